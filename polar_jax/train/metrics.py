"""Metrics of a run: metrics.jsonl (every step once), TensorBoard, and what a person watches."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any, TextIO

import jax
import numpy as np

from polar_jax.runtime import paths
from polar_jax.types import UserError

FILE, SAMPLES, SUMMARY = 'metrics.jsonl', 'samples.jsonl', 'summary.json'


def read_metrics(folder: pathlib.Path, file: str = FILE) -> list[dict[str, Any]]:
  """The rows of a run's metrics.jsonl, or of another log of its steps.

  A last line without its newline that does not parse was torn by a kill, and is left out.

  Raises:
    UserError: for any other line that is no JSON object with a `step`, naming file and line.
  """
  path = folder / file
  text = path.read_text(encoding='utf-8') if path.exists() else ''
  lines, rows = text.splitlines(), []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines) and not text.endswith('\n'):
        break
      raise UserError(f'{path}:{number}: not valid JSON ({error}); delete the line') from error
    if not isinstance(row, dict) or 'step' not in row:
      raise UserError(f'{path}:{number}: not an object with a `step`; delete the line')
    rows.append(row)
  return rows


def keep_logs(folder: pathlib.Path, home: pathlib.Path) -> None:
  """Copies a run's logs to where its checkpoints are, if that is elsewhere. Only the first process has any."""
  if folder != home and jax.process_index() == 0:
    for name in (FILE, SAMPLES, SUMMARY):
      if (folder / name).exists():
        paths.copy(folder / name, home / name)


def fetch_logs(folder: pathlib.Path, home: pathlib.Path, step: int) -> None:
  """Brings back what `keep_logs` has kept, on a machine that has not logged the run up to the checkpoint of `step`."""
  if folder != home and jax.process_index() == 0 and all(row['step'] < step for row in read_metrics(folder)):
    for name in (FILE, SAMPLES, SUMMARY):
      if (home / name).exists():
        paths.copy(home / name, folder / name)


class StepLog:
  """Appends rows to a file of JSON lines; on a resume drops those after the restored step, which the run will write again.

  Attributes:
    lost: seconds that the dropped steps had taken.
  """

  def __init__(self, folder: pathlib.Path, resume_step: int, file: str):
    self._file: TextIO | None = None
    self.lost = 0.0
    if jax.process_index() != 0:
      return
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_metrics(folder, file)
    kept = [row for row in rows if row['step'] <= resume_step]
    self.lost = sum(row.get('step_seconds', 0.0) for row in rows if row['step'] > resume_step)
    temporary = folder / (file + '.tmp')
    temporary.write_text(''.join(json.dumps(row) + '\n' for row in kept), encoding='utf-8')
    os.replace(temporary, folder / file)
    self._file = (folder / file).open('a', encoding='utf-8')

  def write(self, row: dict[str, Any]) -> None:
    """One line; the row has a `step`."""
    if self._file is not None:
      self._file.write(json.dumps(row) + '\n')

  def flush(self) -> None:
    """Everything written so far is on disk afterwards: called before a checkpoint may say that these steps are done."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self.flush()
      self._file.close()


class MetricsLog(StepLog):
  """metrics.jsonl, and its numbers in TensorBoard."""

  def __init__(self, folder: pathlib.Path, resume_step: int):
    super().__init__(folder, resume_step, FILE)
    self._tensorboard: Any = None
    if self._file is None:
      return
    from tensorboardX import SummaryWriter  # takes 0.2 s to import, and only the first process needs it

    self._tensorboard = SummaryWriter(str(folder / 'tensorboard'), purge_step=resume_step + 1, flush_secs=30)

  def write(self, row: dict[str, Any]) -> None:
    """One line of metrics.jsonl; numbers go to TensorBoard too."""
    super().write(row)
    if self._tensorboard is None:
      return
    for name, value in row.items():
      if isinstance(value, (int, float)) and name != 'step':
        self._tensorboard.add_scalar(name, value, row['step'])

  def histogram(self, step: int, name: str, values: np.ndarray) -> None:
    if self._tensorboard is not None:
      self._tensorboard.add_histogram(name, values, step)

  def close(self) -> None:
    super().close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def reward_histogram(rewards_NC: np.ndarray, bins: int = 12) -> dict[str, Any]:
  """Counts of chosen and rejected rewards over common, equal bins between the smallest and the largest."""
  low, high = float(rewards_NC.min()), float(rewards_NC.max())
  high = high if high > low else low + 1e-6
  chosen, rejected = (np.histogram(rewards_NC[:, c], bins, (low, high))[0].tolist() for c in (0, 1))
  return {'low': low, 'high': high, 'chosen': chosen, 'rejected': rejected}


# What a person watches: of training on rows, and of tuning by reward.
_SHOWN = ('loss', 'accuracy', 'validation_loss', 'validation_accuracy', 'reward', 'nll', 'kl', 'length')


class Progress:
  """A bar in a terminal, a plain line every `every` steps elsewhere. Only the first process speaks."""

  def __init__(self, name: str, total: int, initial: int, every: int):
    self._name, self._total, self._every, self._bar = name, total, every, None
    self._silent = jax.process_index() != 0
    if not self._silent and sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(total=total, initial=initial, desc=name, unit='step', dynamic_ncols=True)

  def update(self, row: dict[str, Any]) -> None:
    if self._silent:
      return
    shown = {k: row[k] for k in _SHOWN if k in row}
    if self._bar is not None:
      self._bar.update(row['step'] - self._bar.n)
      self._bar.set_postfix({k: f'{v:.{1 if k == "length" else 3}f}' for k, v in shown.items()})
    elif row['step'] % self._every == 0 or row['step'] == self._total or 'validation_loss' in row:
      rate = f'  {row["tokens_per_second"]:,.0f} tokens/s' if 'tokens_per_second' in row else ''
      values = '  '.join(f'{k} {v:.{1 if k == "length" else 4}f}' for k, v in shown.items())
      print(f'{self._name}  step {row["step"]}/{self._total}  {values}{rate}', flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
