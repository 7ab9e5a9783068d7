"""The POLAR paper's protocol on RMB: the top-ranked answer is the reference, the second should beat the third.

RMB's pairs of one prompt form a graph whose edges lead from the better answer to the worse one. Contradictory edges, which are part of a
cycle, are dropped. A path of two edges that starts at an answer which nothing beats is a ranking of three. Each second edge counts once,
however many answers are above it. The paper does not publish its own selection.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence

from polar_jax.data.template import join_messages
from polar_jax.evaluate import measures, sets
from polar_jax.evaluate.benchmarks import polar_paper, rmb
from polar_jax.evaluate.sets import EvaluationSet, Item, Rewards


def read(folders: Sequence[pathlib.Path], on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Build the comparisons from RMB's pairs; see `polar_jax.evaluate.benchmarks.read`."""
  (source,) = rmb.read(folders, on_bad_example)
  by_prompt: dict[str, list[Item]] = {}
  for item in source.items:
    if item.facts['kind'] == 'pairwise':
      by_prompt.setdefault(json.dumps(item.prompt), []).append(item)
  items = [made for pairs in by_prompt.values() for made in chains(pairs)]
  return [EvaluationSet('polar_rmb', items, official, source.missing, source.skipped, polar_paper.table)]


def chains(pairs: Sequence[Item]) -> list[Item]:
  """Return the comparisons of second and third with a top-ranked reference that the pairs of one prompt imply."""
  models: dict[str, str] = {}  # by answer
  edges: dict[tuple[str, str], Item] = {}
  for pair in pairs:
    chosen, rejected = (join_messages(text, 'candidate') for text in pair.candidates)
    models |= dict(zip((chosen, rejected), pair.facts['models'], strict=True))
    edges[chosen, rejected] = pair
  below = {answer: _below(answer, edges) for answer in models}
  kept = {edge: pair for edge, pair in edges.items() if edge[0] not in below[edge[1]]}
  beaten = {worse for _, worse in kept}
  out = []
  for (second, third), pair in kept.items():
    tops = [top for top, answer in kept if answer == second and top not in beaten]
    if tops:  # one that also beats the third itself, if there is one
      top = next((top for top in tops if (top, third) in kept), tops[0])
      out.append(_item(pair, top, models))
  return out


def _below(answer: str, edges: Mapping[tuple[str, str], Item]) -> set[str]:
  """Return the answers that paths from `answer` reach."""
  reached: set[str] = set()
  waiting = [answer]
  while waiting:
    current = waiting.pop()
    new = {worse for better, worse in edges if better == current} - reached
    reached |= new
    waiting += new
  return reached


def _item(pair: Item, top: str, models: Mapping[str, str]) -> Item:
  facts = {**pair.facts, 'reference_model': models[top]}
  return Item(pair.id, pair.prompt, pair.candidates, pair.comparisons, pair.category, reference=top, facts=facts)


def official(items: Sequence[Item], rewards: Rewards) -> dict[str, float]:
  """Return the accuracy by group, `all`, the mean over comparisons as in Table 1 of the paper, and `group_mean`."""
  correct = measures.correctness(sets.margins(items, rewards).margin)
  groups: dict[str, list[float]] = {}
  for item, value in zip(items, correct.tolist(), strict=True):
    groups.setdefault(item.category, []).append(value)
  shares = {group: 100 * sum(values) / len(values) for group, values in sorted(groups.items())}
  return shares | {'all': 100 * float(correct.mean()), 'group_mean': sum(shares.values()) / len(shares)}
