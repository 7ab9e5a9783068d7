"""FLOPs of traced functions, against counts by hand and, without loops, those of XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from polar_jax.planning.matmuls import matmul_flops


def none(name, shapes):
  raise AssertionError(f'no kernel here: {name} {shapes}')


def count(function, *shapes, kernel=none):
  return matmul_flops(jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr, kernel)


def test_batched_products_by_hand():
  assert count(lambda a, b: jnp.einsum('bij,bjk->bik', a, b), (3, 4, 5), (3, 5, 6)) == 2 * 3 * 4 * 5 * 6
  assert count(lambda a: a + 1, (3, 4)) == 0


def test_loops_count_by_their_trip_counts():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jax.lax.scan(lambda y, _: (y @ w, None), x, None, length=3)[0], None), x, weights)[0]

  assert count(layers, (4, 8), (5, 8, 8)) == 5 * 3 * 2 * 4 * 8 * 8


def test_gradients_and_recomputation():
  def loss(x, weights, policy=None):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jnp.sum(jax.lax.scan(layer if policy is None else jax.checkpoint(layer, policy=policy), x, weights)[0])

  one = 5 * 2 * 4 * 8 * 8
  assert count(jax.grad(loss, argnums=(0, 1)), (4, 8), (5, 8, 8)) == 3 * one
  again = lambda x, w: loss(x, w, jax.checkpoint_policies.nothing_saveable)
  assert count(jax.grad(again, argnums=(0, 1)), (4, 8), (5, 8, 8)) == 4 * one


def test_a_conditional_counts_as_its_most_expensive_branch():
  def either(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w @ w)

  assert count(either, (4, 8), (8, 8)) == 2 * 2 * 4 * 8 * 8


def test_a_while_loop_with_products_is_refused():
  def until(x, w):
    return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

  with pytest.raises(ValueError, match='unknown length'):
    count(until, (8, 8), (8, 8))


def test_agrees_with_xla_without_loops():
  def mlp(x, a, b):
    return jnp.sum(jnp.tanh((x @ a) @ b))

  shapes = ((64, 128), (128, 256), (256, 32))
  lowered = jax.jit(jax.grad(mlp, argnums=(0, 1, 2))).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
  assert count(jax.grad(mlp, argnums=(0, 1, 2)), *shapes) == pytest.approx(lowered.cost_analysis()['flops'], rel=0.02)
