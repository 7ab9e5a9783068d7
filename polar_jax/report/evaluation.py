"""The section of report.md on given evaluation sets: files of the user and public benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.report import markdown, plots, sections

FIGURE, BEST_OF_N, CURVE, CALIBRATION = 'evaluation', 'best_of_n', 'reference_curve', 'calibration'
_CAPTIONS = {
  FIGURE: 'Accuracy by set, next to baselines, with 95% intervals',
  BEST_OF_N: 'Right answers among the chosen of n, with 95% intervals over prompts',
  CURVE: 'Accuracy against the share of the words of the reference that the model reads, with 95% intervals',
  CALIBRATION: 'Share of comparisons that hold against the confidence in them, in bins of equal counts; the line is perfect calibration',
}
_DRAWN, _MOST = ('right', 'wrong', 'shuffled'), 4  # references of best-of-n in the figure
_LONGEST = 40  # characters of a name
_TOGETHER = 5  # sets in one panel, beyond which their lines cannot be told apart


def section(evaluation: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return the section, from the section `evaluation` of report.json.

  Args:
    evaluation: with `sets`, as in evaluation.json.
    figures: name -> link of the figures that were drawn.
  """
  sets = evaluation.get('sets', {})
  if not sets:
    return []
  out = [
    '## Evaluation',
    'Accuracy in % of comparisons, with 95% intervals; a tie counts half. The mean over categories weights every category alike.',
    _accuracies(sets),
    *_arms(sets),
    *sections.clustering(sets),
    *(part for name, caption in _CAPTIONS.items() for part in markdown.figure(figures, name, caption)),
  ]
  out += [f'On {_name(name)}, {sections.verdict("the model", found["margin_over_best_baseline"])}' for name, found in sets.items()]
  out += [
    s
    for name, found in sets.items()
    for s in (*_compared(name, found), *_leaked(name, found), *_truncated(name, found), *_drawn(name, found))
  ]
  if (tests := evaluation.get('paired_tests', 0)) > 1:
    out.append(f'There are {tests} paired tests in all, baselines among them, so that a small p-value somewhere is to be expected.')
  parts = (_official, _paper, _references, _styles, _categories)
  out += [paragraph for name, found in sets.items() for part in parts for paragraph in part(name, found)]
  return out


def draw(evaluation: Mapping[str, Any]) -> dict[str, Any]:
  """Return the figures: accuracies, calibration, and best-of-n and degraded references where they were measured."""
  sets = evaluation.get('sets', {})
  if not sets:
    return {}
  baselines: dict[str, dict[str, Any]] = {}
  for name, found in sets.items():
    for baseline, interval in found['baselines'].items():
      baselines.setdefault(baseline, {})[name] = interval
  figures = {
    FIGURE: plots.accuracy_bars(sets, baselines),
    CALIBRATION: plots.curves(_calibration(sets), 'confidence, %', 'comparisons that hold, %'),
  }
  if best := {_name(name): _best_of_n(found['reference'], found['best_of_n']) for name, found in sets.items() if 'best_of_n' in found}:
    figures[BEST_OF_N] = plots.curves(best, 'answers to choose from (n)', 'right, %')
  if degraded := {
    _name(name): {'model': _degraded(found['reference_curve'])} for name, found in sets.items() if 'reference_curve' in found
  }:
    figures[CURVE] = plots.curves(degraded, "share of the reference's words, %", 'accuracy, %')
  return figures


def _calibration(sets: Mapping[str, Any]) -> dict[str, Any]:
  """Return the lines of all sets in one panel, or in one of its own for each if there are many."""
  lines = {}
  for name, found in sets.items():
    bins = found['calibration']['bins']
    lines[_name(name)] = {'x': [100 * b['confidence'] for b in bins], 'y': [b['accuracy'] for b in bins]}
  perfect = {'x': [50, 100], 'y': [0.5, 1.0]}
  if len(lines) > _TOGETHER:
    return {name: {'perfect': perfect, 'model': line} for name, line in lines.items()}
  return {'calibration': {'perfect': perfect, **lines}}


def _best_of_n(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
  """Return the lines of a panel: with few references, because more could not be told apart.

  Args:
    name: of the main references.
    found: entry `best_of_n` of a set.
  """
  drawn = [view for view in dict.fromkeys((name, *_DRAWN)) if view in found['references']][:_MOST]
  curves = {f'model, reference: {view}': found['references'][view] for view in drawn}
  lines = {label: {'x': found['n'], 'y': of['reward'], 'low': of['low'], 'high': of['high']} for label, of in curves.items()}
  return lines | {other: {'x': found['n'], 'y': found[other]} for other in ('majority', 'random', 'oracle') if other in found}


def _degraded(found: list[Mapping[str, Any]]) -> dict[str, Any]:
  line = {key: [point[key] for point in found] for key in ('low', 'high')}
  return {'x': [point['words_kept'] for point in found], 'y': [point['accuracy'] for point in found], **line}


def _name(name: str) -> str:
  return markdown.shorten(name, _LONGEST)


def _accuracies(sets: Mapping[str, Any]) -> str:
  head = ['set', 'accuracy, %', 'mean over categories', 'items', 'comparisons', 'ties', 'calibration error', 'best baseline']
  body = []
  for name, found in sets.items():
    best = found['margin_over_best_baseline']['baseline']
    body.append(
      [
        _name(name),
        sections.accuracy(found),
        f'{100 * found["category_mean"]:.1f}',
        *(f'{found[key]:,}' for key in ('items', 'n', 'ties')),
        f'{100 * found["calibration"]["ece"]:.1f}',
        f'{markdown.escape(best)} {sections.accuracy(found["baselines"][best])}',
      ]
    )
  return markdown.table(head, body)


def _arms(sets: Mapping[str, Any]) -> list[str]:
  """Return the table of the arms that a workdir has trained."""
  names = list(dict.fromkeys(arm for found in sets.values() for arm in found.get('arms', {})))
  if len(names) < 2:
    return []
  head, body = ['set', *map(markdown.escape, names)], []
  for name, found in sets.items():
    cells = []
    for arm in names:
      entry = found.get('arms', {}).get(arm)
      margin = (entry or {}).get('main_minus')
      points = f'; {100 * margin["difference"]:+.1f} [{100 * margin["low"]:+.1f}, {100 * margin["high"]:+.1f}]' if margin else ''
      cells.append(f'{sections.accuracy(entry)}{points}' if entry else '-')
    body.append([_name(name), *cells])
  seeds = {len(entry.get('by_seed', [0])) for found in sets.values() for entry in found.get('arms', {}).values()}
  over = f' Means over up to {max(seeds)} seeds of fine-tuning; the intervals are over clusters, not seeds.' if max(seeds) > 1 else ''
  fewer = any(entry['n'] < found['n'] for found in sets.values() for entry in found.get('arms', {}).values())
  part = ' Arms were compared on a random part of each set (`evaluate.arm_items`).' if fewer else ''
  return [
    '### Arms',
    f'Accuracy in %, and after the semicolon the paired difference of `{names[0]}` from the arm, in points.{over}{part}',
    markdown.table(head, body),
  ]


def _compared(name: str, found: Mapping[str, Any]) -> list[str]:
  out = []
  for system, other in found.get('compare', {}).items():
    points = ' to '.join(f'{100 * other[key]:+.1f}' for key in ('low', 'high'))
    out.append(
      f'On {_name(name)}, the model is {100 * other["difference"]:+.1f} points from {markdown.escape(system)} on the same comparisons '
      f"(95% interval {points}; McNemar's exact test: p = {other['mcnemar']['p']:.3g})."
    )
  return out


def _leaked(name: str, found: Mapping[str, Any]) -> list[str]:
  if 'contamination' not in found:
    return []
  leaked = found['contamination']
  without = f'; accuracy without them: {sections.accuracy(leaked["without"])}' if leaked['items'] else ''
  return [f'{leaked["items"]:,} of {found["items"]:,} prompts of {_name(name)} are in the training files{without}.']


def _truncated(name: str, found: Mapping[str, Any]) -> list[str]:
  cut = found.get('truncated') or {}
  return [
    f'On {_name(name)}, the model reads only a part of the {kind} of {cut[kind]:,} of {found["items"]:,} items.'
    for kind in ('responses', 'prompts')
    if cut.get(kind)
  ]


def _drawn(name: str, found: Mapping[str, Any]) -> list[str]:
  if 'drawn_from' not in found:
    return []
  return [f'{_name(name)} is a random part of its set: {found["items"]:,} of {found["drawn_from"]:,} items (`evaluate.max_items`).']


def _styles(name: str, found: Mapping[str, Any]) -> list[str]:
  if 'reference_styles' not in found:
    return []
  styles, matrix = found['reference_styles']['styles'], found['reference_styles']['matrix']
  cell = lambda value: '-' if value is None else f'{value:.1f}'
  body = [
    [markdown.escape(reference), markdown.escape(right), *map(cell, matrix[k][i])]
    for k, reference in enumerate(styles)
    for i, right in enumerate(styles)
  ]
  return [
    f'### {_name(name)}: styles of reference, right and wrong answer',
    'Comparisons that hold, in %. The reference is the right answer in the style of the first column; where that is also the candidate, '
    f'the row is empty. With the style of the reference a cell moves by {found["reference_styles"]["movement"]:.1f} points on average.',
    markdown.table(['reference', 'right answer', *(f'wrong: {markdown.escape(style)}' for style in styles)], body),
  ]


def _official(name: str, found: Mapping[str, Any]) -> list[str]:
  numbers = {key: value for key, value in (found.get('official') or {}).items() if isinstance(value, (int, float))}
  if not numbers:
    return []
  missing = f' Missing files: {", ".join(map(markdown.escape, found["missing"]))}.' if found.get('missing') else ''
  return [
    f'### {_name(name)}: official score',
    f'By the rule of the benchmark, in %.{missing}',
    markdown.table([*map(markdown.escape, numbers)], [[f'{value:.2f}' for value in numbers.values()]]),
  ]


def _paper(name: str, found: Mapping[str, Any]) -> list[str]:
  """Return the table of the paper's categories, next to its own numbers."""
  rows = found.get('paper')
  if not rows:
    return []
  systems = [*rows[0]['paper']]
  body = [
    [
      markdown.escape(row['category']),
      '-' if row['accuracy'] is None else sections.accuracy(row),
      f'{row["n"]:,}' if row['n'] else '-',
      *(f'{100 * row["paper"][system]:.1f}' for system in systems),
      _groups(row, rows),
    ]
    for row in rows
  ]
  return [
    f'### {_name(name)}: the categories of the paper',
    'Accuracy in % with 95% intervals, next to Table 1 of the POLAR paper, in which InternLM2 and Skywork read no reference. These are not '
    'the same prompts: which of RMB the paper uses is not published, its categories also hold prompts of its own, and some seem to have '
    'few. A category takes the groups of RMB that have its name, or those marked as inferred, by us; without either it is empty.',
    markdown.table(['category', 'this model', 'comparisons', *map(markdown.escape, systems), 'groups of RMB'], body),
  ]


def _groups(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
  if row is rows[-1]:
    return 'all'
  groups = ', '.join(map(markdown.escape, row['rmb_groups'])) or '-'
  return f'{groups} (inferred)' if row['mapping'] == 'inferred' else groups


def _references(name: str, found: Mapping[str, Any]) -> list[str]:
  variants = found['references']
  if len(variants) < 2:
    return []
  body = [[markdown.escape(variant), sections.accuracy(interval)] for variant, interval in variants.items()]
  return [f'### {_name(name)}: other references', markdown.table(['reference', 'accuracy, %'], body)]


def _categories(name: str, found: Mapping[str, Any]) -> list[str]:
  parts = {**found['by_category'], **{key.replace('_', ' '): value for key, value in found['by_length'].items()}}
  body = [[_name(key), sections.accuracy(interval), f'{interval["n"]:,}'] for key, interval in parts.items()]
  return [f'### {_name(name)}: by category and length', markdown.table(['', 'accuracy, %', 'comparisons'], body)]
