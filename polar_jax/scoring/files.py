"""Files of the score stage: examples in the form of POLAR's client (prompt, reference, output), and the same examples with rewards."""

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
from polar_jax.data.examples import BadField, checked_examples, parse_example
from polar_jax.runtime.paths import in_bucket
from polar_jax.types import Group

REWARD = 'reward'
OUTPUT_SUFFIXES = ('.jsonl', '.jsonl.gz')


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
    content = parse_example(raw, fields)
    if content.get(REWARD) is not None:
      raise BadField(REWARD, f'already has a field {REWARD!r}, which the score stage writes; rename or remove it')
    if not isinstance(raw, bytes):  # from parquet
      try:
        json.dumps(content)
      except (TypeError, ValueError) as error:
        raise BadField(None, f'cannot be written as JSON ({error})') from error
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

  Attributes:
    kept: number of examples that a stopped run had finished; writing continues after them.
    changed: names of the settings whose change made the partial output of a stopped run useless.
    count: number of rewards, including those kept.
  """

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    self._path, self._partial, self._header = path, *partial_files(path)
    self.kept, self.count, self.changed, self._sum, self._squares, self._file = 0, 0, list[str](), 0.0, 0.0, None
    if jax.process_index() != 0:
      return
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(settings))  # as JSON returns them
    if self._partial.exists():
      known = _read_header(self._header)
      self.changed = sorted(name for name in settings.keys() | known.keys() if settings.get(name) != known.get(name))
      if not self.changed:
        self.kept = self._keep_whole_lines()
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
    """Append examples with their `rewards` (examples,), float32, which JSON preserves bit for bit; they are on disk on return."""
    lines = []
    for example, reward in zip(examples, rewards.tolist(), strict=True):
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

  def _keep_whole_lines(self) -> int:
    """Count the finished examples and truncate a line that was cut short by a kill."""
    whole = 0
    with self._partial.open('rb+') as file:
      for line in file:
        if not line.endswith(b'\n'):
          break
        self._add(json.loads(line)[REWARD])
        whole += len(line)
      file.truncate(whole)
    return self.count


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
    known = json.loads(path.read_text(encoding='utf-8'))
  except (OSError, ValueError):  # cut short by a kill, or never written
    return {}
  return known if isinstance(known, dict) else {}


def _line(content: dict[str, Any]) -> bytes:
  try:
    return json.dumps(content, ensure_ascii=False).encode('utf-8') + b'\n'
  except UnicodeEncodeError:  # a lone surrogate in a field that is only passed on: JSON can represent it escaped, UTF-8 cannot
    return json.dumps(content).encode('utf-8') + b'\n'
