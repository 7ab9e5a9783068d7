"""Attention over intervals in tiles, in plain XLA: for CPUs, and wherever no kernel runs.

Queries and keys are cut into blocks, and a loop visits only the tiles (row, query block, key block) in which some query sees some
key, with an online softmax (Milakov and Gimelshein, 2018; Dao, 2023). The list of tiles depends on the data but the shapes do not:
one compilation serves every packing, memory grows linearly with the length of a row, and a packed row of short triplets costs as much
as its triplets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from polar_jax.model.attention.reference import EMPTY, SAVED


def _block(length: int) -> int:
  """Return the block size for a row length: matmuls of 256 and more run near a core's peak, smaller tiles waste less in short rows."""
  return 256 if length >= 1024 else 128 if length > 768 else 64


Bounds = tuple[jax.Array, ...]  # start and end of each interval of every query


class _Tiles(NamedTuple):
  """Tiles to visit: the first `total` entries of the index arrays."""

  row: jax.Array
  query: jax.Array
  key: jax.Array
  total: jax.Array


def attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *bounds_BT: jax.Array, block: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Compute attention as `polar_jax.model.attention.Backend` defines it, over any number of intervals.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    *bounds_BT: start and end of each interval.
    block: number of queries and of keys of a tile; None: chosen by the length of the row.
  """
  block = block or _block(k_BSKH.shape[1])
  batch, length, heads, head_dim = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  group = heads // kv_heads
  # A short row is one block of its own length, rounded up to a multiple that suits vector units.
  query_block, key_block = (min(block, -(-n // 8) * 8) for n in (length, k_BSKH.shape[1]))
  pad = lambda a, size: jnp.pad(a, [(0, 0), (0, -a.shape[1] % size)] + [(0, 0)] * (a.ndim - 2))
  q = pad(q_BTNH * head_dim**-0.5, query_block)
  bounds = tuple(pad(a, query_block).reshape(batch, -1, query_block) for a in bounds_BT)
  # B I K M H, where M holds the queries of a block for each of the G heads that share a key head: larger matmuls.
  q = q.reshape(batch, -1, query_block, kv_heads, group, head_dim).transpose(0, 1, 3, 4, 2, 5)
  q = q.reshape(batch, -1, kv_heads, group * query_block, head_dim)
  k, v = (pad(a, key_block).reshape(batch, -1, key_block, kv_heads, head_dim).swapaxes(2, 3) for a in (k_BSKH, v_BSKH))
  out, lse = _attend(q, k, v, bounds)
  out = out.reshape(batch, -1, kv_heads, group, query_block, head_dim).transpose(0, 1, 4, 2, 3, 5)
  lse = lse.reshape(batch, -1, kv_heads, group, query_block).transpose(0, 1, 4, 2, 3)
  out = out.reshape(batch, -1, heads, head_dim)[:, :length].astype(q_BTNH.dtype)
  return out, lse.reshape(batch, -1, heads)[:, :length]


def _list_tiles(bounds: Bounds, blocks: int, key_block: int) -> _Tiles:
  low_111J = (jnp.arange(blocks) * key_block)[None, None, None]

  def meets(start_BIQ: jax.Array, end_BIQ: jax.Array) -> jax.Array:
    return (start_BIQ[..., None] < low_111J + key_block) & (end_BIQ[..., None] > low_111J) & (end_BIQ > start_BIQ)[..., None]

  needed_BIJ = jnp.any(_any_interval(meets, bounds), axis=2)
  index = jnp.nonzero(needed_BIJ.reshape(-1), size=needed_BIJ.size, fill_value=0)[0]
  row, query, key = jnp.unravel_index(index, needed_BIJ.shape)
  return _Tiles(row, query, key, jnp.sum(needed_BIJ))


def _seen(bounds: Bounds, tiles: _Tiles, at: jax.Array, key_block: int) -> jax.Array:
  """Return the mask (Q, S) of the keys of a tile that each of its queries sees."""
  b, i = tiles.row[at], tiles.query[at]
  key_1S = (tiles.key[at] * key_block + jnp.arange(key_block))[None]
  return _any_interval(lambda start, end: (key_1S >= start[b, i][:, None]) & (key_1S < end[b, i][:, None]), bounds)


def _any_interval(inside: Callable[[jax.Array, jax.Array], jax.Array], bounds: Bounds) -> jax.Array:
  return functools.reduce(jnp.logical_or, (inside(*pair) for pair in zip(bounds[::2], bounds[1::2], strict=True)))


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bounds: Bounds) -> tuple[jax.Array, jax.Array]:
  return _forward(q, k, v, bounds)[0]


def _forward(q, k, v, bounds):
  """Compute (out, lse) of shapes (B, I, K, M[, H]) from q (B, I, K, M, H), k and v (B, J, K, S, H) and bounds (B, I, Q)."""
  key_block, group = k.shape[3], q.shape[3] // bounds[0].shape[2]
  tiles = _list_tiles(bounds, k.shape[1], key_block)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def visit(at, carry):
    out, peak, total = carry
    b, i, j = tiles.row[at], tiles.query[at], tiles.key[at]
    seen_MS = jnp.tile(_seen(bounds, tiles, at, key_block), (group, 1))[None]
    logits = jnp.where(seen_MS, dot('kmh,ksh->kms', q[b, i], k[b, j]), EMPTY)
    new_peak = jnp.maximum(peak[b, i], jnp.max(logits, axis=-1))
    weights = jnp.where(seen_MS, jnp.exp(logits - new_peak[..., None]), 0.0)
    shrink = jnp.exp(peak[b, i] - new_peak)
    mixed = dot('kms,ksh->kmh', weights.astype(v.dtype), v[b, j])
    out = out.at[b, i].set(out[b, i] * shrink[..., None] + mixed)
    total = total.at[b, i].set(total[b, i] * shrink + jnp.sum(weights, axis=-1))
    return out, peak.at[b, i].set(new_peak), total

  zeros = jnp.zeros(q.shape, jnp.float32)
  out, peak, total = jax.lax.fori_loop(0, tiles.total, visit, (zeros, zeros[..., 0] + EMPTY, zeros[..., 0]))
  total = jnp.maximum(total, 1e-30)
  out, lse = (checkpoint_name(a, SAVED) for a in (out / total[..., None], peak + jnp.log(total)))
  return (out, lse), (q, k, v, bounds, out, lse)


def _backward(saved, gradients):
  """Recompute the logits of each tile, transposed, so that only one of the five products has to transpose its operand."""
  q, k, v, bounds, out, lse = saved
  d_out, d_lse = gradients
  key_block, group = k.shape[3], q.shape[3] // bounds[0].shape[2]
  tiles = _list_tiles(bounds, k.shape[1], key_block)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  shift = jnp.einsum('bikmh,bikmh->bikm', d_out, out) - d_lse
  d_out = d_out.astype(v.dtype)

  def visit(at, carry):
    dq, dk, dv = carry
    b, i, j = tiles.row[at], tiles.query[at], tiles.key[at]
    seen_SM = jnp.tile(_seen(bounds, tiles, at, key_block).T, (1, group))[None]
    logits = dot('ksh,kmh->ksm', k[b, j], q[b, i])
    weights = jnp.where(seen_SM, jnp.exp(logits - lse[b, i][:, None]), 0.0)
    d_weights = dot('ksh,kmh->ksm', v[b, j], d_out[b, i])
    d_logits = (weights * (d_weights - shift[b, i][:, None])).astype(q.dtype)
    dq = dq.at[b, i].add(dot('ksm,ksh->kmh', d_logits, k[b, j]))
    dk = dk.at[b, j].add(dot('ksm,kmh->ksh', d_logits, q[b, i]))
    dv = dv.at[b, j].add(dot('ksm,kmh->ksh', weights.astype(v.dtype), d_out[b, i]))
    return dq, dk, dv

  zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
  dq, dk, dv = jax.lax.fori_loop(0, tiles.total, visit, zeros)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
