"""Columns of numbers of ranked examples, which are training signals in addition to the texts: margins of pairs, and weights."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.data.examples import example_number, examples_at
from polar_jax.data.readers import DataError
from polar_jax.types import Triplet

_AT_ONCE = 1_024  # examples
# Column -> (the option that reads it, what its values must be).
_COLUMNS = {'margin': ('loss.margin', '>= 0'), 'weight': ('loss.weights', '> 0 (leave out an example that is not to count)')}


def read(source: Sequence[Triplet], indices: Sequence[int], names: Sequence[str]) -> dict[str, np.ndarray]:
  """Return columns of examples as float32 arrays by name.

  Args:
    source: the examples, which keep columns in their metadata.
    indices: which of them.
    names: the columns: 'margin', 'weight'.

  Raises:
    DataError: as in `check`.
  """
  if not names:
    return {}
  examples = examples_at(source, indices)
  columns: dict[str, np.ndarray] = {}
  for name in names:
    values = [_number(source, index, example, name) for index, example in zip(indices, examples, strict=True)]
    columns[name] = np.array(values, np.float32)
  return columns


def check(source: Sequence[Triplet], names: Sequence[str]) -> None:
  """Check that all examples have the columns that a run reads.

  Raises:
    DataError: a value is missing, is no number or is not allowed; the message names the file and the example.
  """
  for start in range(0, len(source) if names else 0, _AT_ONCE):
    read(source, range(start, min(start + _AT_ONCE, len(source))), names)


def _number(source: Sequence[Triplet], index: int, example: Triplet, name: str) -> float:
  """Return a value of a column: a margin of at least 0, or a weight above 0."""
  value: Any = example.metadata.get(name)
  option, allowed = _COLUMNS[name]
  if value is None:
    reason = f'field {name!r} is missing'
  elif isinstance(value, bool) or not isinstance(value, numbers.Real):
    reason = f'{name} must be a number, not {str(value)!r:.60}'
  elif not math.isfinite(value) or value < 0 or (name == 'weight' and value == 0):
    reason = f'{name} is {float(value):g}; it must be a finite number {allowed}'
  else:
    return float(value)
  raise DataError(f'{_path(source)}example {example_number(source, index)}: {reason}; correct it, or set {option} to False')


def _path(source: Sequence[Triplet]) -> str:
  """Return the file of the examples, or the folder of a TFDS data set, as the beginning of a message; '' for examples of a program."""
  shards = getattr(source, 'shards', None)
  path = shards[0].parent if shards else getattr(source, 'path', None)
  return f'{path}, ' if path else ''
