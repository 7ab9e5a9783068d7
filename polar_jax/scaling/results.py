"""results.csv: a row per trained cell of a sweep, and what the fits take from it."""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from polar_jax.scaling.fit import FitError, lower_envelope

NEEDED = ('parameters', 'tokens', 'flops', 'loss')
OPTIONAL = ('learning_rate', 'batch')


@dataclasses.dataclass(frozen=True)
class Results:
  """Columns of numbers, a row per run: float64 (rows,). The optional ones are None where the file has none."""

  parameters: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  learning_rate: np.ndarray | None = None
  batch: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.loss)

  def rows(self, which: Sequence[int] | np.ndarray) -> Results:
    """Some of the rows."""
    at = np.asarray(which)
    columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return dataclasses.replace(self, **{name: values[at] for name, values in columns.items() if values is not None})

  def best(self) -> Results:
    """Of the runs of one size and one number of tokens that with the lowest loss: what remains once learning rate and batch are tuned."""
    order = np.argsort(self.loss, kind='stable')
    first = {(self.parameters[i], self.tokens[i]): i for i in order[::-1]}
    return self.rows(np.array(sorted(first.values())))

  def longest(self) -> Results:
    """Of each size the run on the most tokens: the law in parameters is one of runs with enough data."""
    best = self.best()
    last = {best.parameters[i]: i for i in np.argsort(best.tokens, kind='stable')}
    return best.rows(np.array([last[size] for size in sorted(last)]))

  def envelope(self) -> Results:
    """The runs that no other size undercuts at the same FLOPs."""
    best = self.best()
    return best.rows(np.flatnonzero(lower_envelope(best.parameters, best.flops, best.loss)))


def read(path: str | pathlib.Path) -> Results:
  """Reads a CSV file with a header. Columns that are not known are left alone.

  Raises:
    FitError: no file, no such column, or a field that is no positive finite number, by row and column.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FitError(f'{path}: no such file; a sweep writes one, or give a CSV file with the columns {", ".join(NEEDED)}')
  with path.open(newline='', encoding='utf-8-sig') as file:
    reader = csv.DictReader(file, skipinitialspace=True)
    names = [(name or '').strip() for name in reader.fieldnames or []]
    missing = [name for name in NEEDED if name not in names]
    if missing:
      raise FitError(f'{path}: no column {", ".join(missing)}; the header has: {", ".join(names) or "nothing"}')
    reader.fieldnames = names
    kept = [name for name in (*NEEDED, *OPTIONAL) if name in names]
    table = [[_number(path, reader.line_num, name, row[name]) for name in kept] for row in reader]
  if not table:
    raise FitError(f'{path}: a header and no rows')
  return Results(**dict(zip(kept, np.array(table, np.float64).T, strict=True)))


def _number(path: pathlib.Path, line: int, name: str, text: str | None) -> float:
  try:
    value = float((text or '').strip())
  except ValueError:
    raise FitError(f'{path}: line {line}, column {name}: {text!r} is not a number') from None
  if not (math.isfinite(value) and value > 0):
    raise FitError(f'{path}: line {line}, column {name}: {text!r}; every number here must be positive and finite')
  return value
