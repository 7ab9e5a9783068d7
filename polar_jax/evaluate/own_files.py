"""Evaluation sets of a user's own files: pairs, ranked lists and best-of-n rows, told apart by their fields.

  pair        prompt, reference, chosen, rejected
  ranked      prompt, reference, candidates, ranks (1 is best; equal ranks are not compared)
  best of n   prompt, reference, candidates, correct (true or false for each)
  one answer  prompt, reference, response, correct (true or false): the rows of a prompt are a best-of-n row

`category` and `id` are optional. An id is needed only where rewards are recorded; without it, it is the number of the row. Rows of one
answer are grouped by `prompt_id` where they have it, which is then the id, else by prompt. The final answers that a majority votes on are
in `answers` (`answer` in rows of one answer); without them, each is the last number of a candidate.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from polar_jax.config import ConfigError
from polar_jax.data import examples, readers
from polar_jax.data.examples import BadExampleError, BadField, parse_example
from polar_jax.data.template import join_messages
from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import EvaluationSet, Item
from polar_jax.ppo.rewards.last_number import last_number
from polar_jax.types import Text, Triplet, UserError

_KINDS = 'chosen and rejected, candidates and ranks, candidates and correct, or response and correct'
_KNOWN = {'id', 'prompt', 'reference', 'chosen', 'rejected', 'candidates', 'ranks', 'correct', 'category', 'wrapper'}
_KNOWN |= {'response', 'prompt_id', 'answer', 'answers'}


# In the world `files`, ends the name of the held-out set of triplets with a policy that no training row has.
UNSEEN_POLICIES = '_unseen_policies'


class _Answer(NamedTuple):
  """A row of one answer: the item without its comparisons, whose candidates are this answer alone."""

  item: Item


def set_names(files: Sequence[pathlib.Path]) -> list[str]:
  """Return the name of the set of each file: its own, or with that of its folder where several files have the same.

  Raises:
    ConfigError: two sets have the same name even so.
  """
  stems = [path.name.split('.')[0] for path in files]
  names = [stem if stems.count(stem) == 1 else f'{path.parent.name}_{stem}' for path, stem in zip(files, stems, strict=True)]
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise ConfigError(f'synthesize.files: two files would be the set {twice!r}; rename one')
  return names


def read(path: pathlib.Path, name: str, on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read a file, or the held-out splits of a data set of triplets: `test`, else `validation`, and the splits `unseen_*` of a pool.

  Args:
    path: .jsonl, .jsonl.gz, .parquet, a folder of `save_to_disk`, or a data set of triplets.
    name: of the set; those of further splits are `<name>_<split>`.
    on_bad_example: 'raise', or 'skip' to leave bad rows out and list them in `skipped`.

  Raises:
    UserError: the data cannot be read, or a row cannot be used.
  """
  if readers.is_one_split(path):
    return [_read_file(path, name, on_bad_example)]
  return [
    EvaluationSet(name if i == 0 else f'{name}_{split}', [_of_triplet(n, triplet) for n, triplet in enumerate(triplets, start=1)])
    for i, (split, triplets) in enumerate(_held_out(path, on_bad_example))
  ]


def _read_file(path: pathlib.Path, name: str, on_bad_example: str) -> EvaluationSet:
  skipped: list[tuple[int, str]] = []
  numbered = list(examples.checked_examples(path, _row, on_bad_example, skipped))
  items = [_named(row, number) for number, row in numbered if isinstance(row, Item)]
  items += _grouped(path, [(number, row.item) for number, row in numbered if isinstance(row, _Answer)], on_bad_example, skipped)
  if not items:
    raise UserError(f'{path}: no prompt has both right and wrong answers, so that there is nothing to compare')
  sets.check_unique(items, str(path))
  return EvaluationSet(name, items, skipped=tuple((f'{path.name}, row {number}', reason) for number, reason in skipped))


def _held_out(path: pathlib.Path, on_bad_example: str) -> list[tuple[str, Sequence[Triplet]]]:
  """Return the names and triplets of the held-out splits of a data set.

  Raises:
    NoSplitError: it has neither `test` nor `validation`.
  """
  found = list[tuple[str, Sequence[Triplet]]]()
  for split in ('test', 'validation', 'unseen_prompts', 'unseen_policies'):
    if split == 'validation' and found:
      continue
    try:
      found.append((split, examples.open_triplets(path, split, on_bad_example)))
    except examples.NoSplitError:
      if split == 'validation':
        raise
  return found


def _of_triplet(number: int, triplet: Triplet) -> Item:
  facts = {**triplet.metadata, 'wrapper': triplet.wrapper}
  candidates = (triplet.chosen, triplet.rejected)
  return Item(str(number), triplet.prompt, candidates, sets.pair(), triplet.category, triplet.reference, facts=facts)


def _named(item: Item, number: int) -> Item:
  return item if item.id else dataclasses.replace(item, id=str(number))


def _row(example: Any) -> Item | _Answer:
  fields = parse_example(example, ('prompt',))
  if fields.get('reference') is not None:
    parse_example(fields, ('reference',))
  of_one = 'response' in fields and not any(name in fields for name in ('chosen', 'rejected', 'candidates'))
  name, category = fields.get('prompt_id' if of_one else 'id', ''), fields.get('category') or ''
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise BadField('id', f'{"prompt_id" if of_one else "id"} must be a string or an integer, not {type(name).__name__}')
  if not isinstance(category, str):
    raise BadField('category', f'category must be a string, not {type(category).__name__}')
  facts = {key: value for key, value in fields.items() if key not in _KNOWN}
  facts |= {'wrapper': fields.get('wrapper') or 'sft'}
  if of_one:
    parse_example(fields, ('response',))
    if not isinstance(fields.get('correct'), bool):
      raise BadField('correct', 'correct must be true or false')
    correct, answers = (fields['correct'],), _answers({'answers': [fields['answer']]} if 'answer' in fields else {}, (fields['response'],))
    return _Answer(Item(str(name), fields['prompt'], (fields['response'],), (), category, fields.get('reference'), correct, answers, facts))
  candidates, comparisons, flags = _candidates(fields)
  voted = None if flags is None else _answers(fields, candidates)
  return Item(str(name), fields['prompt'], candidates, comparisons, category, fields.get('reference'), flags, voted, facts)


def _grouped(path: pathlib.Path, rows: Sequence[tuple[int, Item]], mode: str, skipped: list[tuple[int, str]]) -> list[Item]:
  """Return an item for each prompt of rows of one answer. Prompts whose answers are all right or all wrong are left out and listed.

  Args:
    path: of the file, for messages.
    rows: (number, row), in order.
    mode: 'raise' or 'skip', for rows that contradict the first row of their prompt.
    skipped: receives (number of the first row, reason).

  Raises:
    BadExampleError: the rows of a prompt have different references, categories or wrappers.
  """
  groups: dict[str, list[tuple[int, Item]]] = {}
  for number, row in rows:
    first = groups.setdefault(json.dumps([row.prompt, row.id], sort_keys=True), [])
    if first:
      field = next((f for f in ('reference', 'category') if getattr(row, f) != getattr(first[0][1], f)), None)
      field = field or ('wrapper' if row.facts['wrapper'] != first[0][1].facts['wrapper'] else None)
      if field:
        reason = f'{field} is another one than in row {first[0][0]}, which has the same prompt'
        if mode == 'raise':
          raise BadExampleError(path, number, field, reason)
        skipped.append((number, reason))
        continue
    first.append((number, row))
  out = []
  for members in groups.values():
    (number, item), flags = members[0], tuple(row.correct[0] for _, row in members if row.correct)
    if all(flags) or not any(flags):
      skipped.append((number, f'all {len(flags)} answers to its prompt are {"right" if flags[0] else "wrong"}'))
      continue
    candidates = tuple(row.candidates[0] for _, row in members)
    answers = tuple(row.answers[0] if row.answers else None for _, row in members)
    facts = {name: value for name, value in item.facts.items() if all(row.facts.get(name) == value for _, row in members)}
    comparisons = sets.all_pairs(flags)
    item = dataclasses.replace(item, candidates=candidates, comparisons=comparisons, correct=flags, answers=answers, facts=facts)
    out.append(_named(item, number))
  return out


def _answers(fields: dict[str, Any], candidates: Sequence[Text]) -> tuple[str | None, ...]:
  """Return the final answer of each candidate: given ones, or last numbers."""
  if fields.get('answers') is not None:
    valid = lambda v: v is None or (isinstance(v, (str, int, float)) and not isinstance(v, bool))
    given = _list(fields, 'answers', len(candidates), valid, 'strings, numbers or null')
    return tuple(None if value is None else str(value) for value in given)
  numbers = [last_number(join_messages(text, 'candidate')) for text in candidates]
  return tuple(None if number is None else str(number) for number in numbers)


def _candidates(fields: dict[str, Any]) -> tuple[tuple, tuple[sets.Comparison, ...], tuple[bool, ...] | None]:
  """Return candidates, comparisons and correctness of a row of several candidates."""
  if 'chosen' in fields or 'rejected' in fields:
    parse_example(fields, ('chosen', 'rejected'))
    return (fields['chosen'], fields['rejected']), sets.pair(), None
  candidates = fields.get('candidates')
  if candidates is None:
    raise BadField(None, f'a row needs {_KINDS}')
  if not isinstance(candidates, list) or len(candidates) < 2:
    raise BadField('candidates', 'candidates must be a list of at least two texts')
  for i, candidate in enumerate(candidates):
    parse_example({f'candidates[{i}]': candidate}, (f'candidates[{i}]',))
  if 'correct' in fields:
    flags = _list(fields, 'correct', len(candidates), lambda value: isinstance(value, bool), 'true or false')
    if all(flags) or not any(flags):
      raise BadField('correct', f'all candidates are {"right" if flags[0] else "wrong"}, so that there is nothing to compare')
    return tuple(candidates), sets.all_pairs(flags), tuple(flags)
  if 'ranks' in fields:
    ranks = _list(fields, 'ranks', len(candidates), lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v == v, 'numbers')
    if len(set(ranks)) < 2:
      raise BadField('ranks', 'all ranks are equal, so that there is nothing to compare')
    return tuple(candidates), sets.ranked_pairs(ranks), None
  raise BadField(None, f'a row needs {_KINDS}')


def _list(fields: dict[str, Any], name: str, count: int, valid: Callable[[Any], bool], kind: str) -> list[Any]:
  values = fields[name]
  if not isinstance(values, list) or len(values) != count or not all(map(valid, values)):
    raise BadField(name, f'{name} must be a list of {kind}, one for each of the {count} candidates')
  return values
