"""Margins, weights, penalties and the official mean in the train step, and what a run says of data that lack a column."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from polar_jax import api_training, sharding
from polar_jax.config import LossConfig, MeshConfig, ModelConfig, TemplateConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.data.examples import as_triplets
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.heads import abstract_model
from polar_jax.model.reward_model import pair_rewards
from polar_jax.train import losses
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import ranking
from polar_jax.types import UserError

CONFIG = ModelConfig(
  vocab_size=264, num_layers=1, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.2, v_head_init='normal'
)
OPTIONS = LossConfig('focal', margin=True, weights=True, center_rewards_coefficient=0.1, penalty='log_barrier', mean='official')


def _examples(size=21):
  rng = np.random.default_rng(0)
  word = lambda: bytes(rng.integers(97, 123, rng.integers(2, 20)).tolist()).decode()
  fields = ('prompt', 'reference', 'chosen', 'rejected')
  return [{name: word() for name in fields} | {'margin': i % 3 / 2, 'weight': 0.25 + i % 4} for i in range(size)]


@pytest.mark.long
def test_options_of_a_sharded_step_are_those_of_the_formula():
  """On eight devices with two micro-batches: each example gets its own margin and weight, and loss and gradients are the official ones."""
  devices = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  segments = pipeline.open_segments(as_triplets(_examples()), Template(TemplateConfig(), ByteTokenizer()), OPTIONS.columns)
  plan = pipeline.BatchPlan(18, sharding.batch_shards(devices) * 2)
  pack = pipeline.plan_packing(segments, plan, 256, steps=1, seed=0)
  (batch,) = list(pipeline.pair_batches(segments, plan, pack, steps=1, seed=0))
  real = batch.index_BP >= 0
  assert real.sum() == 18 and len(set(real.sum(axis=1)[real.any(axis=1)].tolist())) > 1
  np.testing.assert_array_equal(batch.margin_BP[real], batch.index_BP[real] % 3 / 2)
  np.testing.assert_array_equal(batch.weight_BP[real], 0.25 + batch.index_BP[real] % 4)
  assert not batch.margin_BP[~real].any() and not batch.weight_BP[~real].any()

  weights = np.where(real, 0.25 + batch.index_BP % 4, 0.0)
  packs = weights.sum(axis=1)[real.any(axis=1)]
  count = len(packs) / np.mean(1 / packs)
  graphdef, _ = nnx.split(abstract_model(CONFIG, 'reward'))

  def official(params):
    rewards = pair_rewards(nnx.merge(graphdef, params), batch)
    chosen, rejected = rewards[..., 0], rewards[..., 1]
    of_pair = losses.focal(chosen - batch.index_BP % 3 / 2, rejected) + 0.1 * (chosen + rejected) ** 2
    of_pair += 0.01 * (losses.log_barrier(chosen, 5.0) + losses.log_barrier(rejected, 5.0))
    correct = np.where(real, 1.0, 0.0) * (chosen > rejected)
    return (of_pair * weights).sum() / count, (correct * weights).sum() / weights.sum()

  with jax.set_mesh(devices):
    functions = step_lib.build(ranking(OPTIONS), CONFIG, optax.trace(decay=0.0), devices, 2)
    state = functions.init(jax.random.key(0), None)
    params = jax.device_get(state.params)
    state, out = functions.train(state, sharding.put_local(batch, devices))
    evaluated = functions.evaluate(state.params, sharding.put_local(batch, devices))
  (loss, accuracy), gradients = jax.jit(jax.value_and_grad(official, has_aux=True))(params)
  np.testing.assert_allclose([out['scalars']['loss'], out['scalars']['accuracy']], [loss, accuracy], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), state.opt_state.trace, gradients)
  np.testing.assert_allclose(evaluated['count'], weights.sum(), rtol=1e-6)  # validation has the mean over examples


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_missing_column_is_said_before_the_first_step(tmp_path, split):
  for name in ('train', 'validation'):
    examples = _examples(6)
    if name == split:
      del examples[4]['margin']
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, examples)))
  with pytest.raises(UserError, match=rf"{split}\.jsonl, example 5: field 'margin' is missing; correct it, or set loss\.margin to False"):
    api_training.train_reward_model(
      tmp_path,
      tmp_path,
      init='scratch',
      output_dir=tmp_path / 'run',
      args=TrainConfig(loss=OPTIONS),
      model=CONFIG,
      tokenizer='byte',
      mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    )
