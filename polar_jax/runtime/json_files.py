"""JSON that this package reads and writes: strict in both directions.

Read: a key that an object has twice is refused by name, and every failure is one line with the name of the file. Written: no NaN and no
Infinity, which are not JSON and which most readers refuse; a number that is not finite becomes null.
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.runtime import text_files
from polar_jax.types import UserError

_MAX_SHOWN = 160  # characters of a reason
_KINDS: dict[type, str] = {dict: 'object', list: 'array'}


class JsonError(UserError):
  """A text is not JSON. The message is one line for the user."""


class RepeatedKeyError(JsonError):
  """An object has a key twice, so that it is open which value counts.

  Attributes:
    key: the key.
  """

  def __init__(self, key: str, count: int):
    super().__init__(f'the key {key!r:.60} occurs {count} times in one object; only one value can be meant')
    self.key, self._count = key, count

  def __reduce__(self) -> tuple:
    return type(self), (self.key, self._count)


def parse(text: str | bytes, **hooks: Any) -> Any:
  """Return the value of a JSON text. Python's NaN and Infinity are accepted, because many programs write them.

  Args:
    text: of the value; bytes must be UTF-8.
    hooks: `parse_int`, `parse_float` and `parse_constant` of `json.loads`.

  Raises:
    JsonError: it is not JSON, is nested too deeply, or an object has a key twice.
  """
  try:
    text = text.decode('utf-8') if isinstance(text, bytes) else text  # json.loads would also take UTF-16
    return json.loads(text, object_pairs_hook=_without_repetition, **hooks)
  except RepeatedKeyError:
    raise
  except UnicodeDecodeError as error:
    raise JsonError(f'not UTF-8 (byte {error.start}); {text_files.advice(error.object[error.start :])}') from error
  except RecursionError as error:
    raise JsonError('not JSON (nested too deeply)') from error
  except (ValueError, MemoryError, OverflowError) as error:
    raise JsonError(f'not JSON ({shorten(error)})') from error


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) != len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    raise RepeatedKeyError(*next((name, count) for name, count in counts.items() if count > 1))
  return out


def read(path: pathlib.Path, remedy: str, kind: type = dict) -> Any:
  """Return the value in a JSON file.

  Args:
    path: of the file.
    remedy: what to do about a damaged file, for the message.
    kind: type that the value must have.

  Raises:
    JsonError: the file cannot be read, or its content is not JSON or of another type.
  """
  try:
    value = parse(text_files.read_text(path))
  except text_files.TextError as error:
    raise JsonError(f'{error}; or {remedy}') from error
  except (JsonError, OSError) as error:
    raise JsonError(f'{path}: {shorten(error)}; {remedy}') from error
  if not isinstance(value, kind):
    raise JsonError(f'{path}: must contain a JSON {_KINDS[kind]}, not {type(value).__name__}; {remedy}')
  return value


def dumps(value: Any, **how: Any) -> str:
  """Return a value as JSON; numbers that are not finite become null. `how`: of `json.dumps`."""
  try:
    return json.dumps(value, allow_nan=False, **how)
  except ValueError:  # rare: a number that is not finite
    return json.dumps(_finite(value), allow_nan=False, **how)


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def shorten(error: BaseException) -> str:
  """Return the message of an error on one line of bounded length."""
  text = ' '.join(str(error).split()) or type(error).__name__
  return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + '...'
