"""The report's section on scaling laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.report import markdown

FIGURE = 'figures/scaling.png'
FEW = 5  # sizes: below this a law is a demonstration
_LAWS = {'N': 'parameters, the longest run of each size', 'C': 'training FLOPs, the lower envelope of all runs'}


def section(found: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  """Lines of Markdown; none where nothing was fitted.

  Args:
    found: section `scaling` of report.json.
    figures: name -> relative link.
  """
  if not found:
    return []
  head = ['law of the loss', 'X', 'alpha', '95% interval', 'beta', 'R2', 'points']
  rows = [
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
    if (law := found.get(name))
  ]
  out = ['## Scaling laws', markdown.table(head, rows), *markdown.figure(figures, 'scaling', 'Loss over parameters and over FLOPs')]
  out += [sentence for name in _LAWS if (sentence := _held_out(found.get(name, {}), name))]
  if found.get('sizes', FEW) < FEW:
    out.append(f'**{found["sizes"]} sizes prove nothing**: this shows the machinery, not a law.')
  return out


def _held_out(law: Mapping[str, Any], name: str) -> str:
  held = law.get('held_out')
  if not held:
    return ''
  return (
    f'The largest size, predicted from the others by L({name}): {held["predicted"]:.4f} [{held["low"]:.4f}, {held["high"]:.4f}]; '
    f'measured {held["loss"]:.4f}, {"within" if held["within"] else "**not** within"} the interval.'
  )
