"""The evaluate stage of the miniature, with its two test sets and the Bayes-optimal discriminator, which knows every policy exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import baselines
from polar_jax.miniature import pool, world
from polar_jax.stages import evaluate as stage
from polar_jax.stages.arms import FINETUNE
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain import RUN as PRETRAIN
from polar_jax.types import Triplet

SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')


def evaluate(context: Context) -> dict[str, Any]:
  """Evaluate the runs of the workdir. Returns the sections `evaluate` and `finetune` of the report."""
  results: dict[str, Any] = {}
  if stage.trained(context, PRETRAIN):
    splits = {split: context.triplets(split) for split in SPLITS}
    optimal = BayesOptimal(context)
    results['evaluate'] = stage.evaluate_triplets(context, splits, optimal) | {'bayes_loss': optimal.loss}
    context.log(f'evaluate: loss of the Bayes-optimal discriminator: {", ".join(f"{k} {v:.4f}" for k, v in optimal.loss.items())} nats')
  if stage.trained(context, FINETUNE):
    results['finetune'] = stage.evaluate_preferences(context, context.preferences('unseen_policies'))
  if not results:
    context.log('evaluate: no pretrain or finetune run in this workdir yet')
  return results


class BayesOptimal:
  """The Bayes-optimal discriminator of the workdir's pool.

  Attributes:
    loss: its mean loss by split, in nats, of the splits that it was called for.
  """

  def __init__(self, context: Context):
    self.loss: dict[str, float] = {}
    self._workers, self._pool = context.config.synthesize.workers, world.load_pool(context.workdir)

  def __call__(self, examples: Sequence[Triplet], split: str) -> dict[str, np.ndarray]:
    """Return {'bayes': correct}, given the policies that the split was drawn from; more policies would only add wrong hypotheses."""
    drawn = [p for p in self._pool if p.params.held_out == (split == 'unseen_policies')]
    prefixes = [example.metadata['prompt_ids'] for example in examples]
    logp = [
      pool.pool_logprobs(drawn, prefixes, [example.metadata[f'{name}_ids'] for example in examples], self._workers)
      for name in ('reference', 'chosen', 'rejected')
    ]
    self.loss[split] = float(baselines.bayes_loss(*logp).mean())
    return {'bayes': baselines.bayes_correct(*logp)}
