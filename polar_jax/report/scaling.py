"""The section of report.md on scaling laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.report import markdown

FIGURE = 'figures/scaling.png'
_LAWS = {'N': 'parameters, the longest run of each size', 'C': 'training FLOPs, the lower envelope of all runs'}


def section(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Return paragraphs of Markdown; none if nothing was fitted.

  Args:
    results: the section `scaling` of report.json.
    figures: name -> relative link.
  """
  if not results:
    return []
  from polar_jax.scaling.analysis import FEW_SIZES, compare_forms  # scipy takes longer to import than a report without laws to write

  head = ['scaling law of the loss', 'X', 'alpha', '95% interval', 'beta', 'R2', 'runs']
  body = [
    [
      f'beta X^alpha, {name}',
      meaning,
      f'{law["alpha"]:.4f}',
      f'[{law["low"]:.4f}, {law["high"]:.4f}]',
      f'{law["beta"]:.4g}',
      f'{law["r2"]:.4f}',
      str(law['n']),
    ]
    for name, meaning in _LAWS.items()
    if (law := results.get(name))
  ]
  floored = results.get('floored', {})
  body += [
    [
      f'{law["irreducible"]:.4g} + beta X^alpha, {name}',
      'as above',
      f'{law["alpha"]:.4f}',
      '-',
      f'{law["beta"]:.4g}',
      f'{law["r2"]:.4f}',
      str(law['n']),
    ]
    for name in _LAWS
    if (law := floored.get(name))
  ]
  out = ['## Scaling laws', markdown.table(head, body)]
  out += markdown.figure(figures, 'scaling', 'Loss against parameters and against training FLOPs')
  if body:
    out.append(
      "Intervals of alpha are over the fitted runs (the wider of Student's t and a studentized bootstrap of the residuals). They do not "
      'resample the validation examples that each loss is a mean over.'
    )
  out += [sentence for name in _LAWS if (sentence := _held_out(results.get(name, {}), f'L({name})'))]
  out += [sentence for name in _LAWS if (sentence := _held_out(floored.get(name, {}), f'L({name}) with a floor'))]
  if forms := results.get('forms'):
    sentence = compare_forms(forms)
    out.append(f'{sentence[0].upper()}{sentence[1:]}.')
  if results.get('sizes', FEW_SIZES) < FEW_SIZES:
    out.append(f'**{results["sizes"]} sizes prove nothing**: this demonstrates the machinery and is not a scaling law.')
  return out


def _held_out(law: Mapping[str, Any], name: str) -> str:
  held_out = law.get('held_out')
  if not held_out:
    return ''
  return (
    f'The loss of the largest size, predicted from the others by {name}, is {held_out["predicted"]:.4f} '
    f'[{held_out["low"]:.4f}, {held_out["high"]:.4f}]; the measured loss is {held_out["loss"]:.4f}, '
    f'{"within" if held_out["within"] else "**not** within"} the interval.'
  )
