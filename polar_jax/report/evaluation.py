"""The section of report.md on given evaluation sets: files of the user and public benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.report import markdown, plots, sections

FIGURE = 'evaluation'
_LONGEST = 40  # characters of a name


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
    *sections.clustering(sets),
    *markdown.figure(figures, FIGURE, 'Accuracy by set, next to baselines, with 95% intervals'),
  ]
  out += [f'On {_name(name)}, {sections.verdict("the model", found["margin_over_best_baseline"])}' for name, found in sets.items()]
  out += [sentence for name, found in sets.items() for sentence in (*_compared(name, found), *_leaked(name, found))]
  parts = (_official, _paper, _references, _categories)
  out += [part for name, found in sets.items() for make in parts for part in make(name, found)]
  return out


def draw(evaluation: Mapping[str, Any]) -> dict[str, Any]:
  """Return the figure of accuracies, if there are any."""
  sets = evaluation.get('sets', {})
  if not sets:
    return {}
  baselines: dict[str, dict[str, Any]] = {}
  for name, found in sets.items():
    for baseline, interval in found['baselines'].items():
      baselines.setdefault(baseline, {})[name] = interval
  return {FIGURE: plots.accuracy_bars(sets, baselines)}


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


def _compared(name: str, found: Mapping[str, Any]) -> list[str]:
  if 'compare' not in found:
    return []
  other, count = found['compare'], found['compare']['sets_compared']
  points = ' to '.join(f'{100 * other[key]:+.1f}' for key in ('low', 'high'))
  many = f'; {count} sets were compared, so that a small p-value somewhere is to be expected' if count > 1 else ''
  return [
    f'On {_name(name)}, the model is {100 * other["difference"]:+.1f} points from {markdown.escape(other["with"])} on the same comparisons '
    f"(95% interval {points}; McNemar's exact test: p = {other['mcnemar']['p']:.3g}{many})."
  ]


def _leaked(name: str, found: Mapping[str, Any]) -> list[str]:
  if 'contamination' not in found:
    return []
  leaked = found['contamination']
  without = f'; accuracy without them: {sections.accuracy(leaked["without"])}' if leaked['items'] else ''
  return [f'{leaked["items"]:,} of {found["items"]:,} prompts of {_name(name)} are in the training files{without}.']


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
