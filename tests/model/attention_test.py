from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.model import attention


def _oracle(q, k, v, start, end, out_gradient=None):
  """Attention in float64, one query and one head at a time, and its gradients by the textbook formulas."""
  batch, length, heads, dim = q.shape
  group = heads // k.shape[2]
  q, k, v = (a.astype(np.float64) for a in (q, k, v))
  out = np.zeros_like(q)
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b in range(batch):
    for t in range(length):
      keys = list(range(start[b, t], end[b, t]))
      if not keys:
        continue
      for n in range(heads):
        logits = np.array([q[b, t, n] @ k[b, s, n // group] for s in keys]) / np.sqrt(dim)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        for w, s in zip(weights, keys, strict=True):
          out[b, t, n] += w * v[b, s, n // group]
        if out_gradient is None:
          continue
        do = out_gradient[b, t, n].astype(np.float64)
        dw = np.array([do @ v[b, s, n // group] for s in keys])
        dlogits = weights * (dw - weights @ dw) / np.sqrt(dim)
        for w, dl, s in zip(weights, dlogits, keys, strict=True):
          dv[b, s, n // group] += w * do
          dq[b, t, n] += dl * k[b, s, n // group]
          dk[b, s, n // group] += dl * q[b, t, n]
  return out, (dq, dk, dv)


def _case(seed, batch=2, queries=7, keys=9, heads=4, kv_heads=2, dim=32):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, k, v = draw(batch, queries, heads, dim), draw(batch, keys, kv_heads, dim), draw(batch, keys, kv_heads, dim)
  a, b = rng.integers(0, keys + 1, (2, batch, queries), dtype=np.int32)
  start, end = np.minimum(a, b), np.maximum(a, b)
  start[0, 0] = end[0, 0] = 0  # an empty interval, in every case
  start[1, 1] = end[1, 1] = 5
  start[0, 2], end[0, 2] = 0, keys
  start[1, 2], end[1, 2] = 3, 4
  return q, k, v, start, end, draw(batch, queries, heads, dim)


@jax.jit
def _run(q, k, v, start, end, out_gradient):
  out, pull = jax.vjp(lambda q, k, v: attention.reference_attention(q, k, v, start, end), q, k, v)
  return out, pull(jnp.asarray(out_gradient, out.dtype))


@pytest.mark.parametrize(('dim', 'heads', 'kv_heads'), [(32, 1, 1), (32, 4, 2), (64, 6, 2), (64, 3, 3), (128, 4, 1)])
def test_matches_the_oracle(dim, heads, kv_heads):
  case = _case(dim + heads, heads=heads, kv_heads=kv_heads, dim=dim)
  out, gradients = _run(*case)
  expected, expected_gradients = _oracle(*case)
  np.testing.assert_allclose(out, expected, atol=2e-6)
  for gradient, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_bfloat16():
  q, k, v, start, end, out_gradient = _case(5)
  q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
  out, gradients = _run(q, k, v, start, end, out_gradient)
  assert out.dtype == jnp.bfloat16
  expected, expected_gradients = _oracle(*(np.asarray(a, np.float32) for a in (q, k, v)), start, end, out_gradient)
  np.testing.assert_allclose(out.astype(np.float32), expected, atol=0.03)
  for gradient, wanted in zip(gradients, expected_gradients, strict=True):
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(np.float32), wanted, atol=0.06)


def test_empty_intervals_give_zeros_and_finite_gradients():
  q, k, v, _, _, out_gradient = _case(1)
  nowhere = np.full(q.shape[:2], 4, np.int32)
  out, gradients = _run(q, k, v, nowhere, nowhere, out_gradient)
  for array in (out, *gradients):
    np.testing.assert_array_equal(array, 0)


def test_huge_logits_stay_finite():
  q, k, v, start, end, out_gradient = _case(2)
  q, k = 100 * q, 100 * k
  out, gradients = _run(q, k, v, start, end, out_gradient)
  expected, _ = _oracle(q, k, v, start, end)
  np.testing.assert_allclose(out, expected, atol=2e-3)
  assert all(np.isfinite(g).all() for g in gradients)


def test_keys_outside_the_interval_do_not_matter():
  q, k, v, start, end, _ = _case(3)
  start[:], end[:] = 2, 6
  out = attention.reference_attention(q, k, v, start, end)
  k[:, 6:], v[:, 6:], k[:, :2], v[:, :2] = 1e6, -1e6, 1e6, 1e6
  np.testing.assert_array_equal(attention.reference_attention(q, k, v, start, end), out)


def test_backends():
  assert attention.attention_backend('auto') is attention.attention_backend('reference')
  with pytest.raises(KeyError):
    attention.attention_backend('nonsense')
