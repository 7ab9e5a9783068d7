"""Alarms: when they are raised, when they are silent, and after a resume."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from polar_jax.config import AlarmConfig
from polar_jax.ppo.alarms import Alarms


def steps(key, values, first=1):
  return [{'step': first + i, **({} if v is None else {key: v})} for i, v in enumerate(values)]


@pytest.mark.parametrize(
  ('option', 'key', 'limit', 'good', 'bad'),
  [
    ('max_kl', 'kl', 0.5, 0.1, 0.9),
    ('min_entropy', 'entropy', 1.0, 2.0, 0.1),
    ('max_truncated', 'truncated', 0.5, 0.0, 1.0),
    ('max_empty', 'empty', 0.1, 0.05, 0.8),
    ('min_shuffled_gap', 'shuffled_gap', 0.0, 1.0, -1.0),
    ('max_shuffled_rise', 'shuffled_rise', 0.5, 0.1, 1.2),
    ('max_overlap', 'overlap', 0.5, 0.2, 0.9),
  ],
)
def test_alarm_is_raised_once_until_it_clears(option, key, limit, good, bad):
  alarms = Alarms(AlarmConfig(window=2, **{option: limit}))
  records = steps(key, [good, good, bad, bad, bad, good, good, bad, bad])
  raised = {n: alarms.check(records[:n]) for n in range(len(records) + 1)}
  mean = np.mean([bad, good])
  beyond = mean > limit if option.startswith('max') else mean < limit  # whether one bad step of two is enough
  assert [n for n, lines in raised.items() if lines] == ([3, 8] if beyond else [4, 9])
  (line,) = raised[3 if beyond else 4]
  assert line.startswith(f'step {3 if beyond else 4}: {key} {mean if beyond else bad:.4g} ') and f'rft.alarms.{option}' in line
  assert f'{limit:.4g} ' in line and 'it may mean that' in line and '\n' not in line
  assert alarms.history(records) == [line for lines in raised.values() for line in lines]
  assert Alarms(AlarmConfig(window=2)).history(records) == []


def test_a_mean_at_its_limit_raises_no_alarm():
  assert Alarms(AlarmConfig(window=1, max_kl=0.5, min_entropy=0.5)).history([{'step': 1, 'kl': 0.5, 'entropy': 0.5}]) == []


def test_resumed_run_raises_the_same_alarms():
  rng = np.random.default_rng(0)
  records = [{'step': s, 'kl': float(k), 'entropy': float(e)} for s, (k, e) in enumerate(rng.random((60, 2)), 1)]
  config = AlarmConfig(window=3, max_kl=0.5, min_entropy=0.5)
  whole = [Alarms(config).check(records[:n]) for n in range(1, 61)]
  assert 5 < sum(map(len, whole)) < 60
  for cut in (1, 7, 30):
    restored = [json.loads(json.dumps(record)) for record in records[:cut]]
    resumed = Alarms(config)
    for n in range(cut + 1, 61):
      assert resumed.check([*restored, *records[cut:n]]) == whole[n - 1]
  assert [Alarms(config).check(records[max(0, n - 4) : n]) for n in range(1, 61)] == whole  # window + 1 records suffice


def test_window_counts_only_steps_that_measured_the_metric():
  alarms = Alarms(AlarmConfig(window=2, min_shuffled_gap=0.0))
  records = steps('shuffled_gap', [-1.0, None, None, -1.0, None, None, -1.0])
  assert [n for n in range(8) if alarms.check(records[:n])] == [4]
  assert Alarms(AlarmConfig(window=5, min_shuffled_gap=0.0)).history(records) == []


def test_a_value_that_is_not_finite_is_beyond_its_limit():
  (line,) = Alarms(AlarmConfig(window=2, max_kl=0.5)).history(steps('kl', [0.1, 0.1, math.nan]))
  assert line.startswith('step 3: kl nan > 0.5')
