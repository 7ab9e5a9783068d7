"""Variants of the references of an evaluation set: what a reference-conditioned model makes of other ones."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from polar_jax.evaluate.sets import Item
from polar_jax.types import Text, UserError

# Variant -> what it shows.
VARIANTS = {
  'true': 'the reference of the item',
  'none': 'no reference: the template without it',
  'empty': 'an empty reference',
  'shuffled': 'the reference of another prompt of the same category',
  'twin': 'the best candidate itself, which leaks the answer',
}


def references(items: Sequence[Item], variant: str, seed: int = 0) -> list[Text]:
  """Return a reference for each item.

  Args:
    items: of a set.
    variant: one of `VARIANTS`; for 'none' the texts are not read.
    seed: of the shuffle.

  Raises:
    UserError: the variant needs references that the items do not have.
  """
  if variant in ('none', 'empty'):
    return [''] * len(items)
  if variant == 'twin':
    return [item.candidates[_best(item)] for item in items]
  given = [item.reference for item in items]
  if any(reference is None for reference in given):
    raise UserError(f'evaluate.references: {variant!r} needs references, which the set does not have; use none, empty or twin')
  known = [reference for reference in given if reference is not None]
  return known if variant == 'true' else [known[i] for i in _shuffled(items, seed)]


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
