"""PPO with adapters: policy, critic and reference policy share one base, and checkpoints hold adapters alone."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import polar_jax
from polar_jax import sharding
from polar_jax.checkpoints import checkpointer
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import (
  CheckpointingConfig,
  ConfigError,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RftConfig,
  RolloutConfig,
)
from polar_jax.ppo import trainer as loop
from polar_jax.train.metrics import read_metrics

pytestmark = pytest.mark.long

MODEL = ModelConfig(
  vocab_size=261, num_layers=2, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.3, v_head_init='normal'
)
FAST = OptimizerConfig(learning_rate=3e-2, warmup_ratio=0.0, final_lr_ratio=1.0)
LORA = LoraConfig(rank=2, targets=('wq', 'wv', 'w_down'))
RFT = RftConfig(
  steps=4,
  prompts_per_step=8,
  micro_batch_rows=8,
  actor=FAST,
  critic=FAST,
  rollout=RolloutConfig(max_prompt=8, max_new=6, max_concurrent=8),
  lora=LORA,
)
PROMPTS = [{'prompt': f'p{i}'} for i in range(8)]


def share_of_letters(prompts, completions, **columns):
  """Return the share of printable ASCII in responses."""
  return [sum(' ' <= character <= '~' for character in text) / 6 for text in completions]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def base(tmp_path_factory, mesh):
  folder = tmp_path_factory.mktemp('workdir') / 'policy'
  polar_jax.LanguageModel.init(MODEL, 'byte', mesh=mesh, seed=1).save(folder)
  return folder


def tune(base, folder, mesh, **changes):
  settings = polar_jax.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=2, keep=3))
  args = dataclasses.replace(RFT, **changes)
  return polar_jax.train_policy(base, PROMPTS, share_of_letters, output_dir=folder, args=args, mesh=mesh, settings=settings)


@pytest.fixture(scope='module')
def tuned(base, mesh):
  """(result, the trainer of the run)."""
  trainers, run_to_end = [], loop.Trainer.run_to_end
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.Trainer, 'run_to_end', lambda self: trainers.append(self) or run_to_end(self))
    return tune(base, base.parent / 'run', mesh), trainers[0]


def test_policy_critic_and_reference_policy_share_their_base(tuned):
  _, trainer = tuned
  frozen = trainer.run.base
  assert set(frozen) == {'decoder', 'lm_head'} and 'lora' not in frozen['decoder']['layers']
  for held in (trainer.reference_policy, trainer.actor_params):
    assert held['lm_head'] is frozen['lm_head'] and held['decoder']['layers']['wq'] is frozen['decoder']['layers']['wq']
  assert trainer._critic_base['decoder']['layers']['wq'] is frozen['decoder']['layers']['wq']
  assert set(trainer.critic_state.params) == {'decoder', 'v_head'} and set(trainer.critic_state.params['decoder']) == {'layers'}
  assert not any(leaf.any() for leaf in jax.tree.leaves(trainer.reference_policy['decoder']['layers']['lora']))


def test_the_policy_starts_as_its_reference_and_learns(tuned):
  result, _ = tuned
  records = [record for record in result.metrics if 'kl' in record]
  assert records[0]['kl'] == 0 and records[-1]['kl'] > 1e-3
  assert all(record['rollout_mismatch'] < 1e-5 for record in records)
  assert records[-1]['grad_norm'] > 0 and records[-1]['critic_grad_norm'] > 0
  assert result.summary['steps'] == 4


def test_checkpoints_hold_adapters_and_open_as_the_merged_policy(tuned, base, mesh):
  result, trainer = tuned
  metadata = checkpointer.ocp.StandardCheckpointer().metadata(result.folder / checkpointer.FOLDER / '4' / 'state').item_metadata
  sizes = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree) if leaf.shape)
  count = 2 * 2 * ((16 + 16) + (16 + 8) + (16 + 16))
  assert (sizes(metadata['params']), sizes(metadata['opt_state'])) == (count, 2 * count)
  assert sizes(metadata['critic']['params']) == count + 16
  opened = open_pretrained(result.folder)
  assert opened.lora == LORA and opened.base.path == base
  loaded = polar_jax.load(result.folder, mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, loaded.params, result.model.params)
  changed = [
    name for name, w in loaded.params['decoder']['layers'].items() if not np.array_equal(w, trainer.run.base['decoder']['layers'][name])
  ]
  assert set(changed) == set(LORA.targets)


def test_a_stopped_run_continues_bit_for_bit(tuned, base, mesh):
  result, _ = tuned
  folder = base.parent / 'resumed'
  shutil.copytree(result.folder, folder)
  shutil.rmtree(folder / checkpointer.FOLDER / '4')
  again = tune(base, folder, mesh)
  jax.tree.map(np.testing.assert_array_equal, again.model.params, result.model.params)
  rewards = lambda of: [record['raw'] for record in read_metrics(of) if 'raw' in record]
  assert rewards(folder) == rewards(result.folder)


def test_a_policy_in_memory_is_no_base(base, mesh, tmp_path):
  with pytest.raises(ConfigError, match='a base in memory'):
    tune(polar_jax.load(base, mesh=mesh), tmp_path / 'run', mesh)


@pytest.mark.parametrize('base_dtype', ['bfloat16', 'int8', 'nf4'])
def test_a_base_of_fewer_bits(base, mesh, tmp_path, base_dtype):
  """The policy that samples is the one that is trained, starts as its reference, and opens as it ended."""
  result = tune(base, tmp_path / 'run', mesh, steps=2, lora=dataclasses.replace(LORA, base_dtype=base_dtype))
  records = [record for record in result.metrics if 'kl' in record]
  assert records[0]['kl'] == 0 and records[-1]['kl'] > 1e-5
  assert all(record['rollout_mismatch'] < 1e-3 for record in records), [record['rollout_mismatch'] for record in records]
  opened = polar_jax.load(tmp_path / 'run', mesh=mesh)
  jax.tree.map(np.testing.assert_array_equal, opened.params, result.model.params)
