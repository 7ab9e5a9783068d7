"""Advantages of a step by every method, against float64 oracles."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.config import RftConfig
from polar_jax.ppo.experience import estimate_advantages

GAMMA, LAMBDA, KL_COEF = 0.9, 0.5, 0.3
GROUP = np.array([0, 0, 1, 1], np.int32)
LENGTH = np.array([3, 1, 2, 4])
MASK = (np.arange(4)[None] < LENGTH[:, None]).astype(np.float32)


@pytest.fixture(scope='module')
def arrays():
  rng = np.random.default_rng(0)
  score, kl, value = (rng.normal(size=shape).astype(np.float32) for shape in (4, (4, 4), (4, 4)))
  return score, kl * MASK, value * MASK


def estimate(arrays, **settings):
  score, kl, value = arrays
  config = RftConfig(num_generations=2, gamma=GAMMA, gae_lambda=LAMBDA, **settings)
  return [np.asarray(x) for x in estimate_advantages(config, 2, score, kl, value, MASK, GROUP, np.float32(KL_COEF))]


def token_rewards(arrays, kl_in):
  """Rewards by hand: the score at the last token, and the penalty for KL at every one, only if `kl_in` is 'reward'."""
  score, kl, _ = arrays
  rewards = -KL_COEF * kl.astype(np.float64) if kl_in == 'reward' else np.zeros((4, 4))
  rewards[np.arange(4), LENGTH - 1] += score
  return rewards


@pytest.mark.parametrize('kl_in', ['none', 'reward', 'loss'])
@pytest.mark.parametrize('whiten', [False, True])
def test_gae(arrays, kl_in, whiten):
  rewards, value = token_rewards(arrays, kl_in), arrays[2].astype(np.float64)
  advantage = np.zeros((4, 4))
  for r, n in enumerate(LENGTH):
    following = 0.0
    for t in reversed(range(n)):
      delta = rewards[r, t] + (GAMMA * value[r, t + 1] if t + 1 < n else 0.0) - value[r, t]
      advantage[r, t] = following = delta + GAMMA * LAMBDA * following
  returns = (advantage + value) * MASK
  if whiten:
    valid = advantage[MASK > 0]
    advantage = (advantage - valid.mean()) / valid.std(ddof=1) * MASK
  found, found_returns = estimate(arrays, kl_in=kl_in, kl_estimator='k2', whiten=whiten)
  np.testing.assert_allclose(found, advantage, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found_returns, returns, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kl_in', ['none', 'reward', 'loss'])
@pytest.mark.parametrize('method', ['rloo', 'grpo'])
def test_methods_without_a_critic_compare_whole_rewards_within_a_group(arrays, kl_in, method):
  total = token_rewards(arrays, kl_in).sum(axis=1)
  difference = total[::2] - total[1::2]
  halves = np.stack([difference, -difference], axis=1).ravel()
  expected = halves if method == 'rloo' else halves / 2 / (np.abs(difference).repeat(2) / np.sqrt(2) + 1e-6)
  found, returns = estimate(arrays, kl_in=kl_in, kl_estimator='k2', advantage=method)
  np.testing.assert_allclose(found, expected[:, None] * MASK, rtol=1e-5, atol=1e-6)
  assert not returns.any()
