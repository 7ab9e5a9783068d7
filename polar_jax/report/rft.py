"""The section of report.md on reinforcement fine-tuning, from the section `rft` of report.json and the logs of the runs.

  study        `seeds`, the number of runs; FIGURE_before, FIGURE_after and `kl`: one number per seed;
               comparison[POLICY][FIGURE]: one number per seed, policies start, ppo, best_of_n, sft, target;
               `target`, the policy that wrote every reference
  other runs   runs[RUN]: numbers of the run, `evaluation_before` and `evaluation_after` on held-out prompts, `alarms`

Figures: reward; target_nll, in nats per token; relative_nll, the same minus the mean over the pool; kl to the start, in nats per token;
length in tokens; distinct_2. Whatever is missing is left out.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.report import markdown, rft_plots
from polar_jax.train.metrics import FILE, read_metrics

FOLDER = 'rft'
_SAMPLES = 'samples.jsonl'
_SHOWN = 4  # samples of a run
_POLICIES = ('start', 'ppo', 'best_of_n', 'sft', 'target')
_FIGURES = {
  'reward': 'reward',
  'target_nll': 'NLL under the target, nats per token',
  'relative_nll': "the same minus the pool's mean",
  'kl': 'KL to the start, nats per token',
  'length': 'length, tokens',
  'distinct_2': 'distinct bigrams, share',
}
_SIGNS = {
  'raw': 'score',
  'shuffled': 'score under shuffled references',
  'shuffled_gap': 'the difference',
  'length_free': "score at the first step's length",
  'overlap': 'overlap with the reference',
  'length': 'length, tokens',
  'truncated': 'cut at the most tokens',
  'empty': 'empty',
  'distinct_1': 'distinct words',
  'distinct_2': 'distinct bigrams',
  'kl': 'KL to the start, nats per token',
  'entropy': 'entropy, nats per token',
  'clip_fraction': 'clip fraction',
  'explained_variance': 'explained variance',
}
_FAR = 2.0  # lengths that grew or shrank by this factor are beyond what a regression within a batch can say
_EMPTY = 0.05  # share of answers
_LESS_VARIED = 0.9  # distinct bigrams below this share of what they were are worth a sentence


def read_runs(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Name -> rows of metrics.jsonl of the run in `rft`, or of those in its folders.

  Raises:
    UserError: on a broken line, naming it.
  """
  return {name: rows for name, folder in _folders(workdir, FILE).items() if (rows := read_metrics(folder))}


def read_samples(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Name -> samples of the last step that left any, of the same runs.

  Raises:
    UserError: on a broken line, naming it.
  """
  out = {}
  for name, folder in _folders(workdir, _SAMPLES).items():
    rows = read_metrics(folder, _SAMPLES)
    last = max((row['step'] for row in rows), default=None)
    if last is not None:
      out[name] = [row for row in rows if row['step'] == last][:_SHOWN]
  return out


def draw(workdir: pathlib.Path, results: Mapping[str, Any], runs: Mapping[str, rft_plots.Rows]) -> dict[str, str]:
  """Draws what can be drawn; name of a figure -> its link relative to the workdir."""
  links = {name: f'figures/{name}.png' for name in ('rft', 'rft_comparison')}
  drawn = {}
  if rft_plots.panels_of(runs):
    rft_plots.dashboard(runs, workdir / links['rft'])
    drawn['rft'] = links['rft']
  compared = _comparison(results)
  if any(figures.get(key) for figures in compared.values() for key in ('reward', 'target_nll', 'relative_nll')):
    named = {_name(name, results): figures for name, figures in compared.items()}
    rft_plots.comparison(named, workdir / links['rft_comparison'])
    drawn['rft_comparison'] = links['rft_comparison']
  return drawn


def section(
  results: Mapping[str, Any],
  figures: Mapping[str, str],
  samples: Mapping[str, Sequence[Mapping[str, Any]]],
  runs: Mapping[str, rft_plots.Rows] | None = None,
) -> list[str]:
  """Paragraphs of Markdown, none if there is nothing to say.

  Args:
    results: the section `rft` of report.json.
    figures: name -> link, as `draw` gives them.
    samples: name of a run -> rows of its samples.jsonl.
    runs: name of a run -> rows of its metrics.jsonl.
  """
  parts = [
    *_study(results),
    *_beside(results, figures),
    *_runs(results),
    *_signs(runs or {}, figures, 'target' in results),
    *_samples(samples),
  ]
  return ['## Reinforcement fine-tuning', *parts] if parts else []


def _folders(workdir: pathlib.Path, file: str) -> dict[str, pathlib.Path]:
  root = pathlib.Path(workdir) / FOLDER
  found = [path.parent for path in [root / file, *sorted(root.glob(f'*/{file}'))] if path.exists()]
  return {FOLDER if folder == root else folder.name.replace('_', ' '): folder for folder in found}


def _study(results: Mapping[str, Any]) -> list[str]:
  """Before and after, over seeds."""
  pairs = {key: (_numbers(results, f'{key}_before'), _numbers(results, f'{key}_after')) for key in _FIGURES}
  kl = _numbers(results, 'kl')
  rows = []
  for key, label in _FIGURES.items():
    before, after = pairs[key]
    if key == 'kl':
      after = after or kl
    if before or after:
      change = [a - b for b, a in zip(before, after, strict=True)] if len(before) == len(after) else []
      rows.append([label, _spread(before), _spread(after), _spread(change, '+')])
  if not rows:
    return []
  n = results.get('seeds', max(len(values) for pair in (*pairs.values(), (kl,)) for values in pair))
  seeds = 'One run.' if n == 1 else f'Means over {n} seeds; brackets hold the lowest and the highest seed, and are no confidence intervals.'
  out = ['### Before and after', seeds, markdown.table(['', 'before', 'after', 'change'], rows)]
  changes = {k: [a - b for b, a in zip(*pair, strict=True)] for k, pair in pairs.items() if pair[0] and len(pair[0]) == len(pair[1])}
  lines = []
  for key, what, unit, wanted in (
    ('reward', 'The reward', '', 1),
    ('target_nll', 'The NLL under the target', ' nats per token', -1),
    ('relative_nll', "The NLL relative to the pool's mean", ' nats per token', -1),
  ):
    if key in changes:
      lines.append(_moved(what, unit, changes[key], wanted))
  if _all(changes.get('target_nll'), -1) and 'relative_nll' in changes and not _all(changes['relative_nll'], -1):
    lines.append('The NLL fell where the relative one did not: the answers became likelier under the whole pool, not nearer to the target.')
  before, after = pairs['distinct_2']
  if before and after and np.mean(after) < _LESS_VARIED * np.mean(before):
    lines.append(
      f'Distinct bigrams fell from {np.mean(before):.3f} to {np.mean(after):.3f}: answers repeat themselves or each other more, '
      'which by itself lowers an NLL.'
    )
  if 'target_nll' in changes or 'relative_nll' in changes:
    lines.append('Likelihoods are exact, under laws that the reward model never saw; they say nothing about large language models.')
  return [*out, _bullets(lines)] if lines else out


def _beside(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """PPO beside the start, best-of-n, supervised fine-tuning and the target."""
  compared = _comparison(results)
  keys = [key for key in _FIGURES if any(values.get(key) for values in compared.values())]
  if not keys:
    return []
  rows = [[_name(name, results), *(_spread(values.get(key, [])) for key in keys)] for name, values in compared.items()]
  out = ['### Beside other ways to use the references', markdown.table(['', *(_FIGURES[key] for key in keys)], rows)]
  out += markdown.figure(figures, 'rft_comparison', 'Policies beside each other: a dot for every seed, a bar at the mean')
  key = next((k for k in ('relative_nll', 'target_nll') if k in keys), None)
  ppo = compared.get('ppo', {}).get(key or '', [])
  lines = []
  if key and ppo:
    what = f'The {"relative " if key == "relative_nll" else ""}NLL of PPO'
    for other in ('start', 'best_of_n', 'sft'):
      numbers = compared.get(other, {}).get(key, [])
      if numbers and len(numbers) == len(ppo):
        lines.append(_below(what, _name(other, results), [a - b for a, b in zip(ppo, numbers, strict=True)]))
    lines += _share_of_the_way(compared, key)
  lines += _beyond_the_target(compared)
  return [*out, _bullets(lines)] if lines else out


def _share_of_the_way(compared: Mapping[str, Mapping[str, list[float]]], key: str) -> list[str]:
  start, ppo, target = (compared.get(name, {}).get(key, []) for name in ('start', 'ppo', 'target'))
  if not start or not len(start) == len(ppo) == len(target) or any(s <= t for s, t in zip(start, target, strict=True)):
    return []
  shares = [100 * (s - p) / (s - t) for s, p, t in zip(start, ppo, target, strict=True)]
  seeds = '' if len(shares) == 1 else f' (by seed {min(shares):.0f}% to {max(shares):.0f}%)'
  return [f"By that figure PPO went {np.mean(shares):.0f}% of the way from the start to the target's own samples{seeds}."]


def _beyond_the_target(compared: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
  ppo, target = (compared.get(name, {}).get('reward', []) for name in ('ppo', 'target'))
  beyond = sum(p > t for p, t in zip(ppo, target, strict=True)) if len(ppo) == len(target) else 0
  if not beyond:
    return []
  which = 'in the one run' if len(ppo) == 1 else f'for {beyond} of {len(ppo)} seeds'
  return [f"The reward of PPO is above that of the target's own samples {which}: what lies above is no nearness to the target."]


def _runs(results: Mapping[str, Any]) -> list[str]:
  """Runs that are no study: their numbers, held-out prompts before and after, alarms."""
  runs = {name: run for name, run in results.get('runs', {}).items() if run}
  if not runs:
    return []
  scalars = {name: {k: v for k, v in run.items() if isinstance(v, (int, float, str))} for name, run in runs.items()}
  keys = markdown.ordered({k: 0 for values in scalars.values() for k in values}, ('steps', 'answers', 'tokens', 'seconds', 'reward', 'raw'))
  out = ['### Runs', 'Figures of the training are means over its last steps. One run stands behind each column.']
  rows = [[key, *(markdown.text(scalars[name][key]) if key in scalars[name] else '-' for name in runs)] for key in keys]
  out += [markdown.table(['', *runs], rows)] if rows else []
  held_out, lines = [], []
  for name, run in runs.items():
    before, after = run.get('evaluation_before', {}), run.get('evaluation_after', {})
    for key in markdown.ordered({**before, **after}, ('raw', 'model', 'rule')):
      numbers = [values.get(key) for values in (before, after)]
      change = _number(numbers[1] - numbers[0], '+') if None not in numbers else '-'
      held_out.append([name, key, *map(_number, numbers), change])
    lines += _verdict_of_run(name, before, after)
  if held_out:
    out += ['On held-out prompts:', markdown.table(['run', '', 'before', 'after', 'change'], held_out)]
  for name, run in runs.items():
    if 'alarms' in run:
      lines += [f'{name}: ALARM, {alarm}' for alarm in run['alarms']] or [f'{name}: none of the alarms that were set was raised.']
  return [*out, _bullets(lines)] if lines else out


def _verdict_of_run(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
  change = {key: after[key] - before[key] for key in ('model', 'rule') if key in before and key in after}
  out = []
  if 'rule' in change:
    verb = 'rose' if change['rule'] > 0 else 'did NOT rise'
    numbers = f'{100 * before["rule"]:.1f}% to {100 * after["rule"]:.1f}% ({100 * change["rule"]:+.1f} points)'
    out.append(f'{name}: the share that the rule calls right {verb}: {numbers}.')
    if change.get('model', 0) > 0 >= change['rule']:
      out.append(f"{name}: the reward model's score rose and the rule did NOT: a sign of reward hacking.")
  return out


def _signs(runs: Mapping[str, rft_plots.Rows], figures: Mapping[str, str], one_writer: bool) -> list[str]:
  """The dashboard in numbers: how each run began and ended. `one_writer`: all references are of one policy."""
  shuffled = '' if one_writer else 'the score under shuffled references should stay behind; '
  out = markdown.figure(figures, 'rft', f'The runs step by step; {shuffled}dots are greedy answers to held-out prompts')
  ends = {name: {key: both for key in _SIGNS if (both := _ends(rows, key))} for name, rows in runs.items()}
  ends = {name: values for name, values in ends.items() if values}
  if ends:
    keys = [key for key in _SIGNS if any(key in values for values in ends.values())]
    arrow = lambda both: f'{_number(both[0])} \u2192 {_number(both[1])}'
    rows = [[_SIGNS[key], *(arrow(ends[n][key]) if key in ends[n] else '-' for n in ends)] for key in keys]
    out += [
      "From the mean of a run's first tenth of steps to that of its last tenth, on the prompts that it trains on:",
      markdown.table(['', *ends], rows),
    ]
    lines = _gap_lines(ends, one_writer) + _gain_lines(ends, one_writer) + _empty_lines(ends)
    out += [_bullets(lines)] if lines else []
  return ['### Signs of reward hacking', *out] if out else []


def _gap_lines(ends: Mapping[str, Mapping[str, tuple[float, float]]], one_writer: bool) -> list[str]:
  gaps = {name: values['shuffled_gap'][1] for name, values in ends.items() if 'shuffled_gap' in values}
  if gaps and one_writer:
    spread = _spread([*gaps.values()], '+')
    return [
      f'Own minus shuffled references at the end: {spread}. One policy wrote all references here, and the reward model compares policies: '
      "another prompt's reference asks for the same policy, so that no gap is by itself no sign of reward hacking."
    ]
  blind = [name for name, gap in gaps.items() if gap <= 0]
  if blind:
    return [f'At the end answers do NOT score higher with their own reference than with that of another prompt: {", ".join(blind)}.']
  if not gaps:
    return []
  gap = f'{min(gaps.values()):.3g}' if len(gaps) == 1 else f'{min(gaps.values()):.3g} to {max(gaps.values()):.3g}'
  return [f'At the end answers score {gap} higher with their own reference than with that of another prompt.']


def _gain_lines(ends: Mapping[str, Mapping[str, tuple[float, float]]], one_writer: bool) -> list[str]:
  """How much of the rise in score is there without the reference, and without the change in length."""
  gain = lambda key, names: float(np.mean([ends[n][key][1] - ends[n][key][0] for n in names]))
  out = []
  names = [n for n in ends if {'raw', 'shuffled'} <= ends[n].keys()]
  if names and (risen := gain('raw', names)) > 0:
    mean, shuffled = '' if len(names) == 1 else 'on average ', gain('shuffled', names)
    hacked = (
      ': most of the rise does not come from the reference, a sign of reward hacking' if shuffled > risen / 2 and not one_writer else ''
    )
    out.append(f'The score rose {mean}by {risen:.3g}; under the references of other prompts, by {shuffled:.3g}{hacked}.')
  for name in (n for n in ends if {'raw', 'length_free', 'length'} <= ends[n].keys()):
    (before, after), risen = ends[name]['length'], gain('raw', [name])
    if risen <= 0:
      continue
    if not before / _FAR < after < before * _FAR:
      why = "no line within a batch tells what answers of the first step's length would earn"
      out.append(f'{name}: length went from {before:.3g} to {after:.3g} tokens; {why}.')
    else:
      free = gain('length_free', [name])
      out.append(f"{name}: the score rose by {risen:.3g}; moved along each batch's line to the first step's length, by {free:.3g}.")
  return out


def _empty_lines(ends: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
  empty = {name: values['empty'][1] for name, values in ends.items() if 'empty' in values}
  return [f'{name}: at the end {100 * share:.0f}% of the answers are EMPTY.' for name, share in empty.items() if share > _EMPTY]


def _ends(rows: rft_plots.Rows, key: str) -> tuple[float, float] | None:
  """Means of the first and of the last tenth of a figure; None if it was not measured twice."""
  values = rft_plots.finite_points(rows, key)[1]
  width = max(len(values) // 10, 1)
  return (float(values[:width].mean()), float(values[-width:].mean())) if len(values) > 1 else None


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
  out = []
  for name, rows in samples.items():
    if rows:
      head = ['', 'prompt', 'reference', 'answer', 'score', 'shuffled', 'tokens']
      cells = [_cells(row) for row in rows]
      out += [f'{name}, step {rows[0].get("step", "-")}:', markdown.table(head, cells)]
  if out:
    note = 'Answers with the highest and the lowest score, and some between. Long texts are shortened in the middle; '
    out = ['### Samples', f'{note}samples.jsonl has them whole.', *out]
  return out


def _cells(row: Mapping[str, Any]) -> list[str]:
  texts = [_shown(row.get(key, ''), most) for key, most in (('prompt', 120), ('reference', 160), ('output', 240))]
  return [str(row.get('pick', '')), *texts, *(_number(row.get(key)) for key in ('score', 'shuffled', 'length'))]


def _number(value: float | None, sign: str = '') -> str:
  """Three decimals, one for what is large: tables of a run are read down their columns."""
  if value is None or isinstance(value, int):
    return '-' if value is None else f'{value:{sign},}'
  return f'{value:{sign}.3f}' if abs(value) < 10 else f'{value:{sign}.1f}'


def _shown(text: str, most: int) -> str:
  """A text as a cell shows it: shortened in the middle, on one line, nothing in it taken for Markdown or HTML."""
  if not text.strip():
    return '*empty*'
  if len(text) > most:
    half = most // 2
    text = f'{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}'
  text = ''.join(c if c.isprintable() else ' ' for c in text.strip().replace('\n', ' \u23ce '))
  return re.sub(r'([\\`*_\[\]~#$!])', r'\\\1', text.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;'))


def _comparison(results: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
  """Policies in their order, each with its figures as lists."""
  given = results.get('comparison', {})
  return {name: {key: _numbers(given[name], key) for key in _FIGURES} for name in markdown.ordered(given, _POLICIES) if given[name]}


def _name(policy: str, results: Mapping[str, Any]) -> str:
  names = {'ppo': 'PPO', 'sft': 'supervised', 'best_of_n': f'best of {results.get("best_of", "n")}'}
  return names.get(policy, policy.replace('_', ' '))


def _numbers(values: Mapping[str, Any], key: str) -> list[float]:
  found = values.get(key)
  return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]


def _spread(values: Sequence[float], sign: str = '') -> str:
  if not values:
    return '-'
  mean = _number(float(np.mean(values)), sign)
  return mean if len(values) == 1 else f'{mean} [{_number(min(values), sign)}, {_number(max(values), sign)}]'


def _all(changes: Sequence[float] | None, sign: int) -> bool:
  return bool(changes) and all(sign * change > 0 for change in changes or ())


def _moved(what: str, unit: str, changes: Sequence[float], wanted: int) -> str:
  """One exact sentence on whether a figure moved the way it should."""
  verb, plain = ('rose', 'rise') if wanted > 0 else ('fell', 'fall')
  good, n, mean = sum(wanted * change > 0 for change in changes), len(changes), f'{np.mean(changes):+.3g}{unit}'
  spread = f'by seed {min(changes):+.3g} to {max(changes):+.3g}, mean {mean}'
  if n == 1:
    return f'{what} {verb} in the one run ({mean}); nothing is known of other seeds.' if good else f'{what} did NOT {plain} ({mean}).'
  if good == n:
    return f'{what} {verb} for every one of {n} seeds ({spread}).'
  return f'{what} {verb} for {good} of {n} seeds only ({spread}).' if good else f'{what} did NOT {plain} for any of {n} seeds ({spread}).'


def _below(what: str, other: str, differences: Sequence[float]) -> str:
  """One exact sentence on whether PPO is nearer to the target than another policy; seeds are paired."""
  good, n, mean = sum(d < 0 for d in differences), len(differences), f'{np.mean(differences):+.3g}'
  spread = f'difference {mean}' if n == 1 else f'difference by seed {min(differences):+.3g} to {max(differences):+.3g}, mean {mean}'
  if n == 1:
    return f'{what} is {"" if good else "NOT "}below that of `{other}` in the one run ({spread}).'
  if good == n:
    return f'{what} is below that of `{other}` for every one of {n} seeds ({spread}).'
  if good:
    return f'{what} is below that of `{other}` for {good} of {n} seeds only ({spread}).'
  return f'{what} is NOT below that of `{other}` for any of {n} seeds ({spread}).'


def _bullets(lines: Sequence[str]) -> str:
  return '\n'.join(f'- {line}' for line in lines)
