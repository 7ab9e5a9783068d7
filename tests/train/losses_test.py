"""Losses and their metrics against their definitions, with and without padding."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.config import ConfigError, LossConfig
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


REWARDS = np.random.default_rng(4).normal(size=(5, 6, 2)).astype(np.float32) * 4  # rows, pairs, candidates; some outside of +-5
MASK = (np.random.default_rng(5).random((5, 6)) < 0.7).astype(np.float32)
MARGIN, WEIGHT = (np.random.default_rng(seed).random((5, 6)).astype(np.float32) * 3 for seed in (6, 7))


def _sigmoid(x):
  return 1 / (1 + math.exp(-x))


def _barrier(reward, bound):
  inside = min(max(reward, -bound + 1e-3), bound - 1e-3)
  return -math.log(bound - inside) - math.log(inside + bound)


# The part of a pair's loss that each option defines, from chosen reward, rejected reward and margin, as TRL and XTuner publish it.
ORACLES = {
  'bradley_terry': (LossConfig(), lambda c, r, m: -math.log(_sigmoid(c - r - m))),
  'focal': (LossConfig('focal'), lambda c, r, m: (1 - 2 * max(_sigmoid(c - r - m) - 0.5, 0)) ** 2 * -math.log(_sigmoid(c - r - m))),
  'plackett_luce': (LossConfig('plackett_luce'), lambda c, r, m: math.log(math.exp(c - m) + math.exp(r)) - (c - m)),
  'label_smoothing': (
    LossConfig(label_smoothing=0.1),
    lambda c, r, m: -0.9 * math.log(_sigmoid(c - r - m)) - 0.1 * math.log(_sigmoid(r + m - c)),
  ),
  'centered': (
    LossConfig(center_rewards_coefficient=0.02),
    lambda c, r, m: -math.log(_sigmoid(c - r - m)) + 0.02 * (c + r) ** 2,
  ),
  'log_barrier': (
    LossConfig(penalty='log_barrier', penalty_weight=0.05, penalty_bound=4.0),
    lambda c, r, m: -math.log(_sigmoid(c - r - m)) + 0.05 * (_barrier(c, 4) + _barrier(r, 4)),
  ),
  'focal with all': (
    LossConfig('focal', center_rewards_coefficient=0.1, penalty='l2'),
    lambda c, r, m: ORACLES['focal'][1](c, r, m) + 0.1 * (c + r) ** 2 + 0.01 * (c**2 + r**2),
  ),
}


@pytest.mark.parametrize('name', ORACLES)
@pytest.mark.parametrize('margins', [False, True])
@pytest.mark.parametrize('weights', [False, True])
def test_losses_of_pairs_against_their_published_definitions(name, margins, weights):
  options, oracle = ORACLES[name]
  margin, weight = MARGIN if margins else None, WEIGHT if weights else None
  loss, sums = losses.pair_sums(jnp.asarray(REWARDS), jnp.asarray(MASK), options, margin, weight)
  expected, accuracy, regularization = 0.0, 0.0, 0.0
  for b, p in zip(*np.nonzero(MASK), strict=True):
    (c, r), w, m = REWARDS[b, p].tolist(), float(WEIGHT[b, p]) if weights else 1.0, float(MARGIN[b, p]) if margins else 0.0
    expected += w * oracle(c, r, m)
    regularization += w * (oracle(c, r, m) - ORACLES[options.name if not options.label_smoothing else name][1](c, r, m))
    accuracy += w * (c > r)  # margins do not count in the metrics
  np.testing.assert_allclose(loss, expected, rtol=2e-5)
  np.testing.assert_allclose(sums['accuracy'], accuracy, rtol=1e-6)
  adds = options.penalty != 'none' or options.center_rewards_coefficient
  assert ('regularization' in sums) == bool(adds)
  if adds:
    np.testing.assert_allclose(sums['regularization'], regularization, rtol=1e-3)


def test_without_options_the_loss_is_bradley_terry_to_the_bit():
  plain, sums = losses.pair_sums(jnp.asarray(REWARDS), jnp.asarray(MASK))
  expected = jnp.sum(jnp.where(MASK > 0, losses.bradley_terry(REWARDS[..., 0], REWARDS[..., 1]), 0.0))
  assert float(plain) == float(expected) and set(sums) == {'accuracy', 'margin', 'chosen_reward', 'rejected_reward'}
  for name in ('plackett_luce', 'bradley_terry'):
    assert float(losses.pair_sums(jnp.asarray(REWARDS), jnp.asarray(MASK), LossConfig(name))[0]) == float(plain)


def test_a_reward_outside_of_the_barrier_has_a_finite_penalty_without_gradient():
  value, gradient = jax.vmap(jax.value_and_grad(lambda r: losses.log_barrier(r, 5.0)))(jnp.array([-40.0, -4.0, 0.0, 4.0, 7.0, 1e6]))
  np.testing.assert_allclose(np.asarray(value)[[0, 4, 5]], _barrier(7, 5), rtol=1e-6)
  np.testing.assert_allclose(gradient, [0, 1 / 9 - 1, 0, 1 - 1 / 9, 0, 0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('name', ORACLES)
def test_losses_are_finite_for_rewards_of_any_size(name):
  options, _ = ORACLES[name]
  far = jnp.array([[[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]]])
  loss, gradient = jax.value_and_grad(lambda r: losses.pair_sums(r, jnp.ones((1, 3)), options)[0])(far)
  assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_contradictory_options_are_refused():
  with pytest.raises(ConfigError, match=r"finetune\.loss\.label_smoothing is set, but finetune\.loss\.name is 'focal'"):
    LossConfig('focal', label_smoothing=0.1).check('finetune.loss')
  with pytest.raises(ConfigError, match=r"loss\.name is 'hinge'; it must be one of: bradley_terry, focal, plackett_luce"):
    LossConfig('hinge').check()


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
