"""Options of the model."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option

FAMILIES = ('gemma3_text', 'internlm2', 'internlm3', 'llama', 'mistral', 'qwen2', 'qwen3', 'smollm3')
ROPE_SCALINGS = ('none', 'linear', 'dynamic', 'llama3', 'yarn')
REMAT_POLICIES = ('none', 'full', 'dots', 'dots_no_batch', 'offload')
ACTIVATIONS = ('silu', 'gelu_tanh')
ATTENTION_BACKENDS = ('auto', 'reference', 'chunked', 'tpu', 'gpu')
DTYPES = ('float32', 'bfloat16')
STORED_DTYPES = ('float32', 'bfloat16', 'float16')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of the decoder, which language models, reward models and value models share, and how it is computed.

  All families use one decoder; the flags below select what they do differently.
  """

  family: str = option(
    'internlm2', 'Decides the names of tensors and files when a checkpoint is exchanged with Hugging Face.', choices=FAMILIES
  )
  vocab_size: int | None = option(None, "Vocabulary size. None: the tokenizer's.", min=1)
  num_layers: int = option(4, 'Number of decoder layers.', min=1)
  d_model: int = option(128, 'Width of the residual stream.', min=1)
  d_ff: int = option(384, 'Width of the feed-forward layers.', min=1)
  num_heads: int = option(4, 'Number of query heads.', min=1)
  num_kv_heads: int = option(2, 'Number of key/value heads; must divide `num_heads`.', min=1)
  head_dim: int = option(32, 'Width of a head; must be even.', min=2)
  rope_theta: float = option(10_000.0, 'Base of the rotary embeddings.', exclusive_min=0)
  rope_local_theta: float | None = option(
    None, 'Base of the rotary embeddings of layers with a window, where they are not scaled. None: as in other layers.', exclusive_min=0
  )
  nope_every: int | None = option(None, 'Every n-th layer has no rotary embeddings. None: all layers have.', min=1)
  rope_scaling: str = option(
    'none', 'How rotary embeddings are extended beyond the sequence length that they were trained at.', choices=ROPE_SCALINGS
  )
  rope_factor: float = option(1.0, 'Scaling factor of `rope_scaling`.', exclusive_min=0)
  rope_low_freq_factor: float = option(
    1.0,
    "'llama3' only: frequencies with fewer rotations than this over `rope_original_length` are divided by `rope_factor`.",
    exclusive_min=0,
  )
  rope_high_freq_factor: float = option(
    4.0, "'llama3' only: frequencies with more rotations than this are kept, those in between interpolated.", exclusive_min=0
  )
  rope_original_length: int = option(8_192, "'llama3' and 'yarn': sequence length of the original training, in tokens.", min=1)
  rope_beta_fast: float = option(
    32.0, "'yarn' only: about here, in rotations over `rope_original_length`, frequencies begin to be interpolated.", exclusive_min=0
  )
  rope_beta_slow: float = option(
    1.0, "'yarn' only: about here, in rotations over `rope_original_length`, frequencies are divided by `rope_factor`.", exclusive_min=0
  )
  rope_attention_factor: float | None = option(
    None, "'yarn' only: the factor of queries and keys. None: 0.1 ln(`rope_factor`) + 1.", exclusive_min=0
  )
  max_position: int = option(32_768, "Longest sequence the model is made for, in tokens; 'dynamic' scaling acts beyond it.", min=1)
  sliding_window: int | None = option(
    None, 'Number of latest tokens that a token attends to, itself included, in layers with a window. None: no layer has a window.', min=1
  )
  global_every: int | None = option(None, 'Every n-th layer has no window. None: all layers have, if `sliding_window` is set.', min=1)
  norm_eps: float = option(1e-5, 'Epsilon of RMSNorm.', exclusive_min=0)
  init_std: float = option(0.02, 'Standard deviation of the normal initialization of embeddings and linear layers.', exclusive_min=0)
  v_head_init: str = option(
    'zero', 'Initialization of the reward head; with zero the first loss is exactly ln 2, as in XTuner.', choices=('zero', 'normal')
  )
  qkv_bias: bool = option(False, 'Add biases to the query, key and value projections (Qwen2).')
  qk_norm: bool = option(False, 'Apply RMSNorm to each head of queries and keys, before the rotary embeddings (Qwen3, Gemma 3).')
  post_norms: bool = option(False, 'Also apply RMSNorm to the outputs of attention and feed-forward layers (Gemma 3).')
  zero_centered_norms: bool = option(False, 'Store the scales of norms as their difference from 1 (Gemma 3).')
  embedding_scale: bool = option(False, 'Multiply embeddings by the square root of `d_model` (Gemma 3).')
  activation: str = option(
    'silu', 'Activation of the gated feed-forward layers: SwiGLU, or GeGLU with tanh (Gemma 3).', choices=ACTIVATIONS
  )
  query_pre_attn_scalar: float | None = option(
    None, 'Logits of attention are divided by the square root of this (Gemma 3). None: of `head_dim`.', exclusive_min=0
  )
  tie_embeddings: bool = option(False, 'Share the embedding table with the language-model head.')
  compute_dtype: str = option(
    'float32', 'Type of activations and matrix multiplications; master weights are always float32.', choices=DTYPES
  )
  remat: str = option(
    'none',
    'What the backward pass recomputes in each layer: nothing, everything (full; offload: its input is kept in host memory), or all but '
    'matrix multiplications (dots).',
    choices=REMAT_POLICIES,
  )
  frozen_layers: int = option(
    0, 'Layers, the first ones, that training leaves as they are, and the embedding with them; 0: all are trained.', min=0
  )
  scan_unroll: int = option(1, 'Layers per iteration of the scan over layers; small models on a CPU run fastest with all of them.', min=1)
  attention: str = option('auto', 'Attention backend. auto: chosen by the default device.', choices=ATTENTION_BACKENDS)

  @property
  def known_vocab_size(self) -> int:
    """Return `vocab_size` where it must be known.

    Raises:
      ValueError: it is None.
    """
    if self.vocab_size is None:
      raise ValueError('ModelConfig.vocab_size must be set (it comes from the tokenizer)')
    return self.vocab_size
