"""User files of triplets and of prompts (.jsonl, .jsonl.gz, .parquet; here or in a bucket), and the choice between them and a TFDS folder.

A triplet is {prompt, reference, chosen, rejected}, each a string or a list of messages, with an optional wrapper and category; a
prompt of reinforcement fine-tuning is {prompt, reference} with an optional answer and category, or a row of the official format
(docs/rft.md). All else a row holds is kept as metadata. Rows are checked when the file is opened and held in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from polar_jax.data.template import TemplateError, check_wrapper, join_messages
from polar_jax.runtime.paths import in_bucket, path_of
from polar_jax.types import Prompt, Triplet, UserError

SUFFIXES = ('.jsonl', '.jsonl.gz', '.parquet')
STYLE = 'polar'  # of reward_model in the official format
_TEXT_FIELDS = ('prompt', 'reference', 'chosen', 'rejected')
_Checked = TypeVar('_Checked')
_TFDS_FILES = ('dataset_info.json', '*/dataset_info.json', '*/*/dataset_info.json')  # the folder itself, or name/version below it


class SourceError(UserError):
  """Data that cannot be opened. The message is one line for the user."""


class NoSplitError(SourceError):
  """The data is there, and holds no such split."""


class BadRowError(SourceError):
  """A row that cannot be used.

  Attributes:
    path, row (from 1; the line of a jsonl file), field (None: the row as a whole), reason.
  """

  def __init__(self, path: pathlib.Path, row: int, field: str | None, reason: str):
    super().__init__(f"{path}, row {row}: {reason}; mend it, or set data.on_bad_example to 'skip'")
    self.path, self.row, self.field, self.reason = path, row, field, reason

  def __reduce__(self) -> tuple:
    return type(self), (self.path, self.row, self.field, self.reason)


class RowFile(Sequence[_Checked], Generic[_Checked]):
  """The good rows of a file, in its order.

  Attributes:
    path: the file; of a TFDS split the folder and, behind a colon, the split.
    skipped: (row number from 1, reason) of the rows left out.
  """

  def __init__(self, path: pathlib.Path, rows: list[_Checked], skipped: list[tuple[int, str]]):
    self.path, self.skipped, self._rows = path, skipped, rows

  def __len__(self) -> int:
    return len(self._rows)

  @overload
  def __getitem__(self, index: int) -> _Checked: ...
  @overload
  def __getitem__(self, index: slice) -> list[_Checked]: ...
  def __getitem__(self, index: int | slice) -> _Checked | list[_Checked]:
    return self._rows[index]


class BadField(Exception):
  """What a check of a row finds wrong: the field (None: the row as a whole) and the reason."""

  def __init__(self, field: str | None, reason: str):
    super().__init__(reason)
    self.field, self.reason = field, reason


def read_rows(path: str | pathlib.Path, on_bad_example: str = 'raise') -> RowFile[Triplet]:
  """Reads and checks a file of triplets. Blank lines of a jsonl file are no rows.

  Args:
    on_bad_example: 'raise', or 'skip' to leave bad rows out and list them in `.skipped`.

  Raises:
    BadRowError: a bad row, with on_bad_example='raise'.
    SourceError: no such file, unknown suffix, damaged file, or no good row in it.
    ImportError: parquet without pyarrow.
  """
  path = path_of(path)
  skipped: list[tuple[int, str]] = []
  return RowFile(path, [row for _, row in checked_rows(path, _triplet, on_bad_example, skipped)], skipped)


def checked_rows(
  path: str | pathlib.Path, check: Callable[[Any], _Checked], on_bad_example: str, skipped: list[tuple[int, str]]
) -> Iterator[tuple[int, _Checked]]:
  """(row number from 1, what `check` makes of the row) of every good row of a file, read as it is asked for.

  Args:
    check: of a line of JSON in bytes, or a dict; raises BadField (see `parse_row`).
    skipped: takes (row number, reason) of the rows left out with on_bad_example='skip'.

  Raises:
    As `read_rows`.
  """
  path = path_of(path)
  _check_mode(on_bad_example)
  if not path.is_file():
    raise SourceError(f'{path}: no such file')
  reader = _parquet_rows if path.name.endswith('.parquet') else _jsonl_rows if path.name.endswith(SUFFIXES) else None
  if reader is None:
    raise SourceError(f'{path}: unknown kind of file; rows are read from {", ".join(SUFFIXES)}')
  yield from _checked(path, reader(path), check, on_bad_example, skipped)


def _check_mode(on_bad_example: str) -> None:
  if on_bad_example not in ('raise', 'skip'):
    raise ValueError(f"on_bad_example is {on_bad_example!r}; it must be 'raise' or 'skip'")


def _checked(
  path: pathlib.Path,
  rows: Iterable[tuple[int, Any]],
  check: Callable[[Any], _Checked],
  on_bad_example: str,
  skipped: list[tuple[int, str]],
) -> Iterator[tuple[int, _Checked]]:
  good = 0
  for number, row in rows:
    try:
      checked = check(row)
    except BadField as bad:
      if on_bad_example == 'raise':
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
    with path.open('rb') as file, gzip.open(file) if path.suffix == '.gz' else contextlib.nullcontext(file) as lines:
      for number, line in enumerate(lines, 1):
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
    with path.open('rb') as file, pyarrow.parquet.ParquetFile(file) as table:
      for batch in table.iter_batches(batch_size=1024):
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
    _check_text(row[field], field)
  if row.get('wrapper') is not None:
    try:
      check_wrapper(row['wrapper'])
    except TemplateError as error:
      raise BadField('wrapper', str(error)) from error
  return row


def _check_text(value: Any, field: str) -> str:
  """The text of a string or of messages, joined."""
  try:
    text = join_messages(value, field)
  except TemplateError as error:
    raise BadField(field, str(error)) from error
  if not text.isascii() and any('\ud800' <= char <= '\udfff' for char in text):
    raise BadField(field, f'{field} holds half a surrogate pair, which is no Unicode text')
  return text


def _check_string(value: Any, field: str) -> str:
  """A string, '' for an absent one."""
  if value is not None and not isinstance(value, str):
    raise BadField(field, f'{field} must be a string, not {type(value).__name__}')
  return value or ''


def _triplet(row: Any) -> Triplet:
  row = parse_row(row, _TEXT_FIELDS)
  _check_string(row.get('category'), 'category')
  values = {field: row[field] for field in _TEXT_FIELDS} | {k: row[k] for k in ('wrapper', 'category') if row.get(k) is not None}
  known = {*_TEXT_FIELDS, 'wrapper', 'category'}
  return Triplet(**values, metadata={key: value for key, value in row.items() if key not in known})


def open_source(path: str | pathlib.Path, split: str, on_bad_example: str = 'raise') -> Sequence[Triplet]:
  """One split of a data set: of a TFDS folder, of a folder with `<split>.jsonl` (.jsonl.gz, .parquet), or a file, which is its own split.

  Raises:
    NoSplitError: the folder has no such split, saying what it has.
    SourceError: nothing there, saying what was looked for and what there is; and as `read_rows`.
  """
  found = _locate(path_of(path), split)
  return read_rows(found, on_bad_example) if isinstance(found, pathlib.PurePath) else found


def as_triplets(examples: Any, split: str = 'train', on_bad_example: str = 'raise') -> Sequence[Triplet]:
  """Return ranked examples in any form as Triplets.

  Args:
    examples: the path of a data set (see `open_source`), a sequence of Triplets, or a sequence of dicts with `prompt`, `reference`,
      `chosen` and `rejected`, such as a list or a data set of Hugging Face. Dicts are checked now and held in memory.
    split: of a data set on disk.
    on_bad_example: 'raise', or 'skip' to leave bad examples out and list them in `.skipped`.

  Raises:
    UserError: no such data, a bad example, or no example at all.
  """
  return _as_checked(examples, Triplet, _triplet, lambda path: open_source(path, split, on_bad_example), on_bad_example)


def as_prompts(prompts: Any, split: str = 'train', on_bad_example: str = 'raise', optional: Sequence[str] = ()) -> Sequence[Prompt]:
  """Return prompts of reinforcement fine-tuning in any form as Prompts; see `as_triplets`.

  Args:
    prompts: the path of a data set, or a sequence of Prompts or of dicts with `prompt` and `reference`.
    split: of a data set on disk.
    on_bad_example: 'raise', or 'skip' to leave bad prompts out and list them in `.skipped`.
    optional: fields that may be missing: ('reference',) for rewards that do not read references.
  """

  def check(example: Any) -> Prompt:
    if 'reference' in optional and isinstance(example, Mapping) and example.get('reference') is None and 'reward_model' not in example:
      found = _plain_prompt(parse_row(dict(example), ()) | {'reference': 'none'})
      return dataclasses.replace(found, reference='')
    return _prompt(example)

  return _as_checked(prompts, Prompt, check, lambda path: open_prompts(path, split, on_bad_example), on_bad_example)


def _as_checked(examples: Any, kind: type, check: Callable[[Any], Any], read: Callable[[Any], Any], on_bad_example: str) -> Any:
  _check_mode(on_bad_example)
  if isinstance(examples, (str, pathlib.PurePath)):
    return read(examples)
  if not isinstance(examples, Sequence) and not hasattr(examples, '__getitem__'):
    examples = list(examples)
  if isinstance(examples, Mapping) or not hasattr(examples, '__len__'):
    raise SourceError(f'examples must be a path or a sequence of dicts or {kind.__name__}s, not {type(examples).__name__}')
  if len(examples) and isinstance(examples[0], kind):
    return examples
  skipped: list[tuple[int, str]] = []
  where = pathlib.Path('<examples>')
  rows = ((i, dict(examples[i]) if isinstance(examples[i], Mapping) else examples[i]) for i in range(len(examples)))
  return RowFile(where, [example for _, example in _checked(where, rows, check, on_bad_example, skipped)], skipped)


def report_skipped(examples: Sequence[Any], path: pathlib.Path, log: Callable[[str], None]) -> Sequence[Any]:
  """Return `examples`, after reporting which examples of their file were left out as bad."""
  skipped = getattr(examples, 'skipped', [])
  if skipped:
    log(describe_skipped(path, skipped, len(examples)))
  return examples


def describe_skipped(path: pathlib.Path, skipped: Sequence[tuple[int, str]], good: int) -> str:
  """Return a line that counts and names skipped examples."""
  named = '; '.join(f'row {number}: {reason}' for number, reason in skipped[:20])
  return f'{path}: skipped {len(skipped)} bad rows of {good + len(skipped)} ({named}{"; ..." if len(skipped) > 20 else ""})'


def _locate(path: pathlib.Path, split: str) -> pathlib.Path | Sequence[Triplet]:
  """The file that is the split, or the split of a TFDS data set."""
  if not path.exists():
    beside = f'; {path.parent} holds: {_listing(path.parent)}' if path.parent.is_dir() else ''
    raise SourceError(f'{path}: no such file or folder{beside}')
  if not path.is_dir():
    return path
  if any(any(path.glob(pattern)) for pattern in _TFDS_FILES):
    if in_bucket(path):
      kinds = ', '.join(SUFFIXES)
      raise SourceError(f'{path}: TFDS reads from file systems alone: mount the bucket (gcsfuse), or keep {kinds} files in it')
    from polar_jax.data import tfds as triplet_dataset

    try:
      splits = triplet_dataset.open_triplets(path)
    except FileNotFoundError as error:  # more than one data set
      raise SourceError(str(error)) from error
    if split not in splits:
      raise NoSplitError(f'{path}: no split {split!r}; its splits are: {", ".join(sorted(splits)) or "none"}')
    return splits[split]
  found = [file for suffix in SUFFIXES if (file := path / f'{split}{suffix}').is_file()]
  if len(found) > 1:
    raise SourceError(f'{path}: split {split!r} is there more than once: {", ".join(file.name for file in found)}; keep one')
  if not found:
    wanted = ', '.join(f'{split}{suffix}' for suffix in SUFFIXES)
    raise NoSplitError(f'{path}: no split {split!r}: looked for a TFDS data set, {wanted}; there is: {_listing(path)}')
  return found[0]


def open_prompts(path: str | pathlib.Path, split: str, on_bad_example: str = 'raise') -> RowFile[Prompt]:
  """The prompts of one split: of a file or folder as `open_source` finds them, or of a TFDS set of triplets, whose candidates are not read.

  `Prompt.prompt` is what the reward model reads. Where the policy is to answer something else (the official format keeps both),
  that is in `metadata['policy_prompt']`.

  Args:
    on_bad_example: 'raise', or 'skip' to leave bad rows out and list them in `.skipped`.

  Raises:
    As `open_source` and `read_rows`.
  """
  _check_mode(on_bad_example)
  path = path_of(path)
  found = _locate(path, split)
  skipped: list[tuple[int, str]] = []
  if isinstance(found, pathlib.PurePath):
    path, rows = found, checked_rows(found, _prompt, on_bad_example, skipped)
  else:
    path = pathlib.Path(f'{path}:{split}')
    rows = _checked(path, enumerate(found, 1), _prompt_of_triplet, on_bad_example, skipped)
  return RowFile(path, [prompt for _, prompt in rows], skipped)


def _prompt(row: Any) -> Prompt:
  row = parse_row(row, ())
  return _plain_prompt(row) if row.get('reward_model') is None else _official_prompt(row)


def _prompt_of_triplet(row: Triplet) -> Prompt:
  return _plain_prompt(dict(row.metadata) | {'prompt': row.prompt, 'reference': row.reference, 'category': row.category})


def _plain_prompt(row: Mapping[str, Any]) -> Prompt:
  if 'reference' not in row:
    raise BadField('reference', "field 'reference' is missing (in the official format it is reward_model.ground_truth)")
  seen = _present(row, 'prompt')
  _check_text(seen, 'prompt')
  asked, field = (seen, 'prompt') if row.get('policy_prompt') is None else (row['policy_prompt'], 'policy_prompt')
  _check_policy_prompt(asked, field)
  reference = _check_reference(row['reference'], 'reference')
  answer, category = (_check_string(row.get(name), name) for name in ('answer', 'category'))
  metadata = {key: row[key] for key in row if key not in ('prompt', 'reference', 'answer', 'category', 'policy_prompt')}
  return Prompt(seen, reference, answer, category, metadata | _unless_same(asked, seen))


def _official_prompt(row: Mapping[str, Any]) -> Prompt:
  """A row of the official format: `prompt` is what the policy answers, `extra_info.prompt` what the reward model reads."""
  reward, extra = row['reward_model'], {} if row.get('extra_info') is None else row['extra_info']
  for field, value in (('reward_model', reward), ('extra_info', extra)):
    if not isinstance(value, dict):
      raise BadField(field, f'{field} must be an object, not {type(value).__name__}')
  if reward.get('style') not in (None, STYLE):
    reason = f'reward_model.style is {reward["style"]!r}; it must be {STYLE!r}: the ground truth is a whole answer to compare with'
    raise BadField('reward_model.style', reason)
  asked = _present(row, 'prompt')
  _check_policy_prompt(asked, 'prompt')
  seen = asked
  if extra.get('prompt') is not None:
    seen = extra['prompt']
    _check_text(seen, 'extra_info.prompt')
  reference = _check_reference(_present(reward, 'ground_truth', 'reward_model.'), 'reward_model.ground_truth')
  ability = extra.get('ability') if row.get('ability') is None else row['ability']
  metadata = {key: extra[key] for key in extra if key not in ('prompt', 'ability')}
  metadata |= {key: row[key] for key in row if key not in ('prompt', 'ability', 'answer', 'reward_model', 'extra_info')}
  answer, category = _check_string(row.get('answer'), 'answer'), _check_string(ability, 'ability')
  return Prompt(seen, reference, answer, category, metadata | _unless_same(asked, seen))


def _present(section: Mapping[str, Any], key: str, prefix: str = '') -> Any:
  if key not in section:
    raise BadField(prefix + key, f'field {prefix + key!r} is missing')
  return section[key]


def _check_reference(value: Any, field: str) -> Any:
  text = _check_text(value, field)
  if not text or (isinstance(value, list) and not any(message['content'] for message in value)):
    raise BadField(field, f'{field} is empty: it is what the reward model compares answers with')
  return value


def _check_policy_prompt(value: Any, field: str) -> None:
  """A policy needs some text, and its chat template a role for every message."""
  if not _check_text(value, field):
    raise BadField(field, f'{field} is empty: the policy has nothing to answer')
  for i, message in enumerate(value if isinstance(value, list) else ()):
    if not isinstance(message.get('role'), str):
      raise BadField(field, f'{field}[{i}] is a message without a role (system, user or assistant)')


def _unless_same(asked: Any, seen: Any) -> dict[str, Any]:
  return {} if _plain(asked) == _plain(seen) else {'policy_prompt': asked}


def _plain(text: Any) -> Any:
  """Messages without what is null: parquet gives every message the fields of all."""
  return text if isinstance(text, str) else [{key: value for key, value in message.items() if value is not None} for message in text]


def _listing(folder: pathlib.Path, most: int = 12) -> str:
  names = sorted(entry.name for entry in folder.iterdir())
  return (', '.join(names[:most]) or 'nothing') + (f' and {len(names) - most} more' if len(names) > most else '')
