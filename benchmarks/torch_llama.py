"""A Llama in torch with the parameters of one of our models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from polar_jax.config import ModelConfig


def llama_config(config: ModelConfig, **settings: Any) -> LlamaConfig:
  """Return the config of a Llama of our shape, with torch's sdpa."""
  return LlamaConfig(
    vocab_size=config.vocab_size,
    hidden_size=config.d_model,
    intermediate_size=config.d_ff,
    num_hidden_layers=config.num_layers,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    rope_theta=config.rope_theta,
    rms_norm_eps=config.norm_eps,
    max_position_embeddings=4_096,
    attn_implementation='sdpa',
    **settings,
  )


def load(model: torch.nn.Module, config: ModelConfig, params: dict[str, Any], head: dict[str, Any]) -> None:
  """Load the parameters of our decoder, and those of `head` (by their names in torch), into `model`."""
  decoder, layers = params['decoder'], params['decoder']['layers']
  tensors = {'model.embed_tokens.weight': decoder['embedding'], 'model.norm.weight': decoder['norm'], **head}
  names = {'wq': 'self_attn.q_proj', 'wk': 'self_attn.k_proj', 'wv': 'self_attn.v_proj', 'w_gate': 'mlp.gate_proj', 'w_up': 'mlp.up_proj'}
  for i in range(config.num_layers):
    at = f'model.layers.{i}.'
    for ours, theirs in names.items():
      tensors[f'{at}{theirs}.weight'] = layers[ours][i].reshape(config.d_model, -1).T
    tensors[f'{at}self_attn.o_proj.weight'] = layers['wo'][i].reshape(-1, config.d_model).T
    tensors[f'{at}mlp.down_proj.weight'] = layers['w_down'][i].T
    tensors[f'{at}input_layernorm.weight'] = layers['attention_norm'][i]
    tensors[f'{at}post_attention_layernorm.weight'] = layers['mlp_norm'][i]
  model.load_state_dict({name: torch.tensor(np.ascontiguousarray(value)) for name, value in tensors.items()})
