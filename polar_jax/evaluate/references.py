"""Variants of the references of an evaluation set: what a reference-conditioned model makes of other ones.

A variant stands for one or several views, each with a reference for every item. A reference that is one of the candidates leaks the
answer; comparisons with that candidate are left out of the view, except in `twin`, which shows the leak.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.data import readers
from polar_jax.data.examples import BadField, parse_example
from polar_jax.data.template import join_messages
from polar_jax.evaluate.sets import EvaluationSet, Item
from polar_jax.types import Text, UserError

# Variant -> what it shows.
VARIANTS = {
  'true': 'the reference of the item',
  'none': 'no reference: the template without it',
  'empty': 'an empty reference',
  'shuffled': 'the reference of another prompt of the same category',
  'twin': 'the best candidate itself, which leaks the answer',
  'degraded': 'the reference with 75, 50 and 25% of its words',
  'file': 'the reference in evaluate.reference_file, such as that of another model',
  'right': 'another right answer',
  'wrong': 'a wrong answer',
  'style': 'the right answer in each style',
}
KEPT = (75, 50, 25)  # percent of the words, of `degraded`
_HELD_OUT = ('right', 'wrong')
# Facts of an item: the texts that were held out of its candidates by name, and the names of the styles of its first candidates.
REFERENCES, STYLES = 'held_out_references', 'styles'


class View(NamedTuple):
  """A reference for each item of a set.

  Attributes:
    references: of each item.
    own: index of the candidate that is the reference, whose comparisons are left out; None: no candidate is.
  """

  references: list[Text]
  own: list[int | None]


def views(items: Sequence[Item], variant: str, given: Mapping[str, Text] | None = None, seed: int = 0) -> dict[str, View]:
  """Return the views of a variant, by name.

  Args:
    items: of a set.
    variant: one of `VARIANTS`; for 'none' the texts are not read.
    given: references by id, for 'file'.
    seed: of the shuffle and of the words that `degraded` keeps.

  Raises:
    UserError: the items do not have what the variant needs (see `lacking`), or their references cannot be shuffled.
  """
  if reason := lacking(items, variant, given):
    raise UserError(f'evaluate.references: {variant!r} {reason}')
  if variant == 'style':
    names = items[0].facts[STYLES]
    return {f'style_{name}': View([item.candidates[k] for item in items], [k] * len(items)) for k, name in enumerate(names)}
  if variant == 'degraded':
    return {f'degraded_{kept}': _plain([_degraded(_reference(i), kept, (seed, n)) for n, i in enumerate(items)]) for kept in KEPT}
  return {variant: _plain(_references(items, variant, given or {}, seed))}


def lacking(items: Sequence[Item], variant: str, given: Mapping[str, Text] | None = None) -> str | None:
  """Return why a variant cannot be used on a set, as the end of a sentence; None if it can."""
  if variant in ('none', 'empty', 'twin'):
    return None
  if variant == 'file':
    missing = [item.id for item in items if item.id not in (given or {})]
    return f'has no reference for {len(missing)} of {len(items)} items, the first of them {missing[0]!r:.60}' if missing else None
  if variant in _HELD_OUT:
    return None if all(REFERENCES in item.facts for item in items) else 'needs rows with several right and several wrong answers'
  if variant == 'style':
    return None if all(STYLES in item.facts for item in items) else 'needs answers in several styles, as in rm_bench'
  return 'needs references, which the set does not have; use none, empty or twin' if any(item.reference is None for item in items) else None


def _plain(references: list[Text]) -> View:
  return View(references, [None] * len(references))


def _references(items: Sequence[Item], variant: str, given: Mapping[str, Text], seed: int) -> list[Text]:
  match variant:
    case 'none' | 'empty':
      return [''] * len(items)
    case 'twin':
      return [item.candidates[_best(item)] for item in items]
    case 'file':
      return [given[item.id] for item in items]
    case 'right' | 'wrong':
      return [item.facts[REFERENCES][variant] for item in items]
    case 'shuffled':
      return [_reference(items[i]) for i in _shuffled(items, seed)]
  return [_reference(item) for item in items]


def _reference(item: Item) -> Text:
  assert item.reference is not None
  return item.reference


def hold_out(one: EvaluationSet, seed: int = 0) -> EvaluationSet:
  """Take a right and a wrong answer out of the candidates of each item, to be references: for `right` and `wrong`.

  Items with `correct` that have fewer than two right or two wrong answers are left out and listed in `skipped`. A set without `correct`
  is returned as it is.

  Args:
    one: a set.
    seed: of the choice.
  """
  if any(item.correct is None for item in one.items):
    return one
  kept, skipped = list[Item](), list(one.skipped)
  for number, item in enumerate(one.items):
    sides = {name: [i for i, ok in enumerate(item.correct or ()) if ok is (name == 'right')] for name in _HELD_OUT}
    few = next((name for name, side in sides.items() if len(side) < 2), None)
    if few:
      skipped.append((item.id, f'has fewer than two {few} answers, so that none can be a reference'))
      continue
    rng = np.random.default_rng((seed, number))
    taken = {name: side[int(rng.integers(len(side)))] for name, side in sides.items()}
    kept.append(_without(item, taken))
  if not kept:
    raise UserError(f'{one.name}: no item has two right and two wrong answers, which the references right and wrong need')
  return dataclasses.replace(one, items=kept, skipped=tuple(skipped))


def _without(item: Item, taken: Mapping[str, int]) -> Item:
  stay = [i for i in range(len(item.candidates)) if i not in taken.values()]
  place = {old: new for new, old in enumerate(stay)}
  comparisons = tuple(
    c._replace(better=tuple(place[i] for i in c.better), worse=tuple(place[i] for i in c.worse))
    for c in item.comparisons
    if all(i in place for i in (*c.better, *c.worse))
  )
  of_each: dict[str, Any] = {'candidates': item.candidates, 'correct': item.correct, 'answers': item.answers}
  shorter: dict[str, Any] = {name: None if values is None else tuple(values[i] for i in stay) for name, values in of_each.items()}
  facts = {**item.facts, REFERENCES: {name: item.candidates[i] for name, i in taken.items()}}
  return dataclasses.replace(item, comparisons=comparisons, facts=facts, **shorter)


def without_own(items: Sequence[Item], view: View) -> list[Item]:
  """Return the items without the comparisons of candidates that are the reference."""
  return [
    item if own is None else dataclasses.replace(item, comparisons=tuple(c for c in item.comparisons if own not in (*c.better, *c.worse)))
    for item, own in zip(items, view.own, strict=True)
  ]


def read_file(path: pathlib.Path, found: Sequence[EvaluationSet]) -> dict[str, Text]:
  """Return the references of a file of {"id": ..., "reference": ...} by id.

  Args:
    path: .jsonl, .jsonl.gz, .parquet or a folder of `save_to_disk`.
    found: the sets that it is for.

  Raises:
    UserError: the file cannot be read, a row is not of that form, an id occurs twice, or none is of an item.
  """
  out: dict[str, Text] = {}
  for number, row in readers.reader_of(path)(path):
    try:
      fields = parse_example(row, ('reference',))
    except BadField as bad:
      raise UserError(f'{path}, row {number}: {bad.reason}; a row must be {{"id": ..., "reference": ...}}') from bad
    name = fields.get('id')
    if isinstance(name, bool) or not isinstance(name, (str, int)):
      raise UserError(f'{path}, row {number}: id must be a string or an integer; a row must be {{"id": ..., "reference": ...}}')
    if str(name) in out:
      raise UserError(f'{path}, row {number}: the id {str(name)!r:.80} occurs twice; remove one of them')
    out[str(name)] = fields['reference']
  known = {item.id for one in found for item in one.items}
  if not known & out.keys():
    raise UserError(f'{path}: none of its {len(out)} ids is of an item of {", ".join(one.name for one in found)}')
  return out


def _degraded(reference: Text, kept: int, seed: tuple[int, ...]) -> str:
  """Return a share of the words of a reference, in percent, in their order. Of fewer words those of more are kept."""
  words = join_messages(reference, 'reference').split()
  order = np.random.default_rng(seed).permutation(len(words))
  chosen = sorted(order[: round(len(words) * kept / 100)].tolist())
  return ' '.join(words[i] for i in chosen)


def _best(item: Item) -> int:
  """Return the candidate that is better in the most comparisons, less those in which it is worse."""
  won = [sum((i in c.better) - (i in c.worse) for c in item.comparisons) for i in range(len(item.candidates))]
  return won.index(max(won))


def _shuffled(items: Sequence[Item], seed: int) -> list[int]:
  """Return for each item the index of another one, of its category and with another prompt where there is one."""
  rng = np.random.default_rng(seed)
  prompts = [json.dumps(item.prompt, sort_keys=True, default=str) for item in items]
  members: dict[str, list[int]] = {}
  for i, item in enumerate(items):
    members.setdefault(item.category, []).append(i)
  out = []
  for i, item in enumerate(items):
    others = [j for j in members[item.category] if prompts[j] != prompts[i]] or [j for j in range(len(items)) if prompts[j] != prompts[i]]
    if not others:
      raise UserError('evaluate.references: all items have the same prompt, so that their references cannot be shuffled')
    out.append(others[int(rng.integers(len(others)))])
  return out
