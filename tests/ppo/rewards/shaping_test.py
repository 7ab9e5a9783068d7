from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax.config import RewardConfig
from polar_jax.ppo.rewards.shaping import Normalizer, shape


def draw(rng, count):
  return (rng.normal(-3, 2, count) * rng.choice([0.01, 1, 30])).astype(np.float32)


def test_none_changes_nothing():
  raw = np.array([-0.57, 2.75, 1e-8, -1234.567], np.float32)
  got = Normalizer('none').normalize(raw, np.arange(4), None)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, raw)


def test_running_uses_all_scores_so_far_and_those_of_the_batch():
  rng = np.random.default_rng(0)
  normalizer, seen = Normalizer('running'), np.zeros(0)
  for count in (1, 5, 64, 0, 1, 200, 3):
    raw = draw(rng, count)
    seen = np.concatenate([seen, raw])
    got = normalizer.normalize(raw, np.zeros(count, int), None)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, (raw - np.mean(seen)) / (np.std(seen) + 1e-6), rtol=1e-5, atol=1e-6)


def test_running_keeps_the_spread_of_scores_far_from_zero():
  normalizer = Normalizer('running')
  for low in (0, 2, 4):
    got = normalizer.normalize(np.array([1e6 + low, 1e6 + low + 1], np.float32), np.zeros(2, int), None)
  expected = (np.array([4, 5]) - 2.5) / np.std(np.arange(6))
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_running_resumes_from_json_bit_for_bit():
  rng = np.random.default_rng(1)
  batches = [draw(rng, 37) for _ in range(6)]
  whole, resumed = Normalizer('running'), Normalizer('running')
  for raw in batches:
    expected = whole.normalize(raw, np.zeros(37, int), None)
    resumed = Normalizer.from_json(json.loads(json.dumps(resumed.to_json())))
    np.testing.assert_array_equal(resumed.normalize(raw, np.zeros(37, int), None), expected)
  assert resumed.to_json() == whole.to_json()
  assert whole.to_json()['count'] == 6 * 37


def test_equal_scores_become_zero():
  for kind in ('running', 'group'):
    normalizer = Normalizer(kind)
    for _ in range(2):
      got = normalizer.normalize(np.full(7, 0.1, np.float32), np.zeros(7, int), None)
      np.testing.assert_array_equal(got, np.zeros(7, np.float32))


def test_group_compares_the_responses_to_one_prompt():
  rng = np.random.default_rng(2)
  raw, group = draw(rng, 40), rng.integers(3, 12, 40)
  raw[group == 5] = 0.3
  got = Normalizer('group').normalize(raw, group, None)
  assert got.dtype == np.float32
  for g in set(group.tolist()):
    own = [float(r) for r, k in zip(raw, group, strict=True) if k == g]
    mean = sum(own) / len(own)
    std = (sum((r - mean) ** 2 for r in own) / len(own)) ** 0.5
    expected = [(r - mean) / (std + 1e-6) for r in own]
    np.testing.assert_allclose(got[group == g], expected, rtol=1e-4, atol=1e-6)
  assert not got[group == 5].any()


def test_reference_subtracts_the_reward_of_the_reference():
  raw, reference = np.array([1.5, -0.25, 3.0], np.float32), np.array([2.0, 0.5, 3.0], np.float32)
  np.testing.assert_array_equal(Normalizer('reference').normalize(raw, np.arange(3), reference), np.array([-0.5, -0.75, 0], np.float32))
  with pytest.raises(ValueError, match='rewards of the references'):
    Normalizer('reference').normalize(raw, np.arange(3), None)


def shaped(raw, length, stopped, *, max_new=100, **settings):
  config = RewardConfig(**settings)
  return shape(
    np.asarray(raw, np.float32),
    normalizer=Normalizer(config.normalize),
    group_R=np.arange(len(raw)),
    reference_score_R=None,
    length_R=np.asarray(length, np.int32),
    stopped_R=np.asarray(stopped),
    max_new=max_new,
    config=config,
  )


def test_the_defaults_change_nothing():
  raw = np.random.default_rng(3).normal(0, 5, 50).astype(np.float32)
  got, metrics = shaped(raw, [100] * 50, [False] * 50)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, raw)
  assert metrics == {
    'reward_std': pytest.approx(raw.std(), rel=1e-5),
    'reward_clipped': 0,
    'missing_eos_penalty': 0,
    'length_penalty': 0,
  }


def test_penalties_come_after_the_clip():
  got, metrics = shaped(
    [-7, -1.5, 0.25, 9], [10, 90, 95, 100], [True, True, True, False], clip=2.0, missing_eos_penalty=0.5, length_buffer=20
  )
  np.testing.assert_allclose(got, [-2, -1.5 - 0.5, 0.25 - 0.75, 2 - 0.5 - 1], rtol=1e-6)
  assert metrics['reward_clipped'] == 0.5
  assert metrics['missing_eos_penalty'] == pytest.approx(0.125)
  assert metrics['length_penalty'] == pytest.approx((0.5 + 0.75 + 1) / 4)


def test_the_clip_comes_after_the_normalization():
  got, metrics = shaped([100, 101, 102, 140], [1] * 4, [True] * 4, normalize='running', clip=1.0)
  z = (np.array([100, 101, 102, 140]) - 110.75) / np.std([100, 101, 102, 140])
  np.testing.assert_allclose(got, np.clip(z, -1, 1), rtol=1e-5)
  assert got[3] == 1 and metrics['reward_clipped'] == 0.25


def test_length_penalty_against_dapo():
  """The three cases of the paper, for every length."""
  max_new, buffer, factor = 60, 16, 0.7
  length = np.arange(1, max_new + 1)
  expected = []
  for n in length:
    if n <= max_new - buffer:
      expected.append(0.0)
    elif n <= max_new:
      expected.append(((max_new - buffer) - n) / buffer)
    else:
      expected.append(-1.0)
  got, _ = shaped(np.zeros(60), length, [True] * 60, max_new=max_new, length_buffer=buffer, length_penalty=factor)
  np.testing.assert_allclose(got, factor * np.array(expected), rtol=1e-6, atol=0)
  assert got[-1] == pytest.approx(-factor) and got[43] == 0 and got[44] < 0
  beyond, _ = shaped(np.zeros(2), [61, 90], [True] * 2, max_new=max_new, length_buffer=buffer, length_penalty=factor)
  np.testing.assert_allclose(beyond, [-factor, -factor], rtol=1e-6)  # no more than the whole penalty


@pytest.mark.parametrize('wrong', ['raw_R', 'reference_score_R'])
def test_integer_rewards_are_refused(wrong):
  arrays = {'raw_R': np.ones(3, np.float32), 'reference_score_R': np.ones(3, np.float32)}
  arrays[wrong] = arrays[wrong].astype(np.int32)
  with pytest.raises(TypeError, match=f'{wrong} must be float32, not int32'):
    shape(
      arrays['raw_R'],
      normalizer=Normalizer('reference'),
      group_R=np.arange(3),
      reference_score_R=arrays['reference_score_R'],
      length_R=np.ones(3, np.int32),
      stopped_R=np.ones(3, bool),
      max_new=4,
      config=RewardConfig(normalize='reference'),
    )


def test_no_responses():
  got, metrics = shaped(np.zeros(0), np.zeros(0), np.zeros(0, bool), normalize='running', length_buffer=3)
  assert got.shape == (0,) and got.dtype == np.float32
  assert all(np.isfinite(v) for v in metrics.values())
