"""Raw examples in files of users: lines of JSON, and rows of parquet files and of folders that Hugging Face datasets saved.

Rows of a table hold strings, numbers, booleans, None, bytes, lists and dicts, whatever the types of their columns: a time is its ISO
8601 text with all digits (one with a zone in UTC, with a Z), a duration its seconds as a Decimal, a map a list of pairs, a text that is
not UTF-8 its bytes. So a column that nobody reads cannot stop a run.
"""

from __future__ import annotations

import contextlib
import decimal
import gzip
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from polar_jax.runtime import json_files, paths, text_files
from polar_jax.types import UserError

SUFFIXES = ('.jsonl', '.jsonl.gz', '.parquet')
_STATE, _DICT = 'state.json', 'dataset_dict.json'  # of a Dataset and of a DatasetDict that `save_to_disk` wrote
_AT_ONCE = 1_024  # rows
_DIGITS = {'s': 0, 'ms': 3, 'us': 6, 'ns': 9}
_GZIP = b'\x1f\x8b'


class DataError(UserError):
  """A data set cannot be opened. The message is one line for the user."""


def reader_of(path: pathlib.Path) -> Callable[[pathlib.Path], Iterator[tuple[int, Any]]]:
  """Return the function that yields (number from 1, raw example) of a file or saved data set.

  Raises:
    DataError: there is no such file, or it is of an unknown kind.
  """
  if is_saved_dataset(path):
    return _read_saved
  if path.is_dir():
    raise DataError(f'{path}: is a folder; name a file in it ({", ".join(SUFFIXES)}), or a folder that `save_to_disk` wrote')
  if not path.is_file():
    raise DataError(f'{path}: no such file')
  if not path.name.endswith(SUFFIXES):
    raise DataError(f'{path}: unknown kind of file; supported suffixes: {", ".join(SUFFIXES)}')
  return _read_parquet if path.name.endswith('.parquet') else _read_jsonl


def is_saved_dataset(path: pathlib.Path) -> bool:
  """Return whether a path is the folder of one data set (not of several splits) that Hugging Face datasets saved."""
  return (path / _STATE).is_file() and (path / 'dataset_info.json').is_file()


def is_one_split(path: pathlib.Path) -> bool:
  """Return whether a path is the data of a single split: a file or a saved data set."""
  return path.is_file() or is_saved_dataset(path)


def saved_splits(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Return the folders by split of a saved DatasetDict, or of data sets that were saved next to each other; {} if there are none.

  Raises:
    JsonError: the list of splits is damaged.
  """
  if (path / _DICT).is_file():
    names = json_files.read(path / _DICT, 'save the data set again').get('splits')
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
      raise json_files.JsonError(f'{path / _DICT}: `splits` must be a list of names; save the data set again')
  else:
    names = [folder.parent.name for folder in path.glob(f'*/{_STATE}')]
  return {name: path / name for name in sorted(names) if is_saved_dataset(path / name)}


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield (line number, line in bytes) of every line that is not blank."""
  for number, _, line in lines_of(path):
    yield number, line


def lines_of(path: pathlib.Path) -> Iterator[tuple[int, int, bytes]]:
  """Yield (line number, place of its first byte, line in bytes) of every line of a .jsonl or .jsonl.gz file that is not blank.

  Raises:
    DataError: the file cannot be read, or is of another kind.
  """
  number = end = 0
  try:
    with path.open('rb') as file, gzip.open(file) if path.suffix == '.gz' else contextlib.nullcontext(file) as lines:
      for number, line in enumerate(lines, 1):
        end += len(line)
        if number == 1:
          _check_kind(path, line)
          line = line.removeprefix(b'\xef\xbb\xbf')  # byte order mark, which some editors write
        if line.strip():
          yield number, end - len(line), line
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise DataError(f'{path}: gzip file is truncated or damaged after line {number} ({error}); download or write it again') from error
  except OSError as error:
    raise DataError(f'{path}: cannot be read after line {number} ({json_files.shorten(error)})') from error


def _check_kind(path: pathlib.Path, line: bytes) -> None:
  """Check by its first line that a file is not compressed, and not in an encoding of two or four bytes a character."""
  if line.startswith(_GZIP):
    raise DataError(f'{path}: is compressed with gzip; give it a name that ends in .jsonl.gz')
  if text_files.wide_encoding(line):
    raise DataError(f'{path}: not UTF-8; {text_files.advice(line)}')


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield (number, example as a dict)."""
  pyarrow = _import_pyarrow(path)

  def batches() -> Iterator[Any]:
    with path.open('rb') as file, pyarrow.parquet.ParquetFile(file) as table:
      _check_names(path, table.schema_arrow)
      yield from table.iter_batches(batch_size=_AT_ONCE)

  yield from _rows(path, batches(), 'a readable parquet file')


def _read_saved(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield (number, example as a dict) of a folder that `save_to_disk` wrote."""
  pyarrow = _import_pyarrow(path)
  state = json_files.read(path / _STATE, 'save the data set again')
  entries = state.get('_data_files')
  listed = [entry.get('filename') if isinstance(entry, dict) else None for entry in entries] if isinstance(entries, list) else [None]
  names = [str(name) for name in listed if paths.is_plain_name(name) and (path / str(name)).is_file()]
  if len(names) < len(listed):
    raise DataError(
      f'{path / _STATE}: lists files that are not there ({str(listed)[:100]}); copy the whole folder, or save the data set again'
    )
  if state.get('_indices_data_files'):
    raise DataError(f'{path}: has a table of indices, as early versions wrote it; load the data set with datasets and save it again')

  def batches() -> Iterator[Any]:
    for name in names:
      with (path / name).open('rb') as file:
        table = pyarrow.ipc.open_stream(file)
        _check_names(path / name, table.schema)
        for batch in table:
          for column in batch.columns:  # Arrow trusts its files: a damaged offset would end the process
            (column.view('binary') if column.type == 'string' else column).validate(full=True)
          yield batch

  yield from _rows(path, batches(), 'a readable folder of `save_to_disk`')


def _rows(path: pathlib.Path, batches: Iterator[Any], kind: str) -> Iterator[tuple[int, Any]]:
  """Yield (number, row as a dict) of the record batches of a table.

  Args:
    path: of the table, for messages.
    batches: read lazily.
    kind: what the table should be, for messages.
  """
  number = 0
  try:
    for batch in batches:
      for start in range(0, batch.num_rows, _AT_ONCE):
        part = batch.slice(start, _AT_ONCE)
        columns = [_values(part.column(i)) for i in range(part.num_columns)]
        for values in zip(*columns, strict=True) if columns else ((),) * part.num_rows:
          number += 1
          yield number, dict(zip(part.schema.names, values, strict=True))
  except UserError:
    raise
  except Exception as error:  # pyarrow has its own exceptions, and raises most of Python's on damaged files
    raise DataError(f'{path}: not {kind} (after example {number}): {json_files.shorten(error)}; write or copy it again') from error


def _import_pyarrow(path: pathlib.Path) -> Any:
  try:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
  except ImportError as error:
    raise ImportError(f'{path}: reading parquet needs pyarrow: pip install polar_jax[parquet]') from error
  return pyarrow


def _check_names(path: pathlib.Path, schema: Any) -> None:
  """Check that no column, and no field of a column, has the name of another one."""
  names = list(schema.names)
  for i, name in enumerate(names):
    if name in names[:i]:
      raise DataError(f'{path}: {names.count(name)} columns are called {name!r:.60}; rename or remove all but one')
    _check_fields(path, schema.types[i], name)


def _check_fields(path: pathlib.Path, kind: Any, column: str) -> None:
  fields = [kind.field(i) for i in range(kind.num_fields)]
  names = [field.name for field in fields] if str(kind).startswith('struct') else []
  twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
  if twice is not None:
    raise DataError(f'{path}: column {column!r:.60} has {names.count(twice)} fields called {twice!r:.60}; rename or remove all but one')
  for field in fields:
    _check_fields(path, field.type, column)


def _values(array: Any) -> list[Any]:
  """Return the values of a column."""
  from pyarrow import types

  if types.is_dictionary(array.type):
    array = array.dictionary_decode()
  kind = array.type
  simple = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean, types.is_null, types.is_float32, types.is_float64)
  leaf = kind
  while types.is_list(leaf) or types.is_large_list(leaf):
    leaf = leaf.value_type
  leaves = [leaf.field(i).type for i in range(leaf.num_fields)] if types.is_struct(leaf) else [leaf]
  if all(any(test(part) for test in simple) for part in leaves):
    try:
      return array.to_pylist()
    except UnicodeDecodeError:  # one value would hide all others
      pass
  return [_value(scalar) for scalar in array]


def _value(scalar: Any) -> Any:
  """Return a value of any type as the module's docstring says."""
  from pyarrow import types

  kind = scalar.type
  if not scalar.is_valid:
    return None
  if types.is_struct(kind):
    return {kind.field(i).name: _value(scalar[i]) for i in range(kind.num_fields)}
  if types.is_map(kind):
    return [[_value(pair[0]), _value(pair[1])] for pair in scalar.values]
  if types.is_nested(kind) and not types.is_union(kind):
    return [_value(item) for item in scalar.values]
  if types.is_dictionary(kind):
    return _value(scalar.dictionary[scalar.index.as_py()])
  if types.is_union(kind) or hasattr(kind, 'storage_type'):  # the latter: types that extensions define
    return _value(scalar.value)
  if types.is_timestamp(kind):
    return f'{np.datetime64(scalar.value, kind.unit)}{"" if kind.tz is None else "Z"}'
  if types.is_date(kind):
    return str(np.datetime64(scalar.value, 'D') if types.is_date32(kind) else np.datetime64(scalar.value, 'ms').astype('datetime64[D]'))
  if types.is_time(kind):
    return str(np.datetime64(scalar.value, kind.unit)).partition('T')[2]
  if types.is_duration(kind):
    return decimal.Decimal(scalar.value).scaleb(-_DIGITS[kind.unit])
  if types.is_string(kind) or types.is_large_string(kind):
    try:
      return scalar.as_py()
    except UnicodeDecodeError:
      return scalar.as_buffer().to_pybytes()
  value = scalar.as_py()
  return float(value) if types.is_floating(kind) else list(value) if isinstance(value, tuple) else value
