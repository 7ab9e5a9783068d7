"""Moments in host memory: updates are those of moments on the devices, on every mesh, and after a restart."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest
from training_runs import killed_at

import polar_jax
from polar_jax import api_training, sharding
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig, OptimizerConfig, RftConfig, RolloutConfig, TrainConfig
from polar_jax.runtime.compiled import bytes_of_a_device
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import ranking
from polar_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=300, num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8)
KINDS = [{}, {'moments': 'int8'}, {'optimizer': 'adafactor'}, {'optimizer': 'muon'}]


def memory_kinds(tree):
  # Muon's coefficients are a small array.
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim and x.shape != (3,)}


@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS, ids=[next(iter(kind.values()), 'adamw') for kind in KINDS])
def test_states_in_host_memory_take_the_same_updates_on_a_mesh(kind):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  found = []
  for offload in (False, True):
    tx = make_optimizer(TrainConfig(learning_rate=0.1, warmup_ratio=0.0, offload=offload, **kind), 10)
    functions = step_lib.build(ranking(TrainConfig().loss), MODEL, tx, mesh)
    with jax.set_mesh(mesh):
      state = functions.init(jax.random.key(0), None)
      layout = jax.tree.map(lambda a: a.sharding, functions.abstract)
      update = jax.jit(tx.update, out_shardings=(layout.params, layout.opt_state), donate_argnums=1)
      opt_state = state.opt_state
      assert memory_kinds(opt_state) == ({'pinned_host'} if offload else {'device'})
      for seed in range(3):
        rng = np.random.default_rng(seed)
        grads = jax.tree.map(
          lambda p, s, rng=rng: jax.device_put(rng.normal(size=p.shape).astype(np.float32), s), state.params, layout.params
        )
        updates, opt_state = update(grads, opt_state, state.params)
      assert memory_kinds(opt_state) == ({'pinned_host'} if offload else {'device'}) and memory_kinds(updates) == {'device'}
    found.append((jax.device_get((updates, opt_state)), bytes_of_a_device(functions.abstract.opt_state)))
  jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
  assert found[1][1] < 128 < found[0][1]  # counters and the schedule stay on the device


def _train(folder, **kind):
  examples = [{'prompt': f'p{i}', 'reference': 'aaaa', 'chosen': 'aaaaa', 'rejected': 'bbbb'} for i in range(16)]
  result = api_training.train_reward_model(
    examples,
    init='scratch',
    output_dir=folder,
    args=TrainConfig(steps=6, batch_size=8, learning_rate=2e-2, warmup_ratio=0.0, **kind),
    model=ModelConfig(num_layers=2, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8),
    tokenizer='byte',
    mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=2)),
  )
  return result, [record['loss'] for record in result.metrics if 'loss' in record]


@pytest.mark.long
def test_a_killed_run_resumes_with_its_moments_in_host_memory(tmp_path):
  whole, losses = _train(tmp_path / 'device')
  with killed_at(5):
    _train(tmp_path / 'host', offload=True)
  shutil.copytree(tmp_path / 'host', tmp_path / 'moved')
  for folder, offload in (('host', True), ('moved', False)):  # where moments are changes no result
    resumed, again = _train(tmp_path / folder, offload=offload)
    assert again == losses
    jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)


@pytest.mark.long
def test_policy_and_critic_with_moments_in_host_memory(tmp_path):
  base = polar_jax.LanguageModel.init(MODEL, 'byte', mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]), seed=1)
  found = []
  for offload in (False, True):
    optimizer = OptimizerConfig(learning_rate=3e-2, warmup_ratio=0.0, offload=offload)
    rollout = RolloutConfig(max_prompt=8, max_new=6, max_concurrent=8)
    args = RftConfig(steps=2, prompts_per_step=8, micro_batch_rows=8, actor=optimizer, critic=optimizer, rollout=rollout)
    reward = lambda prompts, completions, **columns: [float(len(text)) for text in completions]
    folder = tmp_path / str(offload)
    settings = polar_jax.RunSettings(log=lambda line: None)
    run = polar_jax.train_policy(base, [{'prompt': f'p{i}'} for i in range(8)], reward, output_dir=folder, args=args, settings=settings)
    found.append((run.model.params, [record['critic_grad_norm'] for record in run.metrics if 'critic_grad_norm' in record]))
  assert found[0][1] == found[1][1] and len(found[0][1]) == 2
  jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])
