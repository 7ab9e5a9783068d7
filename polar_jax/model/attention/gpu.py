"""Attention over intervals with the flash kernels of `tokamax`, for NVIDIA GPUs.

The kernel depends on the default device and the dtype:
  Pallas Mosaic GPU  bfloat16 on Hopper, and on data-center Blackwell (sm100) with heads of at most 64
  Pallas Triton      everything else from Ampere on, including all float32, because Mosaic multiplies in 16 bits

The public function of tokamax takes no interval per query, but its operators do, as `Mask(k_start, k_end)`. In the forward pass they
skip the blocks of keys that no query of a block sees. In the backward pass no kernel of tokamax 0.0.12 skips blocks, and Triton's
reads a boolean mask of B x T x S that tokamax materializes.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from polar_jax.model.attention import reference
from polar_jax.types import UserError

# Mosaic's kernels read intervals of whole blocks of queries only, so lengths are padded to multiples of the largest blocks.
_QUERY_BLOCK, _KEY_BLOCK = 256, 128


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array, end_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute attention as `polar_jax.model.attention.Backend` defines it, over one interval.

  The precision of float32 products is that of `jax_default_matmul_precision`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    start_BT: first key of each query's interval.
    end_BT: end of the interval, exclusive.

  Raises:
    UserError: tokamax is not installed, or the default device is not an NVIDIA GPU of the Ampere generation or later.
  """
  return attend_with(_operator(q_BTNH.dtype, q_BTNH.shape[-1]), q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)


def attend_with(
  operator: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array, end_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Compute `attend` with a given operator.

  Args:
    operator: a `DotProductAttention` of tokamax that has a `vjp`.
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    start_BT: first key of each query's interval.
    end_BT: end of the interval, exclusive.
  """
  length = q_BTNH.shape[1]
  empty_BT = end_BT <= start_BT
  # Kernels disagree on the output of a query without keys: means, infinities, and on sm100 wrong residuals of other queries. Such a
  # query therefore reads one key, and its output is dropped.
  start_BT, end_BT = jnp.where(empty_BT, 0, start_BT), jnp.where(empty_BT, 1, end_BT)
  # For the same reason queries of padding repeat the last interval.
  intervals = (_padded(a_BT, _QUERY_BLOCK, mode='edge') for a_BT in (start_BT, end_BT))
  out_BTNH, lse_BTN = _flash(operator, _padded(q_BTNH, _QUERY_BLOCK), _padded(k_BSKH, _KEY_BLOCK), _padded(v_BSKH, _KEY_BLOCK), *intervals)
  empty_BT1 = empty_BT[..., None]
  out_BTNH = jnp.where(empty_BT1[..., None], jnp.zeros((), out_BTNH.dtype), out_BTNH[:, :length])
  return out_BTNH, jnp.where(empty_BT1, reference.EMPTY, lse_BTN[:, :length])


def _tokamax() -> SimpleNamespace:
  """Import the modules of tokamax that are used here."""
  try:
    from tokamax._src import gpu_utils
    from tokamax._src.ops.attention import base, pallas_mosaic_gpu, pallas_triton
  except ImportError as error:
    raise UserError("attention on GPU needs the package tokamax 0.0.12: pip install 'polar_jax[cuda]'") from error
  # tokamax keeps its options in absl flags, and would parse the arguments of a program that has not parsed any.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  return SimpleNamespace(device=gpu_utils, base=base, mosaic=pallas_mosaic_gpu, triton=pallas_triton)


def _operator(dtype: jax.typing.DTypeLike, head_dim: int) -> Any:
  """Return the fastest operator for the default device."""
  tokamax = _tokamax()
  if not tokamax.device.has_triton_support():
    raise UserError(
      'attention on GPU needs an NVIDIA GPU of compute capability 8.0 or higher, and the default device is '
      f'{jax.devices()[0].device_kind}; choose another model.attention'
    )
  # With larger heads the sm100 backward kernel requests more shared memory than the device has.
  has_mosaic = tokamax.device.is_sm90() or (tokamax.device.is_sm100() and head_dim <= 64)
  if has_mosaic and dtype != jnp.float32:
    return tokamax.mosaic.PallasMosaicGpuFlashAttention()
  return tokamax.triton.PallasTritonFlashAttention()


def _padded(array: jax.Array, block: int, **how: str) -> jax.Array:
  """Pad axis 1 to whole blocks."""
  return jnp.pad(array, [(0, -array.shape[1] % block if axis == 1 else 0) for axis in range(array.ndim)], **how)


def _with_config(operator: Any, *args: Any, **arguments: Any) -> Any:
  """Fix the block sizes of the operator's heuristics; otherwise it looks for autotuned ones and warns that there are none."""
  return operator.replace(config=operator.bind(*args, **arguments).get_config(check_autotuning_cache=False))


def _bound(operator: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array, end_BT: jax.Array) -> dict:
  """Return the arguments of the operator and its vjp that are not arrays of numbers."""
  mask = _tokamax().base.Mask(k_start=start_BT[:, None], k_end=end_BT[:, None])
  arguments = dict(operator.bind(q_BTNH, k_BSKH, v_BSKH, mask=mask, precision=None).kwargs)
  del arguments['return_residuals']
  return arguments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
  operator: Any, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, start_BT: jax.Array, end_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Compute (out_BTNH, lse_BTN) for intervals of at least one key. The gradient of tokamax itself ignores that of lse."""
  return _run(operator, q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT)[:2]


def _run(operator: Any, *arrays: jax.Array) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
  """Compute out_BTNH, lse_BTN, and tokamax's residuals of the softmax: the largest logit and the sum, both (B, N, T)."""
  # tokamax broadcasts arrays of different ranks, which the caller may have forbidden.
  with jax.numpy_rank_promotion('allow'):
    arguments = _bound(operator, *arrays) | {'return_residuals': True}
    out_BTNH, (peak_BNT, total_BNT) = _with_config(operator, *arrays[:3], **arguments)(*arrays[:3], **arguments)
  return out_BTNH, jnp.swapaxes(peak_BNT + jnp.log(total_BNT), 1, 2), (peak_BNT, total_BNT)


def _pull(operator: Any, arrays: tuple, out_BTNH: jax.Array, residuals: tuple, d_out_BTNH: jax.Array) -> tuple:
  """Compute the gradients (dq_BTNH, dk_BSKH, dv_BSKH) through out alone, which is all that tokamax provides."""
  with jax.numpy_rank_promotion('allow'):
    args, arguments = (residuals, out_BTNH, d_out_BTNH, *arrays[:3]), _bound(operator, *arrays)
    gradients = _with_config(operator.vjp, *args, **arguments)(*args, **arguments)
  return gradients['q'], gradients['k'], gradients['v']


def _forward(operator: Any, *primals: CustomVJPPrimal) -> tuple[tuple[jax.Array, jax.Array], tuple]:
  arrays = tuple(primal.value for primal in primals)
  out_BTNH, lse_BTN, residuals = checkpoint_name(_run(operator, *arrays), reference.SAVED)
  return (out_BTNH, lse_BTN), (arrays, out_BTNH, residuals)


def _backward(operator: Any, saved: tuple, gradients: tuple[jax.Array | SymbolicZero, jax.Array | SymbolicZero]) -> tuple:
  arrays, out_BTNH, residuals = saved
  q_BTNH, k_BSKH, v_BSKH, start_BT, end_BT = arrays
  d_out_BTNH, d_lse_BTN = gradients
  dq_BTNH, dk_BSKH, dv_BSKH = jnp.zeros_like(q_BTNH), jnp.zeros_like(k_BSKH), jnp.zeros_like(v_BSKH)
  if not isinstance(d_out_BTNH, SymbolicZero):
    dq_BTNH, dk_BSKH, dv_BSKH = _pull(operator, arrays, out_BTNH, residuals, d_out_BTNH)
  # A caller that drops lse, as the model does, pays nothing for it. Otherwise, with p the softmax, dq += dlse p k and
  # dk += p' (dlse q), both times the scale: the first is attention with keys for values, the second a gradient of values.
  if not isinstance(d_lse_BTN, SymbolicZero):
    scaled_BTN1 = d_lse_BTN[..., None] * q_BTNH.shape[-1] ** -0.5
    mean_key_BTNH, _, _ = _run(operator, q_BTNH, k_BSKH, k_BSKH, start_BT, end_BT)
    _, _, dk_lse_BSKH = _pull(operator, arrays, out_BTNH, residuals, (scaled_BTN1 * q_BTNH).astype(q_BTNH.dtype))
    dq_BTNH, dk_BSKH = dq_BTNH + (scaled_BTN1 * mean_key_BTNH).astype(q_BTNH.dtype), dk_BSKH + dk_lse_BSKH
  return dq_BTNH, dk_BSKH, dv_BSKH, None, None


_flash.defvjp(_forward, _backward, symbolic_zeros=True)
