from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_jax.ppo import losses

unhurried = settings(deadline=None)  # a property's first example waits for the compiler


def summed(function):
  """jit of (function's results, gradient of the sum of its loss in the first argument)."""

  def call(x, *rest):
    out = function(x, *rest)
    return out, jax.grad(lambda x: function(x, *rest)[0].sum())(x)

  return jax.jit(call)


dual = summed(losses.policy_loss)
single = summed(lambda *args: losses.policy_loss(*args, None))
clipped_value = summed(losses.value_loss)
free_value = summed(lambda *args: losses.value_loss(*args, None))


def policy_oracle(logprob, old, advantage, low, high, dual_clip):
  """(loss, flag, slope in logprob) of one token, from the objective case by case."""
  log_ratio = logprob - old
  ratio = math.exp(min(max(log_ratio, -20.0), 20.0))
  slope = -advantage * ratio if -20 < log_ratio < 20 else 0.0
  if advantage > 0 and ratio > 1 + high:
    return -advantage * (1 + high), 1.0, 0.0
  if advantage < 0 and ratio < 1 - low:
    return -advantage * (1 - low), 1.0, 0.0
  if advantage < 0 and dual_clip is not None and ratio > dual_clip:
    return -advantage * dual_clip, 0.0, 0.0
  return -advantage * ratio, 0.0, slope


def verl_policy_loss(logprob, old, advantage, low, high, c):
  """(loss, pg_clipfrac) of arrays by the minima and maxima in which verl writes it."""
  ratio = np.exp(np.clip(logprob - old, -20, 20))
  first, second = -advantage * ratio, -advantage * np.clip(ratio, 1 - low, 1 + high)
  worst = np.maximum(first, second)
  return (worst if c is None else np.where(advantage < 0, np.minimum(-advantage * c, worst), worst)), second > first


# The active branch changes at these log-ratios, where rounding may decide differently.
EDGES = [math.log(r) for r in (1 - 0.2, 1 + 0.28, 3.0)] + [-20.0, 20.0]
log_ratios = st.one_of(st.floats(-1.5, 1.5), st.floats(-60, 60)).filter(lambda x: all(abs(x - edge) > 1e-3 for edge in EDGES))


@unhurried
@given(st.lists(st.tuples(st.floats(-5, 0), log_ratios, st.integers(-48, 48)), min_size=12, max_size=12), st.booleans())
def test_policy_loss_against_the_slow_oracle(tokens, bounded):
  old, log_ratio, advantage = np.array(tokens, np.float32).T
  logprob, advantage = old + log_ratio, advantage / 16
  fixed = (0.2, 0.28, 3.0) if bounded else (0.2, 0.28)
  (loss, clipped), slope = (dual if bounded else single)(logprob, old, advantage, *fixed)
  most = 3.0 if bounded else None
  expected = [policy_oracle(float(n), float(o), float(a), 0.2, 0.28, most) for n, o, a in zip(logprob, old, advantage, strict=True)]
  for found, want in zip((loss, clipped, slope), zip(*expected, strict=True), strict=True):
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)
  published = verl_policy_loss(*(x.astype(np.float64) for x in (logprob, old, advantage)), 0.2, 0.28, most)
  for found, want in zip((loss, clipped), published, strict=True):
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-6)


def test_policy_loss_of_a_table_made_by_hand():
  # ratio, advantage -> loss, clipped, slope; clip 0.2 below and 0.3 above, dual clip 3
  table = [
    (1.0, 2.0, -2.0, 0, -2.0),  # the first update of a step: the plain policy gradient
    (1.0, -2.0, 2.0, 0, 2.0),
    (1.25, 2.0, -2.5, 0, -2.5),
    (1.5, 2.0, -2.6, 1, 0.0),  # enough gained
    (0.5, 2.0, -1.0, 0, -1.0),  # wrong way: never clipped
    (0.5, -2.0, 1.6, 1, 0.0),  # enough lost
    (2.0, -2.0, 4.0, 0, 4.0),  # wrong way
    (5.0, -2.0, 6.0, 0, 0.0),  # dual clip
    (5.0, 0.0, 0.0, 0, 0.0),
    (math.exp(25), 0.0, 0.0, 0, 0.0),
  ]
  ratio, advantage, *expected = np.array(table).T
  old = np.full(len(table), -0.5, np.float32)
  (loss, clipped), slope = dual((old + np.log(ratio)).astype(np.float32), old, advantage.astype(np.float32), 0.2, 0.3, 3.0)
  for found, want in zip((loss, clipped, slope), expected, strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-7)
  (loss, _), slope = single((old + np.log(ratio)).astype(np.float32), old, advantage.astype(np.float32), 0.2, 0.3)
  np.testing.assert_allclose([loss[7], slope[7]], [10.0, 10.0], rtol=1e-6)  # without the dual clip


@pytest.mark.parametrize('logprob', [-1e6, -math.inf, 1e6])
def test_policy_loss_of_absurd_probabilities_is_finite(logprob):
  tokens = np.full(3, logprob, np.float32), np.zeros(3, np.float32), np.array([-1, 0, 1], np.float32)
  (loss, clipped), slope = dual(*tokens, 0.2, 0.2, 3.0)
  assert np.isfinite(loss).all() and np.isfinite(clipped).all()
  np.testing.assert_array_equal(slope, 0)
  (loss, _), slope = single(*tokens, 0.2, 0.2)
  assert np.isfinite(loss).all() and np.isfinite(slope).all()


@pytest.mark.parametrize('bounded', [True, False])
def test_policy_loss_does_not_depend_on_the_position_of_a_token(bounded):
  rng = np.random.default_rng(1)
  tokens = rng.normal(size=(3, 12)).astype(np.float32)
  order = rng.permutation(12)
  call, fixed = (dual, (0.2, 0.28, 3.0)) if bounded else (single, (0.2, 0.28))
  once, moved = call(*tokens, *fixed), call(*tokens[:, order], *fixed)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[order], b), once, moved)


def value_oracle(value, old, return_, clip):
  near = min(max(value, old - clip), old + clip)
  free, bound = (value - return_) ** 2, (near - return_) ** 2
  return 0.5 * max(free, bound), float(bound > free), 0.0 if bound > free else value - return_


@unhurried
@given(st.lists(st.tuples(*[st.integers(-300, 300)] * 3), min_size=12, max_size=12))
def test_value_loss_against_the_slow_oracle(tokens):
  value, old, return_ = np.array(tokens, np.float32).T / 64  # exact in float32, so that ties are ties
  (loss, clipped), slope = clipped_value(value, old, return_, 0.5)
  expected = [value_oracle(float(v), float(o), float(r), 0.5) for v, o, r in zip(value, old, return_, strict=True)]
  for found, want in zip((loss, clipped, slope), zip(*expected, strict=True), strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-6)
  (loss, clipped), slope = free_value(value, old, return_)
  np.testing.assert_allclose(loss, (value.astype(np.float64) - return_) ** 2 / 2, rtol=1e-6)
  np.testing.assert_array_equal(clipped, 0)
  np.testing.assert_allclose(slope, value - return_, rtol=1e-6)


def test_value_loss_by_hand():
  # value, old value, return -> loss, clipped, slope; clip 0.5
  table = [
    (1.0, 1.0, 3.0, 2.0, 0, -2.0),
    (2.0, 1.0, 3.0, 1.125, 1, 0.0),  # moved 1 towards the return: judged as if it had moved 0.5
    (0.0, 1.0, 3.0, 4.5, 0, -3.0),  # moved away: its own error is the larger one
    (4.0, 1.0, 2.0, 2.0, 0, 2.0),  # far beyond the return
  ]
  value, old, return_, *expected = np.array(table, np.float32).T
  (loss, clipped), slope = clipped_value(value, old, return_, 0.5)
  for found, want in zip((loss, clipped, slope), expected, strict=True):
    np.testing.assert_allclose(found, want, rtol=1e-6)


@jax.jit
def read(logits, target):
  """Log-probabilities and entropies, and the gradients of their sums."""
  gradients = [jax.grad(lambda x, i=i: losses.logprob_and_entropy(x, target)[i].sum())(logits) for i in (0, 1)]
  return losses.logprob_and_entropy(logits, target), gradients


def read_oracle(logits, target):
  """((log-probability, entropy), gradients) of one token in float64, over the tokens of positive probability."""
  possible = [v for v in range(len(logits)) if logits[v] > -math.inf]
  top = max(float(logits[v]) for v in possible)
  total = sum(math.exp(float(logits[v]) - top) for v in possible)
  logp = {v: float(logits[v]) - top - math.log(total) for v in possible}
  entropy = -sum(math.exp(x) * x for x in logp.values())
  up = [float(v == target) - (math.exp(logp[v]) if v in logp else 0.0) for v in range(len(logits))]
  flat = [-math.exp(logp[v]) * (logp[v] + entropy) if v in logp else 0.0 for v in range(len(logits))]
  return (logp.get(target, -math.inf), entropy), (up, flat)


@unhurried
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1.0, 30.0]), st.sampled_from([0.0, 1e4, -1e4]))
def test_logprob_and_entropy_against_the_slow_oracle(seed, scale, offset):
  rng = np.random.default_rng(seed)
  logits = (rng.normal(size=(2, 3, 7)) * scale + offset).astype(np.float32)
  logits[rng.random(logits.shape) < 0.3] = -np.inf
  target = rng.integers(0, 7, (2, 3))
  logits[np.arange(2)[:, None], np.arange(3)[None], rng.integers(0, 7, (2, 3))] = offset  # at least one is possible
  (logprob, entropy), (up, flat) = read(logits, target)
  for b, t in np.ndindex(2, 3):
    (want_logprob, want_entropy), (want_up, want_flat) = read_oracle(logits[b, t], target[b, t])
    np.testing.assert_allclose(logprob[b, t], want_logprob, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(entropy[b, t], want_entropy, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(flat[b, t], want_flat, atol=3e-6)
    np.testing.assert_allclose(up[b, t], want_up, atol=1e-6)


def test_entropy_by_hand():
  logits = np.zeros((2, 3, 7), np.float32)
  logits[0, 0, 4:] = -np.inf  # four tokens alike
  logits[0, 1, 1:] = -np.inf  # one token
  logits[0, 2] = [200, 0, 0, 0, 0, 0, 0]  # one token as far as float32 goes
  (logprob, entropy), gradients = read(logits, np.zeros((2, 3), np.int32))
  np.testing.assert_allclose(entropy, [[math.log(4), 0, 0], [math.log(7)] * 3], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(logprob, [[-math.log(4), 0, 0], [-math.log(7)] * 3], rtol=1e-6, atol=1e-7)
  assert np.isfinite(gradients).all()


def test_logits_in_bfloat16_are_read_in_float32():
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, 7)) * 4, jnp.bfloat16)
  logprob, entropy = jax.jit(losses.logprob_and_entropy)(logits, np.ones((2, 3), np.int32))
  assert logprob.dtype == entropy.dtype == jnp.float32
  want_logprob, want_entropy = read_oracle(np.asarray(logits[1, 2], np.float32), 1)[0]
  np.testing.assert_allclose([logprob[1, 2], entropy[1, 2]], [want_logprob, want_entropy], rtol=2e-6)
