"""Attention over intervals with every logit in memory: the reference that the other backends are tested against."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# The log of an empty sum. Finite, so that merging two empty intervals gives no NaN.
EMPTY = -1e30

# Name of the arrays that flash backends save for their derivative, for rematerialization policies (jax.ad_checkpoint.checkpoint_name).
SAVED = 'attention'


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *bounds_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Compute attention as `polar_jax.model.attention.Backend` defines it, over any number of intervals."""
  batch, length, heads, head_dim = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
  logits_BKGTS = jnp.einsum('BTKGH,BSKH->BKGTS', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
  key_11S = jnp.arange(k_BSKH.shape[1])[None, None]
  intervals = zip(bounds_BT[::2], bounds_BT[1::2], strict=True)
  seen_BTS = functools.reduce(jnp.logical_or, ((key_11S >= s[..., None]) & (key_11S < e[..., None]) for s, e in intervals))
  seen_B11TS = seen_BTS[:, None, None]
  # A finite floor keeps rows without keys finite; the mask is applied again after the exponential so that they sum to zero.
  logits_BKGTS = jnp.where(seen_B11TS, logits_BKGTS, EMPTY)
  peak_BKGT1 = jax.lax.stop_gradient(jnp.max(logits_BKGTS, axis=-1, keepdims=True))
  weights_BKGTS = jnp.where(seen_B11TS, jnp.exp(logits_BKGTS - peak_BKGT1), 0.0)
  total_BKGT = jnp.maximum(jnp.sum(weights_BKGTS, axis=-1), 1e-30)
  out_BTKGH = jnp.einsum('BKGTS,BSKH->BTKGH', weights_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
  # Dividing after the sum over keys costs H operations per query instead of S.
  scale_BTKG = 1.0 / jnp.transpose(total_BKGT, (0, 3, 1, 2))
  lse_BTKG = jnp.transpose(peak_BKGT1[..., 0] + jnp.log(total_BKGT), (0, 3, 1, 2))
  out_BTNH = (out_BTKGH * scale_BTKG[..., None]).astype(q_BTNH.dtype).reshape(q_BTNH.shape)
  return out_BTNH, lse_BTKG.reshape(batch, length, heads)
