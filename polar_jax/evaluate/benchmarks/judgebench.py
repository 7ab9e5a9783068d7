"""JudgeBench (Tan et al. 2024): pairs of one model's answers, of which one is right, in four groups of tasks.

`data` has a file for each model that answered. Published tables are about the pairs of gpt-4o, which are the set `judgebench`.
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


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the pairs of every model; see `polar_jax.evaluate.benchmarks.read`."""
  (folder,) = folders
  files = published.tables([folder / 'data'])
  if not files:
    raise UserError(f'{folder / "data"}: has no .jsonl or .parquet file of JudgeBench')
  by_model: dict[str, list[Row]] = {}
  for file in files:
    rows = list(published.rows_of(file))
    of_file = next(filter(None, map(_model, rows)), '')  # of rows that do not say
    for row in rows:
      by_model.setdefault(_model(row) or of_file, []).append(row)
  main = next((model for model in by_model if model.startswith(_MAIN)), next(iter(by_model), ''))
  out = []
  for model, rows in sorted(by_model.items(), key=lambda entry: entry[0] != main):
    name, skipped = 'judgebench' if model == main else f'judgebench_{model}', list[tuple[str, str]]()
    items = published.items_of(rows, _item, on_bad_example, skipped)
    sets.check_unique(items, name)
    out.append(EvaluationSet(name, items, official, skipped=tuple(skipped)))
  return out


def _model(row: Row) -> str:
  """Return the model that answered, or '' if the row does not say."""
  return str(row.fields.get('response_model') or '') if isinstance(row.fields, Mapping) else ''


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
    facts={'source': source},
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, Any]:
  """Return the accuracy of each group, and `all`, over the pairs."""
  right = sets.margins(items, rewards).margin > 0
  groups = np.array([item.category for item in items])
  out = {group: 100 * float(right[groups == group].mean()) for group in GROUPS.values() if (groups == group).any()}
  return out | {'all': 100 * float(right.mean())}
