"""Results of a sweep: `result.json` of each job, and results.csv, with one row per run, which the fits read."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.config import ConfigError
from polar_jax.runtime import json_files, text_files
from polar_jax.runtime.paths import write_atomically
from polar_jax.scaling.fit import FitError, lower_envelope

TABLE = 'results.csv'  # of a sweep, in the workdir
RESULT = 'result.json'  # of a job, in its folder
NEEDED = ('parameters', 'tokens', 'flops', 'loss')
OPTIONAL = ('learning_rate', 'batch')


@dataclasses.dataclass(frozen=True)
class Results:
  """Columns of numbers with one row per run: float64 (rows,). An optional column is None if the file does not have it."""

  parameters: np.ndarray
  tokens: np.ndarray
  flops: np.ndarray
  loss: np.ndarray
  learning_rate: np.ndarray | None = None
  batch: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.loss)

  def rows(self, which: Sequence[int] | np.ndarray) -> Results:
    """Return the rows with these indices."""
    indices = np.asarray(which)
    columns = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return dataclasses.replace(self, **{name: values[indices] for name, values in columns.items() if values is not None})

  def best(self) -> Results:
    """Return the run with the lowest loss for each size and number of tokens, as if learning rate and batch size had been tuned."""
    order = np.argsort(self.loss, kind='stable')
    first = {(self.parameters[i], self.tokens[i]): i for i in order[::-1]}
    return self.rows(np.array(sorted(first.values())))

  def longest(self) -> Results:
    """Return the run with the most tokens for each size (L(N) assumes enough data)."""
    best = self.best()
    last = {best.parameters[i]: i for i in np.argsort(best.tokens, kind='stable')}
    return best.rows(np.array([last[size] for size in sorted(last)]))

  def envelope(self) -> Results:
    """Return the runs that no other size undercuts at the same FLOPs."""
    best = self.best()
    return best.rows(np.flatnonzero(lower_envelope(best.parameters, best.flops, best.loss)))


def read(path: str | pathlib.Path) -> Results:
  """Read a CSV file with a header. Unknown columns are ignored.

  Raises:
    FitError: the file or a column is missing, the file is not CSV in UTF-8, a column occurs twice, or a field is not a positive finite
      number (named by line and column).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FitError(f'{path}: no such file; run the sweep stage to write one, or give a CSV file with the columns {", ".join(NEEDED)}')
  try:
    names, rows = _read_csv(path, skipinitialspace=True)
  except ConfigError as error:
    raise FitError(str(error)) from error
  missing = [name for name in NEEDED if name not in names]
  if missing:
    raise FitError(f'{path}: no column {", ".join(missing)}; the header has: {", ".join(names)[:200] or "nothing"}')
  kept = [name for name in (*NEEDED, *OPTIONAL) if name in names]
  table = [[_number(path, line, name, row[name]) for name in kept] for line, row in rows]
  if not table:
    raise FitError(f'{path}: the file has a header but no rows')
  return Results(**dict(zip(kept, np.array(table, np.float64).T, strict=True)))


def _read_csv(path: pathlib.Path, **form: Any) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
  """Return the names of the columns, and (line, fields by name) of every row; a field that a short row lacks is None.

  Args:
    path: of the file.
    form: of `csv.reader`.

  Raises:
    ConfigError: the file is not CSV in UTF-8, has a column twice, or a row with more fields than the header.
  """
  try:
    reader = csv.reader(io.StringIO(text_files.read_text(path)), **form)
    names = [name.strip() for name in next(reader, [])]
    twice = next((name for i, name in enumerate(names) if name and name in names[:i]), None)
    if twice is not None:
      raise ConfigError(f'{path}: {names.count(twice)} columns are called {twice!r:.60}; rename or remove all but one')
    rows = []
    for fields in reader:
      if any(fields[len(names) :]):
        raise ConfigError(f'{path}: line {reader.line_num} has {len(fields)} fields, and the header {len(names)}; quote fields with commas')
      if fields:
        rows.append((reader.line_num, dict(itertools.zip_longest(names, fields[: len(names)]))))
    return names, rows
  except (OSError, csv.Error, text_files.TextError) as error:
    raise ConfigError(f'{"" if isinstance(error, text_files.TextError) else f"{path}: not a readable CSV file: "}{error}') from error


def _number(path: pathlib.Path, line: int, name: str, text: str | None) -> float:
  try:
    value = float((text or '').strip())
  except ValueError:
    raise FitError(f'{path}: line {line}, column {name}: {text!r:.80} is not a number') from None
  if not (math.isfinite(value) and value > 0):
    raise FitError(f'{path}: line {line}, column {name}: {text!r} is not a positive finite number')
  return value


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
  """Return the result of the job with this folder, or None if the job is not done.

  Raises:
    UserError: the file is damaged.
  """
  path = folder / RESULT
  if not path.exists():
    return None
  remedy = f'delete {path.name}, and the same command reads the result from the checkpoint of the job'
  result = json_files.read(path, remedy)
  for name, value in result.items():
    numeric = name in (*NEEDED, *OPTIONAL, 'steps', 'validation_loss')
    if numeric and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
      raise ConfigError(f'{path}: {name} is {value!r:.60}, which is not a finite number; {remedy}')
  if 'steps' not in result:
    raise ConfigError(f'{path}: has no `steps`; {remedy}')
  return result


def write_result(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Write the result of the job with this folder, which marks it as done."""
  write_atomically(folder / RESULT, json.dumps(result, indent=2, allow_nan=False) + '\n')


def read_table(path: pathlib.Path) -> dict[str, dict[str, str]]:
  """Return the rows of a results.csv by the name of their run; an empty dict if there is no file.

  Raises:
    ConfigError: the file is not the table of a sweep.
  """
  if not path.exists():
    return {}
  names, rows = _read_csv(path)
  if 'run' not in names or any(None in row.values() or not row['run'] for _, row in rows):
    raise ConfigError(f'{path}: not the table of a sweep (it needs a column `run` and a value in every field); move the file away')
  runs = [row['run'] for _, row in rows]
  twice = next((run for i, run in enumerate(runs) if run in runs[:i]), None)
  if twice is not None:
    raise ConfigError(f'{path}: {runs.count(twice)} rows are of the run {twice!r:.60}; remove all but one')
  return {str(row['run']): {name: str(value) for name, value in row.items()} for _, row in rows}


def write_table(path: pathlib.Path, rows: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> None:
  """Write a results.csv.

  Args:
    path: of the file.
    rows: by the name of their run.
    order: names of the grid's runs. Rows of other sweeps come before them.
  """
  out = io.StringIO()
  others = [name for name in rows if name not in set(order)]
  columns = list(dict.fromkeys(name for row in rows.values() for name in row))
  writer = csv.DictWriter(out, columns, restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows[name] for name in [*others, *order] if name in rows)
  write_atomically(path, out.getvalue())
