"""Rewards that another system recorded: JSON lines of {"id": ..., "rewards": [...]}, in the order of an item's candidates.

A line may also name its `set`; it then belongs to no other one. The stage's own scores.jsonl.gz consists of such lines.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.data import readers
from polar_jax.evaluate import sets
from polar_jax.evaluate.sets import EvaluationSet, Item
from polar_jax.runtime import json_files
from polar_jax.types import UserError

_NAMED = 5
_Key = tuple[str | None, str]  # (set, id)


class Recorded:
  """The rewards of a file by id.

  Attributes:
    path: of the file.
    rewards: (line, value) by (set or None, id). The value has not been checked against an item.
  """

  def __init__(self, path: pathlib.Path):
    """Read a file.

    Raises:
      UserError: a line is not an object with `id` and `rewards`, or an id occurs twice.
    """
    self.path = path
    self.rewards: dict[_Key, tuple[int, Any]] = {}
    for number, line in readers.reader_of(path)(path):
      try:
        fields = json_files.parse(line) if isinstance(line, bytes) else line
      except json_files.JsonError as error:
        raise UserError(f'{path}, line {number}: {error}; fix the file') from error
      name = fields.get('id') if isinstance(fields, Mapping) else None
      if isinstance(name, bool) or not isinstance(name, (str, int)) or 'rewards' not in fields:
        raise UserError(
          f'{path}, line {number}: must be an object with `id`, a string or integer, and `rewards`, a list of numbers; fix it'
        )
      of_set = fields.get('set')
      key = (None if of_set is None else str(of_set), str(name))
      if key in self.rewards:
        raise UserError(f'{path}, line {number}: the id {key[1]!r:.80} is also on line {self.rewards[key][0]}; remove one of them')
      self.rewards[key] = number, fields['rewards']
    if not self.rewards:
      raise UserError(f'{path}: has no rewards')

  def of(self, found: Sequence[EvaluationSet], on_missing: str = 'raise') -> dict[str, tuple[EvaluationSet, list[np.ndarray]]]:
    """Return the sets that have rewards, by name, each with the rewards of its items.

    A set of which no item has rewards is left out: it is another system's.

    Args:
      found: all sets.
      on_missing: 'raise' if some items of a set have no rewards, or 'skip' to leave them out and list them in `skipped`.

    Raises:
      UserError: rewards are missing, are of no item, are ambiguous, or do not fit their item.
    """
    keys = _keys(found)
    out, used = dict[str, tuple[EvaluationSet, list[np.ndarray]]](), set[_Key]()
    for one in found:
      held = {id(item): key for item in one.items if (key := next((k for k in keys[id(item)] if k in self.rewards), None))}
      if not held:
        continue
      lacking = [item.id for item in one.items if id(item) not in held]
      if lacking and on_missing == 'raise':
        raise UserError(
          f'{self.path}: has no rewards for {len(lacking)} of {len(one.items)} items of {one.name} ({_named(lacking)}); add them, or leave '
          'those items out with data.on_bad_example=skip'
        )
      items = [item for item in one.items if id(item) in held]
      rewards = [self._rewards(item, held[id(item)]) for item in items]
      used |= set(held.values())
      skipped = (*one.skipped, *((name, f'{self.path.name} has no rewards for it') for name in lacking))
      out[one.name] = dataclasses.replace(one, items=items, skipped=skipped), rewards
    unknown = [name for key in self.rewards if key not in used for name in key[1:]]
    if unknown and (on_missing == 'raise' or not out):
      ambiguous = _ambiguous(found)
      if both := [key for key in unknown if key in ambiguous]:
        raise UserError(f'{self.path}: the id {both[0]!r:.80} is of several items; write {" or ".join(ambiguous[both[0]])}')
      raise UserError(
        f'{self.path}: {len(unknown)} of {len(self.rewards)} ids are of no item of {", ".join(one.name for one in found)} '
        f'({_named(unknown)}); remove them, or read all files that they belong to'
      )
    return out

  def _rewards(self, item: Item, key: _Key) -> np.ndarray:
    number, value = self.rewards[key]
    if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
      raise UserError(f'{self.path}, line {number}: rewards must be a list of numbers; fix it')
    try:
      return sets.checked_rewards(item, value)
    except (UserError, OverflowError) as error:
      raise UserError(f'{self.path}, line {number}: {error}; fix it') from error


def _bare(item: Item) -> str | None:
  return item.facts.get('bare_id')


def _keys(found: Sequence[EvaluationSet]) -> dict[int, list[_Key]]:
  """Return the keys by which rewards may name each item: its own id, and that of the published file where it is of one item only."""
  ambiguous = _ambiguous(found)
  out = {}
  for one in found:
    for item in one.items:
      bare = _bare(item)
      names = [item.id] if bare is None or bare in ambiguous else [item.id, bare]
      out[id(item)] = [(of_set, name) for name in names for of_set in (one.name, None)]
  return out


def _ambiguous(found: Sequence[EvaluationSet]) -> dict[str, list[str]]:
  """Return the ids of published files that several items of a set share -> the items' own ids."""
  out: dict[str, list[str]] = {}
  for one in found:
    shared: dict[str, list[str]] = {}
    for item in one.items:
      if (bare := _bare(item)) is not None:
        shared.setdefault(bare, []).append(item.id)
    out |= {bare: ids for bare, ids in shared.items() if len(ids) > 1}
  return out


def _named(ids: Sequence[str]) -> str:
  return ', '.join(repr(name)[:60] for name in ids[:_NAMED]) + (', ...' if len(ids) > _NAMED else '')
