"""The oracle and the test cases of every attention backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _oracle(q, k, v, start, end, out_gradient, lse_gradient):
  """Compute attention in float64, one query and one head at a time, and its gradients by the textbook formulas."""
  batch, length, heads, dim = q.shape
  group = heads // k.shape[2]
  q, k, v, out_gradient, lse_gradient = (np.asarray(a, np.float64) for a in (q, k, v, out_gradient, lse_gradient))
  out, lse = np.zeros_like(q), np.full((batch, length, heads), -1e30)
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b in range(batch):
    for t in range(length):
      keys = range(start[b, t], end[b, t])
      for n in range(heads) if len(keys) else ():
        logits = np.array([q[b, t, n] @ k[b, s, n // group] for s in keys]) / np.sqrt(dim)
        weights = np.exp(logits - logits.max())
        lse[b, t, n] = logits.max() + np.log(weights.sum())
        weights /= weights.sum()
        for w, s in zip(weights, keys, strict=True):
          out[b, t, n] += w * v[b, s, n // group]
        do = out_gradient[b, t, n]
        dw = np.array([do @ v[b, s, n // group] for s in keys])
        dlogits = weights * (dw - weights @ dw + lse_gradient[b, t, n]) / np.sqrt(dim)
        for w, dl, s in zip(weights, dlogits, keys, strict=True):
          dv[b, s, n // group] += w * do
          dq[b, t, n] += dl * k[b, s, n // group]
          dk[b, s, n // group] += dl * q[b, t, n]
  return (out, lse), (dq, dk, dv)


def _intervals(rng, batch, queries, keys):
  """Return intervals of every kind: random, empty, whole, and of one key."""
  a, b = rng.integers(0, keys + 1, (2, batch, queries), dtype=np.int32)
  start, end = np.minimum(a, b), np.maximum(a, b)
  start[0, 0] = end[0, 0] = 0
  start[-1, 1] = end[-1, 1] = min(5, keys)
  start[0, 2], end[0, 2] = 0, keys
  start[-1, 2], end[-1, 2] = 3, 4
  return start, end


def _packed_intervals(rng, batch, length):
  """Return intervals of packed triplets, as `polar_jax.data.layout` lays them out, followed by padding."""
  start, end = np.zeros((2, batch, length), np.int32)
  for b in range(batch):
    at = 0
    while True:
      tail, prefix, other = rng.integers(0, 5), rng.integers(1, 9), rng.integers(0, 5)
      if at + tail + prefix + other > length:
        break
      for i in range(tail + prefix + other):
        j = at + i
        start[b, j], end[b, j] = (j, at + tail + prefix) if i < tail else (at + tail, j + 1)
      at += tail + prefix + other
  return start, end


@pytest.fixture(scope='session')
def make_case():
  """(q, k, v, start, end, gradient of out, gradient of lse), float32 or rounded to bfloat16."""

  def make(seed, batch=2, queries=7, keys=9, heads=4, kv_heads=2, dim=32, packed=False, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), dtype))
    q, k, v = draw(batch, queries, heads, dim), draw(batch, keys, kv_heads, dim), draw(batch, keys, kv_heads, dim)
    start, end = _packed_intervals(rng, batch, queries) if packed else _intervals(rng, batch, queries, keys)
    return q, k, v, start, end, draw(batch, queries, heads, dim), rng.normal(size=(batch, queries, heads)).astype(np.float32)

  return make


@pytest.fixture(scope='session')
def assert_matches_oracle():
  """Compare values (within `atol`) and gradients (within `10 * atol`, relative to their scale) of a backend with the oracle."""

  def check(attend, case, atol=2e-6):
    q, k, v, start, end, out_gradient, lse_gradient = case

    @jax.jit
    def run(q, k, v, start, end):
      (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end), q, k, v)
      return (out, lse), pull((jnp.asarray(out_gradient, out.dtype), jnp.asarray(lse_gradient)))

    (out, lse), gradients = run(q, k, v, start, end)
    (expected, expected_lse), expected_gradients = _oracle(*case)
    assert (out.dtype, lse.dtype) == (q.dtype, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=atol)
    np.testing.assert_array_equal(np.asarray(out)[end == start], 0)
    seen = (end > start)[..., None] & np.ones_like(expected_lse, bool)
    np.testing.assert_allclose(np.asarray(lse)[seen], expected_lse[seen], atol=max(atol, 2e-6) * 2)
    assert (np.asarray(lse)[~seen] < -1e29).all()
    for gradient, wanted, given in zip(gradients, expected_gradients, (q, k, v), strict=True):
      assert gradient.dtype == given.dtype
      np.testing.assert_allclose(np.asarray(gradient, np.float64), wanted, atol=5 * atol * max(1, np.abs(wanted).max()))

  return check
