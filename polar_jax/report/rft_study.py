"""The study of PPO over seeds in report.md: before and after, and the comparison with other methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.report import markdown

_POLICIES = ('start', 'ppo', 'best_of_n', 'sft', 'target')
_METRICS = {
  'reward': 'reward',
  'reward_other': "reward under other policies' references",
  'target_nll': 'NLL under the target, nats per token',
  'relative_nll': 'the same minus the pool mean',
  'divergence': "divergence of token frequencies from the target's, nats",
  'kl': 'KL to the initial policy, nats per token',
  'length': 'length, tokens',
  'distinct_2': 'distinct bigrams, share',
}
# Metric, its name in a sentence, its unit, and the sign of an improvement.
_WANTED = (
  ('reward', 'The reward', '', 1),
  ('target_nll', 'The NLL under the target', ' nats per token', -1),
  ('relative_nll', 'The NLL relative to the pool mean', ' nats per token', -1),
  ('divergence', "The divergence of token frequencies from the target's", ' nats', -1),
)
_FOR_AN_INTERVAL = 3  # seeds
_LESS_VARIED = 0.9  # a smaller share of the distinct bigrams before training is worth a sentence

Values = Mapping[str, list[float]]  # metric -> one number per seed


def before_and_after(results: Mapping[str, Any]) -> list[str]:
  """Return the paragraphs on each metric before and after training, over seeds; none without a measurement.

  Args:
    results: the section `rft` of report.json.
  """
  before = {key: _numbers(results, f'{key}_before') for key in _METRICS}
  after = {key: _numbers(results, f'{key}_after') for key in _METRICS}
  after['kl'] = after['kl'] or _numbers(results, 'kl')
  changes = {key: change for key in _METRICS if (change := _differences(after[key], before[key]))}
  body = [
    [label, *(markdown.spread(values[key]) for values in (before, after)), markdown.spread(changes.get(key, ()), '+')]
    for key, label in _METRICS.items()
    if before[key] or after[key]
  ]
  if not body:
    return []
  n = results.get('seeds', max(len(numbers) for values in (before, after) for numbers in values.values()))
  seeds = 'One run.' if n == 1 else f'Means over {n} seeds; brackets hold the lowest and the highest seed and are not confidence intervals.'
  out = ['### Before and after', seeds + _targets(results), markdown.table(['', 'before', 'after', 'change'], body)]
  lines = [moved(what, unit, changes[key], wanted) for key, what, unit, wanted in _WANTED if key in changes]
  lines += _warnings(before, after, changes)
  return [*out, markdown.bullets(lines)] if lines else out


def _targets(results: Mapping[str, Any]) -> str:
  targets = results.get('targets', [])
  described = ', '.join(f'{t["name"]} ({t["corpus"]}, temperature {t["temperature"]:.2f})' for t in targets)
  if len(targets) < 2:
    return f' The target is the policy {described}.' if targets else ''
  return f' Every run is tuned towards another policy of the pool: {described}.'


def comparison(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return the paragraphs that compare PPO with the initial policy, best-of-n, supervised fine-tuning and the target.

  Args:
    results: the section `rft` of report.json.
    figures: name -> link of the figures that were drawn.
  """
  policies = compared(results)
  keys = [key for key in _METRICS if any(values.get(key) for values in policies.values())]
  if not keys:
    return []
  body = [[name_of(name, results), *(markdown.spread(values.get(key, [])) for key in keys)] for name, values in policies.items()]
  out = ['### Comparison with other methods', markdown.table(['', *(_METRICS[key] for key in keys)], body)]
  out += markdown.figure(figures, 'rft_comparison', 'Policies compared: a dot per seed, a bar at the mean')
  key = next((k for k in ('relative_nll', 'target_nll') if k in keys), None)
  ppo = policies.get('ppo', {}).get(key or '', [])
  lines = []
  if key and ppo:
    what = f'The {"relative " if key == "relative_nll" else ""}NLL of PPO'
    for other in ('start', 'best_of_n', 'sft'):
      if differences := _differences(ppo, policies.get(other, {}).get(key, [])):
        lines.append(below(what, name_of(other, results), differences))
    lines += _share_of_the_way(policies, key)
  of_ppo, of_sft = (policies.get(name, {}).get('divergence', []) for name in ('ppo', 'sft'))
  if of_ppo and (differences := _differences(of_ppo, of_sft)):
    lines.append(below("The divergence of PPO's token frequencies from the target's", name_of('sft', results), differences))
  lines += _beyond_the_target(policies)
  return [*out, markdown.bullets(lines)] if lines else out


def compared(results: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
  """Return policy -> metric -> one number per seed, in the order in which policies are shown."""
  given = results.get('comparison', {})
  return {name: {key: _numbers(given[name], key) for key in _METRICS} for name in markdown.ordered(given, _POLICIES) if given[name]}


def name_of(policy: str, results: Mapping[str, Any]) -> str:
  """Return the name of a policy in tables, figures and sentences."""
  names = {'ppo': 'PPO', 'sft': 'supervised', 'best_of_n': f'best of {results.get("best_of", "n")}'}
  return names.get(policy, policy.replace('_', ' '))


def moved(what: str, unit: str, changes: Sequence[float], wanted: int) -> str:
  """Return one exact sentence on whether a metric moved in the wanted direction.

  Args:
    what: the metric, as the subject of the sentence.
    unit: of the metric, with a leading space.
    changes: one number per seed.
    wanted: 1 if the metric should rise, -1 if it should fall.
  """
  verb, plain = ('rose', 'rise') if wanted > 0 else ('fell', 'fall')
  good, n, average = sum(wanted * change > 0 for change in changes), len(changes), f'{mean(changes)}{unit}'
  by_seed = f'by seed {min(changes):+.3g} to {max(changes):+.3g}, mean {average}'
  if n == 1:
    return f'{what} {verb} in the one run ({average}); nothing is known of other seeds.' if good else f'{what} did NOT {plain} ({average}).'
  if good == n:
    return f'{what} {verb} for each of {n} seeds ({by_seed}).'
  return f'{what} {verb} for only {good} of {n} seeds ({by_seed}).' if good else f'{what} did NOT {plain} for any of {n} seeds ({by_seed}).'


def below(what: str, other: str, differences: Sequence[float]) -> str:
  """Return one exact sentence on whether PPO is below another policy; seeds are paired.

  Args:
    what: the metric, as the subject of the sentence.
    other: the other policy.
    differences: PPO minus the other policy, one number per seed.
  """
  good, n, average = sum(d < 0 for d in differences), len(differences), mean(differences)
  by_seed = f'difference {average}' if n == 1 else f'difference by seed {min(differences):+.3g} to {max(differences):+.3g}, mean {average}'
  if n == 1:
    return f'{what} is {"" if good else "NOT "}below that of `{other}` in the one run ({by_seed}).'
  if good == n:
    return f'{what} is below that of `{other}` for each of {n} seeds ({by_seed}).'
  if good:
    return f'{what} is below that of `{other}` for only {good} of {n} seeds ({by_seed}).'
  return f'{what} is NOT below that of `{other}` for any of {n} seeds ({by_seed}).'


def mean(values: Sequence[float]) -> str:
  """Return the mean over seeds, of three or more with its 95% interval by Student's t."""
  center, n = float(np.mean(values)), len(values)
  if n < _FOR_AN_INTERVAL:
    return f'{center:+.3g}'
  from scipy import special  # not at the top: a report without a study needs no scipy

  reach = float(special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))
  return f'{center:+.3g} [{center - reach:+.3g}, {center + reach:+.3g}]'


def _warnings(before: Values, after: Values, changes: Values) -> list[str]:
  """Return sentences on improvements that may not be what they seem."""
  lines = []
  if _all(changes.get('target_nll'), -1) and 'relative_nll' in changes and not _all(changes['relative_nll'], -1):
    lines.append('The NLL fell but the relative NLL did not: responses became likelier under the whole pool, not closer to the target.')
  bigrams = before['distinct_2'], after['distinct_2']
  if all(bigrams) and np.mean(bigrams[1]) < _LESS_VARIED * np.mean(bigrams[0]):
    lines.append(
      f'Distinct bigrams fell from {np.mean(bigrams[0]):.3f} to {np.mean(bigrams[1]):.3f}: responses repeat themselves or each other '
      'more, which by itself lowers an NLL.'
    )
  if 'target_nll' in changes or 'relative_nll' in changes:
    lines.append(
      'Likelihoods are exact, under distributions that the reward model never saw; they say nothing about large language models.'
    )
  return lines


def _share_of_the_way(policies: Mapping[str, Values], key: str) -> list[str]:
  start, ppo, target = (policies.get(name, {}).get(key, []) for name in ('start', 'ppo', 'target'))
  if not start or not len(start) == len(ppo) == len(target) or any(s <= t for s, t in zip(start, target, strict=True)):
    return []
  shares = [100 * (s - p) / (s - t) for s, p, t in zip(start, ppo, target, strict=True)]
  seeds = '' if len(shares) == 1 else f' (by seed {min(shares):.0f}% to {max(shares):.0f}%)'
  return [
    f'By that metric, PPO covered {np.mean(shares):.0f}% of the distance from the initial policy to samples of the target itself{seeds}.'
  ]


def _beyond_the_target(policies: Mapping[str, Values]) -> list[str]:
  out = []
  for key, sign, sentence in (
    ('reward', 1, 'The reward of PPO is above that of samples of the target itself {}; the excess does not mean closer to the target.'),
    ('target_nll', -1, 'PPO is likelier under the target than its own samples are {}: it keeps to what the target writes most often.'),
  ):
    ppo, target = (policies.get(name, {}).get(key, []) for name in ('ppo', 'target'))
    beyond = sum(sign * p > sign * t for p, t in zip(ppo, target, strict=True)) if len(ppo) == len(target) else 0
    if beyond:
      out.append(sentence.format('in the one run' if len(ppo) == 1 else f'for {beyond} of {len(ppo)} seeds'))
  return out


def _numbers(values: Mapping[str, Any], key: str) -> list[float]:
  """Return a value that may be missing, a number or one number per seed as a list."""
  value = values.get(key)
  return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
  """Return a - b by seed; nothing if the seeds do not correspond."""
  return [x - y for x, y in zip(a, b, strict=True)] if len(a) == len(b) else []


def _all(changes: Sequence[float] | None, sign: int) -> bool:
  return bool(changes) and all(sign * change > 0 for change in changes or ())
