"""Hand-written derivatives against those that JAX derives from the plain formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.model import layers


def _rng(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _plain_rms_norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 0.1) * jnp.broadcast_to(scale, x.shape)


def _plain_geglu(gate, up):
  return gate * up / (1 + jnp.exp(-np.sqrt(8 / np.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.long
@pytest.mark.parametrize(
  ('function', 'plain', 'inputs'),
  [
    (lambda x, scale: layers.rms_norm(x, scale, 0.1), _plain_rms_norm, (_rng(2, 5, 8), 1 + _rng(8))),
    (lambda x, scale: layers.rms_norm(x, scale, 0.1), _plain_rms_norm, (_rng(2, 5, 3, 8), 1 + _rng(8))),
    (lambda x, scale: layers.rms_norm(x, scale, 0.1, True), lambda x, scale: _plain_rms_norm(x, 1 + scale), (_rng(2, 5, 8), _rng(8))),
    (layers.geglu, _plain_geglu, (2 * _rng(2, 5, 8), _rng(2, 5, 8)[::-1])),
    (layers.swiglu, lambda gate, up: gate * jax.nn.sigmoid(gate) * up, (3 * _rng(2, 5, 8), _rng(2, 5, 8)[::-1])),
  ],
  ids=['rms_norm', 'rms_norm of heads', 'zero-centered rms_norm', 'geglu', 'swiglu'],
)
def test_derivatives_are_those_of_the_formula(function, plain, inputs):
  out, pull = jax.vjp(function, *inputs)
  expected, expected_pull = jax.vjp(plain, *inputs)
  np.testing.assert_allclose(out, expected, atol=1e-6)
  cotangent = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
  for gradient, wanted in zip(pull(cotangent), expected_pull(cotangent), strict=True):
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(gradient, wanted, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
  'function',
  [
    lambda x, y: layers.rms_norm(x, y[0, 0], 1e-5),
    lambda x, y: layers.rms_norm(x, y[0, 0], 1e-5, True),
    layers.swiglu,
    layers.geglu,
  ],
)
def test_derivatives_have_the_types_of_their_inputs(function):
  x = jnp.asarray(_rng(2, 3, 8), jnp.bfloat16)
  out, pull = jax.vjp(function, x, x)
  assert {a.dtype for a in (out, *pull(out))} == {jnp.dtype(jnp.bfloat16)}


def test_zero_centered_norm_scales_before_it_casts():
  """The order of Gemma, whose bits in bfloat16 differ from those of the other order."""
  x, scale = jnp.asarray(_rng(4, 5, 64), jnp.bfloat16), 0.5 * _rng(64)
  x32 = np.asarray(x, np.float32)
  normed = x32 / np.sqrt((x32 * x32).mean(-1, keepdims=True) + np.float32(1e-5))
  expected, other_order = (
    jnp.asarray(normed * (1 + scale), x.dtype),
    jnp.asarray(normed, x.dtype) * jnp.asarray(1 + scale, x.dtype)[None, None],
  )
  got = layers.rms_norm(x, scale, 1e-5, True)
  assert (got != expected).mean() < 0.01 and (got != other_order).mean() > 0.05


@pytest.mark.parametrize(
  ('shape', 'weight', 'inputs', 'formula'), [((2, 5, 8), (8, 3, 4), 1, 'btd,dnh->btnh'), ((2, 5, 3, 4), (3, 4, 8), 2, 'btnh,nhd->btd')]
)
def test_project_is_an_einsum(shape, weight, inputs, formula):
  x, w = _rng(*shape), _rng(*weight)
  np.testing.assert_allclose(layers.project(x, w, inputs), np.einsum(formula, x, w), atol=1e-5)
