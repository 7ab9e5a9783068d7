"""Table 1 of the POLAR paper: preference accuracy in twelve categories, to read next to that on `polar_rmb`.

The paper does not publish which prompts of RMB are in which category. Categories are taken for the groups of RMB with the same name, or, as
our inference, for those whose name means the same; the others have no groups. The paper's categories also hold prompts of its authors' own
set, so that no row compares the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import measures, sets, statistics
from polar_jax.evaluate.sets import Item, Rewards

# The classic reward models are fine-tuned from the same language models, without pre-training by POLAR and without references.
SYSTEMS = (
  'POLAR-1.8B',
  'POLAR-7B',
  'POLAR-1.8B without pre-training',
  'POLAR-7B without pre-training',
  'classic reward model 1.8B',
  'classic reward model 7B',
  'InternLM2-Reward-20B',
  'Skywork-27B',
)
AVERAGE = 'Average'
# Category -> accuracies of the systems in %. The average weights categories by their prompts.
PUBLISHED = {
  'Harmlessness': (74.2, 77.7, 73.9, 78.4, 63.8, 74.0, 66.8, 75.9),
  'NLP tasks': (68.5, 71.3, 69.9, 71.3, 65.4, 70.9, 70.6, 71.3),
  'Multilingual': (80.8, 80.0, 84.6, 84.0, 56.0, 72.0, 69.2, 76.9),
  'Chat': (75.1, 79.1, 70.6, 71.8, 65.5, 63.8, 69.5, 72.3),
  'Brainstorming': (74.8, 72.3, 72.3, 79.9, 67.9, 76.1, 74.8, 73.6),
  'Role playing': (70.6, 67.7, 60.3, 70.6, 70.6, 63.2, 75.0, 70.6),
  'STEM': (79.8, 81.0, 75.0, 77.4, 59.5, 54.8, 52.4, 54.8),
  'Instruction following': (73.1, 65.4, 76.9, 61.5, 50.0, 61.5, 65.4, 69.2),
  'Closed & open QA': (80.3, 80.3, 73.2, 76.1, 54.9, 64.8, 56.3, 62.0),
  'Creative writing': (85.5, 85.5, 81.6, 86.8, 57.9, 65.8, 51.3, 56.6),
  'Coding': (65.8, 68.4, 57.9, 64.5, 54.0, 59.2, 63.2, 60.5),
  'Reasoning': (69.2, 69.2, 69.1, 76.9, 46.2, 46.2, 53.9, 53.9),
  AVERAGE: (74.0, 76.3, 72.6, 76.5, 63.3, 70.8, 66.7, 72.4),
}
_SAME = {name: (name,) for name in ('Harmlessness', 'Chat', 'Brainstorming', 'Reasoning')} | {'Role playing': ('Role Playing',)}
_INFERRED = {
  'NLP tasks': ('Classification', 'Rewrite', 'Summarization'),
  'Multilingual': ('Translation',),
  'Closed & open QA': ('Closed QA', 'Open QA'),
  'Coding': ('Code',),
}


def table(items: Sequence[Item], rewards: Rewards, resamples: int = 2_000) -> list[dict[str, Any]]:
  """Return the accuracy in each category, next to those of the paper.

  Args:
    items: of `polar_rmb`.
    rewards: of each item's candidates.
    resamples: of the bootstrap.

  Returns:
    For each category, in the order of the paper, and for the average: `category`; `paper`, system -> accuracy; `rmb_groups`, and
    `mapping`, whether their names are the `same`, `inferred`, or there is none (null); `n`, and `accuracy`, `low`, `high`, which are null
    without comparisons. Accuracies are fractions; a tie counts half.
  """
  found = sets.margins(items, rewards)
  correct, clusters = measures.correctness(found.margin), sets.clusters(items, found.item)
  groups = np.array([items[i].category for i in found.item])
  out = []
  for category, published in PUBLISHED.items():
    own = _SAME.get(category) or _INFERRED.get(category) or (tuple(sorted(set(groups.tolist()))) if category == AVERAGE else ())
    chosen = np.isin(groups, own)
    row: dict[str, Any] = {'n': 0, 'accuracy': None, 'low': None, 'high': None}
    if chosen.any():
      row = statistics.accuracy_interval(correct[chosen], clusters.select(chosen), resamples).asdict()
    out.append(
      {
        'category': category,
        'paper': {system: value / 100 for system, value in zip(SYSTEMS, published, strict=True)},
        'rmb_groups': list(own),
        'mapping': 'same' if category in _SAME or category == AVERAGE else 'inferred' if own else None,
        **{key: row[key] for key in ('n', 'accuracy', 'low', 'high')},
      }
    )
  return out
