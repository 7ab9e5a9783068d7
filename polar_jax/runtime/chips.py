"""Data-sheet numbers of accelerators: the only table of chips in the project.

Sources: for TPUs the system architecture pages of Google Cloud (cloud.google.com/tpu/docs/v2, v3, v4, v5e, v5p, v6e and tpu7x), for v4i
"Ten Lessons From Three Generations Shaped Google's TPUv4i" (ISCA 2021), for GPUs the data sheets of NVIDIA's A100, H100 and H200 (dense).
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
  """One chip. Numbers of memory and links that are not needed are 0: the plan stage compiles only for chips that have them."""

  peak_flops: float  # dense bfloat16, FLOP/s
  device_kinds: tuple[str, ...]  # in lower case: of a TPU all that jax.Device.device_kind may be, of a GPU parts of it
  hbm: int = 0  # bytes
  bandwidth: float = 0.0  # of the HBM, bytes/s
  interconnect: float = 0.0  # of all links to other chips together, in both directions, bytes/s
  cores: int = 1  # tensor cores
  device_cores: int = 1  # of a JAX device, unless it says how many it has: a v4 and a v5p can be split into their cores


CHIPS = {
  'v2': Chip(46e12, ('tpu v2',), cores=2),
  'v3': Chip(123e12, ('tpu v3',), cores=2),
  'v4i': Chip(138e12, ('tpu v4 lite', 'tpu v4lite')),
  'v4': Chip(275e12, ('tpu v4',), cores=2, device_cores=2),
  'v5e': Chip(197e12, ('tpu v5 lite', 'tpu v5e'), 16 * GIB, 819e9, 200e9),
  'v5p': Chip(459e12, ('tpu v5', 'tpu v5p'), 95 * GIB, 2_765e9, 600e9, 2, 2),
  'v6e': Chip(918e12, ('tpu v6 lite', 'tpu v6e'), 32 * GIB, 1_640e9, 448e9),
  'tpu7x': Chip(2_307e12, ('tpu7x', 'tpu v7x', 'tpu7'), cores=2),
  'a100': Chip(312e12, ('a100',)),
  'h100pcie': Chip(756e12, ('h100 pcie',)),
  'h100nvl': Chip(835e12, ('h100 nvl',)),
  'h100': Chip(989e12, ('h100',)),
  'h200nvl': Chip(835e12, ('h200 nvl',)),
  'h200': Chip(989e12, ('h200',)),
}


def find_chip(device_kind: str) -> Chip | None:
  """Return the chip of a device by the name that JAX gives to it; None if it is not in the table.

  Names of TPUs must be equal, because one may begin another: `TPU v5` is a v5p, and `TPU v5 lite` a v5e. Those of GPUs end in sizes and
  interfaces; the first chip counts whose name they contain.
  """
  kind = device_kind.lower()
  is_tpu = kind.startswith('tpu')
  return next((c for c in CHIPS.values() if any(k == kind if is_tpu else k in kind for k in c.device_kinds)), None)
