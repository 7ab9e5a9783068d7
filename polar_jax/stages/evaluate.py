"""The evaluate stage: accuracy of the trained reward models, next to heuristic baselines and Bayes-optimal accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.evaluate import baselines, statistics
from polar_jax.evaluate.clusters import Clusters, cluster
from polar_jax.miniature import pool
from polar_jax.miniature import world as engine
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import training as stages
from polar_jax.types import Triplet

SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')  # of the synthesize stage
GIVEN = ('validation',)  # `data.validation` names a single split
MAIN_ARM = 'pretrained_finetuned'
# Arm of Table 7 -> (folder of its run, whether it reads the reference).
ARMS = {
  MAIN_ARM: (stages.FINETUNE, True),
  'finetuned_only': (stages.FINETUNE_ONLY, True),
  'finetuned_without_reference': (stages.FINETUNE_NO_REFERENCE, False),
  'pretrained_only': (stages.PRETRAIN, True),
}


def evaluate(context: stages.Context) -> dict[str, Any]:
  """Evaluate the runs in the workdir: the pre-trained model on triplets, and every fine-tuned arm on preferences."""
  results: dict[str, Any] = {}
  if _trained(context, stages.PRETRAIN):
    results['evaluate'] = _evaluate_triplets(context)
  if _trained(context, stages.FINETUNE):
    results['finetune'] = _evaluate_preferences(context)
  if not results:
    context.log('evaluate: no pretrain or finetune run in this workdir yet')
  return results


def _trained(context: stages.Context, folder: str) -> bool:
  return checkpoint.exists(context.home(folder))


def _scorer(context: stages.Context, folder: str, use_reference: bool) -> Scorer:
  config = context.config
  template, model = context.template(use_reference), context.model_config()
  return Scorer.from_run(context.home(folder), model, template, context.mesh, rows=config.evaluate.rows_per_batch)


def _correct(scorer: Scorer, examples: Sequence[Triplet]) -> np.ndarray:
  rewards_NC = scorer.score_pairs(examples).astype(np.float64)
  return statistics.pair_correct(rewards_NC[:, 0], rewards_NC[:, 1])


def _evaluate_triplets(context: stages.Context) -> dict[str, Any]:
  """Evaluate the pre-trained model on each split, with baselines and the paired margin over the best of them."""
  scorer, resamples = _scorer(context, stages.PRETRAIN, True), context.config.evaluate.bootstrap
  bayes = _BayesOptimal(context)
  by_split, margins = {}, {}
  by_baseline: dict[str, dict[str, Any]] = {}
  for split in GIVEN if context.config.data.validation else SPLITS:
    examples = list(context.triplets(split))
    clusters = cluster(examples)
    heuristics = baselines.heuristic_correct(examples)
    correct = _correct(scorer, examples)
    by_split[split] = _interval(correct, clusters, resamples)
    margins[split] = baselines.margin_over_best_baseline(correct, heuristics, clusters, resamples)
    for name, values in (heuristics | bayes(examples, split)).items():
      by_baseline.setdefault(name, {})[split] = _interval(values, clusters, resamples)
    best = str(margins[split]['baseline'])
    context.log(f'{split}: {_shown(by_split[split])}; best baseline {best} {_shown(by_baseline[best][split])}')
  return {'by_split': by_split, 'baselines': by_baseline, 'margin_over_best_baseline': margins}


def _evaluate_preferences(context: stages.Context) -> dict[str, Any]:
  """Evaluate every arm on the same preferences, of unseen prompts and unseen policies."""
  examples, resamples = list(context.preferences('unseen_policies')), context.config.evaluate.bootstrap
  clusters = cluster(examples)
  correct = {
    arm: _correct(_scorer(context, folder, use_reference), examples)
    for arm, (folder, use_reference) in ARMS.items()
    if _trained(context, folder)
  }
  arms = {arm: _interval(values, clusters, resamples) for arm, values in correct.items()}
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
    'baselines': {name: _interval(values, clusters, resamples) for name, values in heuristics.items()},
    'margin_over_best_baseline': baselines.margin_over_best_baseline(main, heuristics, clusters, resamples),
  }


class _BayesOptimal:
  """The Bayes-optimal discriminator of the workdir's own pool; no result for data that came from elsewhere."""

  def __init__(self, context: stages.Context):
    self._workers = context.config.synthesize.workers
    given = context.config.data.triplets or context.config.data.validation
    self._pool = [] if given else engine.load_pool(context.workdir)

  def __call__(self, examples: Sequence[Triplet], split: str) -> dict[str, np.ndarray]:
    """Return {'bayes': correct} under the policies that the split is drawn from; further policies would only add wrong hypotheses."""
    drawn = [p for p in self._pool if p.params.held_out == (split == 'unseen_policies')]
    if not drawn:
      return {}
    prefixes = [example.metadata['prompt_ids'] for example in examples]
    logp = [
      pool.pool_logprobs(drawn, prefixes, [example.metadata[f'{name}_ids'] for example in examples], self._workers)
      for name in ('reference', 'chosen', 'rejected')
    ]
    return {'bayes': baselines.bayes_correct(*logp)}


def _interval(correct: np.ndarray, clusters: Clusters, resamples: int) -> dict[str, Any]:
  return statistics.accuracy_interval(correct, clusters, resamples).asdict()


def _shown(interval: dict[str, Any]) -> str:
  return f'{interval["accuracy"]:.3f} [{interval["low"]:.3f}, {interval["high"]:.3f}]'
