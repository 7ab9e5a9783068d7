"""All arms of a workdir on the same evaluation sets: accuracies that are means over seeds, and paired differences from the main arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.evaluate import measures, sets, statistics
from polar_jax.evaluate.clusters import Clusters
from polar_jax.evaluate.sets import EvaluationSet, Rewards
from polar_jax.stages import evaluate_systems as systems
from polar_jax.stages.context import Context
from polar_jax.types import Text


class Task(NamedTuple):
  """What all arms score: a set with its main references.

  Attributes:
    one: the set.
    view: name of the references.
    references: of each item.
    known: rewards of the first run of the first arm.
  """

  one: EvaluationSet
  view: str
  references: Sequence[Text]
  known: Rewards


class ArmRewards(NamedTuple):
  """The rewards of an arm on all sets.

  Attributes:
    name: of the arm.
    runs: of its seeds.
    by_set: name of the set -> rewards of each seed.
  """

  name: str
  runs: Sequence[str]
  by_set: Mapping[str, Sequence[Rewards]]


def score(context: Context, arms: Mapping[str, Sequence[str]], tasks: Sequence[Task]) -> list[ArmRewards]:
  """Score all sets with every seed of every arm.

  Args:
    context: config, workdir and devices.
    arms: arm -> runs of its seeds.
    tasks: one for each set.
  """
  out = []
  first = next(iter(arms.values()))[0]
  for arm, runs in arms.items():
    by_set: dict[str, list[Rewards]] = {task.one.name: [] for task in tasks}
    for run in runs:
      if run != first:
        context.log(f'evaluate: {arm}: {run}')
      model = None if run == first else systems.RewardSystem(context, 'checkpoint', context.home(run))
      for task in tasks:
        rewards = task.known if model is None else model.rewards(task.one.items, task.references, task.view != 'none')
        by_set[task.one.name].append(rewards)
    out.append(ArmRewards(arm, runs, by_set))
  return out


def measure(context: Context, one: EvaluationSet, arms: Sequence[ArmRewards]) -> dict[str, Any]:
  """Return what evaluation.json says of the arms on a set.

  Returns:
    Arm -> its accuracy with an interval over clusters, `by_seed` if there are several, `by_category`, and for all but the first arm
    `main_minus`: the paired difference of the first arm from it.
  """
  resamples = context.config.evaluate.bootstrap
  correct = {arm.name: [_correct(one, rewards) for rewards in arm.by_set[one.name]] for arm in arms}
  means = {name: np.mean(of_seeds, axis=0) for name, of_seeds in correct.items()}
  item = sets.margins(one.items, arms[0].by_set[one.name][0]).item
  clusters = sets.clusters(one.items, item)
  categories = np.array([one.items[i].category or 'none' for i in item])
  main, out = means[arms[0].name], {}
  for name, values in means.items():
    entry = _interval(values, clusters, resamples)
    if len(correct[name]) > 1:
      entry['by_seed'] = [float(of_seed.mean()) for of_seed in correct[name]]
    entry['by_category'] = {
      str(category): _interval(values[categories == category], clusters.select(categories == category), resamples)
      for category in sorted(set(categories.tolist()))
    }
    if name != arms[0].name:
      entry['main_minus'] = statistics.paired_difference(main, values, clusters, resamples).asdict()
    out[name] = entry
  return out


def _correct(one: EvaluationSet, rewards: Rewards) -> np.ndarray:
  return measures.correctness(sets.margins(one.items, rewards).margin)


def _interval(correct: np.ndarray, clusters: Clusters, resamples: int) -> dict[str, Any]:
  return statistics.accuracy_interval(correct, clusters, resamples).asdict()
