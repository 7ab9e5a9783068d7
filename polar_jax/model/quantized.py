"""Frozen weights in 8 or 4 bits: blocks of the last axis share a scale, and a weight is expanded where it is multiplied.

int8 divides the range of a block evenly. nf4 (QLoRA, arXiv 2305.14314, section 3) has 16 levels at quantiles of a normal distribution,
so that for normal weights each is used about equally often.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx

from polar_jax.model.layers import project

BITS = {'int8': 8, 'nf4': 4}
_BLOCK = 64  # most elements that share a scale


@functools.cache
def nf4_levels() -> np.ndarray:
  """Return the 16 levels of nf4, float32, ascending from -1 to 1, with an exact 0: 7 negative and 8 positive quantiles."""
  tail = (1 / 32 + 1 / 30) / 2
  negative = scipy.special.ndtri(np.linspace(tail, 0.5, 8))[:-1]
  positive = scipy.special.ndtri(np.linspace(0.5, 1 - tail, 9))
  levels = np.concatenate([negative, positive])
  levels[7] = 0.0
  return (levels / np.abs(levels).max()).astype(np.float32)


def block_size(last: int) -> int:
  """Return the elements of a block: the largest divisor of the last axis that is at most 64."""
  return next(size for size in range(min(_BLOCK, last), 0, -1) if last % size == 0)


@functools.partial(jax.jit, static_argnames='kind')
def quantize(weight: jax.Array, kind: str) -> dict[str, jax.Array]:
  """Return the codes and scales of a weight.

  Args:
    weight: of any shape; the last axis is even for 'nf4'.
    kind: 'int8' or 'nf4'.

  Returns:
    For int8, codes of the weight's shape. For nf4, uint8 of half the last axis: an element in the low four bits, its successor in the
    high ones. The float32 scales have one element for each block.
  """
  *rows, last = weight.shape
  blocks = weight.astype(jnp.float32).reshape(*rows, -1, block_size(last))
  largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
  safe = jnp.where(largest == 0, 1.0, largest)
  if kind == 'int8':
    return {'codes': jnp.round(blocks / safe * 127).astype(jnp.int8).reshape(weight.shape), 'scale': largest[..., 0] / 127}
  levels = nf4_levels()
  codes = jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), blocks / safe).astype(jnp.uint8).reshape(*rows, last // 2, 2)
  return {'codes': codes[..., 0] | (codes[..., 1] << 4), 'scale': largest[..., 0]}


def expand(codes: jax.Array, scale: jax.Array) -> jax.Array:
  """Return the weight, float32, of the result of `quantize`."""
  if codes.dtype == jnp.int8:
    values = codes.astype(jnp.float32)
  else:
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    values = jnp.take(jnp.asarray(nf4_levels()), pairs, axis=0)
  return (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(values.shape)


class QuantizedWeight(nnx.Module):
  """A frozen weight of a stack of layers."""

  def __init__(self, weight: nnx.Param, kind: str):
    """Create the weight with zeros: only its shape and the names of its axes are those of `weight`."""
    *rows, last = weight.shape
    axes = weight.get_metadata()['axes']
    codes = jnp.zeros((*rows, last * BITS[kind] // 8), jnp.int8 if kind == 'int8' else jnp.uint8)
    self.codes = nnx.Param(codes, axes=axes)
    self.scale = nnx.Param(jnp.zeros((*rows, last // block_size(last)), jnp.float32), axes=axes)

  def project(self, x: jax.Array, inputs: int, bias: nnx.Param | None = None) -> jax.Array:
    """Compute `layers.project`. The backward pass expands the weight again instead of keeping it."""

    def multiply(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
      return project(x, expand(codes, scale), inputs)

    out = jax.checkpoint(multiply)(x, self.codes[...], self.scale[...])
    return out if bias is None else out + bias[...].astype(x.dtype)[(None,) * (x.ndim - inputs)]


def is_quantized(tree: Any) -> bool:
  """Return whether a part of a parameter tree is a quantized weight."""
  return isinstance(tree, dict) and tree.keys() == {'codes', 'scale'}
