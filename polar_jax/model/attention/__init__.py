"""The one attention interface: every query sees one interval of keys.

Causal, padded, packed and shared-prefix rows all fit it, so a mask is two integers per query and never an array of T x S. A candidate
of a larger group sees two intervals (see `polar_jax.data.layout`). `attend` picks the implementation and runs it on the rows and heads
of each device.

The implementation depends on the platform that the code is compiled for: by default that of the default backend, or the one that
`for_platform` sets while a function is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from polar_jax import sharding
from polar_jax.model.attention import chunked, gpu, reference, tpu
from polar_jax.types import Interval

# The kernels of accelerators process at least this many queries at a time; for fewer, materialized logits are small.
_FEW_QUERIES = 128

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


def platform() -> str:
  """Return the platform that functions are traced for: the one set by `for_platform`, else that of the default backend."""
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
  """Choose implementations for another platform than the default backend's, in this thread, as long as the context is open.

  The choice is made when a function is traced: open the context around `trace` or `lower`. A function that was traced with the same
  arguments before keeps its implementation.

  Args:
    name: 'cpu', 'gpu' or 'tpu'.
  """
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


class Backend(Protocol):
  """Softmax attention of each query over the keys [start, end), with softmax in float32 and scale head_dim ** -0.5."""

  def __call__(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, /, *bounds_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Compute attention, differentiable in q, k and v through both outputs.

    Args:
      q_BTNH: queries. T and S may differ.
      k_BSKH: keys. N is a multiple of K: query head n reads key head n // (N / K).
      v_BSKH: values.
      *bounds_BT: start and end of the interval; a backend that takes several intervals gets them one after another.

    Returns:
      out_BTNH in the dtype of q, and lse_BTN in float32, the log of the sum of exponentials of the scaled logits. A query with an
      empty interval gives out 0, lse `reference.EMPTY`, and no gradient.
    """


BACKENDS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
  'reference': reference.attend,
  'chunked': chunked.attend,
  'tpu': tpu.attend,
  'gpu': gpu.attend,
}
_ONE_INTERVAL = ('tpu', 'gpu')


def choose(name: str) -> str:
  """Return the backend that `name` (`config.model.attention`) stands for: 'auto' depends on the platform, the others on nothing."""
  if name != 'auto':
    return name
  kind = platform()
  nvidia = kind == 'gpu' and 'cuda' in jax.devices()[0].client.platform_version
  return kind if kind == 'tpu' or (nvidia and importlib.util.find_spec('tokamax')) else 'chunked'


def attend(name: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, intervals: Sequence[Interval]) -> jax.Array:
  """Compute the attention (B, T, N, H) of each query over the keys of all its intervals, on whatever mesh is set.

  Rows, heads and queries stay on the devices that hold them.

  Args:
    name: the backend, as in the config.
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    intervals: (start_BT, end_BT) of each interval; the intervals of a query must not overlap.
  """
  chosen = choose(name)
  if chosen in _ONE_INTERVAL and q_BTNH.shape[1] < _FEW_QUERIES:
    chosen = 'reference'
  if chosen not in _ONE_INTERVAL:
    return _attend_sharded(chosen, q_BTNH, k_BSKH, v_BSKH, *itertools.chain(*intervals))[0]
  return functools.reduce(_merge, (_attend_sharded(chosen, q_BTNH, k_BSKH, v_BSKH, *interval) for interval in intervals))[0]


def _merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Combine the (out, lse) of two disjoint sets of keys into that of their union."""
  (out1_BTNH, lse1_BTN), (out2_BTNH, lse2_BTN) = one, other
  lse_BTN = jnp.logaddexp(lse1_BTN, lse2_BTN)
  weigh = lambda out_BTNH, part_BTN: out_BTNH.astype(jnp.float32) * jnp.exp(part_BTN - lse_BTN)[..., None]
  return (weigh(out1_BTNH, lse1_BTN) + weigh(out2_BTNH, lse2_BTN)).astype(out1_BTNH.dtype), lse_BTN


def _attend_sharded(
  name: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *bounds_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return BACKENDS[name](q_BTNH, k_BSKH, v_BSKH, *bounds_BT)
  shards, heads, kv_heads = mesh.shape['tensor'], q_BTNH.shape[2], k_BSKH.shape[2]
  split = shards if heads % shards == 0 else 1
  if kv_heads % split:
    # Every device needs the key heads of its query heads, so they are repeated until the devices divide them.
    copies = next(c for c in range(1, heads // kv_heads + 1) if heads % (kv_heads * c) == 0 and kv_heads * c % split == 0)
    k_BSKH, v_BSKH = (jnp.repeat(a, copies, axis=2) for a in (k_BSKH, v_BSKH))
  # Queries may be divided over `context`; each device gathers the keys and values of its rows. An interval is two indices of keys, so
  # this works for any layout of a row, shared prefixes included.
  length = 'length' if q_BTNH.shape[1] % mesh.shape['context'] == 0 else None
  per_token = sharding.spec('batch', length)
  queries, keys = (sharding.spec('batch', tokens, 'heads' if split > 1 else None) for tokens in (length, 'keys'))
  # Kernels and loops are opaque to the partitioner, which would gather whole batches around them.
  return jax.shard_map(
    BACKENDS[name],
    in_specs=(queries, keys, keys) + (per_token,) * len(bounds_BT),
    out_specs=(queries, queries),
    check_vma=False,
  )(q_BTNH, k_BSKH, v_BSKH, *bounds_BT)
