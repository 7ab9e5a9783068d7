"""Building blocks of report.md: tables, numbers, lists and links to figures as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NUMERIC = re.compile(r'-|[-+\d\[][-+\d.,\s\[\]%\u2192e]*')  # an empty cell, or numbers with brackets, arrows and signs

# An underscore inside a word is harmless, and common in names.
_SPECIAL = re.compile(r'[\\`*\[\]~#$!]|(?<![^\W_])_|_(?![^\W_])')


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
  """Return a table; columns of numbers are aligned to the right.

  Args:
    head: heading of each column.
    body: cells of each line, already escaped (see `escape`) where they hold text of a user.
  """
  right = [i > 0 and bool(body) and all(_NUMERIC.fullmatch(line[i]) for line in body) for i in range(len(head))]
  lines = [head, ['---:' if r else '---' for r in right], *body]
  return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in line) + ' |' for line in lines)


def bullets(lines: Sequence[str]) -> str:
  """Return a bulleted list."""
  return '\n'.join(f'- {line}' for line in lines)


def figure(figures: Mapping[str, str], name: str, caption: str) -> list[str]:
  """Return the paragraph that shows a figure; nothing if it was not drawn.

  Args:
    figures: name -> link of the figures that were drawn.
    name: of the figure.
    caption: plain text.
  """
  return [f'![{caption}]({figures[name]})'] if name in figures else []


def text(value: Any) -> str:
  """Return a JSON value as a cell shows it, escaped."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return escape(', '.join(map(str, value)) if isinstance(value, list) else str(value))
  return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


def number(value: float | None, sign: str = '') -> str:
  """Return a number with three decimals, or one if it is large, so that a column is easy to compare; '-' for None."""
  if value is None or isinstance(value, int):
    return '-' if value is None else f'{value:{sign},}'
  return f'{value:{sign}.3f}' if abs(value) < 10 else f'{value:{sign}.1f}'


def spread(values: Sequence[float], sign: str = '') -> str:
  """Return the mean, followed by the lowest and the highest of several values in brackets; '-' for none."""
  if not values:
    return '-'
  mean = number(float(np.mean(values)), sign)
  return mean if len(values) == 1 else f'{mean} [{number(min(values), sign)}, {number(max(values), sign)}]'


def escape(value: str) -> str:
  """Return text of a user on one line, in which nothing is read as Markdown or HTML."""
  line = ''.join(c if c.isprintable() else ' ' for c in value.strip().replace('\n', ' \u23ce '))
  return _SPECIAL.sub(r'\\\g<0>', line.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;'))


def shorten(value: str, longest: int) -> str:
  """Return text of a user as a cell shows it: escaped, and shortened in the middle to about `longest` characters."""
  if not value.strip():
    return '*empty*'
  if len(value) > longest:
    half = longest // 2
    value = f'{value[:half]} [... {len(value) - 2 * half:,} characters ...] {value[-half:]}'
  return escape(value)


def ordered(keys: Mapping[str, Any], first: Sequence[str]) -> list[str]:
  """Return the keys: those in `first` in that order, then the others by name."""
  return [k for k in first if k in keys] + sorted(k for k in keys if k not in first)
