"""Pieces of report.md: tables, numbers and links to figures as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|').replace('\n', ' ') for cell in line) + ' |' for line in lines)


def text(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return ', '.join(map(str, value)) if isinstance(value, list) else str(value)
  return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'


def figure(figures: Mapping[str, str], name: str, caption: str) -> list[str]:
  return [f'![{caption}]({figures[name]})'] if name in figures else []


def ordered(keys: Mapping[str, Any], first: Sequence[str]) -> list[str]:
  """Known keys in their order, then the others by name."""
  return [k for k in first if k in keys] + sorted(k for k in keys if k not in first)
