"""Config of an InternLM2 checkpoint. Copied to exported folders, where `transformers` loads it; does not import polar_jax."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class InternLM2Config(PretrainedConfig):
  """The fields of an InternLM2 `config.json`; the default shape is the 7B's.

  `rope_scaling` is None, or a dict with `type` (or `rope_type`) 'linear' or 'dynamic' and `factor`. `rope_parameters` (the same with
  `rope_theta` inside), which newer versions of transformers write, is read as well and takes precedence. `head_dim` None means
  hidden_size / num_attention_heads.
  """

  model_type = 'internlm2'

  def __init__(
    self,
    vocab_size: int = 92_544,
    hidden_size: int = 4_096,
    intermediate_size: int = 14_336,
    num_hidden_layers: int = 32,
    num_attention_heads: int = 32,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    hidden_act: str = 'silu',
    bias: bool = False,
    max_position_embeddings: int = 32_768,
    initializer_range: float = 0.02,
    rms_norm_eps: float = 1e-6,
    rope_theta: float = 10_000.0,
    rope_scaling: dict[str, Any] | None = None,
    rope_parameters: dict[str, Any] | None = None,
    reward_token_id: int | None = None,
    pad_token_id: int | None = 2,
    bos_token_id: int | None = 1,
    eos_token_id: int | None = 2,
    tie_word_embeddings: bool = False,
    **kwargs,
  ):
    if hidden_act != 'silu' or bias:
      raise ValueError(f"InternLM2 checkpoints with hidden_act {hidden_act!r} and bias {bias} are not supported: only 'silu' and False")
    rope = dict(rope_parameters or rope_scaling or {})
    kind = rope.pop('rope_type', None) or rope.get('type', 'default')
    if kind not in ('default', 'linear', 'dynamic'):
      raise ValueError(f"rope_scaling type {kind!r} is not supported: 'linear' or 'dynamic', or no rope_scaling")
    self.vocab_size = vocab_size
    self.hidden_size = hidden_size
    self.intermediate_size = intermediate_size
    self.num_hidden_layers = num_hidden_layers
    self.num_attention_heads = num_attention_heads
    self.num_key_value_heads = num_key_value_heads or num_attention_heads
    self.head_dim = head_dim or hidden_size // num_attention_heads
    self.hidden_act = hidden_act
    self.bias = bias
    self.max_position_embeddings = max_position_embeddings
    self.initializer_range = initializer_range
    self.rms_norm_eps = rms_norm_eps
    self.rope_theta = rope.pop('rope_theta', rope_theta)
    self.reward_token_id = reward_token_id
    scaling = None if kind == 'default' else {'type': kind, 'rope_type': kind, 'factor': float(rope['factor'])}
    self.rope_parameters = {'rope_type': 'default', **(scaling or {}), 'rope_theta': self.rope_theta}
    super().__init__(
      # An attribute in transformers 4, where inference engines look for it; newer ones merge it into rope_parameters.
      rope_scaling=scaling,
      pad_token_id=pad_token_id,
      bos_token_id=bos_token_id,
      eos_token_id=eos_token_id,
      tie_word_embeddings=tie_word_embeddings,
      **kwargs,
    )
