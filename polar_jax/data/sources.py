"""User files of triplets: .jsonl, .jsonl.gz and .parquet, and the choice between them and a TFDS folder.

A row is {prompt, reference, chosen, rejected}, each a string or a list of messages, with an optional wrapper and category; all
else it holds is kept as metadata. Rows are checked when the file is opened and held in memory.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

from polar_jax.data.template import TemplateError, check_wrapper, join_messages
from polar_jax.types import Triplet, UserError

SUFFIXES = ('.jsonl', '.jsonl.gz', '.parquet')
_TEXT_FIELDS = ('prompt', 'reference', 'chosen', 'rejected')
_Checked = TypeVar('_Checked')
_TFDS_FILES = ('dataset_info.json', '*/dataset_info.json', '*/*/dataset_info.json')  # the folder itself, or name/version below it


class SourceError(UserError):
  """Data that cannot be opened. The message is one line for the user."""


class BadRowError(SourceError):
  """A row that cannot be used.

  Attributes:
    path, row (from 1; the line of a jsonl file), field (None: the row as a whole), reason.
  """

  def __init__(self, path: pathlib.Path, row: int, field: str | None, reason: str):
    super().__init__(f"{path}, row {row}: {reason}; mend it, or set data.on_bad_row to 'skip'")
    self.path, self.row, self.field, self.reason = path, row, field, reason

  def __reduce__(self) -> tuple:
    return type(self), (self.path, self.row, self.field, self.reason)


class RowFile(Sequence[Triplet]):
  """The good rows of a file, in its order.

  Attributes:
    path: the file.
    skipped: (row number from 1, reason) of the rows left out.
  """

  def __init__(self, path: pathlib.Path, rows: list[Triplet], skipped: list[tuple[int, str]]):
    self.path, self.skipped, self._rows = path, skipped, rows

  def __len__(self) -> int:
    return len(self._rows)

  @overload
  def __getitem__(self, index: int) -> Triplet: ...
  @overload
  def __getitem__(self, index: slice) -> list[Triplet]: ...
  def __getitem__(self, index: int | slice) -> Triplet | list[Triplet]:
    return self._rows[index]


class BadField(Exception):
  """What a check of a row finds wrong: the field (None: the row as a whole) and the reason."""

  def __init__(self, field: str | None, reason: str):
    super().__init__(reason)
    self.field, self.reason = field, reason


def read_rows(path: str | pathlib.Path, on_bad_row: str = 'raise') -> RowFile:
  """Reads and checks a file of triplets. Blank lines of a jsonl file are no rows.

  Args:
    on_bad_row: 'raise', or 'skip' to leave bad rows out and list them in `.skipped`.

  Raises:
    BadRowError: a bad row, with on_bad_row='raise'.
    SourceError: no such file, unknown suffix, damaged file, or no good row in it.
    ImportError: parquet without pyarrow.
  """
  path = pathlib.Path(path)
  skipped: list[tuple[int, str]] = []
  return RowFile(path, [row for _, row in checked_rows(path, _triplet, on_bad_row, skipped)], skipped)


def checked_rows(
  path: str | pathlib.Path, check: Callable[[Any], _Checked], on_bad_row: str, skipped: list[tuple[int, str]]
) -> Iterator[tuple[int, _Checked]]:
  """(row number from 1, what `check` makes of the row) of every good row of a file, read as it is asked for.

  Args:
    check: of a line of JSON in bytes, or a dict; raises BadField (see `parse_row`).
    skipped: takes (row number, reason) of the rows left out with on_bad_row='skip'.

  Raises:
    As `read_rows`.
  """
  path = pathlib.Path(path)
  if on_bad_row not in ('raise', 'skip'):
    raise ValueError(f"on_bad_row is {on_bad_row!r}; it must be 'raise' or 'skip'")
  if not path.is_file():
    raise SourceError(f'{path}: no such file')
  reader = _parquet_rows if path.name.endswith('.parquet') else _jsonl_rows if path.name.endswith(SUFFIXES) else None
  if reader is None:
    raise SourceError(f'{path}: unknown kind of file; rows are read from {", ".join(SUFFIXES)}')
  good = 0
  for number, row in reader(path):
    try:
      checked = check(row)
    except BadField as bad:
      if on_bad_row == 'raise':
        raise BadRowError(path, number, bad.field, bad.reason) from bad
      skipped.append((number, bad.reason))
    else:
      good += 1
      yield number, checked
  if not good:
    example = f'; row {skipped[0][0]}: {skipped[0][1]}' if skipped else ''
    raise SourceError(f'{path}: no good rows ({len(skipped)} bad ones{example})')


def _jsonl_rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """(line number, line in bytes) of every line that is not blank."""
  number = 0
  try:
    with gzip.open(path, 'rb') if path.suffix == '.gz' else path.open('rb') as file:
      for number, line in enumerate(file, 1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')  # byte order mark, as some editors write it
        if line.strip():
          yield number, line
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise SourceError(f'{path}: gzip file is truncated or damaged after line {number} ({error}); fetch or write it again') from error


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError(f'{path}: reading parquet needs pyarrow: pip install polar_jax[parquet]') from error
  number = 0
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
          number += 1
          yield number, row
  except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
    raise SourceError(f'{path}: not a parquet file that can be read (after row {number}): {str(error).splitlines()[0]}') from error


def parse_row(row: Any, text_fields: Sequence[str]) -> dict[str, Any]:
  """A row (a line of JSON in bytes, or a dict) as a dict whose `text_fields` are texts, and whose wrapper, if any, is one.

  Raises:
    BadField.
  """
  if isinstance(row, bytes):
    try:
      row = json.loads(row.decode('utf-8'))
    except UnicodeDecodeError as error:
      raise BadField(None, f'not UTF-8 (byte {error.start} of the line)') from error
    except (ValueError, RecursionError) as error:
      raise BadField(None, f'not JSON ({error})') from error
  if not isinstance(row, dict):
    raise BadField(None, f'a row is a JSON object, not {type(row).__name__}')
  for field in text_fields:
    if field not in row:
      raise BadField(field, f'field {field!r} is missing')
    try:
      text = join_messages(row[field], field)
    except TemplateError as error:
      raise BadField(field, str(error)) from error
    if not text.isascii() and any('\ud800' <= char <= '\udfff' for char in text):
      raise BadField(field, f'{field} holds half a surrogate pair, which is no Unicode text')
  if row.get('wrapper') is not None:
    try:
      check_wrapper(row['wrapper'])
    except TemplateError as error:
      raise BadField('wrapper', str(error)) from error
  return row


def _triplet(row: Any) -> Triplet:
  row = parse_row(row, _TEXT_FIELDS)
  if row.get('category') is not None and not isinstance(row['category'], str):
    raise BadField('category', f'category must be a string, not {type(row["category"]).__name__}')
  values = {field: row[field] for field in _TEXT_FIELDS} | {k: row[k] for k in ('wrapper', 'category') if row.get(k) is not None}
  known = {*_TEXT_FIELDS, 'wrapper', 'category'}
  return Triplet(**values, metadata={key: value for key, value in row.items() if key not in known})


def open_source(path: str | pathlib.Path, split: str, on_bad_row: str = 'raise') -> Sequence[Triplet]:
  """One split of a data set: of a TFDS folder, of a folder with `<split>.jsonl` (.jsonl.gz, .parquet), or a file, which is its own split.

  Raises:
    SourceError: nothing there, saying what was looked for and what there is; and as `read_rows`.
  """
  path = pathlib.Path(path)
  if not path.exists():
    beside = f'; {path.parent} holds: {_listing(path.parent)}' if path.parent.is_dir() else ''
    raise SourceError(f'{path}: no such file or folder{beside}')
  if not path.is_dir():
    return read_rows(path, on_bad_row)
  if any(any(path.glob(pattern)) for pattern in _TFDS_FILES):
    from polar_jax.data import triplet_dataset

    try:
      splits = triplet_dataset.open_triplets(path)
    except FileNotFoundError as error:  # more than one data set
      raise SourceError(str(error)) from error
    if split not in splits:
      raise SourceError(f'{path}: no split {split!r}; its splits are: {", ".join(sorted(splits)) or "none"}')
    return splits[split]
  found = [file for suffix in SUFFIXES if (file := path / f'{split}{suffix}').is_file()]
  if len(found) > 1:
    raise SourceError(f'{path}: split {split!r} is there more than once: {", ".join(file.name for file in found)}; keep one')
  if not found:
    wanted = ', '.join(f'{split}{suffix}' for suffix in SUFFIXES)
    raise SourceError(f'{path}: no split {split!r}: looked for a TFDS data set, {wanted}; there is: {_listing(path)}')
  return read_rows(found[0], on_bad_row)


def _listing(folder: pathlib.Path, most: int = 12) -> str:
  names = sorted(entry.name for entry in folder.iterdir())
  return (', '.join(names[:most]) or 'nothing') + (f' and {len(names) - most} more' if len(names) > most else '')
