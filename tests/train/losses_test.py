"""Losses and their metrics against their definitions, with and without padding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.train import losses


def test_bradley_terry_against_its_definition():
  chosen, rejected = np.random.default_rng(0).normal(size=(2, 30)) * 3
  expected = [-math.log(1 / (1 + math.exp(-(c - r)))) for c, r in zip(chosen, rejected, strict=True)]
  np.testing.assert_allclose(losses.bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected)), expected, rtol=2e-6)


@pytest.mark.parametrize(('margin', 'loss', 'slope'), [(1e4, 0.0, 0.0), (-1e4, 1e4, -1.0), (0.0, math.log(2), -0.5), (200.0, 0.0, 0.0)])
def test_bradley_terry_is_stable(margin, loss, slope):
  value, gradient = jax.value_and_grad(losses.bradley_terry)(jnp.float32(margin), jnp.float32(0))
  np.testing.assert_allclose(value, loss, rtol=1e-7, atol=1e-30)
  np.testing.assert_allclose(gradient, slope, atol=1e-30)


def test_pair_sums_ignore_padding():
  rewards = np.array([[[1.0, -1.0]], [[0.5, 0.5]], [[np.nan, np.inf]], [[-2.0, 3.0]]], np.float32)
  mask = np.array([[1], [1], [0], [1]], np.float32)
  (loss, sums), gradient = jax.value_and_grad(losses.pair_sums, has_aux=True)(jnp.asarray(rewards), jnp.asarray(mask))
  expected = sum(math.log1p(math.exp(-m)) for m in (2.0, 0.0, -5.0))
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert {k: float(v) for k, v in sums.items()} == {'accuracy': 1.5, 'margin': -3.0, 'chosen_reward': -0.5, 'rejected_reward': 2.5}
  slope = lambda m: -1 / (1 + math.exp(m))
  real = [0, 1, 3]
  np.testing.assert_allclose(gradient[real, 0, 0], [slope(2), slope(0), slope(-5)], rtol=1e-6)
  np.testing.assert_allclose(gradient[real, 0, 1], [-slope(2), -slope(0), -slope(-5)], rtol=1e-6)


def test_several_pairs_in_a_row():
  rewards, mask = np.random.default_rng(1).normal(size=(3, 4, 2)).astype(np.float32), np.zeros((3, 4), np.float32)
  mask[0, :3] = mask[2, 1] = 1
  loss, sums = losses.pair_sums(jnp.asarray(rewards), jnp.asarray(mask))
  pairs = [rewards[0, 0], rewards[0, 1], rewards[0, 2], rewards[2, 1]]
  np.testing.assert_allclose(loss, sum(math.log1p(math.exp(r - c)) for c, r in pairs), rtol=1e-5)
  assert sums['accuracy'] == sum(c > r for c, r in pairs)


def test_next_token_sums():
  rng = np.random.default_rng(2)
  logits, target = rng.normal(size=(2, 3, 5)) * 4, rng.integers(0, 5, (2, 3))
  logits[0, 1] += 1e4  # the loss is invariant to a common offset
  mask = np.array([[1, 1, 0], [0, 1, 0]])
  expected, correct = 0.0, 0
  for b, t in zip(*np.nonzero(mask), strict=True):
    row = logits[b, t] - logits[b, t].max()
    expected += math.log(np.exp(row).sum()) - row[target[b, t]]
    correct += int(row.argmax() == target[b, t])
  loss, sums = losses.next_token_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(target), jnp.asarray(mask, jnp.float32))
  np.testing.assert_allclose(loss, expected, rtol=3e-4)
  assert sums['accuracy'] == correct
