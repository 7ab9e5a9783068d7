"""Published model shapes (InternLM2.5 series, section 4 of the paper's model card data)."""

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

PRESETS = {'polar_1_8b': POLAR_1_8B, 'polar_7b': POLAR_7B}
