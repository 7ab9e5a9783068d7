"""Files of the score stage: examples in the form of POLAR's client (prompt, reference, output), and the same examples with rewards."""

from __future__ import annotations

import base64
import decimal
import gzip
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polar_jax.config import ConfigError
from polar_jax.data.examples import BadField, checked_examples, parse_example
from polar_jax.runtime import json_files
from polar_jax.runtime.json_files import shorten
from polar_jax.runtime.paths import in_bucket
from polar_jax.types import Group, UserError

REWARD = 'reward'
_LONGEST_INT = 4_000  # digits; Python refuses to convert more than 4,300
OUTPUT_SUFFIXES = ('.jsonl', '.jsonl.gz')


class Verbatim(float):
  """A number of a JSON text that is written as it was read: 1e400, 0.10, 1.0 and 123456789012345678901234567890 alike."""

  def __new__(cls, text: str) -> Verbatim:
    """Return the number that `text` is."""
    number = super().__new__(cls, text)
    number.text = text
    return number

  text: str


class Example(NamedTuple):
  """An example to be scored."""

  number: int  # from 1; the line of a jsonl file
  content: dict[str, Any]  # all its fields
  group: Group  # of one candidate


def read_examples(
  path: pathlib.Path, on_bad_example: str, skipped: list[tuple[int, str]], *, use_reference: bool = True
) -> Iterator[Example]:
  """Yield the valid examples of a .jsonl, .jsonl.gz or .parquet file in order, reading the file lazily.

  An example has the fields prompt, reference and output, each a string or a list of messages, and optionally wrapper. Other fields are
  passed on, except for `reward`, which the stage writes itself: it never overwrites one, so the user has to rename or remove it.
  Numbers of a jsonl file are passed on digit by digit; see `json_text` for the columns of a parquet file.

  Args:
    path: of the file.
    on_bad_example: 'raise' or 'skip'.
    skipped: receives (example number, reason) of each bad example if on_bad_example is 'skip'.
    use_reference: whether examples need a reference.

  Raises:
    BadExampleError: an example is bad and on_bad_example is 'raise'; it names file, example and field.
    DataError: the file does not exist, has an unknown suffix, is damaged, or holds no valid example.
  """
  fields = ('prompt', 'reference', 'output') if use_reference else ('prompt', 'output')

  def check(raw: Any) -> dict[str, Any]:
    content = parse_example(raw, fields, parse_int=_parse_int, parse_float=Verbatim)
    if content.get(REWARD) is not None:
      raise BadField(REWARD, f'already has a field {REWARD!r}, which the score stage writes; rename or remove it')
    try:
      json_text(content)
    except (TypeError, RecursionError) as error:
      raise BadField(None, f'cannot be written as JSON ({shorten(error)})') from error
    return content

  for number, content in checked_examples(path, check, on_bad_example, skipped):
    group = Group(content['prompt'], content.get('reference', ''), [content['output']], content.get('wrapper') or 'sft')
    yield Example(number, content, group)


class RewardFile:
  """The output of the score stage: one JSON object per line, in the order of the input, with the input's fields and `reward` last.

  Examples are appended to `<name>.partial` next to the file; `finish` moves it into place, replacing an older file. The partial output
  of a stopped run is kept if its `settings` (in `<name>.partial.json`) are the same: rewards are exact, so the finished file is
  the same to the last byte. Only the first process writes.

  Args:
    path: of the finished file.
    settings: everything that determines the output.
    source: the examples of the input, with which the partial output of a stopped run is compared; None: it is only parsed.

  Attributes:
    kept: number of examples that a stopped run had finished; writing continues after them.
    damaged: whether what that run had written after them was not what it should be, beyond a last line that was cut short.
    changed: names of the settings whose change made the partial output of a stopped run useless.
    count: number of rewards, including those kept.
  """

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any], source: Iterable[Example] | None = None):
    self._path, self._partial, self._header = path, *partial_files(path)
    self.damaged = False
    self.kept, self.count, self.changed, self._sum, self._squares, self._file = 0, 0, list[str](), 0.0, 0.0, None
    if jax.process_index() != 0:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))  # as JSON returns them
    if self._partial.exists():
      known = _read_header(self._header)
      self.changed = sorted(name for name in settings.keys() | known.keys() if settings.get(name) != known.get(name))
      if not self.changed:
        self.kept = self._keep_whole_lines(source)
    if not self.kept:
      self._partial.unlink(missing_ok=True)  # examples must never be next to a header with other settings
      self._header.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    self._file = self._partial.open('ab')

  @property
  def mean(self) -> float:
    """Mean of all rewards."""
    return self._sum / self.count if self.count else 0.0

  @property
  def std(self) -> float:
    """Standard deviation of all rewards."""
    return max(self._squares / self.count - self.mean**2, 0.0) ** 0.5 if self.count else 0.0

  def write(self, examples: Sequence[Example], rewards: np.ndarray) -> None:
    """Append examples with their `rewards` (examples,), float32, which JSON preserves bit for bit; they are on disk on return.

    Raises:
      UserError: a reward is not finite, which JSON does not have; nothing is written.
    """
    lines = []
    for example, reward in zip(examples, rewards.tolist(), strict=True):
      if not math.isfinite(reward):
        raise UserError(
          f'{self._path}: the reward of example {example.number} would be {reward}, which is no number; check the weights of the model'
        )
      self._add(reward)
      lines.append(_line({**example.content, REWARD: reward}))
    if self._file is not None:
      self._file.write(b''.join(lines))
      self._file.flush()
      os.fsync(self._file.fileno())

  def finish(self) -> None:
    """Move the complete file into place."""
    if self._file is None:
      return
    self._file.close()
    complete = self._partial
    if self._path.name.endswith('.gz'):
      complete = self._path.with_name(f'{self._path.name}.tmp')
      with self._partial.open('rb') as plain, complete.open('wb') as raw:
        with gzip.GzipFile('', 'wb', fileobj=raw, mtime=0) as packed:  # without name and time, so that equal examples give equal bytes
          shutil.copyfileobj(plain, packed, 1 << 20)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(complete, self._path)
    self._partial.unlink(missing_ok=True)
    self._header.unlink(missing_ok=True)

  def close(self) -> None:
    """Close the file; the next run continues after the examples written so far."""
    if self._file is not None:
      self._file.close()

  def _add(self, reward: float) -> None:
    self.count, self._sum, self._squares = self.count + 1, self._sum + reward, self._squares + reward * reward

  def _keep_whole_lines(self, source: Iterable[Example] | None) -> int:
    """Count the finished examples, and cut off a line that a kill cut short and what follows a damaged one."""
    whole = 0
    expected = itertools.repeat(None) if source is None else iter(source)
    with self._partial.open('rb+') as file:
      for line in file:
        if not line.endswith(b'\n'):
          break
        reward = _reward_of(line)
        example = next(expected, None) if reward is not None else None
        if reward is None or (source is not None and (example is None or line != _line({**example.content, REWARD: reward}))):
          self.damaged = True
          break
        self._add(reward)
        whole += len(line)
      file.truncate(whole)
    return self.count


def _reward_of(line: bytes) -> float | None:
  """Return the reward in a line of the output; None if the line is damaged."""
  try:
    content = json_files.parse(line)
  except UserError:
    return None
  reward = content.get(REWARD) if isinstance(content, dict) else None
  return reward if isinstance(reward, float) and math.isfinite(reward) else None


def check_output(path: pathlib.Path, source: pathlib.Path) -> None:
  """Check that the score stage can write to `path`.

  Args:
    path: the setting `output`.
    source: the setting `input`.

  Raises:
    ConfigError: it cannot.
  """
  if in_bucket(path):
    raise ConfigError(f'output {path}: buckets cannot be written line by line; name a local file and copy it afterwards')
  if not path.name.endswith(OUTPUT_SUFFIXES):
    raise ConfigError(f'output {path}: must end in {" or ".join(OUTPUT_SUFFIXES)}')
  if path.is_dir():
    raise ConfigError(f'output {path}: is a folder; name a file')
  if not in_bucket(source) and (path.resolve() == source.resolve() or (path.exists() and source.exists() and path.samefile(source))):
    raise ConfigError(f'output {path}: is the input; name another file')


def partial_files(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the paths of an unfinished output and of the settings that it was computed with."""
  return path.with_name(f'{path.name}.partial'), path.with_name(f'{path.name}.partial.json')


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json_files.read(path, 'delete it')
  except json_files.JsonError:  # cut short by a kill, or never written
    return {}


def _line(content: dict[str, Any]) -> bytes:
  try:
    return json_text(content).encode('utf-8') + b'\n'
  except UnicodeEncodeError:  # a lone surrogate in a field that is only passed on: JSON can represent it escaped, UTF-8 cannot
    return json_text(content, json.encoder.encode_basestring_ascii).encode('utf-8') + b'\n'


def json_text(value: Any, quote: Callable[[str], str] = json.encoder.encode_basestring) -> str:
  """Return a value as JSON, including what tables hold beyond it.

  A `Verbatim` number is written as it was read, a Decimal with all its digits, bytes in base64. NaN and infinity, which JSON does not
  have, become null.

  Args:
    value: of an example.
    quote: returns a string in quotes, escaped.

  Raises:
    TypeError: the value is of another type.
  """
  if isinstance(value, str):
    return quote(value)
  if isinstance(value, Verbatim):
    return value.text
  if isinstance(value, dict):
    return '{' + ', '.join([f'{quote(key)}: {json_text(item, quote)}' for key, item in value.items()]) + '}'
  if isinstance(value, (list, tuple)):
    return '[' + ', '.join([json_text(item, quote) for item in value]) + ']'
  if isinstance(value, bytes):
    return quote(base64.b64encode(value).decode('ascii'))
  if isinstance(value, (float, decimal.Decimal)) and not math.isfinite(value):
    return 'null'
  return format(value, 'f') if isinstance(value, decimal.Decimal) else json.dumps(value)


def _parse_int(text: str) -> int | float:
  """Return an integer of a JSON text; one that Python would change (-0) or not read (thousands of digits) is kept as it is."""
  return Verbatim(text) if text == '-0' or len(text) > _LONGEST_INT else int(text)
