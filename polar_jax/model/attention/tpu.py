"""Flash attention over intervals as Pallas kernels for TPU: memory linear in length, time by the blocks that intervals touch.

The recurrence is that of FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2). Which blocks of keys a block of queries needs
is computed in XLA and passed to the kernels as prefetched scalars: the innermost grid dimension is only as long as the longest such
range, and the steps after a shorter range neither compute nor copy.

Letters of blocks: Q queries of a block, S keys of a block, H head dimension, W lanes of a register (128 on a TPU). In arrays of
whole rows, Y and X count the blocks of queries and of keys.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polar_jax.model.attention.reference import EMPTY, SAVED
from polar_jax.sharding import round_up

_LANES = 128
# Running maxima start above the logit of a masked key, so that its exponential is exactly zero without a second mask.
_FLOOR = EMPTY / 2
_TRANSPOSED = (((1,), (1,)), ((), ()))  # x @ y.T
_PLAIN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Number of queries and keys per block: multiples of 128, because both are laid out along lanes. Shorter rows use shorter blocks."""

  query: int = 512
  key: int = 512


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  start_BT: jax.Array,
  end_BT: jax.Array,
  *,
  blocks: Blocks = Blocks(),
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Compute attention as `polar_jax.model.attention.Backend` defines it, over one interval.

  Args:
    q_BTNH: queries. All of q, k, v are float32 or all are bfloat16; float32 is multiplied as float32.
    k_BSKH: keys.
    v_BSKH: values.
    start_BT: start of each query's interval.
    end_BT: end of each query's interval.
    blocks: block sizes; interpret mode also takes small powers of two (from 8).
    interpret: emulate the kernels, on any device. Never inferred, so that a host without a TPU can compile for one.

  Raises:
    ValueError: the kernels do not support the dtypes, the head dimension (above 256) or the block sizes.
  """
  queries, keys, head_dim = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3]
  if {x.dtype for x in (q_BTNH, k_BSKH, v_BSKH)} not in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)}):
    raise ValueError(f'q, k, v are {q_BTNH.dtype}, {k_BSKH.dtype}, {v_BSKH.dtype}; the TPU kernel takes all float32 or all bfloat16')
  if head_dim > 256:
    raise ValueError(f'head dimension {head_dim} is above 256, the maximum of the TPU kernel')
  if not interpret and (blocks.query % _LANES or blocks.key % _LANES):
    raise ValueError(f'{blocks}: on a TPU both must be multiples of {_LANES}')
  query_block = min(blocks.query, round_up(queries, _LANES))
  key_block = min(blocks.key, round_up(keys, _LANES))
  # A row of 64 fills half of the lanes; any other size takes whole registers anyway.
  dim = 64 if head_dim <= 64 else round_up(head_dim, _LANES)
  heads_major = lambda x, block: _pad(_pad(jnp.swapaxes(x, 1, 2), 2, block), 3, dim)
  # Padded keys must stay outside every interval; padded queries get the interval [0, 0).
  seen_B2T = _pad(jnp.stack([jnp.maximum(start_BT, 0), jnp.minimum(end_BT, keys)], 1).astype(jnp.int32), 2, query_block)
  out_BNTH, lse_BNT = _flash(
    heads_major(q_BTNH, query_block),
    heads_major(k_BSKH, key_block),
    heads_major(v_BSKH, key_block),
    seen_B2T,
    _Static(query_block, key_block, head_dim**-0.5, interpret),
  )
  return jnp.swapaxes(out_BNTH[:, :, :queries, :head_dim], 1, 2), jnp.swapaxes(lse_BNT[:, :, :queries], 1, 2)


@dataclasses.dataclass(frozen=True)
class _Static:
  """The constants that the kernels are specialized to."""

  query_block: int
  key_block: int
  scale: float
  interpret: bool

  @property
  def lanes(self) -> int:
    """Lanes that hold copies of a value per query."""
    return min(_LANES, self.key_block)


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Pad the end of `axis` with zeros up to a multiple."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, round_up(x.shape[axis], multiple) - x.shape[axis])
  return jnp.pad(x, widths)


def key_ranges(seen_B2T: jax.Array, query_block: int, key_block: int) -> tuple[jax.Array, jax.Array]:
  """Return (low_BY, high_BY), the blocks of keys that each block of queries needs; (0, 0) if none of its queries sees a key."""
  start_BYQ, end_BYQ = (x.reshape(x.shape[0], -1, query_block) for x in (seen_B2T[:, 0], seen_B2T[:, 1]))
  empty_BYQ = start_BYQ >= end_BYQ
  high_BY = jnp.max(jnp.where(empty_BYQ, 0, -(-end_BYQ // key_block)), -1)
  low_BY = jnp.min(jnp.where(empty_BYQ, jnp.iinfo(jnp.int32).max, start_BYQ // key_block), -1)
  return jnp.minimum(low_BY, high_BY), high_BY


def query_ranges(low_BY: jax.Array, high_BY: jax.Array, key_blocks: int) -> tuple[jax.Array, jax.Array]:
  """Return (low_BX, high_BX), the range of blocks of queries that need each block of keys; (0, 0) if none does."""
  key_11X = jnp.arange(key_blocks, dtype=jnp.int32)[None, None]
  needed_BYX = (low_BY[:, :, None] <= key_11X) & (key_11X < high_BY[:, :, None])
  query_1Y1 = jnp.arange(low_BY.shape[1], dtype=jnp.int32)[None, :, None]
  high_BX = jnp.max(jnp.where(needed_BYX, query_1Y1 + 1, 0), 1)
  return jnp.minimum(jnp.min(jnp.where(needed_BYX, query_1Y1, low_BY.shape[1]), 1), high_BX), high_BX


def block_at(step: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
  """Return the block of a step over [low, high). Steps after the range stay on its last block, so that nothing new is copied."""
  return jnp.minimum(low + step, jnp.maximum(high - 1, low))


def _steps(low: jax.Array, high: jax.Array) -> jax.Array:
  """Return the length of the longest range, a dynamic grid dimension: at least one step, which writes the output."""
  return jnp.maximum(jnp.max(high - low), 1)


def _dot(x: jax.Array, y: jax.Array, dimensions) -> jax.Array:
  # Explicit, because the default of Mosaic may round float32 to bfloat16, and fp32 contraction of bfloat16 does not exist.
  precision = lax.Precision.HIGHEST if y.dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(x.astype(y.dtype), y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _column(row_1Q: jax.Array, lanes: int) -> jax.Array:
  """Lay out one value per query with queries along sublanes and copies along lanes. In HBM this would take `lanes` times the memory."""
  return jnp.broadcast_to(row_1Q, (lanes, row_1Q.shape[1])).T


def _spread(x_QW: jax.Array, width: int) -> jax.Array:
  """Cut or repeat copies along lanes to `width`. Unlike broadcasting from one lane, this matches the layout of registers and is free."""
  lanes = x_QW.shape[1]
  return x_QW[:, :width] if width <= lanes else jnp.tile(x_QW, (1, width // lanes))


def _logits_by_query(q_ref, k_ref, seen_2QW, block: jax.Array, scale: float) -> jax.Array:
  """Compute the masked logits (Q, S) of a block."""
  logits_QS = _dot(q_ref[...], k_ref[...], _TRANSPOSED) * scale
  key_QS = block * logits_QS.shape[1] + lax.broadcasted_iota(jnp.int32, logits_QS.shape, 1)
  start_QS, end_QS = (_spread(seen_2QW[i], logits_QS.shape[1]) for i in range(2))
  return jnp.where((key_QS >= start_QS) & (key_QS < end_QS), logits_QS, EMPTY)


def _forward_kernel(low, high, q, k, v, seen, out, lse, seen_2QW, peak_QW, total_QW, sum_QH, *, scale: float):
  row, query, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  last, block = pl.num_programs(3) - 1, low[row, query] + step

  @pl.when(step == 0)
  def _start():
    for i in range(2):
      seen_2QW[i] = _column(seen[i : i + 1], seen_2QW.shape[2])
    peak_QW[...] = jnp.full_like(peak_QW, _FLOOR)
    total_QW[...] = jnp.zeros_like(total_QW)
    sum_QH[...] = jnp.zeros_like(sum_QH)

  @pl.when(block < high[row, query])
  def _accumulate():
    logits_QS = _logits_by_query(q, k, seen_2QW, block, scale)
    before_QW = peak_QW[...]
    now_QW = jnp.maximum(before_QW, jnp.max(logits_QS, 1, keepdims=True))
    weights_QS = jnp.exp(logits_QS - _spread(now_QW, logits_QS.shape[1]))
    decay_QW = jnp.exp(before_QW - now_QW)
    peak_QW[...] = now_QW
    total_QW[...] = total_QW[...] * decay_QW + jnp.sum(weights_QS, 1, keepdims=True)
    sum_QH[...] = sum_QH[...] * _spread(decay_QW, sum_QH.shape[1]) + _dot(weights_QS, v[...], _PLAIN)

  @pl.when(step == last)
  def _finish():
    empty_QW = total_QW[...] == 0
    divisor_QW = jnp.where(empty_QW, 1.0, total_QW[...])
    out[...] = (sum_QH[...] / _spread(divisor_QW, sum_QH.shape[1])).astype(out.dtype)
    lse[...] = jnp.where(empty_QW, EMPTY, peak_QW[...] + jnp.log(divisor_QW)).T[:1]


def _dq_kernel(low, high, q, k, v, seen, d_out, stats, dq, seen_2QW, stats_2QW, sum_QH, *, scale: float):
  row, query, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  last, block = pl.num_programs(3) - 1, low[row, query] + step

  @pl.when(step == 0)
  def _start():
    for i in range(2):
      seen_2QW[i] = _column(seen[i : i + 1], seen_2QW.shape[2])
      stats_2QW[i] = _column(stats[i : i + 1], stats_2QW.shape[2])
    sum_QH[...] = jnp.zeros_like(sum_QH)

  @pl.when(block < high[row, query])
  def _accumulate():
    logits_QS = _logits_by_query(q, k, seen_2QW, block, scale)
    lse_QS, delta_QS = (_spread(stats_2QW[i], logits_QS.shape[1]) for i in range(2))
    d_logits_QS = jnp.exp(logits_QS - lse_QS) * (_dot(d_out[...], v[...], _TRANSPOSED) - delta_QS)
    sum_QH[...] += _dot(d_logits_QS, k[...], _PLAIN)

  @pl.when(step == last)
  def _finish():
    dq[...] = (sum_QH[...] * scale).astype(dq.dtype)


def _dkv_kernel(low, high, first, after, q, k, v, seen, d_out, stats, dk, dv, dk_SH, dv_SH, *, scale: float):
  """Accumulate with transposed logits (S, Q): values per query are then rows, and no product needs a transposed left operand."""
  row, key, member, step = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.program_id(4)
  begin, end = (member == 0) & (step == 0), (member == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1)
  query = block_at(step, first[row, key], after[row, key])
  # Not every block of queries between the first and the last that need these keys needs them too.
  needed = (first[row, key] + step < after[row, key]) & (low[row, query] <= key) & (key < high[row, query])

  @pl.when(begin)
  def _start():
    dk_SH[...] = jnp.zeros_like(dk_SH)
    dv_SH[...] = jnp.zeros_like(dv_SH)

  @pl.when(needed)
  def _accumulate():
    logits_SQ = _dot(k[...], q[...], _TRANSPOSED) * scale
    key_SQ = key * logits_SQ.shape[0] + lax.broadcasted_iota(jnp.int32, logits_SQ.shape, 0)
    logits_SQ = jnp.where((key_SQ >= seen[0:1]) & (key_SQ < seen[1:2]), logits_SQ, EMPTY)
    weights_SQ = jnp.exp(logits_SQ - stats[0:1])
    d_logits_SQ = weights_SQ * (_dot(v[...], d_out[...], _TRANSPOSED) - stats[1:2])
    dv_SH[...] += _dot(weights_SQ, d_out[...], _PLAIN)
    dk_SH[...] += _dot(d_logits_SQ, q[...], _PLAIN)

  @pl.when(end)
  def _finish():
    dk[...] = (dk_SH[...] * scale).astype(dk.dtype)
    dv[...] = dv_SH[...].astype(dv.dtype)


def _call(kernel, static: _Static, grid, scalars, inputs, outputs, scratch):
  """Run a kernel that accumulates over the grid axes after the third.

  Args:
    kernel: the kernel function.
    static: its constants.
    grid: size of each grid axis.
    scalars: prefetched scalars.
    inputs: (array, block) of each input.
    outputs: (shape, block) of each output.
    scratch: scratch memory.
  """
  arrays, in_specs = zip(*inputs, strict=True)
  out_shape, out_specs = zip(*outputs, strict=True)
  return pl.pallas_call(
    functools.partial(kernel, scale=static.scale),
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars), grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
    ),
    compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.PARALLEL] * 3 + [pltpu.ARBITRARY] * (len(grid) - 3)),
    interpret=static.interpret,
    name='attention' + kernel.__name__.removesuffix('_kernel'),
  )(*scalars, *arrays)


def _by_query(q, k, static: _Static):
  """Return the blocks of the grid (B, N, Y, steps): of queries, keys and intervals, and a function for values along lanes."""
  query_block, dim, group = static.query_block, q.shape[3], q.shape[1] // k.shape[1]
  queries = pl.BlockSpec((None, None, query_block, dim), lambda b, n, y, step, low, high: (b, n, y, 0))
  keys = pl.BlockSpec(
    (None, None, static.key_block, dim), lambda b, n, y, step, low, high: (b, lax.div(n, group), block_at(step, low[b, y], high[b, y]), 0)
  )
  seen = pl.BlockSpec((None, 2, query_block), lambda b, n, y, step, low, high: (b, 0, y))
  along_lanes = lambda values: pl.BlockSpec((None, None, values, query_block), lambda b, n, y, step, low, high: (b, n, 0, y))
  return queries, keys, seen, along_lanes


def _forward(q_BNTH, k_BKSH, v_BKSH, seen_B2T, static: _Static) -> tuple[jax.Array, jax.Array]:
  batch, heads, length, dim = q_BNTH.shape
  queries, keys, seen, along_lanes = _by_query(q_BNTH, k_BKSH, static)
  low_BY, high_BY = key_ranges(seen_B2T, static.query_block, static.key_block)
  out_BNTH, lse_BN1T = _call(
    _forward_kernel,
    static,
    (batch, heads, low_BY.shape[1], _steps(low_BY, high_BY)),
    (low_BY, high_BY),
    [(q_BNTH, queries), (k_BKSH, keys), (v_BKSH, keys), (seen_B2T, seen)],
    [
      (jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype), queries),
      (jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32), along_lanes(1)),
    ],
    [
      pltpu.VMEM((2, static.query_block, static.lanes), jnp.int32),
      pltpu.VMEM((static.query_block, static.lanes), jnp.float32),
      pltpu.VMEM((static.query_block, static.lanes), jnp.float32),
      pltpu.VMEM((static.query_block, dim), jnp.float32),
    ],
  )
  return out_BNTH, lse_BN1T[:, :, 0]


def _dq(low_BY, high_BY, q, k, v, seen_B2T, d_out, stats_BN2T, static: _Static) -> jax.Array:
  batch, heads, _, dim = q.shape
  queries, keys, seen, along_lanes = _by_query(q, k, static)
  (dq_BNTH,) = _call(
    _dq_kernel,
    static,
    (batch, heads, low_BY.shape[1], _steps(low_BY, high_BY)),
    (low_BY, high_BY),
    [(q, queries), (k, keys), (v, keys), (seen_B2T, seen), (d_out, queries), (stats_BN2T, along_lanes(2))],
    [(jax.ShapeDtypeStruct(q.shape, q.dtype), queries)],
    [
      pltpu.VMEM((2, static.query_block, static.lanes), jnp.int32),
      pltpu.VMEM((2, static.query_block, static.lanes), jnp.float32),
      pltpu.VMEM((static.query_block, dim), jnp.float32),
    ],
  )
  return dq_BNTH


def _dkv(low_BY, high_BY, q, k, v, seen_B2T, d_out, stats_BN2T, static: _Static) -> tuple[jax.Array, jax.Array]:
  """Sum over the query heads of each kv head inside the grid; gradients per query head would take 2 N / K times the memory of k and v."""
  batch, kv_heads, length, dim = k.shape
  group, query_block, key_block = q.shape[1] // kv_heads, static.query_block, static.key_block
  first_BX, after_BX = query_ranges(low_BY, high_BY, length // key_block)
  block = lambda b, x, step, first, after: block_at(step, first[b, x], after[b, x])
  queries = pl.BlockSpec(
    (None, None, query_block, dim), lambda b, h, x, g, step, _, __, *range_: (b, h * group + g, block(b, x, step, *range_), 0)
  )
  keys = pl.BlockSpec((None, None, key_block, dim), lambda b, h, x, *_: (b, h, x, 0))
  seen = pl.BlockSpec((None, 2, query_block), lambda b, h, x, g, step, _, __, *range_: (b, 0, block(b, x, step, *range_)))
  stats = pl.BlockSpec(
    (None, None, 2, query_block), lambda b, h, x, g, step, _, __, *range_: (b, h * group + g, 0, block(b, x, step, *range_))
  )
  return _call(
    _dkv_kernel,
    static,
    (batch, kv_heads, length // key_block, group, _steps(first_BX, after_BX)),
    (low_BY, high_BY, first_BX, after_BX),
    [(q, queries), (k, keys), (v, keys), (seen_B2T, seen), (d_out, queries), (stats_BN2T, stats)],
    [(jax.ShapeDtypeStruct(k.shape, k.dtype), keys), (jax.ShapeDtypeStruct(v.shape, v.dtype), keys)],
    [pltpu.VMEM((key_block, dim), jnp.float32)] * 2,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q_BNTH, k_BKSH, v_BKSH, seen_B2T, static: _Static) -> tuple[jax.Array, jax.Array]:
  """Compute (out_BNTH, lse_BNT) from padded, heads-major arrays."""
  return _forward(q_BNTH, k_BKSH, v_BKSH, seen_B2T, static)


def _flash_forward(q, k, v, seen_B2T, static: _Static):
  out, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, seen_B2T, static))
  return (out, lse), (q, k, v, seen_B2T, out, lse)


def _flash_backward(static: _Static, residuals, gradients):
  q, k, v, seen_B2T, out, lse_BNT = residuals
  d_out, d_lse_BNT = gradients
  # The gradient of a logit is p * (d_out . v - delta), and that of lse by a logit is p: lse only shifts delta.
  delta_BNT = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1) - d_lse_BNT
  # Without a visible key all logits are EMPTY, and any finite lse far above makes their weights zero.
  stats_BN2T = jnp.stack([jnp.where(lse_BNT < _FLOOR, 0.0, lse_BNT), delta_BNT], 2)
  low_BY, high_BY = key_ranges(seen_B2T, static.query_block, static.key_block)
  arrays = (low_BY, high_BY, q, k, v, seen_B2T, d_out, stats_BN2T, static)
  return _dq(*arrays), *_dkv(*arrays), None


_flash.defvjp(_flash_forward, _flash_backward)
