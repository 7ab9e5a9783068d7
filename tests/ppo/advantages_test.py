from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polar_jax.ppo import advantages

R, T, WIDE = 4, 6, 9
unhurried = settings(deadline=None)  # a property's first example waits for the compiler
kl = jax.jit(advantages.kl, static_argnums=2)
token_rewards = jax.jit(advantages.token_rewards)
gae = jax.jit(advantages.gae)
whiten = jax.jit(advantages.whiten)
grpo = jax.jit(advantages.grpo, static_argnums=2)
rloo = jax.jit(advantages.rloo, static_argnums=2)
loss_weights = jax.jit(advantages.loss_weights, static_argnums=1)

lengths = st.lists(st.integers(0, T), min_size=R, max_size=R)  # 0: a response that was dropped
seeds = st.integers(0, 2**32 - 1)
rates = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def prefix_mask(length_R, width=T):
  return (np.arange(width)[None] < np.asarray(length_R)[:, None]).astype(np.float32)


def draw(seed, *shape, mask=None):
  """Return normal numbers, NaN where the mask is 0, so that a function which reads those is noticed."""
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return x if mask is None else np.where(mask > 0, x, np.float32(np.nan))


def widen(x_RT, fill=np.nan):
  return np.pad(x_RT, [(0, 0), (0, WIDE - T)], constant_values=fill)


def test_kl_against_the_definitions():
  logprob, reference = draw(0, 5, 8) * 2, draw(1, 5, 8) * 2
  ratio = np.exp(reference.astype(np.float64) - logprob)  # reference over policy
  np.testing.assert_allclose(kl(logprob, reference, 'k1'), -np.log(ratio), rtol=1e-5)
  np.testing.assert_allclose(kl(logprob, reference, 'k2'), np.log(ratio) ** 2 / 2, rtol=1e-5)
  np.testing.assert_allclose(kl(logprob, reference, 'k3'), np.minimum(ratio - 1 - np.log(ratio), 10), rtol=1e-4)
  with pytest.raises(ValueError, match="KL estimator 'k4' does not exist; choose k1, k2 or k3"):
    kl(logprob, reference, 'k4')


def test_kl_by_hand():
  policy, reference = np.log(np.array([0.5, 0.5, 0.25], np.float32)), np.log(np.array([0.25, 0.5, 0.5], np.float32))
  np.testing.assert_allclose(kl(policy, reference, 'k1'), [math.log(2), 0, -math.log(2)], rtol=1e-6)
  np.testing.assert_allclose(kl(policy, reference, 'k2'), [math.log(2) ** 2 / 2, 0, math.log(2) ** 2 / 2], rtol=1e-6)
  np.testing.assert_allclose(kl(policy, reference, 'k3'), [0.5 - 1 + math.log(2), 0, 2 - 1 - math.log(2)], rtol=1e-6)


def test_bounds_and_slopes_of_k3():
  log_ratio = np.array([-200.0, -21.0, -4.0, -1.0, 0.0, 1.0, 4.0, 15.0, 25.0, np.inf], np.float32)  # log(policy / reference)
  found, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: advantages.kl(x, jnp.zeros(()), 'k3'))))(log_ratio)
  np.testing.assert_allclose(found, [10, 10, 10, math.e - 2, 0, 1 / math.e, math.exp(-4) + 3, 10, 10, 10], rtol=1e-6)
  np.testing.assert_allclose(slope, [0, 0, 0, 1 - math.e, 0, 1 - 1 / math.e, 1 - math.exp(-4), 0, 0, 0], rtol=1e-6)


def test_k3_of_a_small_ratio_is_not_rounding():
  x = np.array([1e-3, -1e-3, 3e-3], np.float32)
  np.testing.assert_allclose(kl(x, np.zeros(3, np.float32), 'k3'), np.expm1(-x.astype(np.float64)) + x, rtol=1e-3)


def test_the_mean_of_k1_and_of_k3_is_the_kl():
  policy, reference = (p / p.sum() for p in np.exp(draw(2, 2, 50) / 2))
  exact = float(np.sum(policy * np.log(policy / reference)))
  for estimator in ('k1', 'k3'):
    np.testing.assert_allclose(np.sum(policy * kl(np.log(policy), np.log(reference), estimator)), exact, rtol=1e-5)


@unhurried
@given(lengths, seeds)
def test_token_rewards_against_the_slow_oracle(length_R, seed):
  mask = prefix_mask(length_R)
  score, kl_RT = draw(seed, R), draw(seed + 1, R, T, mask=mask)
  expected = np.zeros((R, T))
  for r in range(R):
    for t in range(length_R[r]):
      expected[r, t] = -0.3 * kl_RT[r, t] + (score[r] if t == length_R[r] - 1 else 0)
  found = token_rewards(score, kl_RT, mask, 0.3)
  np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)
  wide = token_rewards(score, widen(kl_RT), widen(mask, 0), 0.3)
  np.testing.assert_array_equal(wide, widen(found, 0))


def gae_oracle(rewards, values, gamma, lam):
  """Return the result for one response without padding, as the explicit sum over later steps of equation 16."""
  n = len(rewards)
  delta = [rewards[t] + (gamma * values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
  advantage = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
  return advantage, [a + v for a, v in zip(advantage, values, strict=True)]


@unhurried
@given(lengths, seeds, rates, rates)
def test_gae_against_the_slow_oracle(length_R, seed, gamma, lam):
  mask = prefix_mask(length_R)
  rewards, values = draw(seed, R, T, mask=mask), draw(seed + 1, R, T, mask=mask)
  advantage, return_ = np.zeros((2, R, T))
  for r, n in enumerate(length_R):
    advantage[r, :n], return_[r, :n] = gae_oracle(*(x[r, :n].astype(np.float64).tolist() for x in (rewards, values)), gamma, lam)
  found = gae(rewards, values, mask, gamma, lam)
  np.testing.assert_allclose(found[0], advantage, rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(found[1], return_, rtol=1e-5, atol=2e-6)
  wide = gae(widen(rewards), widen(values), widen(mask, 0), gamma, lam)
  for narrow_RT, wide_RT in zip(found, wide, strict=True):
    np.testing.assert_array_equal(wide_RT, widen(narrow_RT, 0))


def verl_gae(rewards, values, mask, gamma, lam):
  """Return the backward recursion of verl 0.5, column by column, without whitening."""
  following, running, out = np.zeros(len(mask)), np.zeros(len(mask)), np.zeros(mask.shape)
  for t in range(mask.shape[1] - 1, -1, -1):
    candidate = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * running
    following = mask[:, t] * values[:, t] + (1 - mask[:, t]) * following
    running = mask[:, t] * candidate + (1 - mask[:, t]) * running
    out[:, t] = running
  return out, out + values


@unhurried
@given(st.lists(st.booleans(), min_size=R * T, max_size=R * T), seeds, rates, rates)
def test_gae_equals_verls_under_any_mask(mask, seed, gamma, lam):
  mask = np.array(mask, np.float32).reshape(R, T)
  rewards, values = draw(seed, R, T), draw(seed + 1, R, T)
  expected = verl_gae(*(x.astype(np.float64) for x in (rewards, values, mask)), gamma, lam)
  hole = lambda x: np.where(mask > 0, x, np.float32(np.nan))
  for found, want in zip(gae(hole(rewards), hole(values), mask, gamma, lam), expected, strict=True):
    np.testing.assert_allclose(found, want * mask, rtol=1e-5, atol=2e-6)


def test_gae_by_hand():
  mask = prefix_mask([3, 1, 0, 0])
  rewards, values = np.zeros((R, T), np.float32), np.zeros((R, T), np.float32)
  rewards[0, :3], values[0, :3] = [0, 1, 4], [1, 2, 3]
  rewards[1, 0], values[1, 0] = -1, 0.5
  # deltas of the first response at gamma 1/2: 0 + 1 - 1, 1 + 1.5 - 2, 4 - 3
  advantage, return_ = gae(rewards, values, mask, 0.5, 0.5)
  np.testing.assert_allclose(advantage[:2, :3], [[0.1875, 0.75, 1], [-1.5, 0, 0]])
  np.testing.assert_allclose(return_[:2, :3], [[1.1875, 2.75, 4], [-1, 0, 0]])


@unhurried
@given(lengths, seeds)
def test_gae_of_the_official_settings_is_score_minus_value(length_R, seed):
  mask = prefix_mask(length_R)
  score, values = draw(seed, R), draw(seed + 1, R, T, mask=mask)
  advantage, return_ = gae(token_rewards(score, np.zeros((R, T), np.float32), mask, 0.0), values, mask, 1.0, 1.0)
  np.testing.assert_allclose(advantage, np.where(mask > 0, score[:, None] - values, 0), rtol=1e-5, atol=2e-6)
  np.testing.assert_allclose(return_, score[:, None] * mask, rtol=1e-5, atol=2e-6)


@unhurried
@given(lengths, seeds, st.permutations(range(R)))
def test_rollouts_do_not_affect_each_other(length_R, seed, order):
  mask = prefix_mask(length_R)
  rewards, values = draw(seed, R, T, mask=mask), draw(seed + 1, R, T, mask=mask)
  once = gae(rewards, values, mask, 0.95, 0.9)
  for found, moved in zip(once, gae(rewards[order], values[order], mask[order], 0.95, 0.9), strict=True):
    np.testing.assert_array_equal(found[np.array(order)], moved)


@unhurried
@given(lengths, seeds)
def test_whiten_against_the_slow_oracle(length_R, seed):
  mask = prefix_mask(length_R)
  x = draw(seed, R, T, mask=mask) * 3 + 100
  real = x[mask > 0].astype(np.float64)
  expected = np.zeros((R, T))
  if len(real) > 1:
    mean = sum(real) / len(real)
    variance = sum((real - mean) ** 2) / (len(real) - 1)
    expected[mask > 0] = (real - mean) / math.sqrt(variance + 1e-8)
  found = whiten(x, mask)
  np.testing.assert_allclose(found, expected, atol=1e-3)  # float32 resolves numbers near 100 to 8e-6
  np.testing.assert_allclose(whiten(widen(x), widen(mask, 0)), widen(found, 0), atol=1e-4)


def test_whiten_by_hand():
  mask = prefix_mask([2, 0, 1, 0])
  x = np.full((R, T), np.nan, np.float32)
  x[0, :2], x[2, 0] = [1, 2], 6
  expected = np.zeros((R, T))
  expected[0, :2], expected[2, 0] = np.array([-2, -1]) / math.sqrt(7), 3 / math.sqrt(7)  # mean 3, variance (4 + 1 + 9) / 2
  np.testing.assert_allclose(whiten(x, mask), expected, rtol=1e-6)
  np.testing.assert_array_equal(whiten(x, prefix_mask([0, 0, 1, 0])), 0)  # one token: only the mean is removed
  np.testing.assert_array_equal(whiten(x, np.zeros((R, T), np.float32)), 0)
  np.testing.assert_array_equal(whiten(np.full((R, T), 0.5, np.float32), np.ones((R, T), np.float32)), 0)


def test_whiten_adds_1e_8_to_the_variance():
  """Which shows where the values hardly vary."""
  x = np.zeros((R, T), np.float32)
  x[0, :2] = [1e-4, -1e-4]
  mask = prefix_mask([2, 0, 0, 0])
  np.testing.assert_allclose(np.asarray(whiten(x, mask))[0, :2], np.array([1e-4, -1e-4]) / math.sqrt(2e-8 + 1e-8), rtol=1e-5)


def test_no_gradient_flows_through_padding():
  mask = prefix_mask([3, 1, 0, 6])
  kl_RT, values = draw(0, R, T, mask=mask), draw(1, R, T, mask=mask)

  @functools.partial(jax.jit, static_argnums=3)
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(score, kl_RT, values, whitened):
    advantage, return_ = advantages.gae(advantages.token_rewards(score, kl_RT, mask, 0.1), values, mask, 0.9, 0.8)
    advantage = advantages.whiten(advantage, mask) if whitened else advantage
    return jnp.sum(jnp.sin(advantage) + jnp.cos(return_))

  for whitened in (True, False):
    score_R, *others = gradients(draw(2, R), kl_RT, values, whitened)
    assert np.isfinite(score_R).all() and score_R[2] == 0 and (score_R[np.array([0, 1, 3])] != 0).all()
    for found in others:
      np.testing.assert_array_equal(found[mask == 0], 0)
      assert np.isfinite(found).all() and (found[mask > 0] != 0).all()


def group_oracle(scores, groups):
  """Return (GRPO, RLOO) by a loop over the members of each group."""
  normal, left_out = [], []
  for score, group in zip(scores, groups, strict=True):
    members = [s for s, g in zip(scores, groups, strict=True) if g == group]
    if len(members) == 1:
      normal.append(0.0), left_out.append(0.0)
      continue
    mean = sum(members) / len(members)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in members) / (len(members) - 1))
    normal.append((score - mean) / (deviation + 1e-6))
    left_out.append(score - (sum(members) - score) / (len(members) - 1))
  return normal, left_out


groups = st.lists(st.integers(0, 3), min_size=7, max_size=7)


@unhurried
@given(groups, st.lists(st.integers(-30, 30), min_size=7, max_size=7))
def test_group_advantages_against_the_slow_oracle(group_R, scores):
  score_R = np.array(scores, np.float32) / 4
  normal, left_out = group_oracle(score_R.tolist(), group_R)
  np.testing.assert_allclose(grpo(score_R, np.array(group_R), 4), normal, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(rloo(score_R, np.array(group_R), 4), left_out, rtol=1e-5, atol=1e-5)


@unhurried
@given(groups, seeds, st.permutations(range(7)))
def test_group_advantages_sum_to_zero_in_any_order(group_R, seed, order):
  score_R, group_R, order = draw(seed, 7), np.array(group_R), np.array(order)
  for function in (grpo, rloo):
    found = np.asarray(function(score_R, group_R, 4))
    np.testing.assert_allclose(np.bincount(group_R, found), 0, atol=2e-5)
    np.testing.assert_allclose(function(score_R[order], group_R[order], 4), found[order], rtol=1e-4, atol=1e-5)


def test_group_advantages_by_hand():
  score_R, group_R = np.array([1, 5, 3, 7, 2, 2, 2], np.float32), np.array([0, 2, 0, 1, 2, 2, 2])
  low = -0.75 / 1.5  # of 5, 2, 2, 2: mean 2.75, variance (5.0625 + 3 * 0.5625) / 3
  np.testing.assert_allclose(grpo(score_R, group_R, 4), [-1 / math.sqrt(2), 1.5, 1 / math.sqrt(2), 0, low, low, low], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(rloo(score_R, group_R, 4), [-2, 3, 2, 0, -1, -1, -1], rtol=1e-6)


@unhurried
@given(st.floats(-50, 50, width=32))
def test_equal_scores_have_no_advantage(score):
  score_R, group_R = np.full(7, score, np.float32), np.array([0, 0, 0, 1, 1, 1, 1])
  np.testing.assert_array_equal(grpo(score_R, group_R, 4), 0)
  np.testing.assert_array_equal(rloo(score_R, group_R, 4), 0)


def test_next_kl_coef_by_hand():
  step = lambda measured: advantages.next_kl_coef(0.1, measured, target=6.0, horizon=10_000, responses=500)
  assert step(6.0) == 0.1
  assert step(6.6) == pytest.approx(0.1 * (1 + 0.1 * 0.05))
  assert step(5.4) == pytest.approx(0.1 * (1 - 0.1 * 0.05))
  assert step(60.0) == step(7.3) == pytest.approx(0.101)
  assert step(-3.0) == step(0.0) == pytest.approx(0.099)
  with pytest.raises(ValueError, match='a horizon of 100 responses is too short for steps of 500; it must exceed 100'):
    advantages.next_kl_coef(0.1, 1.0, 6.0, 100, 500)


def test_next_kl_coef_steers_to_the_target():
  coef, found = 1e-3, []
  for _ in range(400):
    found.append(0.05 / (0.1 + coef))  # the larger the coefficient, the closer the policy stays
    coef = advantages.next_kl_coef(coef, found[-1], target=0.1, horizon=1_000, responses=256)
  assert found[0] > 0.4 and found[-1] == pytest.approx(0.1, rel=1e-3)


@unhurried
@given(lengths, seeds)
def test_loss_weights_against_the_slow_oracle(length_R, seed):
  assume(any(length_R))
  mask, loss = prefix_mask(length_R), draw(seed, R, T)
  rows = [loss[r, :n].astype(np.float64) for r, n in enumerate(length_R) if n]
  for mode, expected in (('token', np.concatenate(rows).mean()), ('sequence', np.mean([row.mean() for row in rows]))):
    weight = loss_weights(mask, mode)
    np.testing.assert_allclose(np.sum(weight), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(weight) > 0, mask > 0)
    np.testing.assert_allclose(np.sum(weight * loss), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(loss_weights(widen(mask, 0), mode), widen(weight, 0))


def test_loss_weights_by_hand():
  mask = prefix_mask([1, 0, 3, 0])
  np.testing.assert_allclose(loss_weights(mask, 'token'), mask / 4)
  np.testing.assert_allclose(loss_weights(mask, 'sequence'), mask * np.array([[1 / 2], [0], [1 / 6], [0]]), rtol=1e-6)
  for mode in ('token', 'sequence'):
    np.testing.assert_array_equal(loss_weights(np.zeros((R, T), np.float32), mode), 0)
  with pytest.raises(ValueError, match="mean 'batch' of losses does not exist; choose 'token'"):
    loss_weights(mask, 'batch')
