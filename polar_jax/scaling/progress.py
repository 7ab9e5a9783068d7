"""The table of a sweep's runs that a person watches."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from polar_jax.scaling import sweep
from polar_jax.scaling.sweep import Job
from polar_jax.train.metrics import FILE

_REDRAW_EVERY = 1.0  # seconds
_TAIL = 8_192  # bytes of a metrics file in which its last line lies


class State(NamedTuple):
  """Of a job."""

  step: int = 0
  loss: float | None = None  # of validation when done, of the last step before
  done: bool = False
  error: str | None = None

  @property
  def word(self) -> str:
    return 'failed' if self.error else 'done' if self.done else f'step {self.step}' if self.step else 'waiting'


def look(job: Job, workdir: pathlib.Path) -> State:
  """What the files of a job say."""
  folder = job.folder(workdir)
  result = sweep.read_result(folder)
  if result is not None:
    return State(result['steps'], result.get('loss'), done=True)
  path = folder / FILE
  if not path.exists():
    return State()
  with path.open('rb') as file:
    file.seek(max(os.path.getsize(path) - _TAIL, 0))
    lines = file.read().split(b'\n')
  for line in reversed(lines[:-1]):  # what follows the last newline may be half a line
    try:
      row = json.loads(line)
    except ValueError:
      break
    if 'loss' in row:
      return State(row['step'], row['loss'])
  return State()


def render(jobs: Sequence[Job], states: Sequence[State], rows: int) -> str:
  """A line per job, at most `rows` lines: first those that run, then those that failed, are done and wait."""
  rank = lambda state: 1 if state.error else 2 if state.done else 0 if state.step else 3
  order = sorted(range(len(jobs)), key=lambda i: (rank(states[i]), i))
  width = max(len(job.name) for job in jobs)
  lines = []
  for i in order[: rows - 1]:
    loss = '' if states[i].loss is None else f'loss {states[i].loss:.4f}'
    lines.append(f'{jobs[i].name:<{width}}  {states[i].word:<12}  {loss}'.rstrip())
  done = sum(state.done for state in states)
  failed = sum(state.error is not None for state in states)
  more = f', {len(jobs) - len(lines)} not shown' if len(lines) < len(jobs) else ''
  return '\n'.join([*lines, f'{done} of {len(jobs)} done' + (f', {failed} failed' if failed else '') + more])


class LiveTable:
  """Redraws itself in a terminal; elsewhere it says a line whenever a job ends.

  Args:
    live: False where the jobs themselves write to this terminal.
  """

  def __init__(self, jobs: Sequence[Job], workdir: pathlib.Path, live: bool = True, out: TextIO | None = None):
    self._jobs, self._workdir, self._out = jobs, workdir, out or sys.stderr
    self._errors: dict[str, str] = {}
    self._drawn, self._at = 0, 0.0
    self._live = live and self._out.isatty()

  def watch(self) -> None:
    """Redraws, if it is time to."""
    if self._live and time.monotonic() - self._at >= _REDRAW_EVERY:
      self._draw()

  def ended(self, job: Job, error: str | None) -> None:
    """Notes that a job ended."""
    if error:
      self._errors[job.name] = error
    if self._live:
      self._draw()
      return
    state = look(job, self._workdir)
    loss = '' if state.loss is None else f', loss {state.loss:.4f}'
    print(f'sweep: {job.name}: ' + (f'failed: {error}' if error else f'done{loss}'), flush=True)

  def _draw(self) -> None:
    size = shutil.get_terminal_size()
    states = [look(job, self._workdir)._replace(error=self._errors.get(job.name)) for job in self._jobs]
    text = render(self._jobs, states, max(size.lines - 2, 2))
    lines = [line[: size.columns - 1] for line in text.split('\n')]
    up = f'\x1b[{self._drawn}F\x1b[J' if self._drawn else ''
    self._out.write(up + '\n'.join(lines) + '\n')
    self._out.flush()
    self._drawn, self._at = len(lines), time.monotonic()
