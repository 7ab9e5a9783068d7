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

BLOCK = 128  # slots that attention reads at a time; a cache has a multiple of them


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

  def append(self, k_LBKH: jax.Array, v_LBKH: jax.Array, active_B: jax.Array) -> KVCache:
    """One more token for every active row; a row that is not keeps its tokens."""
    cached, heads = self._specs()

    def put(all_LBKSH: jax.Array, new_LBKH: jax.Array, slot_B: jax.Array) -> jax.Array:
      def one(b: jax.Array, all_LBKSH: jax.Array) -> jax.Array:
        new_LKH = jax.lax.dynamic_index_in_dim(new_LBKH, b, axis=1, keepdims=False)
        return jax.lax.dynamic_update_slice(all_LBKSH, new_LKH[:, None, :, None].astype(all_LBKSH.dtype), (0, b, 0, slot_B[b], 0))

      return jax.lax.fori_loop(0, new_LBKH.shape[1], one, all_LBKSH)

    rows = sharding.RULES['batch']
    put = _on_mesh(put, (cached, PartitionSpec(None, rows, heads), PartitionSpec(rows)), cached)
    # An idle row writes too, behind its last token, where nobody reads.
    slot_B = jnp.minimum(self.length_B, self.capacity - 1)
    k_LBKSH, v_LBKSH = put(self.k_LBKSH, k_LBKH, slot_B), put(self.v_LBKSH, v_LBKH, slot_B)
    return KVCache(k_LBKSH, v_LBKSH, self.length_B + active_B.astype(jnp.int32))

  def attend(self, layer: jax.Array, q_BNH: jax.Array, k_BKH: jax.Array, v_BKH: jax.Array) -> jax.Array:
    """Attention (B, N, H) of one token of each row over the row's tokens in `layer`, and over its own key and value.

    Reads the filled slots only, in blocks with an online softmax (Milakov and Gimelshein, 2018).
    """
    cached, heads = self._specs()
    rows = sharding.RULES['batch']
    new = PartitionSpec(rows, heads)
    call = _on_mesh(_attend, (cached, cached, PartitionSpec(rows), PartitionSpec(), new, new, new), new)
    return call(self.k_LBKSH, self.v_LBKSH, self.length_B, jnp.asarray(layer), q_BNH, k_BKH, v_BKH)

  def _specs(self) -> tuple[PartitionSpec, str | None]:
    return spec(self.k_LBKSH.shape[2]), _head_axis(self.k_LBKSH.shape[2])


def spec(num_kv_heads: int) -> PartitionSpec:
  """How the keys and values of a cache lie on the mesh that is set."""
  return PartitionSpec(None, sharding.RULES['batch'], _head_axis(num_kv_heads))


def empty(config: ModelConfig, batch: int, capacity: int) -> KVCache:
  """A cache without tokens, in the compute dtype. At least `capacity` slots."""
  shape = (config.num_layers, batch, config.num_kv_heads, -(-capacity // BLOCK) * BLOCK, config.head_dim)
  zeros = lambda: jnp.zeros(shape, config.compute_dtype)
  return KVCache(zeros(), zeros(), jnp.zeros(batch, jnp.int32))


def _head_axis(num_kv_heads: int) -> str | None:
  mesh = jax.sharding.get_abstract_mesh()
  (axis,) = sharding.RULES['kv_heads']
  return axis if not mesh.empty and num_kv_heads % mesh.shape[axis] == 0 else None


def _on_mesh(function: Callable[..., Any], in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec) -> Callable[..., Any]:
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


def _attend(
  k_LBKSH: jax.Array,
  v_LBKSH: jax.Array,
  length_B: jax.Array,
  layer: jax.Array,
  q_BNH: jax.Array,
  k_BKH: jax.Array,
  v_BKH: jax.Array,
) -> jax.Array:
  batch, heads, head_dim = q_BNH.shape
  kv_heads = k_BKH.shape[1]
  some = _rows_at_a_time(batch)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  q_BKGH = q_BNH.reshape(batch, kv_heads, -1, head_dim) * head_dim**-0.5
  # The token itself is the first key of the online softmax.
  peak_BKG = dot('BKGH,BKH->BKG', q_BKGH, k_BKH)
  out_BKGH = jnp.broadcast_to(v_BKH[:, :, None].astype(jnp.float32), q_BKGH.shape)
  rows = lambda a, first: jax.lax.dynamic_slice_in_dim(a, first, some, axis=0)

  def some_rows(i: jax.Array, out_BKGH: jax.Array) -> jax.Array:
    first = i * some
    q_bKGH, length_b = rows(q_BKGH, first), rows(length_B, first)

    def block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      out_bKGH, peak_bKG, total_bKG = carry
      size = (1, some, kv_heads, BLOCK, head_dim)
      k_bKSH, v_bKSH = (jax.lax.dynamic_slice(a, (layer, first, 0, j * BLOCK, 0), size)[0] for a in (k_LBKSH, v_LBKSH))
      seen_b11S = (j * BLOCK + jnp.arange(BLOCK))[None, None, None] < length_b[:, None, None, None]
      logits_bKGS = jnp.where(seen_b11S, dot('bKGH,bKSH->bKGS', q_bKGH, k_bKSH), EMPTY)
      new_peak_bKG = jnp.maximum(peak_bKG, jnp.max(logits_bKGS, axis=-1))
      weights_bKGS = jnp.exp(logits_bKGS - new_peak_bKG[..., None])
      shrink_bKG = jnp.exp(peak_bKG - new_peak_bKG)
      mixed_bKGH = dot('bKGS,bKSH->bKGH', weights_bKGS.astype(v_bKSH.dtype), v_bKSH)
      out_bKGH = out_bKGH * shrink_bKG[..., None] + mixed_bKGH
      return out_bKGH, new_peak_bKG, total_bKG * shrink_bKG + jnp.sum(weights_bKGS, axis=-1)

    peak_bKG = rows(peak_BKG, first)
    start = (rows(out_BKGH, first), peak_bKG, jnp.ones_like(peak_bKG))
    out_bKGH, _, total_bKG = jax.lax.fori_loop(0, -(-jnp.max(length_b) // BLOCK), block, start)
    return jax.lax.dynamic_update_slice_in_dim(out_BKGH, out_bKGH / total_bKG[..., None], first, axis=0)

  out_BKGH = jax.lax.fori_loop(0, batch // some, some_rows, out_BKGH)
  return out_BKGH.astype(q_BNH.dtype).reshape(batch, heads, head_dim)
