"""JudgeBench (Tan et al. 2024): pairs of one model's answers, of which one is right, in four groups of tasks.

data/*.jsonl has a file for each model that answered. Published tables are about the pairs of gpt-4o, which are the set `judgebench`.
A pair is right if the reward model prefers the answer of the label; a tie is wrong. The headline is the mean over pairs.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import sets
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.benchmarks.published import Row
from polar_jax.evaluate.sets import EvaluationSet, Item, Rewards
from polar_jax.types import UserError

# Prefix of `source` -> group of the published tables.
GROUPS = {'mmlu-pro': 'knowledge', 'livebench-reasoning': 'reasoning', 'livebench-math': 'math', 'livecodebench': 'coding'}
_MAIN = 'gpt-4o'


def read(folder: pathlib.Path, on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the pairs of every model; see `polar_jax.evaluate.benchmarks.read`."""
  files = sorted((folder / 'data').glob('*.jsonl'))
  if not files:
    raise UserError(f'{folder / "data"}: has no .jsonl file of JudgeBench')
  skipped: list[tuple[str, str]] = []
  rows = [row for file in files for row in published.rows_of(file)]
  items = published.items_of(rows, _item, on_bad_example, skipped)
  by_model: dict[str, list[Item]] = {}
  for item in items:
    by_model.setdefault(str(item.facts['response_model']), []).append(item)
  main = next((model for model in by_model if model.startswith(_MAIN)), next(iter(by_model), ''))
  out = []
  for model, own in sorted(by_model.items(), key=lambda entry: entry[0] != main):
    name = 'judgebench' if model == main else f'judgebench_{model}'
    sets.check_unique(own, name)
    out.append(EvaluationSet(name, own, official, skipped=tuple(skipped) if model == main else ()))
  return out


def _item(fields: Mapping[str, Any], _: Row) -> Item:
  better = 0 if published.label(fields, 'label', ('A>B', 'B>A')) == 'A>B' else 1
  source = published.text(fields, 'source')
  group = next((group for prefix, group in GROUPS.items() if source.startswith(prefix)), None)
  if group is None:
    published.label({'source': source}, 'source', [f'{prefix}*' for prefix in GROUPS])
  return Item(
    published.text(fields, 'pair_id'),
    published.text(fields, 'question'),
    (published.text(fields, 'response_A'), published.text(fields, 'response_B')),
    sets.pair(better),
    category=str(group),
    facts={'source': source, 'response_model': fields.get('response_model') or ''},
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, Any]:
  """Return the accuracy of each group, and `all`, over the pairs."""
  right = sets.margins(items, rewards).margin > 0
  groups = np.array([item.category for item in items])
  out = {group: 100 * float(right[groups == group].mean()) for group in GROUPS.values() if (groups == group).any()}
  return out | {'all': 100 * float(right.mean())}
