"""RM-Bench (Liu et al. 2024): three right and three wrong answers to a prompt, in the same three styles.

The styles are concise, detailed plain text, and detailed with markdown. Cell (i, j) of the style matrix is the share of prompts at which
the right answer in style i scores higher than the wrong one in style j; a tie is wrong. `hard` is the mean of the cells above the
diagonal (the right answer is plainer), `normal` of the diagonal, `easy` of those below. The score of a domain is the mean of the three.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import references, sets
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.benchmarks.published import Row
from polar_jax.evaluate.sets import Comparison, EvaluationSet, Item, Rewards
from polar_jax.types import UserError

STYLES = ('concise', 'detailed', 'markdown')
# File -> domain. The two files of safety are one domain.
FILES = {
  'chat_filtered.json': 'chat',
  'code_filtered.json': 'code',
  'math_filtered.json': 'math',
  'safety-refuse_filtered.json': 'safety',
  'safety-response_filtered.json': 'safety',
}
_TOTAL = 'total_dataset.json'
# As named by the column `domain` of the file of all domains.
_DOMAINS = {'chat': 'chat', 'code': 'code', 'math': 'math', 'safety': 'safety', 'safety-refuse': 'safety', 'safety-response': 'safety'}


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read the domains that are there; see `polar_jax.evaluate.benchmarks.read`."""
  (folder,) = folders
  names = {name: [name, name.replace('_filtered', '')] for name in FILES}
  present = {name: next((folder / n for n in options if (folder / n).is_file()), None) for name, options in names.items()}
  missing: tuple[str, ...] = ()
  if (folder / _TOTAL).is_file():
    files = [folder / _TOTAL]
  else:
    files = [file for file in present.values() if file is not None]
    missing = tuple(name for name, file in present.items() if file is None)
    if not files:
      raise UserError(f'{folder}: has none of the files of RM-Bench: {", ".join([_TOTAL, *FILES])}')
  domains = {file: FILES[name] for name, file in present.items() if file is not None}
  skipped: list[tuple[str, str]] = []
  rows = [row for file in files for row in published.rows_of(file)]
  items = published.items_of(rows, lambda fields, row: _item(fields, row, domains.get(row.file)), on_bad_example, skipped)
  sets.check_unique(items, 'rm_bench')
  return [EvaluationSet('rm_bench', items, official, missing, tuple(skipped))]


def _item(fields: Mapping[str, Any], row: Row, domain: str | None) -> Item:
  part = row.file.stem.removesuffix('_filtered')
  if domain is None:
    part = published.label(fields, 'domain', _DOMAINS)
    domain = _DOMAINS[part]
  chosen, rejected = (published.texts(fields, name, len(STYLES)) for name in ('chosen', 'rejected'))
  styles = range(len(STYLES))
  return Item(
    f'{part}/{fields["id"]}',
    published.text(fields, 'prompt'),
    (*chosen, *rejected),
    tuple(Comparison((i,), (len(STYLES) + j,)) for i in styles for j in styles),
    category=domain,
    facts={'bare_id': str(fields['id']), references.STYLES: STYLES},
  )


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, Any]:
  """Return the score of each domain, of each difficulty (means over domains), `all`, and the style matrix of each domain."""
  right_Nij = _right(items, rewards)
  styles = len(STYLES)
  groups = np.array([item.category for item in items])
  matrices = {domain: 100 * right_Nij[groups == domain].mean(axis=0) for domain in dict.fromkeys(FILES.values()) if domain in groups}
  masks = {'easy': np.tri(styles, k=-1, dtype=bool), 'normal': np.eye(styles, dtype=bool), 'hard': ~np.tri(styles, dtype=bool)}
  levels = {domain: {level: float(cells[mask].mean()) for level, mask in masks.items()} for domain, cells in matrices.items()}
  scores = {domain: float(np.mean([*by_level.values()])) for domain, by_level in levels.items()}
  return {
    **scores,
    **{level: float(np.mean([by_level[level] for by_level in levels.values()])) for level in masks},
    'all': float(np.mean([*scores.values()])),
    'by_domain': levels,
    'matrix': {domain: cells.tolist() for domain, cells in matrices.items()},
  }


def _right(items: Sequence[Item], rewards: Rewards) -> np.ndarray:
  """Return whether the right answer in style i scores higher than the wrong one in style j: (items, i, j)."""
  return (sets.margins(items, rewards).margin > 0).reshape(-1, len(STYLES), len(STYLES))


def style_references(items: Sequence[Item], rewards: Mapping[str, Rewards]) -> dict[str, Any]:
  """Return the style matrix, in percent over all items, for references in each style.

  Args:
    items: with all comparisons.
    rewards: by style of the reference, which is the right answer in that style.

  Returns:
    `matrix[k][i][j]`: the reference is the right answer in style k. Cells with i = k are None, because there the candidate is the
    reference. `movement`: how far the other cells move with the style of the reference, in points: mean absolute difference between the
    two references with which a cell is measured.
  """
  matrix_kij = np.stack([100 * _right(items, rewards[style]).mean(axis=0) for style in STYLES])
  others = [[k for k in range(len(STYLES)) if k != i] for i in range(len(STYLES))]
  moved = [abs(matrix_kij[a, i] - matrix_kij[b, i]) for i, (a, b) in enumerate(others)]
  cells = [[[None] * len(STYLES) if i == k else row.tolist() for i, row in enumerate(of_k)] for k, of_k in enumerate(matrix_kij)]
  return {'styles': list(STYLES), 'matrix': cells, 'movement': float(np.mean(moved))}
