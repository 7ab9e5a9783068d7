"""Data-sheet numbers of accelerators: the only table of chips in the project.

Sources: for TPUs the system architecture pages of Google Cloud (cloud.google.com/tpu/docs/v4, v5e, v5p and v6e), for GPUs the data
sheets of NVIDIA's A100, H100 and H200 (SXM, dense).
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
  """One chip. Numbers of memory and links that are not needed are 0: the plan stage compiles only for chips that have them."""

  peak_flops: float  # dense bfloat16, FLOP/s
  device_kind: str  # substring of jax.Device.device_kind in lower case
  hbm: int = 0  # bytes
  bandwidth: float = 0.0  # of the HBM, bytes/s
  interconnect: float = 0.0  # of all links to other chips together, in both directions, bytes/s


CHIPS = {
  'v4': Chip(275e12, 'v4'),
  'v5e': Chip(197e12, 'v5 lite', 16 * GIB, 819e9, 200e9),
  'v5p': Chip(459e12, 'v5p', 95 * GIB, 2_765e9, 600e9),
  'v6e': Chip(918e12, 'v6 lite', 32 * GIB, 1_640e9, 448e9),
  'a100': Chip(312e12, 'a100'),
  'h100': Chip(989e12, 'h100'),
  'h200': Chip(989e12, 'h200'),
}
