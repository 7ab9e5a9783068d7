"""Packed rows against two separate sequences per triplet, starting from text: same loss, rewards and gradients."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, TemplateConfig, TokenizerConfig
from polar_jax.data import pipeline
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.miniature.vocabulary import train_tokenizer
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import RANKING
from polar_jax.types import PairBatch, Triplet

CONFIG = ModelConfig(num_layers=3, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8, init_std=0.25, v_head_init='normal')
# Pairs of responses whose common prefix ends inside a word, inside a merged token, at the end of a response, or is empty.
RESPONSES = [
  ('a cat and a dog', 'a cat and a door'),
  ('', 'an answer'),
  ('an answer', ''),
  ('', ''),
  ('same', 'same'),
  ('yes', 'yes, of course, and more'),
  ('one thing', 'other words'),
]


def _triplets() -> list[Triplet]:
  """Return every pair of responses in both orders and with both wrappers, after short and long prompts and references."""
  contexts = itertools.cycle([('the prompt', 'a reference'), ('p', ''), ('a much longer prompt with the words', 'yes'), ('', 'ref')])
  triplets = []
  for (chosen, rejected), wrapper in itertools.product(RESPONSES, ('sft', 'pretrain')):
    prompt, reference = next(contexts)
    triplets += [Triplet(prompt, reference, chosen, rejected, wrapper), Triplet(prompt, reference, rejected, chosen, wrapper)]
  return triplets


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Model config, triplets and template. The tokenizer has merges, so the end of a string need not be the end of a token."""
  triplets = _triplets()
  words = [f'{t.prompt}\n{t.reference} {t.chosen} {t.rejected}' for t in triplets]
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  train_tokenizer(words * 3, 320).save(str(path))
  template = Template(TemplateConfig(), load_tokenizer(TokenizerConfig(kind='trained'), path))
  return dataclasses.replace(CONFIG, vocab_size=template.tokenizer.vocab_size), triplets, template


@pytest.fixture(scope='module')
def two_sequences(world):
  """Parameters, loss, rewards and gradients with each sequence in its own causal row, plain attention and one device."""
  config, triplets, template = world
  sequences = [s for triplet in triplets for s in template.encode(triplet)]
  length = max(map(len, sequences))
  tokens, positions, end = np.zeros((3, len(sequences), length), np.int32)
  for b, s in enumerate(sequences):
    tokens[b, : len(s)], positions[b, : len(s)], end[b, : len(s)] = s, range(len(s)), np.arange(len(s)) + 1
  last = np.array([[[len(s) - 1]] for s in sequences], np.int32)
  batch = PairBatch(tokens, positions, np.zeros_like(tokens), end, last, None, None)
  model = RewardModel(dataclasses.replace(config, attention='reference'), rngs=nnx.Rngs(params=5))
  graphdef, state = nnx.split(model)
  params = nnx.to_pure_dict(state)

  def mean_loss(params):
    rewards = pair_rewards(nnx.merge(graphdef, params), batch).reshape(-1, 2)
    return jnp.mean(jax.nn.softplus(rewards[:, 1] - rewards[:, 0])), rewards

  (loss, rewards), gradients = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
  return jax.tree.map(np.asarray, (params, loss, rewards, gradients))


@pytest.mark.long
@pytest.mark.parametrize(
  ('mesh', 'accumulation', 'remat', 'attention'),
  [
    pytest.param(MeshConfig(fsdp=8), 1, 'none', 'chunked', marks=pytest.mark.slow),
    (MeshConfig(data=2, fsdp=2, tensor=2), 2, 'full', 'chunked'),
    pytest.param(MeshConfig(fsdp=4, tensor=2), 1, 'dots', 'reference', marks=pytest.mark.slow),
    pytest.param(None, 3, 'dots_no_batch', 'chunked', marks=pytest.mark.slow),
  ],
)
def test_packed_rows_equal_two_sequences_per_triplet(world, two_sequences, mesh, accumulation, remat, attention):
  config, triplets, template = world
  params, loss, rewards, gradients = two_sequences
  devices = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else sharding.make_mesh(mesh)
  plan = pipeline.BatchPlan(len(triplets), sharding.batch_shards(devices) * accumulation)
  tokens = pipeline.TripletSegments(triplets, template)
  pack = pipeline.plan_packing(tokens, plan, 128, steps=1, seed=0)
  (batch,) = list(pipeline.pair_batches(tokens, plan, pack, steps=1, seed=0))
  assert (batch.pair_mask_BP.sum(axis=1) > 1).any()
  with jax.set_mesh(devices):
    model = dataclasses.replace(config, attention=attention, remat=remat)
    functions = step_lib.build(RANKING, model, optax.trace(decay=0.0), devices, accumulation)
    state = functions.init(jax.random.key(0), params)
    state, out = functions.train(state, sharding.put_local(batch, devices))
  np.testing.assert_allclose(out['scalars']['loss'], loss, rtol=1e-5)
  index, got = np.asarray(out['rows']['index']), np.asarray(out['rows']['rewards_BPC'])
  real = index >= 0
  assert sorted(index[real]) == list(range(len(triplets)))
  np.testing.assert_allclose(got[real][np.argsort(index[real])], rewards, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), state.opt_state.trace, gradients)
