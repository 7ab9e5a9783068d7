"""Reading the published files of benchmarks: JSON lists and JSON lines, with the file and row of every bad field."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from polar_jax.data import readers
from polar_jax.data.examples import BadExampleError, BadField
from polar_jax.runtime import json_files

_REMEDY = 'download the file again'
_Made = TypeVar('_Made')


class Row(NamedTuple):
  """A row of a published file."""

  file: pathlib.Path
  number: int  # from 1
  fields: Any


def rows_of(file: pathlib.Path) -> Iterator[Row]:
  """Yield the rows of a JSON list (.json) or of JSON lines (.jsonl), or of parquet.

  Raises:
    UserError: the file cannot be read; the message names it.
  """
  if file.suffix == '.json':
    for number, fields in enumerate(json_files.read(file, _REMEDY, list), start=1):
      yield Row(file, number, fields)
    return
  for number, line in readers.reader_of(file)(file):
    fields = line
    if isinstance(line, bytes):
      try:
        fields = json_files.parse(line)
      except json_files.JsonError as error:
        raise BadExampleError(file, number, None, str(error)) from error
    yield Row(file, number, fields)


def items_of(
  rows: Iterable[Row], make: Callable[[Mapping[str, Any], Row], _Made], on_bad_example: str, skipped: list[tuple[str, str]]
) -> list[_Made]:
  """Return what `make` makes of each row.

  Args:
    rows: of published files.
    make: returns an item; raises BadField, or KeyError for a field that is missing.
    on_bad_example: 'raise', or 'skip'.
    skipped: receives (file and row, reason) of rows that are left out.

  Raises:
    UserError: a row is bad, with on_bad_example='raise'.
  """
  out = []
  for row in rows:
    try:
      if not isinstance(row.fields, Mapping):
        raise BadField(None, f'a row must be a JSON object, not {type(row.fields).__name__}')
      out.append(make(row.fields, row))
    except KeyError as missing:
      bad = BadField(str(missing.args[0]), f'field {missing.args[0]!r} is missing')
      _reject(row, bad, on_bad_example, skipped)
    except BadField as bad:
      _reject(row, bad, on_bad_example, skipped)
  return out


def _reject(row: Row, bad: BadField, on_bad_example: str, skipped: list[tuple[str, str]]) -> None:
  if on_bad_example == 'raise':
    raise BadExampleError(row.file, row.number, bad.field, bad.reason) from bad
  skipped.append((f'{row.file.name}, row {row.number}', bad.reason))


def text(fields: Mapping[str, Any], name: str) -> str:
  """Return a text that is not empty.

  Raises:
    BadField: it is something else.
    KeyError: it is missing.
  """
  value = fields[name]
  if not isinstance(value, str) or not value.strip():
    kind = 'empty' if isinstance(value, str) else f'{type(value).__name__}'
    raise BadField(name, f'{name} must be a text that is not empty, not {kind}')
  if any('\ud800' <= character <= '\udfff' for character in value):
    raise BadField(name, f'{name} contains half of a surrogate pair, which is not valid Unicode')
  return value


def texts(fields: Mapping[str, Any], name: str, count: int | None = None) -> list[str]:
  """Return a list of texts, of `count` if that is given.

  Raises:
    BadField: it is something else.
    KeyError: it is missing.
  """
  values = fields[name]
  if not isinstance(values, list) or (len(values) != count if count else not values):
    raise BadField(name, f'{name} must be a list of {count} texts' if count else f'{name} must be a list of texts that is not empty')
  return [text({name: value}, name) for value in values]


def label(fields: Mapping[str, Any], name: str, known: Iterable[str]) -> str:
  """Return a value that must be one of `known`.

  Raises:
    BadField: it is something else.
    KeyError: it is missing.
  """
  value, names = fields[name], list(known)
  if value not in names:
    raise BadField(name, f'{name} is {value!r:.80}; the benchmark has: {", ".join(names)}')
  return str(value)


def tables(folders: Iterable[pathlib.Path], suffixes: Sequence[str] = readers.SUFFIXES) -> list[pathlib.Path]:
  """Return the .parquet and .jsonl files below folders, as the hub and its command-line client lay them out."""
  return sorted(file for folder in folders for file in files_below(folder, suffixes))


def files_below(folder: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """Return the files with one of the suffixes at any depth, also below links to folders, but for hidden ones."""
  found = (pathlib.Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names)
  return sorted(file for file in found if file.name.endswith(tuple(suffixes)) and not file.name.startswith('.'))
