"""The key-value cache of decoding, which makes the cost of the next token independent of the work on the earlier ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.model import attention
from polar_jax.model.attention.reference import EMPTY

BLOCK = 256  # positions that attention reads at a time; the capacity of a cache is a multiple of it, or half of it

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class KVCache(NamedTuple):
  """Keys and values of the tokens that each row has read. Position s of a row holds its token s.

  The layout is head-major: the positions of one head are contiguous, which is how decoding reads them. On a mesh, rows are divided over
  the data-parallel devices, and heads over the tensor-parallel ones if these divide their number.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  length_B: jax.Array  # int32, number of tokens of each row

  @property
  def capacity(self) -> int:
    """Number of positions of a row."""
    return self.k_LBKSH.shape[3]

  def insert(self, k_LPTKH: jax.Array, v_LPTKH: jax.Array, row_PT: jax.Array, position_PT: jax.Array, length_B: jax.Array) -> KVCache:
    """Insert tokens of packed prompts and set the lengths of the rows.

    Args:
      k_LPTKH: keys of the packed tokens.
      v_LPTKH: their values.
      row_PT: the row of the cache that each token belongs to; -1 drops the token.
      position_PT: its position in that row.
      length_B: the new number of tokens of each row.
    """
    cached, heads = self._specs()

    def put(all_LBKSH: jax.Array, new_LPTKH: jax.Array, row_PT: jax.Array, position_PT: jax.Array) -> jax.Array:
      layers, batch = all_LBKSH.shape[:2]
      row_N = row_PT.reshape(-1) - _shard() * batch
      row_N = jnp.where((row_N >= 0) & (row_N < batch), row_N, batch)
      # The dimensions of advanced indices that are separated by a slice come first in the result.
      new_NLKH = jnp.moveaxis(new_LPTKH.reshape(layers, -1, *new_LPTKH.shape[3:]), 1, 0)
      return all_LBKSH.at[:, row_N, :, position_PT.reshape(-1)].set(new_NLKH.astype(all_LBKSH.dtype), mode='drop')

    replicated = PartitionSpec()
    put = _on_mesh(put, (cached, PartitionSpec(None, None, None, heads), replicated, replicated), cached)
    k_LBKSH, v_LBKSH = (put(a, new, row_PT, position_PT) for a, new in ((self.k_LBKSH, k_LPTKH), (self.v_LBKSH, v_LPTKH)))
    return KVCache(k_LBKSH, v_LBKSH, length_B)

  def append(self, buffer: DecodeBuffer, count_B: jax.Array) -> KVCache:
    """Append the first `count_B` tokens of `buffer` to each row, which must have `buffer.capacity` free positions."""
    cached, _ = self._specs()

    def put(all_LBKSH: jax.Array, new_LBKMH: jax.Array, position_B: jax.Array) -> jax.Array:
      # Opaque, because the TPU compiler (libtpu 0.0.42) mistakes writing to each row in turn for writing to every position, and fails.
      row_B = jax.lax.optimization_barrier(jnp.arange(new_LBKMH.shape[1]))

      def one(i: jax.Array, all_LBKSH: jax.Array) -> jax.Array:
        b = row_B[i]
        # Tokens after the first `count_B` are written too, to positions that are never read.
        new_LbKMH = jax.lax.dynamic_slice_in_dim(new_LBKMH, b, 1, axis=1)
        return jax.lax.dynamic_update_slice(all_LBKSH, new_LbKMH, (0, b, 0, position_B[b], 0))

      return jax.lax.fori_loop(0, new_LBKMH.shape[1], one, all_LBKSH)

    put = _on_mesh(put, (cached, cached, PartitionSpec(sharding.RULES['batch'])), cached)
    k_LBKSH, v_LBKSH = put(self.k_LBKSH, buffer.k_LBKMH, self.length_B), put(self.v_LBKSH, buffer.v_LBKMH, self.length_B)
    return KVCache(k_LBKSH, v_LBKSH, self.length_B + count_B)

  def attend(
    self, layer: jax.Array, buffer: DecodeBuffer, step: jax.Array, q_BNH: jax.Array, window: jax.Array | int | None = None
  ) -> jax.Array:
    """Compute the attention (B, N, H) of a token over the row's tokens in the cache, and over the buffer up to itself.

    Only filled positions of the window are read, in blocks with an online softmax (Milakov and Gimelshein, 2018).

    Args:
      layer: index of the layer.
      buffer: the tokens after those in the cache.
      step: index of the token in the buffer.
      q_BNH: its queries.
      window: number of latest tokens to attend to, itself included; None: all.
    """
    cached, heads = self._specs()
    rows = sharding.RULES['batch']
    new = PartitionSpec(rows, heads)
    here = (KVCache._make((cached, cached, PartitionSpec(rows))), PartitionSpec(), DecodeBuffer._make((cached, cached)), PartitionSpec())
    if window is None:
      return _on_mesh(_attend, (*here, new), new)(self, jnp.asarray(layer), buffer, jnp.asarray(step), q_BNH)
    attend = _on_mesh(_attend, (*here, new, PartitionSpec()), new)
    return attend(self, jnp.asarray(layer), buffer, jnp.asarray(step), q_BNH, jnp.asarray(window))

  def _specs(self) -> tuple[PartitionSpec, str | None]:
    return partition_spec(self.k_LBKSH.shape[2]), _head_axis(self.k_LBKSH.shape[2])


class DecodeBuffer(NamedTuple):
  """Keys and values of the tokens that each row got since the cache was last written, with room for M.

  They are separate so that the decoding loop never writes to the cache it reads, which XLA would copy at every step.
  """

  k_LBKMH: jax.Array
  v_LBKMH: jax.Array

  @property
  def capacity(self) -> int:
    """Number of tokens of a row."""
    return self.k_LBKMH.shape[3]

  def write(self, layer: jax.Array, step: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array) -> DecodeBuffer:
    """Write the keys and values of one token of every row.

    Args:
      layer: index of the layer.
      step: index of the token in the buffer.
      k_BKH: keys.
      v_BKH: values.
    """
    at = (layer, 0, 0, step, 0)
    put = lambda all_LBKMH, new_BKH: jax.lax.dynamic_update_slice(all_LBKMH, new_BKH[None, :, :, None].astype(all_LBKMH.dtype), at)
    return DecodeBuffer(put(self.k_LBKMH, k_BKH), put(self.v_LBKMH, v_BKH))


def partition_spec(num_kv_heads: int) -> PartitionSpec:
  """Return the partition of a cache's keys and values over the mesh that is set."""
  return PartitionSpec(None, sharding.RULES['batch'], _head_axis(num_kv_heads))


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
  """Return a cache without tokens, in the compute dtype, with at least `capacity` positions per row."""
  positions = BLOCK // 2 if capacity <= BLOCK // 2 else sharding.round_up(capacity, BLOCK)
  return KVCache(*_zeros(config, batch, positions), jnp.zeros(batch, jnp.int32))


def empty_buffer(config: ModelConfig, batch: int, capacity: int) -> DecodeBuffer:
  """Return a buffer with room for `capacity` tokens of each row."""
  return DecodeBuffer(*_zeros(config, batch, capacity))


def _zeros(config: ModelConfig, batch: int, capacity: int) -> tuple[jax.Array, jax.Array]:
  shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
  return jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype)


def _head_axis(num_kv_heads: int) -> str | None:
  mesh = jax.sharding.get_abstract_mesh()
  (axis,) = sharding.RULES['kv_heads']
  return axis if not mesh.empty and num_kv_heads % mesh.shape[axis] == 0 else None


def _on_mesh(function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: PartitionSpec) -> Callable[..., Any]:
  """Run `function` on each device's rows and heads, because the partitioner would gather whole caches around its loops."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _shard() -> jax.Array | int:
  """Return the index of this device among the data-parallel ones."""
  return 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index(sharding.RULES['batch'])


def _rows_at_a_time(batch: int) -> int:
  """Return 1 on CPUs, which read each row only as far as it is filled, and all rows on accelerators, which prefer few large operations."""
  return 1 if attention.platform() == 'cpu' else batch


def _attend(
  cache: KVCache, layer: jax.Array, buffer: DecodeBuffer, step: jax.Array, q_BNH: jax.Array, window: jax.Array | None = None
) -> jax.Array:
  batch, heads, head_dim = q_BNH.shape
  kv_heads = buffer.k_LBKMH.shape[2]
  q_BKGH = q_BNH.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
  out_BKGH = jnp.zeros(q_BKGH.shape, jnp.float32)
  k_BKMH, v_BKMH = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in buffer)
  start = (out_BKGH, jnp.full(q_BKGH.shape[:3], EMPTY), jnp.zeros(q_BKGH.shape[:3]))
  # Of the buffer and of the cache: their first tokens in the window.
  first_B = jnp.zeros(batch, jnp.int32) if window is None else jnp.broadcast_to(step + 1 - window, batch)
  first_cached_B = first_B if window is None else jnp.maximum(cache.length_B + first_B, 0)
  state = _more_keys(start, q_BKGH, k_BKMH, v_BKMH, first_B, jnp.broadcast_to(step + 1, batch))
  some, length = _rows_at_a_time(batch), min(BLOCK, cache.capacity)
  size = (1, some, kv_heads, length, head_dim)

  def some_rows(i: jax.Array, out_BKGH: jax.Array) -> jax.Array:
    first = i * some
    state_b, q_bKGH = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, some), (state, q_BKGH))
    first_b, length_b = (jax.lax.dynamic_slice_in_dim(a, first, some) for a in (first_cached_B, cache.length_B))

    def block(j: jax.Array, state_b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      at = (layer, first, 0, j * length, 0)
      k_bKSH, v_bKSH = (jax.lax.dynamic_slice(a, at, size)[0] for a in (cache.k_LBKSH, cache.v_LBKSH))
      return _more_keys(state_b, q_bKGH, k_bKSH, v_bKSH, first_b - j * length, length_b - j * length)

    blocks = 0 if window is None else jnp.min(first_b) // length, -(-jnp.max(length_b) // length)
    out_bKGH, _, total_bKG = jax.lax.fori_loop(*blocks, block, state_b)
    return jax.lax.dynamic_update_slice_in_dim(out_BKGH, out_bKGH / total_bKG[..., None], first, axis=0)

  out_BKGH = jax.lax.fori_loop(0, batch // some, some_rows, out_BKGH)
  return out_BKGH.astype(q_BNH.dtype).reshape(batch, heads, head_dim)


def _more_keys(
  state: tuple[jax.Array, ...], q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, start_B: jax.Array, end_B: jax.Array
) -> tuple[jax.Array, ...]:
  """Advance the online softmax by the keys [start, end). The state is (weighted sum, peak, total)."""
  out_BKGH, peak_BKG, total_BKG = state
  key_111S = jnp.arange(k_BKSH.shape[2])[None, None, None]
  seen_B11S = (key_111S >= start_B[:, None, None, None]) & (key_111S < end_B[:, None, None, None])
  logits_BKGS = jnp.where(seen_B11S, _dot('BKGH,BKSH->BKGS', q_BKGH, k_BKSH), EMPTY)
  new_peak_BKG = jnp.maximum(peak_BKG, jnp.max(logits_BKGS, axis=-1))
  weights_BKGS = jnp.exp(logits_BKGS - new_peak_BKG[..., None])
  shrink_BKG = jnp.exp(peak_BKG - new_peak_BKG)
  mixed_BKGH = _dot('BKGS,BKSH->BKGH', weights_BKGS.astype(v_BKSH.dtype), v_BKSH)
  return out_BKGH * shrink_BKG[..., None] + mixed_BKGH, new_peak_BKG, total_BKG * shrink_BKG + jnp.sum(weights_BKGS, axis=-1)
