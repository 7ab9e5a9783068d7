"""Evaluation sets of a user's own files: pairs, ranked lists and best-of-n rows, told apart by their fields.

  pair        prompt, reference, chosen, rejected
  ranked      prompt, reference, candidates, ranks (1 is best; equal ranks are not compared)
  best of n   prompt, reference, candidates, correct (true or false for each)

`category` and `id` are optional. An id is needed only where rewards are recorded; without it, it is the number of the row.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from polar_jax.data import examples, readers
from polar_jax.data.examples import BadField, parse_example
from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import EvaluationSet, Item
from polar_jax.types import Triplet

_KINDS = 'chosen and rejected, candidates and ranks, or candidates and correct'
_KNOWN = {'id', 'prompt', 'reference', 'chosen', 'rejected', 'candidates', 'ranks', 'correct', 'category', 'wrapper'}


def read(path: pathlib.Path, name: str, on_bad_example: str = 'raise') -> EvaluationSet:
  """Read a file or a TFDS folder of pairs (its split `test`, else `validation`).

  Args:
    path: .jsonl, .jsonl.gz, .parquet, a folder of `save_to_disk`, or a data set of triplets.
    name: of the set.
    on_bad_example: 'raise', or 'skip' to leave bad rows out and list them in `skipped`.

  Raises:
    UserError: the data cannot be read, or a row cannot be used.
  """
  skipped: list[tuple[int, str]] = []
  if readers.is_one_split(path):
    numbered = list(examples.checked_examples(path, _item, on_bad_example, skipped))
    items = [item if item.id else dataclasses.replace(item, id=str(number)) for number, item in numbered]
  else:
    items = [_of_triplet(i, triplet) for i, triplet in enumerate(_split(path, on_bad_example), start=1)]
  sets.check_unique(items, str(path))
  return EvaluationSet(name, items, skipped=tuple((f'{path.name}, row {number}', reason) for number, reason in skipped))


def _split(path: pathlib.Path, on_bad_example: str) -> Any:
  try:
    return examples.open_triplets(path, 'test', on_bad_example)
  except examples.NoSplitError:
    return examples.open_triplets(path, 'validation', on_bad_example)


def _of_triplet(number: int, triplet: Triplet) -> Item:
  facts = {**triplet.metadata, 'wrapper': triplet.wrapper}
  candidates = (triplet.chosen, triplet.rejected)
  return Item(str(number), triplet.prompt, candidates, sets.pair(), triplet.category, triplet.reference, facts=facts)


def _item(example: Any) -> Item:
  fields = parse_example(example, ('prompt',))
  if fields.get('reference') is not None:
    parse_example(fields, ('reference',))
  name, category = fields.get('id', ''), fields.get('category') or ''
  if isinstance(name, bool) or not isinstance(name, (str, int)):
    raise BadField('id', f'id must be a string or an integer, not {type(name).__name__}')
  if not isinstance(category, str):
    raise BadField('category', f'category must be a string, not {type(category).__name__}')
  candidates, comparisons, correct = _candidates(fields)
  facts = {key: value for key, value in fields.items() if key not in _KNOWN}
  facts |= {'wrapper': fields.get('wrapper') or 'sft'}
  return Item(str(name), fields['prompt'], candidates, comparisons, category, fields.get('reference'), correct, facts)


def _candidates(fields: dict[str, Any]) -> tuple[tuple, tuple[sets.Comparison, ...], tuple[bool, ...] | None]:
  """Return candidates, comparisons and correctness of a row of any kind."""
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
