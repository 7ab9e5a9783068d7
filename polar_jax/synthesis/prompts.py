"""The prompts of a pool: beginnings of documents, instructions, and the prompts of recorded answers."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from polar_jax.config import ConfigError
from polar_jax.data import readers
from polar_jax.data.template import TemplateError, join_messages
from polar_jax.runtime import json_files, paths, text_files
from polar_jax.synthesis.samples import INSTRUCTION, PREFIX
from polar_jax.types import UserError

_ID_FIELDS = ('prompt_id', 'id')
# A word, a mark, or a character of a script without spaces, with the white space before it.
_WORD = re.compile(r'\s*(?:[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|\w+|[^\w\s])')


class PromptRow(NamedTuple):
  """A prompt of a file."""

  given: str | None  # its own id
  text: str
  kind: str
  source: str


class RecordedRow(NamedTuple):
  """An answer of a file."""

  policy: str
  given: str | None
  prompt: str
  response: str
  source: str


class PromptFile:
  """A file of prompts, read as often as it is iterated over.

  A row with the field `prompt` is an instruction. A row with the field `text` and a paragraph of a .txt file are documents, of which the
  beginning is a prompt: of 1 to `max_words` words, uniformly, and at most half of the document, so that there is something to continue.

  Attributes:
    skipped: documents that are too short, as of the last iteration.
  """

  def __init__(self, path: pathlib.Path, max_words: int, seed: int):
    self.path, self.skipped, self._max_words, self._seed = path, 0, max_words, seed
    self._read: Callable[[pathlib.Path], Iterator[tuple[int, Any]]] = _paragraphs if path.suffix == '.txt' else _tfds_or_rows(path)

  def __iter__(self) -> Iterator[PromptRow]:
    self.skipped = 0
    for number, raw in self._read(self.path):
      row = parse_row(self.path, number, raw)
      if 'prompt' in row:
        text = text_of(self.path, number, row, 'prompt')
        if not text.strip():
          raise UserError(f'{self.path}, row {number}: field prompt is empty; remove the row')
        yield PromptRow(_id_of(row), text, INSTRUCTION, self.path.name)
      elif 'text' in row:
        prefix = beginning(text_of(self.path, number, row, 'text'), self._max_words, self._seed)
        if prefix is None:
          self.skipped += 1
        else:
          yield PromptRow(_id_of(row), prefix, PREFIX, self.path.name)
      else:
        raise UserError(
          f'{self.path}, row {number}: has neither a field prompt (an instruction) nor a field text (a document); found: '
          f'{", ".join(sorted(map(str, row)))[:120]}'
        )


def beginning(document: str, max_words: int, seed: int) -> str | None:
  """Return a random beginning of a document, or None if it has fewer than two words.

  Args:
    document: the text.
    max_words: longest beginning. Words are runs of letters, single marks, and single characters of scripts without spaces.
    seed: of the length, together with the text.
  """
  ends = [match.end() for match in itertools.islice(_WORD.finditer(document), 2 * max_words)]
  most = min(max_words, len(ends) // 2)
  if not most:
    return None
  digest = hashlib.sha256(f'{seed}\0{document[: ends[-1]]}'.encode('utf-8', 'surrogatepass')).digest()
  return document[: ends[int.from_bytes(digest[:8], 'big') % most]]


def read_prompts(files: Sequence[PromptFile], weights: Sequence[float] | None, limit: int | None) -> Iterator[PromptRow]:
  """Yield the prompts of a run: of each file the first ones, interleaved by their shares.

  Args:
    files: of prompts.
    weights: shares of the files in `limit`; None: one file after the other.
    limit: most prompts; None: all.

  Raises:
    UserError: a row of a file cannot be used, or a file has fewer prompts than its share.
  """
  if weights is None:
    yield from itertools.islice(itertools.chain.from_iterable(files), limit)
    return
  assert limit is not None
  share = [weight / sum(weights) for weight in weights]
  readers_, taken = [iter(file) for file in files], [0] * len(files)
  for total in range(1, limit + 1):
    # The file that is furthest behind its share.
    which = max(range(len(files)), key=lambda i: share[i] * total - taken[i])
    try:
      yield next(readers_[which])
    except StopIteration:
      raise UserError(
        f'{files[which].path}: has {taken[which]:,} prompts, fewer than its share of synthesize.max_prompts={limit}; lower max_prompts, or '
        'the weight of the file'
      ) from None
    taken[which] += 1


def read_recorded(path: pathlib.Path, name: str) -> Iterator[RecordedRow]:
  """Yield the answers of a file of rows with `prompt`, `response` and, if there are several policies, `policy`.

  Args:
    path: of the file.
    name: of the policy of rows without one.

  Raises:
    UserError: a row cannot be used.
  """
  for number, raw in readers.reader_of(path)(path):
    row = parse_row(path, number, raw)
    for field in ('prompt', 'response'):
      if field not in row:
        raise UserError(
          f'{path}, row {number}: has no field {field}; a recorded answer has prompt, response and, for several policies, policy'
        )
    policy = row.get('policy', name)
    if not isinstance(policy, str) or not policy or not policy.isprintable():
      raise UserError(f'{path}, row {number}: policy is {policy!r:.60}; it must be a name of printable characters')
    prompt = text_of(path, number, row, 'prompt')
    yield RecordedRow(policy, _id_of(row), prompt, text_of(path, number, row, 'response'), path.name)


def split_of(validation: float, unseen: float) -> Callable[[str], str]:
  """Return the function id of a prompt -> its split, which does not depend on the other prompts."""
  if validation + unseen > 1:
    raise ConfigError(
      f'synthesize.validation_share={validation:g} and synthesize.unseen_share={unseen:g} are more than all prompts; lower one of them'
    )

  def split(identifier: str) -> str:
    digest = hashlib.sha256(f'split\0{identifier}'.encode('utf-8', 'surrogatepass')).digest()
    place = int.from_bytes(digest[:8], 'big') / 2**64
    return 'unseen_prompts' if place < unseen else 'validation' if place < unseen + validation else 'train'

  return split


def open_files(given: str, max_words: int, seed: int) -> list[PromptFile]:
  """Return the files that `synthesize.prompts` names.

  Raises:
    UserError: one does not exist, or is of an unknown kind.
  """
  files = []
  for name in given.split(','):
    path = pathlib.Path(paths.path_of(name.strip()))
    if path.suffix == '.txt' and not path.is_file():
      raise ConfigError(f'synthesize.prompts: no file at {path}')
    files.append(PromptFile(path, max_words, seed))
  return files


def _tfds_or_rows(path: pathlib.Path) -> Callable[[pathlib.Path], Iterator[tuple[int, Any]]]:
  if path.is_dir() and not readers.is_saved_dataset(path) and list(path.glob('**/features.json')):
    return _tfds
  return readers.reader_of(path)


def _tfds(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield the rows of the split `train`, or else of the only one, of a TFDS data set, without loading TensorFlow."""
  import tensorflow_datasets as tfds

  found = sorted(file.parent for file in path.glob('**/features.json'))
  try:
    builder = tfds.builder_from_directory(str(found[0]))
    splits = list(builder.info.splits)
    source = builder.as_data_source('train' if 'train' in splits else splits[0])
    for i in range(len(source)):
      row = {key: value.decode() if isinstance(value, bytes) else value for key, value in source[i].items()}
      yield i + 1, {key: value for key, value in row.items() if key != 'metadata'}
  except Exception as error:  # TFDS, protobuf and array_record each raise their own
    raise UserError(f'{found[0]}: not a readable TFDS data set ({json_files.shorten(error)}); copy or write it again') from error


def _paragraphs(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yield (number of its first line, document) for each run of lines that are not blank, one at a time."""
  lines: list[str] = []
  first = 1
  try:
    with path.open('rb') as file:
      for number, raw in enumerate(file, 1):
        line = text_files.decode(raw, f'{path}, line {number}').replace('\r\n', '\n')
        if line.strip():
          first = first if lines else number
          lines.append(line)
        elif lines:
          yield first, {'text': ''.join(lines).strip()}
          lines = []
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({json_files.shorten(error)})') from error
  if lines:
    yield first, {'text': ''.join(lines).strip()}


def parse_row(path: pathlib.Path, number: int, raw: Any) -> dict[str, Any]:
  """Return a row of a file as an object.

  Raises:
    UserError: it is none.
  """
  try:
    row = json_files.parse(raw) if isinstance(raw, bytes) else raw
  except json_files.JsonError as error:
    raise UserError(f'{path}, row {number}: {error}; correct or remove it') from error
  if not isinstance(row, dict):
    raise UserError(f'{path}, row {number}: must be a JSON object, not {type(row).__name__}')
  return row


def text_of(path: pathlib.Path, number: int, row: dict[str, Any], field: str) -> str:
  """Return a field of a row as text; messages are joined.

  Raises:
    UserError: it is no text.
  """
  try:
    text = join_messages(row[field], f'field {field}')
    text.encode()
  except (TemplateError, UnicodeEncodeError) as error:
    raise UserError(f'{path}, row {number}: {json_files.shorten(error)}; correct or remove the row') from error
  return text


def _id_of(row: dict[str, Any]) -> str | None:
  for field in _ID_FIELDS:
    value = row.get(field)
    if isinstance(value, (str, int)) and not isinstance(value, bool) and str(value):
      return str(value)
  return None
