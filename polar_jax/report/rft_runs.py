"""Runs of PPO in report.md: their numbers and alarms, and signs of reward hacking in their metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.report import markdown, rft_plots, rft_study, surveyed
from polar_jax.report.plots import Records

_SIGNS = {
  'raw': 'score',
  'shuffled': 'score under other references',
  'shuffled_gap': 'the difference',
  'length_free': 'score at the length of the first step',
  'overlap': 'overlap with the reference',
  'length': 'length, tokens',
  'truncated': 'truncated at the token limit',
  'empty': 'empty',
  'distinct_1': 'distinct words',
  'distinct_2': 'distinct bigrams',
  'kl': 'KL to the initial policy, nats per token',
  'entropy': 'entropy, nats per token',
  'clip_fraction': 'clip fraction',
  'explained_variance': 'explained variance',
}
_MODEL = 'model'  # the arm of the reward model
_MEASURED = {'rule': 'share that the rule marks correct', 'model': 'score of the reward model'}
_SEED = re.compile(r'_?seed_\d+$')
_FAR = 2.0  # beyond this factor between lengths, a regression within a batch cannot be extrapolated
_EMPTY = 0.05  # share of responses

Ends = Mapping[str, Mapping[str, tuple[float, float]]]  # run -> metric -> (first value, last value)


def runs(results: Mapping[str, Any]) -> list[str]:
  """Return the paragraphs on runs outside the study: their numbers, held-out prompts before and after, alarms.

  Args:
    results: the section `rft` of report.json.
  """
  given = {name: run for name, run in results.get('runs', {}).items() if run}
  if not given:
    return []
  out = _over_seeds(given)
  out += ['### Runs', 'Training metrics are means over the last steps. Each column is a single run.', *_scalars(given), *_held_out(given)]
  out += surveyed.section({f'{name}, {split}': found for name, run in given.items() for split, found in run.get('examples', {}).items()})
  lines = []
  for name, run in given.items():
    lines += _verdict(markdown.escape(name), run.get('evaluation_before', {}), run.get('evaluation_after', {}))
  for name, run in given.items():
    lines += _alarms(markdown.escape(name), run)
  return [*out, markdown.bullets(lines)] if lines else out


def _over_seeds(given: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Return the table of what runs that differ in their seeds measured on held-out prompts, and how their arms compare."""
  seeds: dict[str, list[Mapping[str, Any]]] = {}
  for name, run in given.items():
    seeds.setdefault(_SEED.sub('', name) or 'all', []).append(run)
  if max(map(len, seeds.values())) < 2:
    return []
  measured: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
  for arm, of_seeds in seeds.items():
    both = [(run.get('evaluation_before', {}), run.get('evaluation_after', {})) for run in of_seeds]
    keys = [key for key in ('rule', 'model') if all(key in before and key in after for before, after in both)]
    measured[arm] = {key: ([before[key] for before, _ in both], [after[key] for _, after in both]) for key in keys}
  body = [
    [markdown.escape(arm), _MEASURED[key], *map(markdown.spread, values), markdown.spread(_minus(values[1], values[0]), '+')]
    for arm, of_arm in measured.items()
    for key, values in of_arm.items()
  ]
  if not body:
    return []
  lines = []
  for arm, of_arm in measured.items():
    key = next(iter(of_arm), None)
    if key is not None:
      lines.append(rft_study.moved(f'{markdown.escape(arm)}: the {_MEASURED[key]}', '', _minus(*reversed(of_arm[key])), 1))
  lines += _against(measured)
  note = 'Means over seeds; brackets hold the lowest and the highest seed and are not confidence intervals. Greedy responses.'
  return ['### Held-out prompts, by arm', note, markdown.table(['', '', 'before', 'after', 'change'], body), markdown.bullets(lines)]


def _against(measured: Mapping[str, Mapping[str, tuple[list[float], list[float]]]]) -> list[str]:
  """Return sentences on how the arm of the reward model ends, compared with the others by the rule; seeds are paired."""
  main = measured.get(_MODEL, {}).get('rule')
  out = []
  for arm, values in measured.items():
    if main and arm != _MODEL and 'rule' in values and len(values['rule'][1]) == len(main[1]):
      differences = _minus(main[1], values['rule'][1])
      higher = sum(difference > 0 for difference in differences)
      out.append(
        f'By the rule, {_MODEL} ends above {markdown.escape(arm)} in {higher} of {len(differences)} seeds: '
        f'{rft_study.mean(differences)} on average.'
      )
  return out


def _minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
  return [x - y for x, y in zip(a, b, strict=True)]


def signs_of_hacking(records: Mapping[str, Records], figures: Mapping[str, str], *, of_other: str) -> list[str]:
  """Return the paragraphs on how each run began and ended, and on signs of reward hacking.

  Args:
    records: name of a run -> records of its metrics.jsonl.
    figures: name -> link of the figures that were drawn.
    of_other: whose reference the other one is, 'prompt' or 'policy'.
  """
  out = markdown.figure(
    figures,
    'rft',
    'The runs step by step; the score under other references should stay below; dots are greedy responses to held-out prompts',
  )
  ends = {name: {key: both for key in _SIGNS if (both := _ends(steps, key))} for name, steps in records.items()}
  ends = {name: values for name, values in ends.items() if values}
  if ends:
    keys = [key for key in _SIGNS if any(key in values for values in ends.values())]
    body = [[_SIGNS[key], *(_arrow(values[key]) if key in values else '-' for values in ends.values())] for key in keys]
    out += [
      'From the mean of the first tenth of the steps to that of the last tenth, on the training prompts:',
      markdown.table(['', *map(markdown.escape, ends)], body),
    ]
    ends = {markdown.escape(name): values for name, values in ends.items()}
    lines = _gap_lines(ends, of_other) + _gain_lines(ends, of_other) + _length_lines(ends) + _empty_lines(ends)
    out += [markdown.bullets(lines)] if lines else []
  return ['### Signs of reward hacking', *out] if out else []


def _scalars(given: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Return the table of the numbers of each run."""
  scalars = {name: {k: v for k, v in run.items() if isinstance(v, (int, float, str))} for name, run in given.items()}
  keys = markdown.ordered(
    {k: 0 for values in scalars.values() for k in values}, ('steps', 'responses', 'tokens', 'seconds', 'reward', 'raw')
  )
  body = [[markdown.escape(key), *(markdown.text(scalars[name][key]) if key in scalars[name] else '-' for name in given)] for key in keys]
  return [markdown.table(['', *map(markdown.escape, given)], body)] if body else []


def _held_out(given: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Return the table of rewards on held-out prompts before and after training."""
  body = []
  for name, run in given.items():
    before, after = run.get('evaluation_before', {}), run.get('evaluation_after', {})
    for key in markdown.ordered({**before, **after}, ('raw', 'model', 'rule')):
      numbers = [values.get(key) for values in (before, after)]
      change = markdown.number(numbers[1] - numbers[0], '+') if None not in numbers else '-'
      body.append([markdown.escape(name), markdown.escape(key), *map(markdown.number, numbers), change])
  return ['On held-out prompts:', markdown.table(['run', 'reward', 'before', 'after', 'change'], body)] if body else []


def _verdict(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
  change = {key: after[key] - before[key] for key in ('model', 'rule') if key in before and key in after}
  out = []
  if 'rule' in change:
    verb = 'rose' if change['rule'] > 0 else 'did NOT rise'
    numbers = f'{100 * before["rule"]:.1f}% to {100 * after["rule"]:.1f}% ({100 * change["rule"]:+.1f} points)'
    out.append(f'{name}: the share of responses that the rule marks correct {verb}: {numbers}.')
    if change.get('model', 0) > 0 >= change['rule']:
      out.append(f'{name}: the score of the reward model rose but the rule did NOT: a sign of reward hacking.')
  return out


def _alarms(name: str, run: Mapping[str, Any]) -> list[str]:
  if 'alarms' not in run:
    return []
  return [f'{name}: ALARM, {alarm}' for alarm in run['alarms']] or [f'{name}: none of the configured alarms was raised.']


def _gap_lines(ends: Ends, of_other: str) -> list[str]:
  """Return sentences on whether responses score higher with their own reference than with another one."""
  gaps = {name: values['shuffled_gap'][1] for name, values in ends.items() if 'shuffled_gap' in values}
  blind = [name for name, gap in gaps.items() if gap <= 0]
  if blind:
    return [f'At the end, responses do NOT score higher with their own reference than with that of another {of_other}: {", ".join(blind)}.']
  if not gaps:
    return []
  gap = f'{min(gaps.values()):.3g}' if len(gaps) == 1 else f'{min(gaps.values()):.3g} to {max(gaps.values()):.3g}'
  return [f'At the end, responses score {gap} higher with their own reference than with that of another {of_other}.']


def _gain_lines(ends: Ends, of_other: str) -> list[str]:
  """Return sentences on how much of the rise in score does not depend on the reference."""
  names = [name for name, values in ends.items() if {'raw', 'shuffled'} <= values.keys()]
  if not names or (gain := _gain(ends, 'raw', names)) <= 0:
    return []
  mean, shuffled = '' if len(names) == 1 else 'on average ', _gain(ends, 'shuffled', names)
  hacked = ': most of the rise does not come from the reference, a sign of reward hacking' if shuffled > gain / 2 else ''
  others = {'prompt': 'prompts', 'policy': 'policies'}[of_other]
  return [f'The score rose {mean}by {gain:.3g}; under the references of other {others}, by {shuffled:.3g}{hacked}.']


def _length_lines(ends: Ends) -> list[str]:
  """Return sentences on how much of the rise in score does not come from a change in length."""
  out = []
  for name, values in ends.items():
    if not {'raw', 'length_free', 'length'} <= values.keys() or (gain := _gain(ends, 'raw', [name])) <= 0:
      continue
    before, after = values['length']
    if before / _FAR < after < before * _FAR:
      free = _gain(ends, 'length_free', [name])
      out.append(f'{name}: the score rose by {gain:.3g}; adjusted to the length of the first step by a regression, by {free:.3g}.')
    else:
      why = 'too far for a regression to estimate the score at the length of the first step'
      out.append(f'{name}: length went from {before:.3g} to {after:.3g} tokens, {why}.')
  return out


def _empty_lines(ends: Ends) -> list[str]:
  empty = {name: values['empty'][1] for name, values in ends.items() if 'empty' in values}
  return [f'{name}: at the end, {100 * share:.0f}% of the responses are EMPTY.' for name, share in empty.items() if share > _EMPTY]


def _gain(ends: Ends, key: str, names: list[str]) -> float:
  return float(np.mean([ends[name][key][1] - ends[name][key][0] for name in names]))


def _ends(records: Records, key: str) -> tuple[float, float] | None:
  """Return the means of the first and of the last tenth of a metric; None if it was measured less than twice."""
  values = rft_plots.finite_points(records, key)[1]
  width = max(len(values) // 10, 1)
  return (float(values[:width].mean()), float(values[-width:].mean())) if len(values) > 1 else None


def _arrow(ends: tuple[float, float]) -> str:
  return f'{markdown.number(ends[0])} \u2192 {markdown.number(ends[1])}'
