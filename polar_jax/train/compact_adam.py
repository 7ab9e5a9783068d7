"""Adam with moments stored in two bytes or one instead of four. All arithmetic is in float32; only what a step leaves behind is rounded.

Rounding is stochastic and unbiased: to nearest, a second moment that changes by less than half a step of its type, such as with
b2 = 0.999 in bfloat16, would never decay. The random bits are a function of the number of the update, so that runs repeat and resume.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_MAX_BLOCK = 256  # values that share a scale
_MIN_BLOCK = 16  # an axis without a divisor in between has one scale for all its values
# Powers by which 8-bit codes are spaced: of the first moment code^2 / 127^2, of the second code^4 / 255^4, each times the scale. Steps near
# the largest value of a block are 1.6%, and values down to 1e-5 and 1e-10 of it are still distinguished from 0.
_FIRST, _SECOND = (2, 127), (4, 255)
_LOW = np.uint32(0xFFFF)  # the lower half of 32 bits
_TYPES = {'bfloat16': (jnp.bfloat16, jnp.bfloat16), 'int8': (jnp.int8, jnp.uint8)}


class CompactAdamState(NamedTuple):
  """State of `scale_by_compact_adam`.

  Attributes:
    count: updates so far.
    mu: first moments, like the parameters but of type bfloat16, or int8 codes.
    nu: second moments, bfloat16 or uint8 codes.
    mu_scale: of 8-bit codes, the largest absolute value of each block of the last axis; else None.
    nu_scale: likewise.
  """

  count: Any
  mu: Any
  nu: Any
  mu_scale: Any
  nu_scale: Any


def scale_by_compact_adam(b1: float, b2: float, eps: float, moments: str) -> optax.GradientTransformation:
  """Return Adam (as `optax.scale_by_adam`) with moments of type 'bfloat16', or 'int8': 8-bit block-wise (after arXiv 2110.02861).

  Args:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    moments: 'bfloat16' or 'int8'.
  """
  first, second = _TYPES[moments]
  has_scales = moments == 'int8'

  def init(params: Any) -> CompactAdamState:
    zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
    scales = lambda: jax.tree.map(lambda p: jnp.zeros(_scale_shape(p.shape), jnp.float32), params) if has_scales else None
    return CompactAdamState(jnp.zeros((), jnp.int32), zeros(first), zeros(second), scales(), scales())

  def update(grads: Any, state: CompactAdamState, _: Any = None) -> tuple[Any, CompactAdamState]:
    count = state.count + 1
    leaves, treedef = jax.tree.flatten(grads)
    columns = [jax.tree.leaves(tree) or [None] * len(leaves) for tree in state[1:]]
    keys = jax.random.split(jax.random.key(count), len(leaves))
    corrections = 1 - b1**count, 1 - b2**count
    out = []
    for g, key, mu, nu, mu_scale, nu_scale in zip(leaves, keys, *columns, strict=True):
      m = b1 * (decode(mu, mu_scale, _FIRST) if has_scales else mu.astype(jnp.float32)) + (1 - b1) * g
      v = b2 * (decode(nu, nu_scale, _SECOND) if has_scales else nu.astype(jnp.float32)) + (1 - b2) * g * g
      step = (m / corrections[0]) / (jnp.sqrt(v / corrections[1]) + eps)
      bits = jax.random.bits(key, g.shape, jnp.uint32)
      if has_scales:
        (mu, mu_scale), (nu, nu_scale) = encode(m, bits >> 16, _FIRST), encode(v, bits & _LOW, _SECOND)
      else:
        mu, nu = to_bfloat16(m, bits >> 16), to_bfloat16(v, bits & _LOW)
      out.append((step, mu, nu, mu_scale, nu_scale))
    steps, *moments_and_scales = ([row[i] for row in out] for i in range(5))
    trees = [None if column[:1] == [None] else jax.tree.unflatten(treedef, column) for column in moments_and_scales]
    return jax.tree.unflatten(treedef, steps), CompactAdamState(count, *trees)

  return optax.GradientTransformation(init, update)


def to_bfloat16(x: jax.Array, random: jax.Array) -> jax.Array:
  """Round float32 values to one of the two nearest bfloat16 values, so that the expectation is the value itself.

  Args:
    x: finite values.
    random: uint32 numbers below 2^16, uniform, in the shape of `x`.
  """
  # A bfloat16 is the upper half of a float32: adding a random lower half carries into it with the right probability.
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + random
  return jax.lax.bitcast_convert_type(bits & ~_LOW, jnp.float32).astype(jnp.bfloat16)


def encode(x: jax.Array, random: jax.Array, code: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
  """Encode float32 values in 8 bits per value, so that the expectation of what `decode` returns is the value itself.

  A positive second moment is never encoded as 0, because Adam divides by its root.

  Args:
    x: finite values (..., n); of the second moment none is negative.
    random: uint32 numbers below 2^16, uniform, in the shape of `x`.
    code: `_FIRST` or `_SECOND`: the power of the spacing of codes, and the largest code.

  Returns:
    The codes, int8 or uint8 (..., n), and the scale of each block (..., n / block).
  """
  power, largest = code
  blocks = x.reshape(*x.shape[:-1], -1, _block(x.shape[-1]))
  scale = jnp.max(jnp.abs(blocks), axis=-1)
  share = jnp.abs(blocks) / jnp.where(scale > 0, scale, 1.0)[..., None]  # of the largest value, in [0, 1]
  position = largest * share ** (1 / power)
  low = jnp.floor(position)
  up = (position**power - low**power) / ((low + 1) ** power - low**power)
  codes = jnp.minimum(low + (random.reshape(blocks.shape).astype(jnp.float32) / 2**16 < up), largest)
  if code == _SECOND:
    return jnp.where(blocks > 0, jnp.maximum(codes, 1), 0).astype(jnp.uint8).reshape(x.shape), scale
  return (jnp.sign(blocks) * codes).astype(jnp.int8).reshape(x.shape), scale


def decode(codes: jax.Array, scale: jax.Array, code: tuple[int, int]) -> jax.Array:
  """Return the float32 values of 8-bit codes; see `encode`."""
  power, largest = code
  values = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1).astype(jnp.float32) / largest
  return (jnp.sign(values) * jnp.abs(values) ** power * scale[..., None]).reshape(codes.shape)


def _block(size: int) -> int:
  """Return how many values of an axis share a scale: a divisor of its size, so that an axis that is sharded evenly has whole blocks."""
  block = max(n for n in range(1, min(size, _MAX_BLOCK) + 1) if size % n == 0)
  return block if block >= _MIN_BLOCK else size


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  return (*shape[:-1], shape[-1] // _block(shape[-1]))
