"""The plan of a PPO step: the functions of a tiny model, compiled for a TPU slice."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from polar_jax.planning.ppo_step import Measured, Plan, changes
from polar_jax.runtime.compiled import Memory

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'rft'
  config.model.update(dict(vocab_size=512, num_layers=2, d_model=256, d_ff=512, num_heads=2, num_kv_heads=2, head_dim=128))
  config.model.compute_dtype = 'bfloat16'
  config.model.remat = 'full'
  config.mesh.fsdp, config.mesh.tensor = 2, 2
  config.rft.micro_batch_rows = 4
  config.rft.row_length = 512
  config.rft.reward.row_length = 512
  config.rft.rollout.max_prompt = 128
  config.rft.rollout.max_new = 128
  config.rft.rollout.max_concurrent = 8
  config.plan.step = 'rft'
  config.plan.topology = 'v5e:2x2'
  config.plan.reward = 'smollm2_135m'
  return config
"""


def plan_of(folder: pathlib.Path, *settings: str) -> dict:
  """Run the stage in its own process: libtpu reads its environment once."""
  (folder / 'tiny.py').write_text(CONFIG)
  files = [f'--config={folder / "tiny.py"}', f'--workdir={folder / "run"}']
  command = [sys.executable, '-m', 'polar_jax.main', *files, '--config.stage=plan']
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'run' / 'plan.json').read_text())


@pytest.mark.slow  # compiles for more than a minute
@pytest.mark.needs('libtpu')
def test_plan_of_a_compiled_step(tmp_path):
  small = plan_of(tmp_path)
  names = [(call['phase'], call['name']) for call in small['calls']]
  learned = [(f'update {model}', name) for model in ('actor', 'critic') for name in ('accumulate', 'apply')]
  read = [('logprobs', f'read {model}') for model in ('actor', 'start', 'critic')]
  assert names == [*(('rollout', name) for name in ('prepare', 'init_state', 'prefill', 'decode')), ('reward', 'score'), *read, *learned]
  assert all(call['peak'] > call['resident'] > 0 for call in small['calls'])
  assert all(size > 0 for size in small['held'].values())
  # Adam has two moments; frozen weights take half the bytes of trained ones.
  assert small['held']['actor moments'] == pytest.approx(2 * small['held']['actor parameters'], abs=64)  # and a few scalars
  assert small['held']['frozen start'] == small['held']['actor parameters'] / 2
  assert small['parameters'] == 2 * 512 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256
  assert small['fits'] and small['peak'] == max(small['phases'].values()) < small['hbm'] == 16 << 30

  # Imitation compiles less: no rollouts and no critic.
  large = plan_of(tmp_path, '--config.rft.method=sft', '--config.rft.reward.source=http', '--config.rft.micro_batch_rows=262144')
  assert [call['phase'] for call in large['calls']] == ['logprobs', 'logprobs', 'update actor', 'update actor']
  assert not large['fits'] and large['peak'] > large['hbm']


def test_changes_follow_the_phases_that_do_not_fit():
  gib = 1 << 30

  def planned(held, **peaks):
    calls = [Measured(phase.replace('_', ' '), 'call', Memory(temporary=peak * gib), 0) for phase, peak in peaks.items()]
    return Plan('v5e:2x2', {'fsdp': 4}, 16 * gib, {'actor parameters': held * gib, 'keys and values': 9 * gib}, calls)

  assert changes(planned(2, rollout=10, reward=16)) == []
  lines = changes(planned(2, rollout=20, logprobs=17, update_actor=18, reward=3))
  assert [line.split(':')[0] for line in lines] == [
    'rft.rollout.max_concurrent',
    'rft.micro_batch_rows',
    'more chips, or larger ones',
  ] and '2.0 of 16 GiB' in lines[-1]
  assert [line.split(':')[0] for line in changes(planned(17, rollout=20))] == ['more chips, or larger ones']
