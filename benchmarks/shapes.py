"""Shapes of models that several benchmarks measure, so that their figures can be compared."""

from __future__ import annotations

from typing import Any

# A Llama of 26M parameters: large enough for matrix multiplications to count, small enough for two CPU cores.
LLAMA_26M: dict[str, Any] = {
  'vocab_size': 8_192,
  'num_layers': 8,
  'd_model': 512,
  'd_ff': 1_248,
  'num_heads': 8,
  'num_kv_heads': 4,
  'head_dim': 64,
}
