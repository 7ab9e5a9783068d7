"""InternLM2 in PyTorch, for `transformers`: language model and reward model. Copied to exported folders; does not import polar_jax.

Parameter names are those of published InternLM2 checkpoints. Query, key and value projections are one matrix whose output is grouped by
key head: its queries, then the key, then the value. There is no KV cache: generation works, but processes the whole text again for each
token. For speed, serve the checkpoint with an inference engine; the common ones support InternLM2.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from .configuration_internlm2 import InternLM2Config

# Arguments of other transformers models that do not change a result here.
_IGNORED = ('use_cache', 'return_dict', 'token_type_ids')


def _refuse(arguments: dict) -> None:
  wrong = [name for name, value in arguments.items() if name not in _IGNORED and value is not None and value is not False]
  if wrong:
    raise TypeError(f'this implementation of InternLM2 does not support the argument {", ".join(wrong)}')


def _rotary_tables(config: InternLM2Config, mask: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
  """Return (cos, sin), each (batch, 1, tokens, head_dim / 2), from the attention mask (batch, tokens).

  Positions and the length that dynamic scaling depends on count attended tokens only, so padding changes no result.
  """
  rope, dim = config.rope_parameters, config.head_dim
  length = mask.sum(-1, dtype=torch.float32)
  theta = torch.full_like(length, rope['rope_theta'])
  if rope['rope_type'] == 'dynamic':
    grown = rope['factor'] * length / config.max_position_embeddings - (rope['factor'] - 1)
    theta = theta * grown.clamp(min=1) ** (dim / (dim - 2))
  inverse_frequency = theta[:, None] ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=mask.device) / dim)
  if rope['rope_type'] == 'linear':
    inverse_frequency = inverse_frequency / rope['factor']
  position = mask.cumsum(-1) - 1
  angle = position[:, None, :, None].float() * inverse_frequency[:, None, None, :]
  return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  first, second = x.chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _seen(mask: torch.Tensor) -> torch.Tensor | None:
  """Return which keys each query sees (batch, 1, queries, keys); None if that is all up to itself, which needs no array."""
  if mask.all():
    return None
  length = mask.shape[-1]
  causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
  # Padding sees itself, because a query without keys would become NaN.
  return (causal & mask[:, None, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)


class InternLM2RMSNorm(nn.Module):
  """RMSNorm that casts back to the input type before it scales."""

  def __init__(self, config: InternLM2Config):
    super().__init__()
    self.weight = nn.Parameter(torch.ones(config.hidden_size))
    self.eps = config.rms_norm_eps

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Normalize over the last axis."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
    return self.weight * normed.to(x.dtype)


class InternLM2Attention(nn.Module):
  """Grouped-query attention with one fused projection."""

  def __init__(self, config: InternLM2Config):
    super().__init__()
    self.head_dim, self.kv_heads = config.head_dim, config.num_key_value_heads
    self.group = config.num_attention_heads // config.num_key_value_heads
    self.wqkv = nn.Linear(config.hidden_size, (self.group + 2) * self.kv_heads * self.head_dim, bias=False)
    self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Return the attention output of each token.

    Args:
      x: (batch, tokens, hidden_size).
      cos: of the rotary embedding.
      sin: of the rotary embedding.
      seen: mask of the keys of each query; None: all keys up to the query.
    """
    batch, length, _ = x.shape
    fused = self.wqkv(x).view(batch, length, self.kv_heads, self.group + 2, self.head_dim)
    query, key, value = fused.split([self.group, 1, 1], dim=3)
    query = _rotate(query.flatten(2, 3).transpose(1, 2), cos, sin)
    key = _rotate(key.flatten(2, 3).transpose(1, 2), cos, sin).repeat_interleave(self.group, dim=1)
    value = value.flatten(2, 3).transpose(1, 2).repeat_interleave(self.group, dim=1)
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None)
    return self.wo(mixed.transpose(1, 2).flatten(2))


class InternLM2MLP(nn.Module):
  """SwiGLU."""

  def __init__(self, config: InternLM2Config):
    super().__init__()
    self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
    self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """Apply the network to each token."""
    return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class InternLM2DecoderLayer(nn.Module):
  """Attention and feed-forward network, each after a norm and with a residual connection."""

  def __init__(self, config: InternLM2Config):
    super().__init__()
    self.attention = InternLM2Attention(config)
    self.feed_forward = InternLM2MLP(config)
    self.attention_norm = InternLM2RMSNorm(config)
    self.ffn_norm = InternLM2RMSNorm(config)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Return the output of the layer; arguments as for attention."""
    x = x + self.attention(self.attention_norm(x), cos, sin, seen)
    return x + self.feed_forward(self.ffn_norm(x))


class InternLM2PreTrainedModel(PreTrainedModel):
  """Base class of the models, as transformers expects it."""

  config_class = InternLM2Config
  base_model_prefix = 'model'
  _no_split_modules = ['InternLM2DecoderLayer']  # noqa: RUF012  (transformers reads it from the class)
  _supports_sdpa = True

  def get_input_embeddings(self) -> nn.Module:
    """Return the embedding table."""
    return self.base_model.tok_embeddings

  def set_input_embeddings(self, value: nn.Module) -> None:
    """Replace the embedding table."""
    self.base_model.tok_embeddings = value


class InternLM2Model(InternLM2PreTrainedModel):
  """The decoder, up to the final norm."""

  def __init__(self, config: InternLM2Config):
    super().__init__(config)
    self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
    self.layers = nn.ModuleList(InternLM2DecoderLayer(config) for _ in range(config.num_hidden_layers))
    self.norm = InternLM2RMSNorm(config)
    self.post_init()

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPast:
    """Return hidden states (batch, tokens, hidden_size). `attention_mask` (batch, tokens) may pad on either side; None: no padding."""
    _refuse(kwargs)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    x = self.tok_embeddings(input_ids)
    cos, sin = _rotary_tables(self.config, mask, x.dtype)
    seen = _seen(mask)
    for layer in self.layers:
      x = layer(x, cos, sin, seen)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
  """The decoder with a vocabulary projection."""

  _tied_weights_keys = {'output.weight': 'model.tok_embeddings.weight'}  # noqa: RUF012  (used where the config ties them)

  def __init__(self, config: InternLM2Config):
    super().__init__(config)
    self.model = InternLM2Model(config)
    self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()

  def get_output_embeddings(self) -> nn.Module:
    """Return the output projection."""
    return self.output

  def set_output_embeddings(self, value: nn.Module) -> None:
    """Replace the output projection."""
    self.output = value

  def prepare_inputs_for_generation(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_) -> dict:
    """Pass the whole text at every step, because there is no cache."""
    return {'input_ids': input_ids, 'attention_mask': attention_mask}

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> CausalLMOutputWithPast:
    """Return next-token logits (batch, tokens, vocab_size)."""
    return CausalLMOutputWithPast(logits=self.output(self.model(input_ids, attention_mask, **kwargs).last_hidden_state))


class InternLM2ForRewardModel(InternLM2PreTrainedModel):
  """The decoder with a scalar head, read at the last attended token (the reward token), whichever side is padded."""

  def __init__(self, config: InternLM2Config):
    super().__init__(config)
    self.model = InternLM2Model(config)
    self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
    self.post_init()

  def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs) -> SequenceClassifierOutputWithPast:
    """Return rewards as logits (batch, 1)."""
    if attention_mask is None:
      raise ValueError('attention_mask is required to find the last token; pass the one that the tokenizer returns')
    hidden = self.model(input_ids, attention_mask, **kwargs).last_hidden_state
    last = attention_mask.cumsum(-1).argmax(-1)
    return SequenceClassifierOutputWithPast(logits=self.v_head(hidden[torch.arange(len(last), device=hidden.device), last]))
