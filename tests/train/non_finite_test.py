"""A reward or a gradient that is not finite stops a run, and is traced to its examples."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_runs import BATCH, EXAMPLES, STEPS, checkpoints, parameters

from polar_jax import api_training
from polar_jax.config import CheckpointingConfig
from polar_jax.data import pipeline
from polar_jax.stages.pretrain import pretrain
from polar_jax.train.metrics import read_metrics
from polar_jax.train.objectives import RANKING
from polar_jax.train.session import NonFiniteError


def poison(example, in_gradient=False):
  """Return the ranking objective with a reward of nan for one example, or with a finite loss and an infinite gradient."""

  def loss_sums(model, batch):
    loss, sums, outputs = RANKING.loss_sums(model, batch)
    hit = batch.index_BP == example
    if in_gradient:  # the square root of zero is zero, but its slope is infinite
      return loss + jnp.any(hit) * jnp.sqrt(jnp.sum(jnp.square(model.v_head[...] * 0))), sums, outputs
    bad = jnp.where(hit[..., None], jnp.nan, outputs['rewards_BPC'])
    return loss + jnp.sum(jnp.where(hit, bad[..., 0], 0.0)), sums, outputs | {'rewards_BPC': bad}

  return dataclasses.replace(RANKING, loss_sums=loss_sums)


def row_mates(example, context, multiple):
  """The examples that share a row of the batch with `example`, and itself."""
  tokens, order = pipeline.TripletSegments(context.triplets('train'), context.template()), {'steps': STEPS, 'seed': context.config.seed}
  plan = pipeline.BatchPlan(BATCH, multiple)
  batches = pipeline.pair_batches(tokens, plan, pipeline.plan_packing(tokens, plan, None, **order), **order)
  index_BP = batches[step_of(example, context) - 1].index_BP
  return sorted(i for i in index_BP[(index_BP == example).any(axis=1)][0].tolist() if i >= 0)


def step_of(example, context):
  """The first step that reads `example`."""
  order = pipeline.global_order(EXAMPLES, context.config.seed)
  return next(position for position in range(EXAMPLES) if order(position)[0] == example) // BATCH + 1


def examples_of(step, context):
  return [example for example in range(EXAMPLES) if step_of(example, context) == step]


@pytest.mark.long
@pytest.mark.parametrize(('accumulation', 'devices'), [(2, 8), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (1, 4))])
def test_a_non_finite_reward_stops_the_run_with_step_and_examples(tmp_path, make_context, monkeypatch, accumulation, devices):
  context = make_context(
    tmp_path,
    devices=devices,
    gradient_accumulation_steps=accumulation,
    evaluate_every=None,
    checkpointing=CheckpointingConfig(every_steps=1),
  )
  example, plan_packing = examples_of(4, context)[0], pipeline.plan_packing

  def roomy(*args, **kwargs):  # every row has a padding pair, which must not be named
    pack = plan_packing(*args, **kwargs)
    return pack._replace(max_pairs=pack.max_pairs + 1)

  monkeypatch.setattr(pipeline, 'plan_packing', roomy)
  monkeypatch.setattr(api_training, 'ranking', lambda options: poison(example))
  named = row_mates(example, context, devices * accumulation)
  with pytest.raises(NonFiniteError, match=rf'pretrain: step 4 has loss nan.*examples {re.escape(str(named))}$'):
    pretrain(context)
  assert example in named and len(named) < BATCH
  assert [r['step'] for r in read_metrics(tmp_path / 'pretrain')] == [1, 2, 3]
  assert checkpoints(tmp_path / 'pretrain') == [2, 3]  # the newest two
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(parameters(tmp_path / 'pretrain', context)))


@pytest.mark.long
def test_a_non_finite_gradient_names_all_examples_of_the_batch(tmp_path, make_context, monkeypatch):
  context = make_context(tmp_path, evaluate_every=None)
  examples = examples_of(1, context)
  monkeypatch.setattr(api_training, 'ranking', lambda options: poison(examples[0], in_gradient=True))
  with pytest.raises(NonFiniteError) as error:
    pretrain(context)
  assert 'step 1 has loss 0.69' in str(error.value) and 'gradient norm nan' in str(error.value)
  assert str(error.value).endswith(f'non-finite outputs: none; the batch has examples {examples}')
  assert checkpoints(tmp_path / 'pretrain') == []
