"""Figures of a data card: triplets by policy and role, and lengths of texts by role. Each returns a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polar_jax.report import plots
from polar_jax.synthesis.tally import ROLES

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_COLORS = {'reference': '#0072B2', 'chosen': '#E69F00', 'rejected': '#D55E00', 'prompt': '#555555'}  # of Okabe and Ito
_ENOUGH_ROWS, _MOST_COLUMNS = 48, 3  # a further column is begun for more policies than these, a fourth one never
_LONGEST_NAME = 30  # characters of a label
_ROW, _COLUMN, _BARS = 0.17, 4.6, 1.1  # inches: height of a bar, width of a column, and of what is not bars


def policies(counts: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Draw how many triplets each policy is in, by role, as one bar for each policy; those with the most triplets first.

  Args:
    counts: policy -> the values of a card: `roles`, and `held_out` and `quarantined`, which are marked at the name.

  Raises:
    ValueError: if there is no policy.
  """
  if not counts:
    raise ValueError('no policy to draw')
  names = sorted(counts, key=lambda name: (-sum(counts[name]['roles'].values()), name))
  columns = min(math.ceil(len(names) / _ENOUGH_ROWS), _MOST_COLUMNS)
  rows = math.ceil(len(names) / columns)
  with plots.style(font_size=8):
    figure = plots.new_figure(max(_COLUMN * columns, 6.5), _BARS + _ROW * max(rows, 4))
    axes = figure.subplots(1, columns, squeeze=False, sharex=True)
    for column, ax in enumerate(axes.flat):
      _bars(ax, names[column * rows : (column + 1) * rows], counts, rows)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside upper center', ncols=len(ROLES))
  return figure


def _bars(ax: Axes, names: list[str], counts: Mapping[str, Mapping[str, Any]], rows: int) -> None:
  start = [0] * len(names)
  for role in ROLES:
    width = [counts[name]['roles'].get(role, 0) for name in names]
    ax.barh(range(len(names)), width, left=start, height=0.72, color=_COLORS[role], label=role)
    start = [a + b for a, b in zip(start, width, strict=True)]
  # Dollar signs of names do not begin formulas.
  ax.set_yticks(range(len(names)), [_label(name, counts[name]) for name in names], parse_math=False)
  ax.set_ylim(rows - 0.4, -0.6)
  ax.tick_params(axis='y', length=0)
  ax.xaxis.set_major_locator(_whole_numbers())
  ax.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
  ax.set_xlabel('triplets, once for each role')
  ax.grid(axis='x', alpha=0.25)


def _whole_numbers() -> Any:
  from matplotlib import ticker

  return ticker.MaxNLocator(5, integer=True)


def _label(name: str, count: Mapping[str, Any]) -> str:
  name = ''.join(c if c.isprintable() else ' ' for c in name)
  if len(name) > _LONGEST_NAME:  # versions are at the end of names
    name = f'{name[: _LONGEST_NAME // 2 - 1]}\u2026{name[-_LONGEST_NAME // 2 :]}'
  marks = [mark for mark, holds in (('held out', count.get('held_out')), ('quarantined', count.get('quarantined') is not None)) if holds]
  return f'{name} ({", ".join(marks)})' if marks else name


def lengths(by_text: Mapping[str, Mapping[str, Any]]) -> Figure:
  """Draw the distribution of lengths in characters, one panel for each text of a triplet; the bins double, a line is at the mean.

  Args:
    by_text: name of a text -> the values of a card: `count`, `mean`, `histogram`.

  Raises:
    ValueError: if there is no text.
  """
  drawn = {name: values for name, values in by_text.items() if values['count']}
  if not drawn:
    raise ValueError('no text to draw')
  bins = [_bin(least) for values in drawn.values() for least in values['histogram']]
  first, last = min(bins), max(bins) + 1
  with plots.style(font_size=9):
    figure = plots.new_figure(max(2.6 * len(drawn), 4.0), 2.5)
    axes = figure.subplots(1, len(drawn), squeeze=False, sharex=True, sharey=True)
    for ax, (name, values) in zip(axes.flat, drawn.items(), strict=True):
      for least, count in values['histogram'].items():
        color = _COLORS.get(name, _COLORS['prompt'])
        ax.bar(_bin(least) + 0.5, 100 * count / values['count'], width=0.94, color=color)
      ax.axvline(_place(values['mean']), color='black', linestyle='--', linewidth=1)
      ax.set_title(f'{name} (mean {values["mean"]:,.0f})')
      ticks = range(first, last + 1, max(1, math.ceil((last - first) / 6)))
      ax.set_xticks(ticks, [_short(1 << i >> 1) for i in ticks])
      ax.set_xlim(first - 0.2, last + 0.2)
      ax.set_xlabel('characters')
      ax.grid(axis='y', alpha=0.25)
    axes[0, 0].set_ylabel('share of texts, %')
  return figure


def _bin(least: str) -> int:
  return int(least).bit_length()


def _place(length: float) -> float:
  """Return where a length is on an axis on which bin i, of the lengths with i binary digits, is from i to i + 1."""
  return length if length < 1 else 1 + math.log2(length)


def _short(length: int) -> str:
  return f'{length:,}' if length < 1024 else f'{length >> 10:,}k' if length < 1 << 20 else f'{length >> 20:,}M'
