"""Signs of reward hacking: figures that a reward alone does not show, and alarms on them. Pure functions of numpy arrays and text.

A reward model that looks at its reference must score an answer lower under the reference of another prompt (`shuffled_references`).
A reward that rises because answers grow is seen by its regression on length; answers become alike before they become empty praise,
which distinct n-grams and the entropy show.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.config import AlarmConfig
from polar_jax.data.template import join_messages
from polar_jax.types import Prompt, Text

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
_CJK = r'\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff'
_WORD = re.compile(rf'[{_CJK}]|[^\W{_CJK}]+')

Seed = int | Sequence[int]


def words(text: str) -> list[str]:
  """Lower-cased words; punctuation is left out."""
  return _WORD.findall(text.lower())


def overlap(outputs: Sequence[str], references: Sequence[Text]) -> np.ndarray:
  """Share of an output's words that stand in its reference.

  A word counts as often as the reference has it, so that repeating one word of it gains nothing.

  Returns:
    (n,) float64 from 0 to 1; 0 for an output without words.
  """
  shares = np.zeros(len(outputs))
  for i, (output, reference) in enumerate(zip(outputs, references, strict=True)):
    own = collections.Counter(words(output))
    shared = own & collections.Counter(words(join_messages(reference, f'references[{i}]')))
    shares[i] = shared.total() / own.total() if own else 0.0
  return shares


def distinct(outputs: Sequence[str], n: int) -> float:
  """Distinct n-grams of words over all outputs, as a share of all their n-grams (distinct-n, Li et al. 2016).

  It falls as more text is looked at: compare equal numbers of outputs of like lengths. No n-gram crosses from one output to the next.

  Returns:
    From 0 to 1; 0 if no output has n words.
  """
  if n < 1:
    raise ValueError(f'n is {n}; an n-gram has one word or more')
  seen: set[tuple[str, ...]] = set()
  total = 0
  for output in outputs:
    own = words(output)
    grams = list(zip(*(own[i:] for i in range(n)), strict=False))
    seen.update(grams)
    total += len(grams)
  return len(seen) / total if total else 0.0


def length_regression(score_R: np.ndarray, length_R: np.ndarray, base_length: float) -> tuple[float, float]:
  """What longer answers earn within a batch, and the mean score if answers were as long as they were at the start.

  The least-squares line of score over length; the mean score is moved along it to `base_length`. Far from the lengths of the batch
  this extrapolates: read it as a direction.

  Args:
    score_R: scores of the answers of one step.
    length_R: their lengths in tokens.
    base_length: tokens, the mean length of the run's first step.

  Returns:
    (slope in score per token, adjusted mean score); the slope is 0 when all lengths are equal.
  """
  score, length = (np.asarray(x, dtype=np.float64) for x in (score_R, length_R))
  if score.ndim != 1 or score.shape != length.shape or not score.size:
    raise ValueError(f'scores {score.shape} and lengths {length.shape} must be one number per answer, of one answer or more')
  centred = length - length.mean()
  variance = centred @ centred
  slope = float(centred @ (score - score.mean()) / variance) if np.ptp(length) else 0.0
  return slope, float(score.mean() + slope * (base_length - length.mean()))


def explained_variance(return_RT: np.ndarray, value_RT: np.ndarray, mask_RT: np.ndarray) -> float:
  """How much of the returns' variance the critic foresees: 1 - Var(return - value) / Var(return) over the tokens of the answers.

  Returns:
    At most 1; 0 is a critic that says nothing, below 0 one that misleads. 0 if the returns do not vary.
  """
  mask = np.asarray(mask_RT, dtype=bool)
  returns, values = (np.asarray(x, dtype=np.float64)[mask] for x in (return_RT, value_RT))
  if not returns.size or not np.ptp(returns):
    return 0.0
  return float(1 - np.var(returns - values) / np.var(returns))


def shuffled_references(prompts: Sequence[Prompt], seed: Seed) -> list[Prompt] | None:
  """Each prompt with the reference and the rule's answer of another prompt of the batch.

  Rows with one prompt text are one prompt, however many references it has, and no prompt keeps a reference of its own. Rows that were
  alike stay alike, so that they can still be scored as one group. Two prompts may share a reference text; that one can come back.

  Args:
    prompts: the prompt of each rollout, or each prompt once.
    seed: the same seed and prompts give the same references.

  Returns:
    One row per row; None if there is only one distinct prompt, or none.
  """
  rows_of: dict[str, list[int]] = {}
  for i, prompt in enumerate(prompts):
    rows_of.setdefault(join_messages(prompt.prompt, f'prompts[{i}].prompt'), []).append(i)
  if len(rows_of) < 2:
    return None
  groups = list(rows_of.values())
  order = np.random.default_rng(seed).permutation(len(groups))
  out = list(prompts)
  for receiver, giver in zip(order, np.roll(order, 1), strict=True):  # along a cycle nobody gives to himself
    offered = _different([prompts[i] for i in groups[giver]])
    kinds = _different([prompts[i] for i in groups[receiver]])
    for i in groups[receiver]:
      given = offered[kinds.index(_reference(prompts[i])) % len(offered)]
      out[i] = dataclasses.replace(prompts[i], reference=given[0], answer=given[1])
  return out


def _reference(prompt: Prompt) -> tuple[Text, str]:
  return prompt.reference, prompt.answer


def _different(prompts: Sequence[Prompt]) -> list[tuple[Text, str]]:
  """The different (reference, answer) of some rows, in their order. Messages cannot be hashed."""
  out: list[tuple[Text, str]] = []
  for prompt in prompts:
    if _reference(prompt) not in out:
      out.append(_reference(prompt))
  return out


def sample_rows(
  step: int,
  prompts: Sequence[Prompt],
  outputs: Sequence[str],
  scores: np.ndarray,
  shuffled: np.ndarray | None,
  lengths: np.ndarray,
  seed: Seed,
  most: int = 4,
) -> list[dict[str, Any]]:
  """Rows of the sample table, for samples.jsonl: the answers with the highest and the lowest score, the others drawn by chance.

  Args:
    step: of the run.
    prompts: of each answer, with the reference that it was scored against.
    outputs: the answers' texts.
    scores: raw scores.
    shuffled: scores under the references of other prompts; None: not measured, and left out of the rows.
    lengths: of the answers in tokens.
    seed: the same seed gives the same rows.
    most: rows.

  Returns:
    {step, pick, prompt, reference, output, score, shuffled, length} by falling score; texts are whole.
  """
  picked = _picked(np.asarray(scores, dtype=np.float64), seed, most)
  rows = []
  for i, pick in picked:
    row = {
      'step': int(step),
      'pick': pick,
      'prompt': join_messages(prompts[i].prompt, f'prompts[{i}].prompt'),
      'reference': join_messages(prompts[i].reference, f'prompts[{i}].reference'),
      'output': outputs[i],
      'score': float(scores[i]),
      **({} if shuffled is None else {'shuffled': float(shuffled[i])}),
      'length': int(lengths[i]),
    }
    rows.append(row)
  return rows


def _picked(scores: np.ndarray, seed: Seed, most: int) -> list[tuple[int, str]]:
  """(index, why) of at most `most` scores, highest first."""
  order = [int(i) for i in np.argsort(-scores, kind='stable')]
  why = dict.fromkeys(order[: min(most, 1)], 'highest')
  if most > 1 and len(order) > 1:
    why[order[-1]] = 'lowest'
  middle = np.array(order[1:-1], dtype=np.int64)
  extra = min(max(most - 2, 0), len(middle))
  why.update(dict.fromkeys(np.random.default_rng(seed).choice(middle, extra, replace=False).tolist() if extra else [], 'random'))
  return [(i, why[i]) for i in order if i in why]


@dataclasses.dataclass(frozen=True)
class _Alarm:
  option: str  # of AlarmConfig; its prefix says which side is bad
  key: str  # of a row of metrics
  unit: str
  meaning: str  # what it may mean
  remedy: str


_ALARMS = (
  _Alarm(
    'max_kl',
    'kl',
    'nats per token',
    'the policy is far from its start, where a high reward proves little',
    'lower rft.actor.learning_rate, set rft.kl_in or raise rft.kl_coef, or keep an earlier checkpoint',
  ),
  _Alarm(
    'min_entropy',
    'entropy',
    'nats per token',
    'answers become all alike and exploration ends',
    'raise rft.entropy_coef, lower rft.actor.learning_rate, or keep an earlier checkpoint',
  ),
  _Alarm(
    'max_truncated',
    'truncated',
    'of the answers',
    'answers grow, or no longer end',
    'raise rft.rollout.max_new, or set rft.reward.missing_eos_penalty or rft.reward.length_buffer',
  ),
  _Alarm(
    'max_empty',
    'empty',
    'of the answers',
    'saying nothing earns more than what the policy has to say',
    'set rft.rollout.min_new, and see what the reward model gives to empty answers',
  ),
  _Alarm(
    'min_shuffled_gap',
    'shuffled_gap',
    'score',
    'the reward hardly depends on the reference: answers please whatever they are compared with',
    'read samples.jsonl, take another rft.reward.checkpoint or more rft.reward.rule_weight, or keep an earlier checkpoint',
  ),
  _Alarm(
    'max_overlap',
    'overlap',
    "of an answer's words stand in its reference",
    'prompts give their references away, or references are learned by heart',
    'read samples.jsonl, check the prompts, and make fewer rft.epochs',
  ),
)


class Alarms:
  """Limits on the mean of a figure over the last `window` steps that measured it.

  Nothing is kept between calls: what is raised follows from the rows alone, so a run that resumes from its metrics.jsonl raises what it
  would have raised without the break.
  """

  def __init__(self, config: AlarmConfig):
    self._window = config.window
    self._limits = [(alarm, limit) for alarm in _ALARMS if (limit := getattr(config, alarm.option)) is not None]

  def check(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The alarms that the last row raises: those whose limit is passed now and was not passed a step before.

    Before there are `window` values of a figure its alarm is silent. A figure that is not finite is beyond its limit.

    Args:
      rows: of metrics.jsonl in the order of steps; the last ones suffice, if they hold window + 1 values of each figure.

    Returns:
      A line per alarm: step, figure, limit, what it may mean and what to do.
    """
    lines = []
    for alarm, limit in self._limits:
      if not rows or rows[-1].get(alarm.key) is None:
        continue  # nothing new was measured
      values = _last_values(rows, alarm.key, self._window + 1)
      now, before = values[: self._window], values[1:]
      if self._beyond(now, alarm, limit) and not self._beyond(before, alarm, limit):
        sign = '>' if alarm.option.startswith('max') else '<'
        lines.append(
          f'step {rows[-1]["step"]}: {alarm.key} {np.mean(now):.4g} {sign} {limit:.4g} {alarm.unit} (rft.alarms.{alarm.option}; mean of '
          f'{len(now)} steps): it may mean that {alarm.meaning}; {alarm.remedy}'
        )
    return lines

  def history(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every alarm that a run with these rows has raised, in order."""
    return [line for end in range(1, len(rows) + 1) for line in self.check(rows[:end])]

  def _beyond(self, values: Sequence[float], alarm: _Alarm, limit: float) -> bool:
    if len(values) < self._window:
      return False
    mean = float(np.mean(values))
    return not (mean <= limit if alarm.option.startswith('max') else mean >= limit)


def _last_values(rows: Sequence[Mapping[str, Any]], key: str, count: int) -> list[float]:
  """The last `count` values of a key, newest first; rows without it are passed over."""
  values = (float(row[key]) for row in reversed(rows) if row.get(key) is not None)
  return list(itertools.islice(values, count))
