"""Frozen layers: they stay as they are to the bit, the others are trained as without them, and no derivative of them is computed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from training_runs import killed_at

from polar_jax import api_training, sharding
from polar_jax.config import CheckpointingConfig, ConfigError, LoraConfig, MeshConfig, ModelConfig, TrainConfig
from polar_jax.data.layout import pair_batch, pair_segment, text_batch
from polar_jax.model import flops
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import NEXT_TOKEN, RANKING
from polar_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(
  vocab_size=40, num_layers=4, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.2, v_head_init='normal'
)
TRAIN = TrainConfig(learning_rate=0.01, warmup_ratio=0.0, eps=1e-3, weight_decay=0.1)


def ranking_batch():
  rng = np.random.default_rng(0)
  segments = []
  for _ in range(8):
    prefix = rng.integers(1, 39, rng.integers(2, 8)).tolist()
    segments.append(pair_segment(*(prefix + rng.integers(1, 39, rng.integers(0, 7)).tolist() + [39] for _ in range(2))))
  return pair_batch(segments, range(8), [[i] for i in range(8)], 24, 1)


def windows():
  return text_batch([np.random.default_rng(i).integers(0, 40, 17).astype(np.int32) for i in range(8)], range(8), 16)


def train(objective, batch, model, mesh_config=None, steps=3):
  """Return the parameters before and after some steps, and the gradients of the first one."""
  mesh = sharding.make_mesh(mesh_config) if mesh_config else sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  tx = optax.chain(optax.trace(decay=0.0), make_optimizer(TRAIN, 10))
  functions = step_lib.build(objective, model, tx, mesh)
  with jax.set_mesh(mesh):
    state = functions.init(jax.random.key(0), None)
    before, gradients = jax.device_get(state.params), None
    for _ in range(steps):
      state, _ = functions.train(state, sharding.put_local(batch, mesh))
      gradients = jax.device_get(state.opt_state[0].trace) if gradients is None else gradients
    return before, jax.device_get(state.params), gradients


CASES = [(RANKING, ranking_batch, MODEL), (NEXT_TOKEN, windows, dataclasses.replace(MODEL, tie_embeddings=True))]


@pytest.mark.long
@pytest.mark.parametrize(('objective', 'make_batch', 'model'), CASES, ids=['ranking', 'next_token_tied'])
@pytest.mark.parametrize('n', [1, pytest.param(3, marks=pytest.mark.long)])
def test_frozen_layers_stay_as_they_are_and_the_others_have_the_gradients_of_full_training(objective, make_batch, model, n):
  batch = make_batch()
  _, _, whole = train(objective, batch, model, steps=1)
  before, after, gradients = train(objective, batch, dataclasses.replace(model, frozen_layers=n))
  np.testing.assert_array_equal(before['decoder']['embedding'], after['decoder']['embedding'])
  for name, trained in after['decoder']['layers'].items():
    start, mine, full = (tree['decoder']['layers'][name] for tree in (before, gradients, whole))
    np.testing.assert_array_equal(trained[:n], start[:n])
    assert (trained[n:] != start[n:]).any() and not mine[:n].any()
    np.testing.assert_allclose(mine[n:], full[n:], atol=1e-5)
  assert (after['decoder']['norm'] != before['decoder']['norm']).any()


@pytest.mark.long
def test_frozen_layers_on_a_mesh():
  model = dataclasses.replace(MODEL, frozen_layers=2)
  one, many = (train(RANKING, ranking_batch(), model, mesh)[1] for mesh in (None, MeshConfig(data=2, fsdp=2, tensor=2)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, many)


@pytest.mark.long
@pytest.mark.parametrize(('objective', 'make_batch', 'model'), CASES, ids=['ranking', 'next_token_tied'])
def test_flops_are_those_of_the_compiled_step(objective, make_batch, model):
  """Wide layers, so that little but matrix products counts."""
  mesh, batch = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), make_batch()
  forward = flops.reward_model_flops if objective is RANKING else flops.language_model_flops
  model, found = dataclasses.replace(model, d_model=128, d_ff=512, num_heads=4, num_kv_heads=4, head_dim=32, scan_unroll=4), []
  for n in (0, 3):
    frozen = dataclasses.replace(model, frozen_layers=n)
    functions = step_lib.build(objective, frozen, optax.identity(), mesh)
    with jax.set_mesh(mesh):
      counted = functions.train.lower(functions.abstract, batch).compile().cost_analysis()['flops']
    found.append((counted, flops.training_flops(forward, frozen, batch, LoraConfig())))
  (xla, ours), (xla_frozen, ours_frozen) = found
  assert ours_frozen / ours == pytest.approx(xla_frozen / xla, rel=0.1) and ours_frozen < 0.6 * ours


def run(folder, **changes):
  examples = [{'prompt': f'p{i}', 'reference': 'aaaa', 'chosen': 'aaaaa', 'rejected': 'bbbb'} for i in range(16)]
  model = ModelConfig(num_layers=2, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8, **changes)
  return api_training.train_reward_model(
    examples,
    init='scratch',
    output_dir=folder,
    args=TrainConfig(steps=5, batch_size=8, learning_rate=2e-2, warmup_ratio=0.0),
    model=model,
    tokenizer='byte',
    mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=2)),
  )


@pytest.mark.long
def test_a_run_with_frozen_layers_resumes_to_the_bit_and_refuses_another_number(tmp_path):
  whole = run(tmp_path / 'whole', frozen_layers=1)
  with killed_at(4):
    run(tmp_path / 'killed', frozen_layers=1)
  with pytest.raises(ConfigError, match=r'model\.frozen_layers was 1, is 0'):
    run(tmp_path / 'killed')
  resumed = run(tmp_path / 'killed', frozen_layers=1)
  jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)


@pytest.mark.parametrize(
  ('model', 'adapters', 'message'),
  [
    ({'frozen_layers': 4}, {}, r'model\.frozen_layers is 4, and the model has 4 layers; leave at least one'),
    ({'frozen_layers': 1}, {'rank': 2}, r'adapters freeze every layer already; set lora\.rank to None, or frozen_layers to 0'),
  ],
)
def test_what_cannot_be_frozen(model, adapters, message):
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(ConfigError, match=message):
    step_lib.build(RANKING, dataclasses.replace(MODEL, **model), make_optimizer(TRAIN, 1), mesh, 1, LoraConfig(**adapters))
