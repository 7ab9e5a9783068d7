"""Evaluation sets in one form: prompts with any number of candidates, and which candidates should score higher than which.

A pair, a ranked list, a best-of-n row and a style matrix differ only in their comparisons. A comparison holds if the lowest reward of
`better` is above the highest of `worse`, so that one comparison also says that one answer beats all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.data.template import join_messages
from polar_jax.evaluate.clusters import Clusters, cluster
from polar_jax.types import Text, Triplet, UserError


class Comparison(NamedTuple):
  """Indices of candidates: each of `better` should score higher than each of `worse`."""

  better: tuple[int, ...]
  worse: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Item:
  """A prompt with candidates.

  Attributes:
    id: unique within its set.
    prompt: what the candidates respond to.
    candidates: at least two.
    comparisons: what a reward model should find; at least one.
    category: of the benchmark or the user; '' if there is none.
    reference: a response of the policy to be recognized; None if the set has none.
    correct: whether each candidate is right, for best-of-n; None if that is not known.
    answers: the final answer of each candidate, for a majority vote, None for one without; None as a whole if they are not known.
    facts: what the official score of a benchmark reads besides the rewards.
  """

  id: str
  prompt: Text
  candidates: tuple[Text, ...]
  comparisons: tuple[Comparison, ...]
  category: str = ''
  reference: Text | None = None
  correct: tuple[bool, ...] | None = None
  answers: tuple[str | None, ...] | None = None
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Rewards = Sequence[np.ndarray]  # float64 (candidates,) of each item
Official = Callable[[Sequence[Item], Rewards], dict[str, Any]]
Paper = Callable[[Sequence[Item], Rewards, int], list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
  """Items that are scored and reported together.

  Attributes:
    name: key of `sets` in evaluation.json.
    items: in the order of their files.
    official: the benchmark's own rule, items and rewards -> numbers in percent; None for a user's own file.
    missing: files of the benchmark that are not there.
    skipped: (where, reason) of rows that cannot be used.
    paper: accuracies next to those of a paper: items, rewards and bootstrap resamples -> rows of a table; None if there is none.
    revisions: repository of the hub -> commit of its files, if the files are from there.
  """

  name: str
  items: Sequence[Item]
  official: Official | None = None
  missing: tuple[str, ...] = ()
  skipped: tuple[tuple[str, str], ...] = ()
  paper: Paper | None = None
  revisions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def pair(better: int = 0) -> tuple[Comparison, ...]:
  """Return the comparison of two candidates."""
  return (Comparison((better,), (1 - better,)),)


def all_pairs(correct: Sequence[bool]) -> tuple[Comparison, ...]:
  """Return the comparisons of every right candidate with every wrong one."""
  right, wrong = ([i for i, ok in enumerate(correct) if bool(ok) is side] for side in (True, False))
  return tuple(Comparison((i,), (j,)) for i in right for j in wrong)


def ranked_pairs(ranks: Sequence[float]) -> tuple[Comparison, ...]:
  """Return the comparisons of candidates whose ranks differ; a lower rank is better."""
  indices = range(len(ranks))
  return tuple(Comparison((i,), (j,)) for i in indices for j in indices if ranks[i] < ranks[j])


class Margins(NamedTuple):
  """The comparisons of a set, one row each.

  Attributes:
    margin: lowest reward of the better candidates minus the highest of the worse ones.
    item: index of the item.
  """

  margin: np.ndarray
  item: np.ndarray


def margins(items: Sequence[Item], rewards: Rewards) -> Margins:
  """Return the margins of all comparisons.

  Args:
    items: of a set.
    rewards: of each item's candidates.

  Raises:
    UserError: the rewards of an item are not as many as its candidates, or one is not finite.
  """
  values, owners = list[float](), list[int]()
  for index, (item, given) in enumerate(zip(items, rewards, strict=True)):
    scores = checked_rewards(item, given)
    for better, worse in item.comparisons:
      values.append(scores[list(better)].min() - scores[list(worse)].max())
      owners.append(index)
  return Margins(np.array(values, np.float64), np.array(owners, np.int64))


def length_differences(items: Sequence[Item]) -> np.ndarray:
  """Return, for each comparison, the mean length of the better candidates minus that of the worse ones, in characters."""
  out = list[float]()
  for item in items:
    lengths = np.array([len(join_messages(text, 'candidate')) for text in item.candidates], np.float64)
    out += [lengths[list(better)].mean() - lengths[list(worse)].mean() for better, worse in item.comparisons]
  return np.array(out, np.float64)


def checked_rewards(item: Item, rewards: Any) -> np.ndarray:
  """Return the rewards of an item as float64.

  Raises:
    UserError: they are not as many as its candidates, or one is not finite.
  """
  values = np.asarray(rewards, np.float64)
  if values.shape != (len(item.candidates),):
    raise UserError(f'item {item.id!r:.80} has {len(item.candidates)} candidates, but {values.size} rewards')
  if not np.isfinite(values).all():
    raise UserError(f'item {item.id!r:.80} has the reward {values[~np.isfinite(values)][0]}; rewards must be finite numbers')
  return values


def clusters(items: Sequence[Item], rows: np.ndarray) -> Clusters:
  """Return the clusters of comparisons, given the index of each one's item: by policy of the reference if known, else by prompt."""
  triplets = [Triplet(item.prompt, '', '', '', metadata=item.facts) for item in items]
  found = cluster(triplets)
  if found.by == 'example' and len(rows) > len(items):  # several comparisons of one prompt
    found = Clusters(found.labels, 'prompt')
  return found.select(rows)


def check_unique(items: Sequence[Item], where: str) -> None:
  """Reject two items with the same id.

  Raises:
    UserError: naming the first.
  """
  seen: set[str] = set()
  for item in items:
    if item.id in seen:
      raise UserError(f'{where}: the id {item.id!r:.80} occurs twice; rewards could not be told apart')
    seen.add(item.id)
