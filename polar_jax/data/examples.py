"""Examples in files of users (.jsonl, .jsonl.gz, .parquet, folders of `save_to_disk`; local or in a bucket) and in TFDS folders.

They are triplets and prompts. A triplet is {prompt, reference, chosen, rejected}, each a string or a list of messages, with an optional
wrapper and category; a ranked list has `ranked` in place of chosen and rejected, or lists of texts in these. A prompt of reinforcement
fine-tuning is {prompt, reference} with an optional answer and category, or an example of the official format (docs/rft.md). Other
fields are kept as metadata. Examples are checked when the file is opened, and kept in memory, but for those of large .jsonl files
(`line_index.LARGE`).
"""

from __future__ import annotations

import array
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, overload

from polar_jax.data import readers
from polar_jax.data.line_index import LineIndex, is_large
from polar_jax.data.readers import SUFFIXES, DataError
from polar_jax.data.template import TemplateError, check_wrapper, join_messages
from polar_jax.runtime import failures, json_files
from polar_jax.runtime.paths import in_bucket, path_of
from polar_jax.types import Prompt, RankedList, Triplet, UserError

STYLE = 'polar'  # the reward_model.style of the official format
_TEXT_FIELDS = ('prompt', 'reference', 'chosen', 'rejected')
_Checked = TypeVar('_Checked')
_MAX_REASON = 300  # characters
_TFDS_FILES = ('dataset_info.json', '*/dataset_info.json', '*/*/dataset_info.json')  # in the folder itself, or in name/version below it


class NoSplitError(DataError):
  """The data set exists but has no such split."""


class BadExampleError(DataError):
  """An example cannot be used.

  Attributes:
    path: the file, or for a TFDS split the folder and the split, as `folder:split`.
    number: of the example, from 1; for a jsonl file the line.
    field: the field at fault; None: the example as a whole.
    reason: the problem, in words.
  """

  def __init__(self, path: pathlib.Path, number: int, field: str | None, reason: str):
    super().__init__(f"{path}, example {number}: {reason}; fix it, or set data.on_bad_example to 'skip'")
    self.path, self.number, self.field, self.reason = path, number, field, reason

  def __reduce__(self) -> tuple:
    return type(self), (self.path, self.number, self.field, self.reason)


class ExampleFile(Sequence[_Checked], Generic[_Checked]):
  """The valid examples of a file, in order.

  Attributes:
    path: the file, or for a TFDS split the folder and the split, as `folder:split`.
    skipped: (number from 1, reason) of each example left out.
    numbers: number from 1 of each example; for a jsonl file the line.
    max_candidates: most candidates of an example: more than two if some are ranked lists.
    content_files: the file, if its bytes identify the examples, because they are too many to be read again for that; else nothing.
  """

  def __init__(
    self,
    path: pathlib.Path,
    examples: Iterable[tuple[int, _Checked]],
    skipped: list[tuple[int, str]],
    index: LineIndex[_Checked] | None = None,
  ):
    """Read `examples`, numbered from 1, to their end; meanwhile `skipped` may receive those left out.

    With an index, whose lines the examples are read from, they are not held in memory.
    """
    self.path, self.skipped = path, skipped
    self.numbers, self.max_candidates = array.array('q'), 2
    self.content_files = () if index is None else (path,)
    held: list[_Checked] = []
    for number, example in examples:
      self.numbers.append(number)
      if isinstance(example, RankedList):
        self.max_candidates = max(self.max_candidates, len(example.candidates))
      if index is None:
        held.append(example)
      else:
        index.keep()
    self._examples: Sequence[_Checked] = held if index is None else index

  def __len__(self) -> int:
    return len(self._examples)

  @overload
  def __getitem__(self, index: int) -> _Checked: ...
  @overload
  def __getitem__(self, index: slice) -> list[_Checked]: ...
  def __getitem__(self, index: int | slice) -> _Checked | list[_Checked]:
    return self._examples[index]  # type: ignore[return-value]  # a slice of an index is a list, too


class BadField(Exception):
  """A check of an example failed, with the field at fault (None: the example as a whole) and the reason."""

  def __init__(self, field: str | None, reason: str):
    reason = failures.shortened(' '.join(reason.split()), _MAX_REASON)  # it may quote a value of any length
    super().__init__(reason)
    self.field, self.reason = field, reason


def read_triplets(path: str | pathlib.Path, on_bad_example: str = 'raise') -> ExampleFile[Triplet]:
  """Read and check a file of triplets. Blank lines of a jsonl file are ignored.

  Args:
    path: the file.
    on_bad_example: 'raise', or 'skip' to leave bad examples out and list them in `.skipped`.

  Raises:
    BadExampleError: an example is bad, with on_bad_example='raise'.
    DataError: the file does not exist, has an unknown suffix, is damaged, or has no valid example.
    ImportError: pyarrow is not installed, for a parquet file.
  """
  path = path_of(path)
  skipped: list[tuple[int, str]] = []
  if not is_large(path):
    return ExampleFile(path, checked_examples(path, _triplet, on_bad_example, skipped), skipped)
  _check_mode(on_bad_example)
  index = LineIndex(path, _triplet)
  return ExampleFile(path, _checked(path, index.lines(), _triplet, on_bad_example, skipped), skipped, index)


def checked_examples(
  path: str | pathlib.Path, check: Callable[[Any], _Checked], on_bad_example: str, skipped: list[tuple[int, str]]
) -> Iterator[tuple[int, _Checked]]:
  """Yield (number from 1, checked example) for each valid example of a file, reading it lazily.

  Args:
    path: the file.
    check: converts an example, given as a line of JSON in bytes or as a dict; raises BadField (see `parse_example`).
    on_bad_example: 'raise' or 'skip'.
    skipped: receives (number, reason) of the examples left out with on_bad_example='skip'.

  Raises:
    BadExampleError, DataError, ImportError: as in `read_triplets`.
  """
  path = path_of(path)
  _check_mode(on_bad_example)
  yield from _checked(path, readers.reader_of(path)(path), check, on_bad_example, skipped)


def _check_mode(on_bad_example: str) -> None:
  if on_bad_example not in ('raise', 'skip'):
    raise ValueError(f"on_bad_example is {on_bad_example!r}; it must be 'raise' or 'skip'")


def _checked(
  path: pathlib.Path,
  examples: Iterable[tuple[int, Any]],
  check: Callable[[Any], _Checked],
  on_bad_example: str,
  skipped: list[tuple[int, str]],
) -> Iterator[tuple[int, _Checked]]:
  valid = 0
  for number, example in examples:
    try:
      checked = check(example)
    except BadField as bad:
      if on_bad_example == 'raise':
        raise BadExampleError(path, number, bad.field, bad.reason) from bad
      skipped.append((number, bad.reason))
    else:
      valid += 1
      yield number, checked
  if not valid:
    first = f'; example {skipped[0][0]}: {skipped[0][1]}' if skipped else ''
    raise DataError(f'{path}: no valid examples ({len(skipped)} bad ones{first})')


def parse_example(example: Any, text_fields: Sequence[str], **hooks: Callable[[str], Any]) -> dict[str, Any]:
  """Parse an example (a line of JSON in bytes, or a dict) into a dict and check its texts and its wrapper, if any.

  Args:
    example: the line or the dict.
    text_fields: names of the fields that must be texts.
    hooks: how numbers of a line are parsed; see `json_files.parse`.

  Raises:
    BadField: the example is not a JSON object, one of `text_fields` is not a text, or the wrapper is unknown.
  """
  if isinstance(example, bytes):
    try:
      example = json_files.parse(example, **hooks)
    except json_files.JsonError as error:
      raise BadField(None, str(error)) from error
  if not isinstance(example, dict):
    raise BadField(None, f'an example must be a JSON object, not {type(example).__name__}')
  for field in text_fields:
    if field not in example:
      raise BadField(field, f'field {field!r} is missing')
    _check_text(example[field], field)
  if example.get('wrapper') is not None:
    try:
      check_wrapper(example['wrapper'])
    except TemplateError as error:
      raise BadField('wrapper', str(error)) from error
  return example


def _check_text(value: Any, field: str) -> str:
  """Return the text of a string or of joined messages."""
  try:
    text = join_messages(value, field)
  except TemplateError as error:
    raise BadField(field, str(error)) from error
  return _check_unicode(text, field)


def _check_unicode(text: str, field: str) -> str:
  """Return a text that files and tokenizers can hold: one that UTF-8 can encode."""
  if not text.isascii() and any('\ud800' <= char <= '\udfff' for char in text):
    raise BadField(field, f'{field} contains half of a surrogate pair, which is not valid Unicode')
  return text


def _check_string(value: Any, field: str) -> str:
  """Return a string; '' if it is absent."""
  if value is not None and not isinstance(value, str):
    raise BadField(field, f'{field} must be a string, not {type(value).__name__}')
  return _check_unicode(value or '', field)


def _triplet(example: Any) -> Triplet:
  """Return an example as a Triplet, or as a RankedList if it has more than two candidates."""
  example = parse_example(example, ())
  candidates, ranks = _ranking(example)
  if candidates:
    example = {k: v for k, v in example.items() if k != 'ranked' or 'chosen' in example} | {
      'chosen': candidates[0],
      'rejected': candidates[-1],
    }
  example = parse_example(example, _TEXT_FIELDS)
  _check_string(example.get('category'), 'category')
  values = {field: example[field] for field in _TEXT_FIELDS}
  values |= {name: example[name] for name in ('wrapper', 'category') if example.get(name) is not None}
  known = {*_TEXT_FIELDS, 'wrapper', 'category'}
  values['metadata'] = {key: value for key, value in example.items() if key not in known}
  if len(candidates) <= 2:
    return Triplet(**values)
  for number, candidate in enumerate(candidates):
    _check_text(candidate, f'candidate {number}')
  return RankedList(**values, candidates=candidates, ranks=ranks)


def _ranking(example: Mapping[str, Any]) -> tuple[list[Any], list[int]]:
  """Return the candidates of a ranked list, best first, and their ranks; ([], []) if the example is a triplet.

  A list has the field `ranked` instead of `chosen` and `rejected`, or several texts in one of these two: then the candidates of each have
  one rank.

  Raises:
    BadField: a list has fewer than two candidates.
  """
  if 'ranked' in example and not {'chosen', 'rejected'} & example.keys():
    ranked = example['ranked']
    if not isinstance(ranked, list) or len(ranked) < 2:
      has = f'has {len(ranked)} candidate(s)' if isinstance(ranked, list) else f'is not a list but {type(ranked).__name__}'
      raise BadField('ranked', f"field 'ranked' {has}; it must be a list of at least two, best first")
    return ranked, [*range(len(ranked))]
  several = {field: _is_several(example.get(field)) for field in ('chosen', 'rejected')}
  if not any(several.values()) or not several.keys() <= example.keys():
    return [], []
  better, worse = (example[field] if is_several else [example[field]] for field, is_several in several.items())
  return [*better, *worse], [0] * len(better) + [1] * len(worse)


def _is_several(value: Any) -> bool:
  """Return whether a field holds a list of texts; a list of messages is one text."""
  return isinstance(value, list) and bool(value) and all(isinstance(item, (str, list)) for item in value)


def max_candidates(examples: Sequence[Triplet]) -> int:
  """Return the most candidates of an example: more than 2 if some are ranked lists.

  TFDS data sets and files know how many. Other sequences that have lists are those of a program, in memory.
  """
  if isinstance(examples, (list, tuple)):
    return max((len(example.candidates) for example in examples if isinstance(example, RankedList)), default=2)
  return getattr(examples, 'max_candidates', 2)


def open_triplets(path: str | pathlib.Path, split: str, on_bad_example: str = 'raise') -> Sequence[Triplet]:
  """Open one split of a data set of triplets.

  Args:
    path: a TFDS folder, a DatasetDict that `save_to_disk` wrote, a folder with `<split>.jsonl` (.jsonl.gz, .parquet), or a file or a
      saved Dataset, which is the split itself.
    split: name of the split.
    on_bad_example: 'raise', or 'skip' to leave bad examples out and list them in `.skipped`.

  Raises:
    NoSplitError: the folder has no such split; the message lists what it has.
    DataError: the path does not exist; the message lists what does.
    BadExampleError, DataError, ImportError: as in `read_triplets`.
  """
  located = _locate(path_of(path), split)
  return read_triplets(located, on_bad_example) if isinstance(located, pathlib.PurePath) else located


def as_triplets(examples: Any, split: str = 'train', on_bad_example: str = 'raise') -> Sequence[Triplet]:
  """Return ranked examples in any form as Triplets.

  Args:
    examples: the path of a data set (see `open_triplets`), a sequence of Triplets, or a sequence of dicts with `prompt`, `reference`,
      `chosen` and `rejected`, such as a list or a data set of Hugging Face. Dicts are checked now and held in memory.
    split: of a data set on disk.
    on_bad_example: 'raise', or 'skip' to leave bad examples out and list them in `.skipped`.

  Raises:
    UserError: no such data, a bad example, or no example at all.
  """
  return _as_checked(examples, Triplet, _triplet, lambda path: open_triplets(path, split, on_bad_example), on_bad_example)


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
      found = _plain_prompt(parse_example(dict(example), ()) | {'reference': 'none'})
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
    raise DataError(f'examples must be a path or a sequence of dicts or {kind.__name__}s, not {type(examples).__name__}')
  if len(examples) and isinstance(examples[0], kind):
    return examples
  skipped: list[tuple[int, str]] = []
  where = pathlib.Path('<examples>')
  rows = ((i, dict(examples[i]) if isinstance(examples[i], Mapping) else examples[i]) for i in range(len(examples)))
  return ExampleFile(where, _checked(where, rows, check, on_bad_example, skipped), skipped)


def examples_at(source: Sequence[Triplet], indices: Sequence[int]) -> Sequence[Triplet]:
  """Read examples of a data set, in one call if it has `__getitems__`, which is four times as fast for TFDS."""
  read_together = getattr(source, '__getitems__', None)
  return read_together(indices) if read_together else [source[i] for i in indices]


def example_number(examples: Sequence[Any], index: int) -> int:
  """Return the number by which messages name an example: in a jsonl file the line, else counted from 1."""
  numbers = getattr(examples, 'numbers', None)
  return index + 1 if numbers is None else numbers[index]


def report_skipped(examples: Sequence[Any], path: pathlib.Path, log: Callable[[str], None]) -> Sequence[Any]:
  """Return `examples`, after reporting which examples of their file were left out as bad."""
  skipped = getattr(examples, 'skipped', [])
  if skipped:
    log(describe_skipped(path, skipped, len(examples)))
  return examples


def describe_skipped(path: pathlib.Path, skipped: Sequence[tuple[int, str]], good: int) -> str:
  """Return a line that counts and names skipped examples."""
  named = '; '.join(f'example {number}: {reason}' for number, reason in skipped[:20])
  return f'{path}: skipped {len(skipped)} bad examples of {good + len(skipped)} ({named}{"; ..." if len(skipped) > 20 else ""})'


def _locate(path: pathlib.Path, split: str) -> pathlib.Path | Sequence[Triplet]:
  """Return the file of a split, or the split of a TFDS data set."""
  if not path.exists():
    siblings = f'; {path.parent} contains: {_listing(path.parent)}' if path.parent.is_dir() else ''
    raise DataError(f'{path}: no such file or folder{siblings}')
  if readers.is_one_split(path):
    return path
  saved = readers.saved_splits(path)
  if saved:
    if split not in saved:
      raise NoSplitError(f'{path}: no split {split!r}; its splits are: {", ".join(saved)}')
    return saved[split]
  if any(any(path.glob(pattern)) for pattern in _TFDS_FILES):
    if in_bucket(path):
      kinds = ', '.join(SUFFIXES)
      raise DataError(f'{path}: TFDS reads only from file systems; mount the bucket (gcsfuse), or store {kinds} files in it')
    from polar_jax.data import tfds

    try:
      splits = tfds.open_triplets(path)
    except UserError as error:  # more than one data set
      raise DataError(str(error)) from error
    if split not in splits:
      raise NoSplitError(f'{path}: no split {split!r}; its splits are: {", ".join(sorted(splits)) or "none"}')
    return splits[split]
  files = [file for suffix in SUFFIXES if (file := path / f'{split}{suffix}').is_file()]
  if len(files) > 1:
    raise DataError(f'{path}: more than one file for split {split!r}: {", ".join(file.name for file in files)}; keep one')
  if not files:
    wanted = ', '.join(f'{split}{suffix}' for suffix in SUFFIXES)
    raise NoSplitError(f'{path}: no split {split!r}: looked for a TFDS data set, {wanted}; found: {_listing(path)}')
  return files[0]


def open_prompts(path: str | pathlib.Path, split: str, on_bad_example: str = 'raise') -> ExampleFile[Prompt]:
  """Open the prompts of one split of a data set; the candidates of a TFDS data set of triplets are ignored.

  `Prompt.prompt` is the prompt that the reward model reads. Where the policy has to respond to another one (the official format keeps
  both), that is `metadata['policy_prompt']`.

  Args:
    path: as in `open_triplets`.
    split: name of the split.
    on_bad_example: 'raise', or 'skip' to leave bad examples out and list them in `.skipped`.

  Raises:
    NoSplitError, BadExampleError, DataError, ImportError: as in `open_triplets`.
  """
  _check_mode(on_bad_example)
  path = path_of(path)
  located = _locate(path, split)
  skipped: list[tuple[int, str]] = []
  if isinstance(located, pathlib.PurePath):
    path, prompts = located, checked_examples(located, _prompt, on_bad_example, skipped)
  else:
    path = pathlib.Path(f'{path}:{split}')
    prompts = _checked(path, enumerate(located, 1), _prompt_of_triplet, on_bad_example, skipped)
  return ExampleFile(path, prompts, skipped)


def _prompt(example: Any) -> Prompt:
  example = parse_example(example, ())
  return _plain_prompt(example) if example.get('reward_model') is None else _official_prompt(example)


def _prompt_of_triplet(triplet: Triplet) -> Prompt:
  fields = {'prompt': triplet.prompt, 'reference': triplet.reference, 'category': triplet.category}
  return _plain_prompt(dict(triplet.metadata) | fields)


def _plain_prompt(example: Mapping[str, Any]) -> Prompt:
  if 'reference' not in example:
    raise BadField('reference', "field 'reference' is missing (in the official format it is reward_model.ground_truth)")
  prompt = _present(example, 'prompt')
  _check_text(prompt, 'prompt')
  own = example.get('policy_prompt')
  policy_prompt, field = (prompt, 'prompt') if own is None else (own, 'policy_prompt')
  _check_policy_prompt(policy_prompt, field)
  reference = _check_reference(example['reference'], 'reference')
  answer, category = (_check_string(example.get(name), name) for name in ('answer', 'category'))
  metadata = {key: example[key] for key in example if key not in ('prompt', 'reference', 'answer', 'category', 'policy_prompt')}
  return Prompt(prompt, reference, answer, category, metadata | _unless_same(policy_prompt, prompt))


def _official_prompt(example: Mapping[str, Any]) -> Prompt:
  """Convert an example of the official format: the policy responds to `prompt`, the reward model reads `extra_info.prompt`."""
  reward, extra = example['reward_model'], {} if example.get('extra_info') is None else example['extra_info']
  for field, value in (('reward_model', reward), ('extra_info', extra)):
    if not isinstance(value, dict):
      raise BadField(field, f'{field} must be an object, not {type(value).__name__}')
  if reward.get('style') not in (None, STYLE):
    reason = f'reward_model.style is {reward["style"]!r}; it must be {STYLE!r}, and the ground truth a whole response to compare with'
    raise BadField('reward_model.style', reason)
  policy_prompt = _present(example, 'prompt')
  _check_policy_prompt(policy_prompt, 'prompt')
  prompt = policy_prompt
  if extra.get('prompt') is not None:
    prompt = extra['prompt']
    _check_text(prompt, 'extra_info.prompt')
  reference = _check_reference(_present(reward, 'ground_truth', 'reward_model.'), 'reward_model.ground_truth')
  ability = extra.get('ability') if example.get('ability') is None else example['ability']
  metadata = {key: extra[key] for key in extra if key not in ('prompt', 'ability')}
  metadata |= {key: example[key] for key in example if key not in ('prompt', 'ability', 'answer', 'reward_model', 'extra_info')}
  answer, category = _check_string(example.get('answer'), 'answer'), _check_string(ability, 'ability')
  return Prompt(prompt, reference, answer, category, metadata | _unless_same(policy_prompt, prompt))


def _present(section: Mapping[str, Any], key: str, prefix: str = '') -> Any:
  if key not in section:
    raise BadField(prefix + key, f'field {prefix + key!r} is missing')
  return section[key]


def _check_reference(value: Any, field: str) -> Any:
  text = _check_text(value, field)
  if not text or (isinstance(value, list) and not any(message['content'] for message in value)):
    raise BadField(field, f'{field} is empty; the reward model compares responses with it')
  return value


def _check_policy_prompt(value: Any, field: str) -> None:
  """Check that a prompt has text, for the policy, and that every message has a role, for its chat template."""
  if not _check_text(value, field):
    raise BadField(field, f'{field} is empty; the policy needs a prompt')
  for i, message in enumerate(value if isinstance(value, list) else ()):
    if not isinstance(message.get('role'), str):
      raise BadField(field, f'{field}[{i}] is a message without a role (system, user or assistant)')


def _unless_same(policy_prompt: Any, prompt: Any) -> dict[str, Any]:
  return {} if _plain(policy_prompt) == _plain(prompt) else {'policy_prompt': policy_prompt}


def _plain(text: Any) -> Any:
  """Drop null fields of messages, because parquet gives every message the fields of all messages."""
  return text if isinstance(text, str) else [{key: value for key, value in message.items() if value is not None} for message in text]


def _listing(folder: pathlib.Path, max_names: int = 12) -> str:
  names = sorted(entry.name for entry in folder.iterdir())
  return (', '.join(names[:max_names]) or 'nothing') + (f' and {len(names) - max_names} more' if len(names) > max_names else '')
