"""The files of the score stage: rows as POLAR's client takes them (prompt, reference, output), and the same rows with rewards."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polar_jax.config import ConfigError
from polar_jax.data import examples as sources
from polar_jax.runtime.paths import in_bucket
from polar_jax.types import Group

REWARD = 'reward'
OUTPUT_SUFFIXES = ('.jsonl', '.jsonl.gz')


class Row(NamedTuple):
  """A row to be scored."""

  number: int  # from 1; the line of a jsonl file
  content: dict[str, Any]  # all of it
  group: Group  # of one candidate


def read_rows(path: pathlib.Path, on_bad_example: str, skipped: list[tuple[int, str]], *, use_reference: bool = True) -> Iterator[Row]:
  """The good rows of a .jsonl, .jsonl.gz or .parquet file, in order, read as they are asked for.

  A row is {prompt, reference, output}, each a string or a list of messages, with an optional wrapper; it may hold anything else
  but a `reward`, which is what the stage writes: whether an older one may be lost is for the user to say, by renaming it.

  Args:
    skipped: takes (row number, reason) of the bad rows, with on_bad_example='skip'.
    use_reference: False: a row needs no reference.

  Raises:
    BadExampleError: a bad row, with on_bad_example='raise', naming file, row and field.
    DataError: no such file, unknown suffix, damaged file, or no good row in it.
  """
  fields = ('prompt', 'reference', 'output') if use_reference else ('prompt', 'output')

  def check(raw: Any) -> dict[str, Any]:
    content = sources.parse_example(raw, fields)
    if content.get(REWARD) is not None:
      raise sources.BadField(REWARD, f'it has a {REWARD!r} already, where its own is to be written: rename or remove that')
    if not isinstance(raw, bytes):  # of parquet
      try:
        json.dumps(content)
      except (TypeError, ValueError) as error:
        raise sources.BadField(None, f'cannot be written as JSON ({error})') from error
    return content

  for number, content in sources.checked_examples(path, check, on_bad_example, skipped):
    group = Group(content['prompt'], content.get('reference', ''), [content['output']], content.get('wrapper') or 'sft')
    yield Row(number, content, group)


class RewardFile:
  """Rows with their rewards: one JSON object a line, in the order of the input, written as it was read, with `reward` last.

  They gather in `<name>.partial` beside the file, and only `finish` puts them in its place, over an older file of that name. What
  a stopped run left there is kept if its `settings` (in `<name>.partial.json`) are the same: rewards are exact, so the file that
  comes of it is the same to the last byte. Only the first process writes.

  Attributes:
    kept: rows of a stopped run that were finished; the next to be written is the one after them.
    changed: names of the settings for which a stopped run's rows were dropped.
    rows, mean, std: of all rewards, kept ones included.
  """

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    self._path, self._partial, self._header = path, *partial_files(path)
    self.kept, self.rows, self.changed, self._sum, self._squares, self._file = 0, 0, list[str](), 0.0, 0.0, None
    if jax.process_index() != 0:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))  # as they read back
    if self._partial.exists():
      known = _read_header(self._header)
      self.changed = sorted(name for name in settings.keys() | known.keys() if settings.get(name) != known.get(name))
      if not self.changed:
        self.kept = self._keep_whole_lines()
    if not self.kept:
      self._partial.unlink(missing_ok=True)  # rows must never lie beside the header of others
      self._header.write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
    self._file = self._partial.open('ab')

  @property
  def mean(self) -> float:
    return self._sum / self.rows if self.rows else 0.0

  @property
  def std(self) -> float:
    return max(self._squares / self.rows - self.mean**2, 0.0) ** 0.5 if self.rows else 0.0

  def write(self, rows: Sequence[Row], rewards: np.ndarray) -> None:
    """Appends rows; they are on disk when this returns. `rewards` (rows,) are float32: as JSON they read back to the same bits."""
    lines = []
    for row, reward in zip(rows, rewards.tolist(), strict=True):
      self._count(reward)
      lines.append(_line({**row.content, REWARD: reward}))
    if self._file is not None:
      self._file.write(b''.join(lines))
      self._file.flush()
      os.fsync(self._file.fileno())

  def finish(self) -> None:
    """Puts the file in its place."""
    if self._file is None:
      return
    self._file.close()
    made = self._partial
    if self._path.name.endswith('.gz'):
      made = self._path.with_name(f'{self._path.name}.tmp')
      with self._partial.open('rb') as plain, made.open('wb') as raw:
        with gzip.GzipFile('', 'wb', fileobj=raw, mtime=0) as packed:  # no name, no time: the same rows, the same bytes
          shutil.copyfileobj(plain, packed, 1 << 20)
        raw.flush()
        os.fsync(raw.fileno())
    os.replace(made, self._path)
    self._partial.unlink(missing_ok=True)
    self._header.unlink(missing_ok=True)

  def close(self) -> None:
    """What is written so far stays for the next run."""
    if self._file is not None:
      self._file.close()

  def _count(self, reward: float) -> None:
    self.rows, self._sum, self._squares = self.rows + 1, self._sum + reward, self._squares + reward * reward

  def _keep_whole_lines(self) -> int:
    """Counts the finished rows, and cuts off a line that a kill tore."""
    whole = 0
    with self._partial.open('rb+') as file:
      for line in file:
        if not line.endswith(b'\n'):
          break
        self._count(json.loads(line)[REWARD])
        whole += len(line)
      file.truncate(whole)
    return self.rows


def check_output(path: pathlib.Path, source: pathlib.Path) -> None:
  """
  Raises:
    ConfigError: the setting `output` cannot be used.
  """
  if in_bucket(path):
    raise ConfigError(f'output {path}: is written line by line, which no bucket allows: name a local file, and copy it')
  if not path.name.endswith(OUTPUT_SUFFIXES):
    raise ConfigError(f'output {path}: must end in {" or ".join(OUTPUT_SUFFIXES)}')
  if path.is_dir():
    raise ConfigError(f'output {path}: is a folder; name a file')
  if not in_bucket(source) and (path.resolve() == source.resolve() or (path.exists() and source.exists() and path.samefile(source))):
    raise ConfigError(f'output {path}: is the input; name another file')


def partial_files(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Where the rows of an unfinished output are, and the settings that they were made with."""
  return path.with_name(f'{path.name}.partial'), path.with_name(f'{path.name}.partial.json')


def _read_header(path: pathlib.Path) -> dict[str, Any]:
  try:
    known = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):  # torn by a kill, or never written
    return {}
  return known if isinstance(known, dict) else {}


def _line(content: dict[str, Any]) -> bytes:
  try:
    return json.dumps(content, ensure_ascii=False).encode('utf-8') + b'\n'
  except UnicodeEncodeError:  # half a surrogate pair in a field that is only passed on: JSON can hold it escaped, UTF-8 cannot
    return json.dumps(content).encode('utf-8') + b'\n'
