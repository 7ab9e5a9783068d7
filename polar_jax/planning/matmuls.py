"""FLOPs of the matrix multiplications in a jaxpr. Loops count by their trip counts, kernels by numbers that the caller gives.

XLA's own count includes the body of a loop once, and kernels not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

# (name of a Pallas kernel, shapes of its arguments) -> FLOPs of one call.
KernelFlops = Callable[[str, list[tuple[int, ...]]], float]


def matmul_flops(jaxpr: Any, kernel: KernelFlops) -> float:
  """Return the FLOPs of all devices together. A conditional counts as its most expensive branch.

  Args:
    jaxpr: closed or not.
    kernel: FLOPs of a Pallas kernel.

  Raises:
    ValueError: a loop of unknown length multiplies matrices.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  return sum(_equation(eqn, kernel) for eqn in jaxpr.eqns)


def _equation(eqn: Any, kernel: KernelFlops) -> float:
  name, p = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    (contracted, _), _ = p['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contracted)
  if name == 'pallas_call':
    return kernel(str(p['name']), [v.aval.shape for v in eqn.invars])
  if name == 'scan':
    return p['length'] * matmul_flops(p['jaxpr'], kernel)
  if name == 'while':
    inside = matmul_flops(p['body_jaxpr'], kernel)
    if inside:
      raise ValueError('a loop of unknown length multiplies matrices: its FLOPs cannot be counted')
    return 0.0
  if name == 'cond':
    return max(matmul_flops(branch, kernel) for branch in p['branches'])
  # Inside a shard_map the shapes are those of one device.
  devices = p['mesh'].size if name == 'shard_map' else 1
  return devices * sum(matmul_flops(inner, kernel) for value in p.values() for inner in _jaxprs(value))


def _jaxprs(value: Any) -> list[Any]:
  if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
    return [value]
  if isinstance(value, (tuple, list)):
    return [inner for item in value for inner in _jaxprs(item)]
  return []
