"""Moments in host memory: updates are those of moments on the devices, on every mesh, and after a restart."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from polar_jax import api_training, sharding
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig, TrainConfig
from polar_jax.runtime.compiled import bytes_of_a_device
from polar_jax.train import step as step_lib
from polar_jax.train import trainer
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
    model=ModelConfig(num_layers=2, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8, remat=kind.pop('remat', 'none')),
    tokenizer='byte',
    mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=2)),
  )
  return result, [record['loss'] for record in result.metrics if 'loss' in record]


@pytest.mark.long
def test_a_killed_run_resumes_with_its_moments_in_host_memory(tmp_path, monkeypatch):
  whole, losses = _train(tmp_path / 'device')
  put, calls = trainer.sharding.put_local, []

  def kill(batch, mesh):
    calls.append(1)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return put(batch, mesh)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(trainer.sharding, 'put_local', kill)
    _train(tmp_path / 'host', offload=True)
  resumed, again = _train(tmp_path / 'host', offload=True)
  assert again == losses
  jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)
