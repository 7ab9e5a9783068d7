"""The evaluate stage: what the trained reward models get right, beside rules that learn nothing and the Bayes ceiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.evaluate import baselines, statistics
from polar_jax.miniature import pool
from polar_jax.miniature import world as engine
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import training as stages
from polar_jax.types import Triplet

SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')  # of the synthesize stage
GIVEN = ('validation',)  # what `data.validation` names is one split
# Arm of Table 7 -> (folder of its run, does it read the reference).
ARMS = {
  'pretrained_finetuned': (stages.FINETUNE, True),
  'finetuned_only': (stages.FINETUNE_ONLY, True),
  'finetuned_without_reference': (stages.FINETUNE_NO_REFERENCE, False),
  'pretrained_only': (stages.PRETRAIN, True),
}


def evaluate(context: stages.Context) -> dict[str, Any]:
  """Evaluates what the workdir holds: the pre-trained model on triplets, and every fine-tuned arm on preferences."""
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


def _correct(scorer: Scorer, rows: Sequence[Triplet]) -> np.ndarray:
  rewards_NC = scorer.score_pairs(rows).astype(np.float64)
  return statistics.pair_correct(rewards_NC[:, 0], rewards_NC[:, 1])


def _evaluate_triplets(context: stages.Context) -> dict[str, Any]:
  scorer, resamples = _scorer(context, stages.PRETRAIN, True), context.config.evaluate.bootstrap
  ceiling = _Ceiling(context)
  by_split, margins = {}, {}
  by_baseline: dict[str, dict[str, Any]] = {}
  for split in GIVEN if context.config.data.validation else SPLITS:
    rows = list(context.triplets(split))
    rules = baselines.rule_correct(rows)
    correct = _correct(scorer, rows)
    by_split[split] = statistics.accuracy_interval(correct, resamples=resamples).asdict()
    margins[split] = baselines.margin_over_best_rule(correct, rules, resamples=resamples)
    for name, values in (rules | ceiling(rows, split)).items():
      by_baseline.setdefault(name, {})[split] = statistics.accuracy_interval(values, resamples=resamples).asdict()
    best = margins[split]
    context.log(f'{split}: {_shown(by_split[split])}; best rule {best["baseline"]} {_shown(by_baseline[str(best["baseline"])][split])}')
  return {'by_split': by_split, 'baselines': by_baseline, 'margin_over_best_baseline': margins}


def _evaluate_preferences(context: stages.Context) -> dict[str, Any]:
  """Every arm on the same ranked rows of unseen prompts and unseen policies."""
  rows, resamples = list(context.preferences('unseen_policies')), context.config.evaluate.bootstrap
  correct = {
    arm: _correct(_scorer(context, folder, use_reference), rows)
    for arm, (folder, use_reference) in ARMS.items()
    if _trained(context, folder)
  }
  arms = {arm: statistics.accuracy_interval(values, resamples=resamples).asdict() for arm, values in correct.items()}
  for arm, interval in arms.items():
    context.log(f'{arm}: {_shown(interval)}')
  main = correct['pretrained_finetuned']
  category = np.array([row.category or 'none' for row in rows])
  by_category = {c: statistics.accuracy_interval(main[category == c], resamples=resamples).asdict() for c in sorted(set(category))}
  rules = baselines.rule_correct(rows)
  shown = {name: statistics.accuracy_interval(values, resamples=resamples).asdict() for name, values in rules.items()}
  margin = baselines.margin_over_best_rule(main, rules, resamples=resamples)
  return {'arms': arms, 'by_category': by_category, 'baselines': shown, 'margin_over_best_baseline': margin}


class _Ceiling:
  """The Bayes discriminator of the workdir's own pool; nothing for data that came from elsewhere."""

  def __init__(self, context: stages.Context):
    self._workers = context.config.synthesize.workers
    given = context.config.data.triplets or context.config.data.validation
    self._pool = [] if given else engine.load_pool(context.workdir)

  def __call__(self, rows: Sequence[Triplet], split: str) -> dict[str, np.ndarray]:
    """{'bayes': correct}, under the policies that the split is drawn from: knowing more of them could only confuse it."""
    drawn = [p for p in self._pool if p.params.held_out == (split == 'unseen_policies')]
    if not drawn:
      return {}
    prefixes = [row.metadata['prompt_ids'] for row in rows]
    logp = [
      pool.pool_logprobs(drawn, prefixes, [row.metadata[f'{name}_ids'] for row in rows], self._workers)
      for name in ('reference', 'chosen', 'rejected')
    ]
    return {'bayes': baselines.bayes_correct(*logp)}


def _shown(interval: dict[str, Any]) -> str:
  return f'{interval["accuracy"]:.3f} [{interval["low"]:.3f}, {interval["high"]:.3f}]'
