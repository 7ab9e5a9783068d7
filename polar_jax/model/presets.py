"""Model shapes: those of the published reward models (InternLM2.5 series), and those of the miniatures."""

from __future__ import annotations

POLAR_1_8B = {
  'vocab_size': 92_544,
  'num_layers': 24,
  'd_model': 2_048,
  'd_ff': 8_192,
  'num_heads': 16,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'norm_eps': 1e-5,
}

POLAR_7B = {
  'vocab_size': 92_544,
  'num_layers': 32,
  'd_model': 4_096,
  'd_ff': 14_336,
  'num_heads': 32,
  'num_kv_heads': 8,
  'head_dim': 128,
  'rope_theta': 1e6,
  'norm_eps': 1e-5,
}

# Short of triplets long before they are short of parameters. init_std is about 1 / sqrt(d_model); all layers are unrolled,
# which a CPU likes.
MINI_TINY = {
  'num_layers': 3,
  'd_model': 64,
  'd_ff': 192,
  'num_heads': 2,
  'num_kv_heads': 1,
  'head_dim': 32,
  'init_std': 0.12,
  'scan_unroll': 3,
}

MINI_SMALL = {
  'num_layers': 3,
  'd_model': 128,
  'd_ff': 256,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 32,
  'init_std': 0.09,
  'scan_unroll': 3,
}

PRESETS = {'polar_1_8b': POLAR_1_8B, 'polar_7b': POLAR_7B, 'mini_tiny': MINI_TINY, 'mini_small': MINI_SMALL}
