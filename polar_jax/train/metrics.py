"""Logs of a run: metrics.jsonl with one record for every step, TensorBoard, and progress on the screen."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any, TextIO

import jax
import numpy as np

from polar_jax.runtime import json_files, paths
from polar_jax.runtime.progress import Progress
from polar_jax.types import UserError

FILE, SAMPLES, SUMMARY = 'metrics.jsonl', 'samples.jsonl', 'summary.json'


def read_metrics(folder: pathlib.Path, file: str = FILE) -> list[dict[str, Any]]:
  """Return the records of a run's metrics.jsonl, or of another log of its steps.

  A last line that has no newline and does not parse was cut off by a kill, and is left out. A metric that was not finite is null in the
  file, because JSON has no NaN, and NaN in the record.

  Raises:
    UserError: another line is not a JSON object with a `step`, or has another type in a field; the message names file and line.
  """
  path = folder / file
  try:
    *lines, rest = path.read_bytes().split(b'\n') if path.exists() else [b'']
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror}); check this path and the disk') from error
  records = []
  for number, line in enumerate([*lines, rest] if rest else lines, 1):
    try:
      record = json_files.parse(line)
    except json_files.JsonError as error:
      if number > len(lines):
        break
      raise UserError(f'{path}:{number}: {error}; delete the line') from error
    problem = _problem(record)
    if problem:
      raise UserError(f'{path}:{number}: {problem}; delete the line')
    # What was not finite when it was written; see `json_files.dumps`.
    records.append({name: math.nan if value is None else value for name, value in record.items()} if file == FILE else record)
  return records


# Fields of records that are not numbers. Those of samples.jsonl are texts.
_NOT_NUMBERS = {'stage': str, 'alarms': list, 'reward_histogram': dict, 'pick': str, 'prompt': str, 'reference': str, 'output': str}


def _problem(record: Any) -> str | None:
  """Return what is wrong with a record; None if nothing is."""
  step = record.get('step') if isinstance(record, dict) else None
  if isinstance(step, bool) or not isinstance(step, (int, float)) or not abs(step) < math.inf:
    return 'not an object with a `step`'
  for name, value in record.items():
    kind = _NOT_NUMBERS.get(name, (int, float))
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
      return f'{name!r:.60} is {value!r:.60}, which is not a {"number" if isinstance(kind, tuple) else kind.__name__}'
  return None


def keep_logs(folder: pathlib.Path, home: pathlib.Path) -> None:
  """Copy a run's logs to the folder of its checkpoints, if that is another one. Only the first process has logs."""
  if folder != home and jax.process_index() == 0:
    for name in (FILE, SAMPLES, SUMMARY):
      if (folder / name).exists():
        paths.copy(folder / name, home / name)


def fetch_logs(folder: pathlib.Path, home: pathlib.Path, step: int) -> None:
  """Copy back the logs that `keep_logs` kept, unless this machine has logged the run up to the checkpoint of `step`."""
  if folder != home and jax.process_index() == 0 and all(record['step'] < step for record in read_metrics(folder)):
    for name in (FILE, SAMPLES, SUMMARY):
      if (home / name).exists():
        paths.copy(home / name, folder / name)


def is_evaluation(record: Mapping[str, Any]) -> bool:
  """Return whether a record of metrics.jsonl is that of an evaluation rather than of a step."""
  return any(name.startswith(('validation_', 'evaluation_')) for name in record)


class StepLog:
  """Appends records to a JSON Lines file. A resumed run drops those after the restored step and writes them again.

  Attributes:
    lost: seconds that the dropped steps took.
  """

  def __init__(self, folder: pathlib.Path, last_step: int, file: str, evaluates_again: bool = False):
    """Open the file.

    Args:
      folder: of the run; created if needed.
      last_step: records of later steps are dropped.
      file: its name.
      evaluates_again: drop also an evaluation of the last step.
    """
    self._file: TextIO | None = None
    self.lost = 0.0
    if jax.process_index() != 0:
      return
    folder.mkdir(parents=True, exist_ok=True)
    records = read_metrics(folder, file)
    repeated = lambda record: evaluates_again and record['step'] == last_step and is_evaluation(record)
    kept = [record for record in records if record['step'] <= last_step and not repeated(record)]
    self.lost = sum(record.get('step_seconds', 0.0) for record in records if record['step'] > last_step)
    paths.write_atomically(folder / file, ''.join(json_files.dumps(record) + '\n' for record in kept))
    self._file = (folder / file).open('a', encoding='utf-8')

  def write(self, record: Mapping[str, Any]) -> None:
    """Append a record, which must have a `step`."""
    if self._file is not None:
      self._file.write(json_files.dumps(record) + '\n')

  def flush(self) -> None:
    """Sync all records to disk. Must come before a checkpoint that counts their steps."""
    if self._file is not None:
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Sync all records to disk and close the file."""
    if self._file is not None:
      self.flush()
      self._file.close()


def _import_tensorboard() -> types.ModuleType:
  """Import tensorboardX without torch, which it imports wherever it finds it, for seconds, only to recognize tensors. We log numbers."""
  hide = 'torch' not in sys.modules
  if hide:
    sys.modules['torch'] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
  try:
    import tensorboardX  # here, because only the first process needs it

    return tensorboardX
  finally:
    if hide:
      del sys.modules['torch']


class MetricsLog(StepLog):
  """metrics.jsonl, and its numbers in TensorBoard."""

  def __init__(self, folder: pathlib.Path, last_step: int, evaluates_again: bool = False):
    """Open both; see `StepLog`."""
    super().__init__(folder, last_step, FILE, evaluates_again)
    self._tensorboard: Any = None
    if self._file is None:
      return
    self._tensorboard = _import_tensorboard().SummaryWriter(str(folder / 'tensorboard'), purge_step=last_step + 1, flush_secs=30)

  def write(self, record: Mapping[str, Any]) -> None:
    """Append a record to metrics.jsonl, and its numbers to TensorBoard."""
    super().write(record)
    if self._tensorboard is None:
      return
    for name, value in record.items():
      if isinstance(value, (int, float)) and name != 'step':
        self._tensorboard.add_scalar(name, value, record['step'])

  def histogram(self, step: int, name: str, values: np.ndarray) -> None:
    """Add a histogram to TensorBoard."""
    if self._tensorboard is not None:
      self._tensorboard.add_histogram(name, values, step)

  def close(self) -> None:
    """Close both."""
    super().close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def reward_histogram(rewards_NC: np.ndarray, bins: int = 12) -> dict[str, Any]:
  """Return counts of chosen and rejected rewards in common, equal bins between the smallest and the largest reward."""
  low, high = float(rewards_NC.min()), float(rewards_NC.max())
  high = high if high > low else low + 1e-6
  chosen, rejected = (np.histogram(rewards_NC[:, c], bins, (low, high))[0].tolist() for c in (0, 1))
  return {'low': low, 'high': high, 'chosen': chosen, 'rejected': rejected}


# Shown on the screen: first of supervised training, then of PPO.
_SHOWN = ('loss', 'accuracy', 'validation_loss', 'validation_accuracy', 'reward', 'nll', 'kl', 'length')


class StepProgress(Progress):
  """Progress of a training run, fed with the records of metrics.jsonl."""

  def __init__(self, name: str, total: int, initial: int, every: int):
    """Open the bar, if there is one.

    Args:
      name: of the run.
      total: steps of the whole run.
      initial: steps that earlier starts took.
      every: steps between plain lines; the last step and validations always have one.
    """
    super().__init__(name, total, initial, unit='step')
    self._every = every

  def update(self, record: Mapping[str, Any]) -> None:
    """Show a record."""
    step = record['step']
    rate = f'{record["tokens_per_second"]:,.0f} tokens/s' if 'tokens_per_second' in record else ''
    line = step % self._every == 0 or step == self._total or 'validation_loss' in record
    self.show(step, {name: record[name] for name in _SHOWN if name in record}, rate=rate, line=line)
