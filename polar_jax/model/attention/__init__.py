"""The one attention interface: every query sees one interval of keys.

Causal, padded, packed and shared-prefix rows all fit it (see `polar_jax.data.rows`), so a mask is two integers per query and
never an array of T x S; a candidate of a larger group sees two intervals (`polar_jax.data.groups`). `attend` picks the
implementation and runs it on each device's rows and heads.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp

from polar_jax import sharding
from polar_jax.model.attention import chunked, gpu, reference, tpu

# Kernels of accelerators work on at least this many queries at a time; for fewer, materialised logits are small.
_FEW_QUERIES = 128


Interval = tuple[jax.Array, jax.Array]  # start_BT, end_BT: the keys [start, end) of each query


class Backend(Protocol):
  """Softmax attention of each query over the keys [start, end), with softmax in float32 and scale head_dim ** -0.5."""

  def __call__(self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, /, *bounds_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH in the dtype of q, lse_BTN in float32: the log of the sum of exponentials of the scaled logits).

    Differentiable in q, k and v through both outputs. A query with an empty interval gives out 0 and lse `reference.EMPTY`, and
    no gradient. N is a multiple of K: query head n reads key head n // (N / K). T and S may differ. `bounds_BT` are the start and
    the end of the interval; a backend that takes several gets them one after another.
    """


BACKENDS: dict[str, Callable[..., tuple[jax.Array, jax.Array]]] = {
  'reference': reference.attend,
  'chunked': chunked.attend,
  'tpu': tpu.attend,
  'gpu': gpu.attend,
}
_ONE_INTERVAL = ('tpu', 'gpu')


def choose(name: str) -> str:
  """What 'auto' (`config.model.attention`) means on the default device; any other name is itself."""
  if name != 'auto':
    return name
  platform = jax.default_backend()
  nvidia = platform == 'gpu' and 'cuda' in jax.devices()[0].client.platform_version
  return platform if platform == 'tpu' or (nvidia and importlib.util.find_spec('tokamax')) else 'chunked'


def attend(name: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, intervals: Sequence[Interval]) -> jax.Array:
  """Attention of each query over the keys of all its intervals, which must not overlap. `name` as in the config.

  Runs on whatever mesh is set: rows, heads and queries stay on the devices that hold them.
  """
  chosen = choose(name)
  if chosen in _ONE_INTERVAL and q_BTNH.shape[1] < _FEW_QUERIES:
    chosen = 'reference'
  if chosen not in _ONE_INTERVAL:
    return _attend_sharded(chosen, q_BTNH, k_BSKH, v_BSKH, *itertools.chain(*intervals))[0]
  return functools.reduce(_merge, (_attend_sharded(chosen, q_BTNH, k_BSKH, v_BSKH, *interval) for interval in intervals))[0]


def _merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """(out, lse) over the union of two disjoint sets of keys."""
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
    # Every device needs the key heads of its query heads: they are repeated until the devices divide them.
    copies = next(c for c in range(1, heads // kv_heads + 1) if heads % (kv_heads * c) == 0 and kv_heads * c % split == 0)
    k_BSKH, v_BSKH = (jnp.repeat(a, copies, axis=2) for a in (k_BSKH, v_BSKH))
  # Queries may be divided over `context`; each device gathers the keys and values of its rows. An interval is two indices of keys, so
  # any layout of a row works, with shared prefixes too.
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
