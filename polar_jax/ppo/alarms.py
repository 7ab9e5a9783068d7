"""Alarms on metrics that a rising reward alone does not explain: signs of reward hacking."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.config import AlarmConfig


@dataclasses.dataclass(frozen=True)
class _Alarm:
  option: str  # of AlarmConfig; its prefix says which side of the limit is bad
  key: str  # of a record of metrics.jsonl
  unit: str
  meaning: str  # what it may mean
  remedy: str


_ALARMS = (
  _Alarm(
    'max_kl',
    'kl',
    'nats per token',
    'the policy is far from its reference policy, where a high reward proves little',
    'lower rft.actor.learning_rate, set rft.kl_in or raise rft.kl_coef, or keep an earlier checkpoint',
  ),
  _Alarm(
    'min_entropy',
    'entropy',
    'nats per token',
    'responses become alike and exploration ends',
    'raise rft.entropy_coef, lower rft.actor.learning_rate, or keep an earlier checkpoint',
  ),
  _Alarm(
    'max_truncated',
    'truncated',
    'of the responses',
    'responses grow, or no longer end',
    'raise rft.rollout.max_new, or set rft.reward.missing_eos_penalty or rft.reward.length_buffer',
  ),
  _Alarm(
    'max_empty',
    'empty',
    'of the responses',
    'empty responses earn more than the others',
    'set rft.rollout.min_new, and check which score the reward model gives to empty responses',
  ),
  _Alarm(
    'min_shuffled_gap',
    'shuffled_gap',
    'score',
    'the reward hardly depends on the reference: responses score well whatever they are compared with',
    'read samples.jsonl, use another rft.reward.checkpoint or a larger rft.reward.rule_weight, or keep an earlier checkpoint',
  ),
  _Alarm(
    'max_shuffled_rise',
    'shuffled_rise',
    'score',
    'the policy finds what the reward model likes under any reference',
    "set rft.kl_in='reward' or raise rft.kl_coef (docs/rft.md has a rule for its size), or keep an earlier checkpoint",
  ),
  _Alarm(
    'max_overlap',
    'overlap',
    "of a response's words occur in its reference",
    'prompts give their references away, or the policy has memorized the references',
    'read samples.jsonl, check the prompts, and lower rft.epochs',
  ),
)


class Alarms:
  """Limits on the mean of a metric over the last `window` steps that measured it.

  Nothing is kept between calls: the alarms follow from the records alone, so a run that resumes from its metrics.jsonl raises the same
  alarms as an uninterrupted one.
  """

  def __init__(self, config: AlarmConfig):
    self._window = config.window
    self._limits = [(alarm, limit) for alarm in _ALARMS if (limit := getattr(config, alarm.option)) is not None]

  def check(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the alarms that the last record raises: those whose limit is passed now and was not passed one step before.

    An alarm is silent until there are `window` values of its metric. A value that is not finite counts as beyond the limit.

    Args:
      records: of metrics.jsonl in the order of steps; the last ones suffice, if they hold window + 1 values of each metric.

    Returns:
      One line per alarm: step, metric, limit, what it may mean and what to do.
    """
    lines = []
    for alarm, limit in self._limits:
      if not records or records[-1].get(alarm.key) is None:
        continue  # the last step did not measure it
      values = _last_values(records, alarm.key, self._window + 1)
      now, before = values[: self._window], values[1:]
      if self._beyond(now, alarm, limit) and not self._beyond(before, alarm, limit):
        sign = '>' if alarm.option.startswith('max') else '<'
        lines.append(
          f'step {records[-1]["step"]}: {alarm.key} {np.mean(now):.4g} {sign} {limit:.4g} {alarm.unit} (rft.alarms.{alarm.option}; mean of '
          f'{len(now)} steps): it may mean that {alarm.meaning}; {alarm.remedy}'
        )
    return lines

  def history(self, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every alarm that a run with these records has raised, in order."""
    return [line for end in range(1, len(records) + 1) for line in self.check(records[:end])]

  def _beyond(self, values: Sequence[float], alarm: _Alarm, limit: float) -> bool:
    if len(values) < self._window:
      return False
    mean = float(np.mean(values))
    return not (mean <= limit if alarm.option.startswith('max') else mean >= limit)


def _last_values(records: Sequence[Mapping[str, Any]], key: str, count: int) -> list[float]:
  """Return the last `count` values of a key, newest first, skipping records without it."""
  values = (float(record[key]) for record in reversed(records) if record.get(key) is not None)
  return list(itertools.islice(values, count))
