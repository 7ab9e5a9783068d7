"""Every backend that a CPU can run, against one oracle. Kernels of accelerators run in interpret mode."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.model.attention import chunked, reference, tpu

BACKENDS = {
  'reference': reference.attend,
  'chunked': functools.partial(chunked.attend, block=8),
  'tpu': functools.partial(tpu.attend, blocks=tpu.Blocks(8, 8), interpret=True),
}


@pytest.fixture(params=list(BACKENDS))
def attend(request):
  return BACKENDS[request.param]


@pytest.mark.long
@pytest.mark.parametrize(('dim', 'heads', 'kv_heads'), [(64, 6, 2), (64, 3, 3), (128, 4, 1)])
def test_matches_the_oracle(attend, dim, heads, kv_heads, make_case, assert_matches_oracle):
  assert_matches_oracle(attend, make_case(dim + heads, heads=heads, kv_heads=kv_heads, dim=dim))


def test_packed_rows(attend, make_case, assert_matches_oracle):
  assert_matches_oracle(attend, make_case(3, queries=45, keys=45, dim=64, packed=True))


@pytest.mark.parametrize('dim', [64, 128])
def test_bfloat16(attend, dim, make_case, assert_matches_oracle):
  assert_matches_oracle(attend, make_case(5, dim=dim, dtype=jnp.bfloat16), atol=3e-2)


@pytest.mark.long
def test_empty_intervals_give_zeros_and_no_gradient(attend, make_case):
  q, k, v, start, _, out_gradient, lse_gradient = make_case(1, dim=64)
  nowhere = np.full_like(start, 4)
  (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, nowhere, nowhere), q, k, v)
  for array in (out, *pull((out_gradient, lse_gradient))):
    np.testing.assert_array_equal(array, 0)
  assert (np.asarray(lse) < -1e29).all()


def test_huge_logits_stay_finite(attend, make_case):
  q, k, v, start, end, out_gradient, lse_gradient = make_case(2, dim=64)
  (out, lse), pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end), 100 * q, 100 * k, v)
  assert all(np.isfinite(a).all() for a in (out, lse, *pull((out_gradient, lse_gradient))))
  expected, _ = reference.attend(100 * q, 100 * k, v, start, end)
  np.testing.assert_allclose(out, expected, atol=2e-3)


def test_keys_outside_the_interval_do_not_matter(attend, make_case):
  q, k, v, start, end, *_ = make_case(3, dim=64)
  start[:], end[:] = 2, 6
  out, _ = attend(q, k, v, start, end)
  k, v = k.copy(), v.copy()
  k[:, 6:], v[:, 6:], k[:, :2], v[:, :2] = 1e6, -1e6, 1e6, 1e6
  np.testing.assert_array_equal(attend(q, k, v, start, end)[0], out)
