"""Progress of a long task: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping

import jax

_print = functools.partial(print, flush=True)


class Progress:
  """A tqdm bar in a terminal, plain lines elsewhere. Only the first process shows either."""

  def __init__(self, name: str, total: int, done: int, *, unit: str, show_line: Callable[[str], None] = _print):
    """Open the bar, if there is one.

    Args:
      name: of the task.
      total: units of the whole task.
      done: units that were done before.
      unit: singular noun, such as 'step'.
      show_line: receives the plain lines.
    """
    self._name, self._total, self._unit, self._show_line, self._bar = name, total, unit, show_line, None
    self._is_first = jax.process_index() == 0
    if self._is_first and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True)

  def show(self, done: int, values: Mapping[str, float], *, rate: str = '', line: bool = True) -> None:
    """Move the bar to `done` units, or print a line.

    Args:
      done: units of the task that are done.
      values: current figures; `length` is shown with one decimal place.
      rate: units per second as text, for the plain line alone: the bar has its own.
      line: whether a plain line is due.
    """
    if self._bar is not None:
      self._bar.update(done - self._bar.n)
      if values:
        self._bar.set_postfix({name: f'{value:.{1 if name == "length" else 3}f}' for name, value in values.items()})
    elif self._is_first and line:
      figures = '  '.join(f'{name} {value:.{1 if name == "length" else 4}f}' for name, value in values.items())
      self._show_line('  '.join(part for part in (self._name, f'{self._unit} {done}/{self._total}', figures, rate) if part))

  def close(self) -> None:
    """Leave the bar as it is."""
    if self._bar is not None:
      self._bar.close()
