"""Progress of a sweep: a table of its jobs that redraws itself in a terminal."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, TextIO

from polar_jax.runtime import json_files
from polar_jax.scaling import results
from polar_jax.scaling.grid import Job
from polar_jax.train.metrics import FILE

_REDRAW_SECONDS = 1.0
_TAIL = 8_192  # bytes at the end of a metrics file that contain its last line


class JobState(NamedTuple):
  """Progress of a job."""

  step: int = 0
  loss: float | None = None  # on validation examples when done, else of the last step
  done: bool = False
  error: str | None = None

  @property
  def status(self) -> str:
    """The state in a word or two."""
    return 'failed' if self.error else 'done' if self.done else f'step {self.step}' if self.step else 'waiting'


def read_state(job: Job, workdir: pathlib.Path) -> JobState:
  """Read the state of a job from its files."""
  folder = job.folder(workdir)
  result = results.read_result(folder)
  if result is not None:
    return JobState(result['steps'], result.get('loss'), done=True)
  path = folder / FILE
  if not path.exists():
    return JobState()
  with path.open('rb') as file:
    file.seek(max(os.path.getsize(path) - _TAIL, 0))
    lines = file.read().split(b'\n')
  for line in reversed(lines[:-1]):  # after the last newline there may be half a line
    try:
      record = json_files.parse(line)
    except json_files.JsonError:
      break
    step, loss = (record.get('step'), record.get('loss')) if isinstance(record, dict) else (None, None)
    if isinstance(step, int) and isinstance(loss, float):
      return JobState(step, loss)
  return JobState()


def render(jobs: Sequence[Job], states: Sequence[JobState], max_lines: int) -> str:
  """Return the table: a line per job, in the order running, failed, done, waiting, and a line with totals; at most `max_lines` lines."""
  rank = lambda state: 1 if state.error else 2 if state.done else 0 if state.step else 3
  order = sorted(range(len(jobs)), key=lambda i: (rank(states[i]), i))
  width = max(len(job.name) for job in jobs)
  lines = []
  for i in order[: max_lines - 1]:
    loss = '' if states[i].loss is None else f'loss {states[i].loss:.4f}'
    lines.append(f'{jobs[i].name:<{width}}  {states[i].status:<12}  {loss}'.rstrip())
  done = sum(state.done for state in states)
  failed = sum(state.error is not None for state in states)
  hidden = f', {len(jobs) - len(lines)} not shown' if len(lines) < len(jobs) else ''
  return '\n'.join([*lines, f'{done} of {len(jobs)} done' + (f', {failed} failed' if failed else '') + hidden])


class LiveTable:
  """A table of jobs that redraws itself in a terminal. Elsewhere it prints a line whenever a job ends."""

  def __init__(self, jobs: Sequence[Job], workdir: pathlib.Path, live: bool = True, out: TextIO | None = None):
    """Initialize the table without drawing it.

    Args:
      jobs: to show.
      workdir: of the sweep.
      live: False if the jobs themselves write to this terminal, so that it cannot be redrawn.
      out: where it is drawn; None: standard error.
    """
    self._jobs, self._workdir, self._out = jobs, workdir, out or sys.stderr
    self._errors: dict[str, str] = {}
    self._drawn_lines, self._drawn_at = 0, 0.0
    self._live = live and self._out.isatty()

  def watch(self) -> None:
    """Redraw the table if enough time has passed."""
    if self._live and time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
      self._draw()

  def ended(self, job: Job, error: str | None) -> None:
    """Show that a job ended, with its error message if it failed."""
    if error:
      self._errors[job.name] = error
    if self._live:
      self._draw()
      return
    state = read_state(job, self._workdir)
    loss = '' if state.loss is None else f', loss {state.loss:.4f}'
    print(f'sweep: {job.name}: ' + (f'failed: {error}' if error else f'done{loss}'), flush=True)

  def _draw(self) -> None:
    size = shutil.get_terminal_size()
    states = [read_state(job, self._workdir)._replace(error=self._errors.get(job.name)) for job in self._jobs]
    text = render(self._jobs, states, max(size.lines - 2, 2))
    lines = [line[: size.columns - 1] for line in text.split('\n')]
    erase = f'\x1b[{self._drawn_lines}F\x1b[J' if self._drawn_lines else ''
    self._out.write(erase + '\n'.join(lines) + '\n')
    self._out.flush()
    self._drawn_lines, self._drawn_at = len(lines), time.monotonic()
