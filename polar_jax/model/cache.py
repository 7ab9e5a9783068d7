"""Keys and values of the tokens that a language model has read, so that the next token costs one token."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.model.attention.reference import EMPTY

BLOCK = 256  # slots that attention reads at a time; a cache has a multiple of them, or half of them

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class KVCache(NamedTuple):
  """Head-major: the slots of one head lie together, which is how decoding reads them. Slot s of a row holds its token s.

  On a mesh the rows lie on the data-parallel devices and the heads on the tensor-parallel ones, if they divide them.
  """

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  length_B: jax.Array  # int32, tokens that each row holds

  @property
  def capacity(self) -> int:
    """Slots of a row."""
    return self.k_LBKSH.shape[3]

  def fill(self, k_LPTKH: jax.Array, v_LPTKH: jax.Array, row_PT: jax.Array, slot_PT: jax.Array, length_B: jax.Array) -> KVCache:
    """Puts tokens of packed rows where they belong, slot `slot_PT` of row `row_PT`, and sets the lengths; row -1 leaves a token out."""
    cached, heads = self._specs()

    def put(all_LBKSH: jax.Array, new_LPTKH: jax.Array, row_PT: jax.Array, slot_PT: jax.Array) -> jax.Array:
      layers, batch = all_LBKSH.shape[:2]
      row_N = row_PT.reshape(-1) - _shard() * batch
      row_N = jnp.where((row_N >= 0) & (row_N < batch), row_N, batch)
      # Indices around a slice come first in what they select.
      new_NLKH = jnp.moveaxis(new_LPTKH.reshape(layers, -1, *new_LPTKH.shape[3:]), 1, 0)
      return all_LBKSH.at[:, row_N, :, slot_PT.reshape(-1)].set(new_NLKH.astype(all_LBKSH.dtype), mode='drop')

    replicated = PartitionSpec()
    put = _on_mesh(put, (cached, PartitionSpec(None, None, None, heads), replicated, replicated), cached)
    k_LBKSH, v_LBKSH = (put(a, new, row_PT, slot_PT) for a, new in ((self.k_LBKSH, k_LPTKH), (self.v_LBKSH, v_LPTKH)))
    return KVCache(k_LBKSH, v_LBKSH, length_B)

  def append(self, recent: Recent, count_B: jax.Array) -> KVCache:
    """The first `count_B` tokens of `recent` behind those of each row, which must have `recent.capacity` free slots."""
    cached, _ = self._specs()

    def put(all_LBKSH: jax.Array, new_LBKMH: jax.Array, slot_B: jax.Array) -> jax.Array:
      # Opaque, since the TPU compiler (libtpu 0.0.42) takes a write to every row in turn for one to every slot, and fails.
      row_B = jax.lax.optimization_barrier(jnp.arange(new_LBKMH.shape[1]))

      def one(i: jax.Array, all_LBKSH: jax.Array) -> jax.Array:
        b = row_B[i]
        # What is behind the first `count_B` is written too, where nobody reads.
        new_LbKMH = jax.lax.dynamic_slice_in_dim(new_LBKMH, b, 1, axis=1)
        return jax.lax.dynamic_update_slice(all_LBKSH, new_LbKMH, (0, b, 0, slot_B[b], 0))

      return jax.lax.fori_loop(0, new_LBKMH.shape[1], one, all_LBKSH)

    put = _on_mesh(put, (cached, cached, PartitionSpec(sharding.RULES['batch'])), cached)
    k_LBKSH, v_LBKSH = put(self.k_LBKSH, recent.k_LBKMH, self.length_B), put(self.v_LBKSH, recent.v_LBKMH, self.length_B)
    return KVCache(k_LBKSH, v_LBKSH, self.length_B + count_B)

  def attend(self, layer: jax.Array, recent: Recent, step: jax.Array, q_BNH: jax.Array) -> jax.Array:
    """Attention (B, N, H) of token number `step` of `recent` over the row's tokens in `layer`, and over `recent` up to itself.

    Reads the filled slots only, in blocks with an online softmax (Milakov and Gimelshein, 2018).
    """
    cached, heads = self._specs()
    rows = sharding.RULES['batch']
    new = PartitionSpec(rows, heads)
    here = (KVCache._make((cached, cached, PartitionSpec(rows))), PartitionSpec(), Recent._make((cached, cached)), PartitionSpec())
    return _on_mesh(_attend, (*here, new), new)(self, jnp.asarray(layer), recent, jnp.asarray(step), q_BNH)

  def _specs(self) -> tuple[PartitionSpec, str | None]:
    return spec(self.k_LBKSH.shape[2]), _head_axis(self.k_LBKSH.shape[2])


class Recent(NamedTuple):
  """Tokens that every row got since the cache was last written, with room for M.

  They lie apart so that the loop that decodes never writes to the cache it reads: XLA would copy all of it at every step.
  """

  k_LBKMH: jax.Array
  v_LBKMH: jax.Array

  @property
  def capacity(self) -> int:
    """Tokens of a row."""
    return self.k_LBKMH.shape[3]

  def put(self, layer: jax.Array, step: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array) -> Recent:
    """With the keys and values of one layer of token number `step` of every row."""
    at = (layer, 0, 0, step, 0)
    put = lambda all_LBKMH, new_BKH: jax.lax.dynamic_update_slice(all_LBKMH, new_BKH[None, :, :, None].astype(all_LBKMH.dtype), at)
    return Recent(put(self.k_LBKMH, k_BKH), put(self.v_LBKMH, v_BKH))


def spec(num_kv_heads: int) -> PartitionSpec:
  """How the keys and values of a cache lie on the mesh that is set."""
  return PartitionSpec(None, sharding.RULES['batch'], _head_axis(num_kv_heads))


def empty(config: ModelConfig, batch: int, capacity: int) -> KVCache:
  """A cache without tokens, in the compute dtype. At least `capacity` slots."""
  slots = BLOCK // 2 if capacity <= BLOCK // 2 else -(-capacity // BLOCK) * BLOCK
  return KVCache(*_zeros(config, batch, slots), jnp.zeros(batch, jnp.int32))


def no_recent(config: ModelConfig, batch: int, capacity: int) -> Recent:
  """Room for `capacity` tokens of each row."""
  return Recent(*_zeros(config, batch, capacity))


def _zeros(config: ModelConfig, batch: int, slots: int) -> tuple[jax.Array, jax.Array]:
  shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
  return jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype)


def _head_axis(num_kv_heads: int) -> str | None:
  mesh = jax.sharding.get_abstract_mesh()
  (axis,) = sharding.RULES['kv_heads']
  return axis if not mesh.empty and num_kv_heads % mesh.shape[axis] == 0 else None


def _on_mesh(function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: PartitionSpec) -> Callable[..., Any]:
  """`function` on each device's rows and heads: loops are opaque to the partitioner, which would gather whole caches around them."""
  if jax.sharding.get_abstract_mesh().empty:
    return function
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _shard() -> jax.Array | int:
  """Which of the data-parallel devices this is."""
  return 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index(sharding.RULES['batch'])


def _rows_at_a_time(batch: int) -> int:
  """CPUs read row by row, each as far as it is filled; accelerators want few large operations."""
  return 1 if jax.default_backend() == 'cpu' else batch


def _attend(cache: KVCache, layer: jax.Array, recent: Recent, step: jax.Array, q_BNH: jax.Array) -> jax.Array:
  batch, heads, head_dim = q_BNH.shape
  kv_heads = recent.k_LBKMH.shape[2]
  q_BKGH = q_BNH.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
  out_BKGH = jnp.zeros(q_BKGH.shape, jnp.float32)
  k_BKMH, v_BKMH = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in recent)
  start = (out_BKGH, jnp.full(q_BKGH.shape[:3], EMPTY), jnp.zeros(q_BKGH.shape[:3]))
  state = _more_keys(start, q_BKGH, k_BKMH, v_BKMH, jnp.broadcast_to(step + 1, batch))
  some, length = _rows_at_a_time(batch), min(BLOCK, cache.capacity)
  size = (1, some, kv_heads, length, head_dim)

  def some_rows(i: jax.Array, out_BKGH: jax.Array) -> jax.Array:
    first = i * some
    state_b, q_bKGH = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, some), (state, q_BKGH))
    length_b = jax.lax.dynamic_slice_in_dim(cache.length_B, first, some)

    def block(j: jax.Array, state_b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      at = (layer, first, 0, j * length, 0)
      k_bKSH, v_bKSH = (jax.lax.dynamic_slice(a, at, size)[0] for a in (cache.k_LBKSH, cache.v_LBKSH))
      return _more_keys(state_b, q_bKGH, k_bKSH, v_bKSH, length_b - j * length)

    out_bKGH, _, total_bKG = jax.lax.fori_loop(0, -(-jnp.max(length_b) // length), block, state_b)
    return jax.lax.dynamic_update_slice_in_dim(out_BKGH, out_bKGH / total_bKG[..., None], first, axis=0)

  out_BKGH = jax.lax.fori_loop(0, batch // some, some_rows, out_BKGH)
  return out_BKGH.astype(q_BNH.dtype).reshape(batch, heads, head_dim)


def _more_keys(
  state: tuple[jax.Array, ...], q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, count_B: jax.Array
) -> tuple[jax.Array, ...]:
  """One step of the online softmax over the first `count_B` keys. State: weighted sum, peak and total so far."""
  out_BKGH, peak_BKG, total_BKG = state
  seen_B11S = jnp.arange(k_BKSH.shape[2])[None, None, None] < count_B[:, None, None, None]
  logits_BKGS = jnp.where(seen_B11S, _dot('BKGH,BKSH->BKGS', q_BKGH, k_BKSH), EMPTY)
  new_peak_BKG = jnp.maximum(peak_BKG, jnp.max(logits_BKGS, axis=-1))
  weights_BKGS = jnp.exp(logits_BKGS - new_peak_BKG[..., None])
  shrink_BKG = jnp.exp(peak_BKG - new_peak_BKG)
  mixed_BKGH = _dot('BKGS,BKSH->BKGH', weights_BKGS.astype(v_BKSH.dtype), v_BKSH)
  return out_BKGH * shrink_BKG[..., None] + mixed_BKGH, new_peak_BKG, total_BKG * shrink_BKG + jnp.sum(weights_BKGS, axis=-1)
