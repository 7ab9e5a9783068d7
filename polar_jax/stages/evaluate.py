"""The evaluate stage: accuracy of the trained reward models on held-out examples, next to heuristic baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax import api
from polar_jax.config import ConfigError
from polar_jax.data import survey
from polar_jax.data.examples import NoSplitError
from polar_jax.data.pipeline import TripletSegments
from polar_jax.data.template import Template
from polar_jax.evaluate import baselines, statistics
from polar_jax.evaluate.clusters import Clusters, cluster
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import arms as arms_lib
from polar_jax.stages import evaluate_policies, evaluate_sets
from polar_jax.stages.arms import FINETUNE, MAIN_ARM, PRETRAIN, trained
from polar_jax.stages.context import Context
from polar_jax.types import Triplet

SPLITS = ('validation', 'test', 'unseen_prompts', 'unseen_policies')  # the last two: of a pool

# (examples, split) -> correctness of further baselines by name.
Baselines = Callable[[Sequence[Triplet], str], Mapping[str, np.ndarray]]


def evaluate(context: Context) -> dict[str, Any]:
  """Evaluate the runs of the workdir on the held-out splits of `data`.

  Given sets, evaluate one reward model on them instead, or all runs of the workdir (`evaluate_sets`); given benchmarks of policies, a
  language model (`evaluate_policies`).

  Returns:
    The sections `evaluate` and `finetune` of the report, or `evaluation`, or `policies`.

  Raises:
    ConfigError: a run was trained, but there are no held-out examples to evaluate it on.
  """
  if evaluate_policies.is_requested(context.config):
    return evaluate_policies.run(context)
  if evaluate_sets.is_requested(context.config):
    return evaluate_sets.run(context)
  results: dict[str, Any] = {}
  if trained(context, PRETRAIN):
    splits = held_out(context, context.triplets, 'data.triplets')
    results['evaluate'] = evaluate_triplets(context, splits)
  if trained(context, FINETUNE):
    splits = held_out(context, context.preferences, 'data.preferences')
    results['finetune'] = evaluate_preferences(context, splits.get('test', splits[next(iter(splits))]))
  if not results:
    context.log(
      'evaluate: no pretrain or finetune run in this workdir yet; for other data set input or evaluate.benchmarks; for policies set '
      'evaluate.tasks'
    )
  return results


def held_out(context: Context, read: Callable[[str], Sequence[Triplet]], setting: str) -> dict[str, Sequence[Triplet]]:
  """Return the examples of every held-out split that exists.

  Args:
    context: config and workdir.
    read: opens a split.
    setting: name of the option for the data, for messages.

  Raises:
    ConfigError: no held-out split exists.
  """
  splits: dict[str, Sequence[Triplet]] = {}
  for split in SPLITS:
    try:
      examples = read(split)
    except NoSplitError:
      continue
    if all(examples is not other for other in splits.values()):  # a single file is every split
      splits[split] = examples
  if not splits:
    raise ConfigError(f'evaluate: {setting} has none of the splits {", ".join(SPLITS)}; name held-out examples with data.validation')
  return splits


def evaluate_triplets(context: Context, splits: Mapping[str, Sequence[Triplet]], further: Baselines | None = None) -> dict[str, Any]:
  """Evaluate the pre-trained model on each split, with baselines and the paired margin over the best of them.

  Args:
    context: config, workdir and devices.
    splits: examples by the name of their split.
    further: baselines beyond the heuristic ones.
  """
  scorer, resamples = _scorer(context, PRETRAIN), context.config.evaluate.bootstrap
  by_split, margins, surveys = {}, {}, {}
  by_baseline: dict[str, dict[str, Any]] = {}
  for split, sequence in splits.items():
    examples = list(sequence)
    clusters = cluster(examples)
    heuristics = baselines.heuristic_correct(examples)
    surveys[split] = _survey(context, split, sequence, scorer.template)
    correct = _correct(scorer, examples)
    by_split[split] = _interval(correct, clusters, resamples)
    margins[split] = baselines.margin_over_best_baseline(correct, heuristics, clusters, resamples)
    for name, values in (heuristics | dict(further(examples, split) if further else {})).items():
      by_baseline.setdefault(name, {})[split] = _interval(values, clusters, resamples)
    best = str(margins[split]['baseline'])
    context.log(f'{split}: {_shown(by_split[split])}; best baseline {best} {_shown(by_baseline[best][split])}')
  return {'by_split': by_split, 'baselines': by_baseline, 'margin_over_best_baseline': margins, 'examples': surveys}


def evaluate_preferences(context: Context, sequence: Sequence[Triplet]) -> dict[str, Any]:
  """Evaluate every arm of fine-tuning on the same held-out preferences. Of several seeds, the mean is taken for each example."""
  examples, resamples = list(sequence), context.config.evaluate.bootstrap
  clusters = cluster(examples)
  correct, surveys, by_seed = {}, {}, {}
  for arm, runs in arms_lib.trained_arms(context).items():
    of_seeds = []
    for run in runs:
      scorer = _scorer(context, run)
      of_seeds.append(_correct(scorer, examples))
    surveys[arm] = _survey(context, arm, sequence, scorer.template)
    correct[arm], by_seed[arm] = np.mean(of_seeds, axis=0), [float(values.mean()) for values in of_seeds]
  arms = {arm: _interval(values, clusters, resamples) | _seeds(by_seed[arm]) for arm, values in correct.items()}
  for arm, interval in arms.items():
    context.log(f'{arm}: {_shown(interval)}')
  main = correct[MAIN_ARM]
  margins = {
    arm: statistics.paired_difference(main, values, clusters, resamples).asdict() for arm, values in correct.items() if arm != MAIN_ARM
  }
  category = np.array([example.category or 'none' for example in examples])
  selected = {name: category == name for name in sorted(set(category))}
  by_category = {str(name): _interval(main[mask], clusters.select(mask), resamples) for name, mask in selected.items()}
  heuristics = baselines.heuristic_correct(examples)
  return {
    'arms': arms,
    'margin_over_arms': margins,
    'by_category': by_category,
    'examples': surveys,
    'baselines': {name: _interval(values, clusters, resamples) for name, values in heuristics.items()},
    'margin_over_best_baseline': baselines.margin_over_best_baseline(main, heuristics, clusters, resamples),
  }


def _scorer(context: Context, run: str) -> Scorer:
  """Return a scorer with the tokenizer and template of the run, which hides the reference from the arm without one."""
  config = context.config
  model = api.load(context.home(run), mesh=context.mesh, compute=config.model, template=config.template)
  return Scorer(model.params, model.config, model.template, context.mesh, rows=config.evaluate.rows_per_batch)


def _survey(context: Context, name: str, examples: Sequence[Triplet], template: Template) -> dict[str, Any]:
  """Count the pairs that are the same to the model, and what is truncated; log what was found."""
  segments = TripletSegments(examples, template)
  found = survey.survey(segments, range(len(examples)), context.config.data.read_threads)
  for line in found.lines():
    context.log(f'{name}: {line}')
  return found.asdict()


def _correct(scorer: Scorer, examples: Sequence[Triplet]) -> np.ndarray:
  rewards_NC = scorer.score_pairs(examples).astype(np.float64)
  return statistics.pair_correct(rewards_NC[:, 0], rewards_NC[:, 1])


def _seeds(by_seed: Sequence[float]) -> dict[str, Any]:
  return {'by_seed': list(by_seed)} if len(by_seed) > 1 else {}


def _interval(correct: np.ndarray, clusters: Clusters, resamples: int) -> dict[str, Any]:
  return statistics.accuracy_interval(correct, clusters, resamples).asdict()


def _shown(interval: dict[str, Any]) -> str:
  return f'{interval["accuracy"]:.3f} [{interval["low"]:.3f}, {interval["high"]:.3f}]'
