"""The plan of a training step: its shapes and FLOPs here, a compiled one in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, PlanConfig, TrainConfig
from polar_jax.data import packing
from polar_jax.data.layout import pair_batch, pair_segment
from polar_jax.model import flops
from polar_jax.planning import topology, train_step
from polar_jax.planning.compiled import Memory
from polar_jax.planning.hlo import Traffic
from polar_jax.planning.train_step import Plan
from polar_jax.stages import plan as stage

ROOT = pathlib.Path(__file__).parents[2]
needs_libtpu = pytest.mark.needs('libtpu')
MODEL = ModelConfig(vocab_size=512, num_layers=3, d_model=256, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=64)
CONFIG = """
from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.model.update(dict(vocab_size=512, num_layers=3, d_model=256, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=128))
  config.model.compute_dtype = 'bfloat16'
  config.model.remat = 'full'
  config.mesh.tensor = 2
  config.data.row_length = 512
  config.pretrain.batch_size = 24
  config.pretrain.gradient_accumulation_steps = 4
  config.pretrain.steps = 100
  config.plan.topology = 'v5e:2x2'
  config.plan.triplet_tokens = 200
  return config
"""


def plan_of(folder: pathlib.Path, *settings: str) -> dict:
  """In a process of its own: libtpu reads its environment once. Flags for CPUs must not reach what is compiled."""
  (folder / 'small.py').write_text(CONFIG)
  files = [f'--config={folder / "small.py"}', f'--workdir={folder / "run"}']
  command = [sys.executable, '-m', 'polar_jax.main', *files, '--config.stage=plan']
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'run' / 'plan.json').read_text()) | {'said': done.stdout}


@needs_libtpu
def test_a_step_is_compiled_for_chips_that_are_not_there(tmp_path):
  found = plan_of(tmp_path)
  model = dataclasses.replace(MODEL, head_dim=128)
  assert found['fits'] is True and found['parameters'] == flops.reward_model_parameters(model).total
  assert found['chips'] == 4 and found['mesh'] == {'data': 1, 'fsdp': 2, 'tensor': 2, 'context': 1}
  # 24 triplets of 200 tokens, in rows of 512 that divide among 2 x 4.
  assert found['batch'] == {'rows': 16, 'row_length': 512, 'accumulation': 4, 'rows_per_chip': 2, 'tokens': 4_800}
  memory = found['memory']
  assert memory['hbm'] == 16 << 30 and memory['peak'] < memory['hbm'] and memory['refused'] == 0
  # Weights and two moments in float32, on four chips all but the norms' vectors.
  assert memory['state'] == pytest.approx(3 * 4 * found['parameters'] / 4, rel=0.03)
  assert memory['state'] < memory['argument'] < memory['peak']
  # One call of each of three loops is what the compiler counts: three layers, four micro-batches.
  assert found['flops']['model'] < found['flops']['hardware'] and found['flops']['hardware'] > 4 * found['flops']['xla']
  # Both axes of the mesh are used: sums of activations over tensor, of gradients over fsdp, at least once a layer and micro-batch.
  assert found['collectives']['all-reduce']['count'] >= 2 * 4 * 3
  assert all(kind['sent'] > 0 and kind['bytes'] > 0 for kind in found['collectives'].values())
  seconds, run = found['step_seconds'], found['run']
  assert seconds['overlapped'] == max(seconds[name] for name in ('compute', 'memory', 'network'))
  assert seconds['compute'] == pytest.approx(found['flops']['hardware'] / 4 / 197e12)
  assert run['tokens'] == 100 * 4_800 and run['tokens_per_second']['serial'] == pytest.approx(4_800 / seconds['serial'])
  assert run['chip_hours']['serial'] == pytest.approx(4 * 100 * seconds['serial'] / 3600)
  assert found['change'] == [] and 'fits' in found['said'] and 'all-reduce' in found['said']


@pytest.mark.slow  # the same code as above, and `changes` below
@needs_libtpu
def test_what_does_not_fit_says_what_to_change(tmp_path):
  found = plan_of(
    tmp_path, '--config.pretrain.batch_size=400_000', '--config.pretrain.gradient_accumulation_steps=1', '--config.model.remat=none'
  )
  assert found['fits'] is False and found['memory']['peak'] > found['memory']['hbm']
  assert any('accumulation' in line for line in found['change']) and any('remat' in line for line in found['change'])
  assert 'does not fit' in found['said'] and 'to make it fit: accumulation' in found['said']


@needs_libtpu
def test_unknown_slices_are_named():
  for name in ('v2:2x2', 'v5p', 'v5p:banana', 'v5p:3x5x7'):
    with pytest.raises(ConfigError, match=name):
      topology.open_slice(name)


def mesh(**sizes):
  return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:8])


def config(**changes):
  return Config(data=DataConfig(row_length=600), pretrain=TrainConfig(batch_size=50), plan=PlanConfig(triplet_tokens=140), **changes)


def test_flops_and_pairs_are_those_of_packed_rows():
  """Fifty triplets of 140 tokens, really packed, cost what the plan says of them."""
  c = config()
  batch, tokens, seen, model_flops = train_step._ranking_shape(c, c.pretrain, MODEL, mesh())
  shared, tail = [0] * 60, 40
  rows = [pair_segment(shared + [1] * tail, shared + [2] * tail)] * 50
  packed = packing.first_fit([140] * 50, 600, 50)
  real = pair_batch(rows, list(range(50)), packed, 600, 4)
  assert tokens == 50 * 140 == (real.end_BT > real.start_BT).sum()
  assert seen == (real.end_BT - real.start_BT).sum()
  assert model_flops == pytest.approx(3 * flops.reward_model_flops(MODEL, real))
  assert batch.tokens_BT.shape == (16, 600)  # thirteen rows and more, a multiple of eight


def test_rows_divide_among_chips_and_micro_batches():
  c = config()
  settings = dataclasses.replace(c.pretrain, gradient_accumulation_steps=3)
  assert train_step._ranking_shape(c, settings, MODEL, mesh(fsdp=4, tensor=2))[0].tokens_BT.shape[0] == 12
  whole = dataclasses.replace(c, plan=PlanConfig())  # every triplet fills a row
  assert train_step._ranking_shape(whole, settings, MODEL, mesh(fsdp=4, tensor=2))[0].tokens_BT.shape[0] == 60


def test_a_row_length_that_data_would_decide_is_asked_for():
  c = dataclasses.replace(config(), data=DataConfig())
  with pytest.raises(ConfigError, match=r'data\.row_length'):
    train_step._ranking_shape(c, c.pretrain, MODEL, mesh())


def test_kernels_count_what_their_pairs_cost():
  count = train_step._attention(1_000.0)
  ints, q, kv = (2, 8), (2, 4, 512, 64), (2, 2, 512, 64)
  # Two multiplications forward, seven back, each of 2 x 64 FLOPs a pair, for two rows of four heads.
  assert sum(count(f'attention_{name}', [ints, q, kv, kv]) for name in ('forward', 'dq', 'dkv')) == 9 * 2 * 64 * 1_000 * 2 * 4
  assert count('attention_forward', [ints, (2, 4, 128, 64), kv, kv]) == 2 * 2 * 64 * (128 * 512 / 2) * 2 * 4
  with pytest.raises(ValueError, match='sorting'):
    count('sorting', [q, kv])


def planned(**changes) -> Plan:
  """A step of a gigabyte of state and twenty of everything else on 4 v5e."""
  gib = topology.GIB
  plan = Plan(
    topology='v5e:2x2',
    mesh={'data': 1, 'fsdp': 4, 'tensor': 1, 'context': 1},
    chip=topology.CHIPS['v5e'],
    peak_flops=197e12,
    parameters=10**9,
    rows=32,
    row_length=1_024,
    accumulation=2,
    tokens_per_step=32_000.0,
    total_tokens=None,
    state=1 * gib,
    memory=Memory(argument=1 * gib, temporary=20 * gib),
    flops_model=1e15,
    flops_hardware=2e15,
    flops_xla=1e14,
    traffic=Traffic({'all-gather': 1.0}, {'all-gather': 4e9}, {'all-gather': 3e9}, 8.19e9),
  )
  return dataclasses.replace(plan, **changes)


def test_the_roofline_by_hand():
  roof = planned().roofline
  assert roof == pytest.approx((2e15 / 4 / 197e12, 0.01, 0.03))
  assert roof.overlapped == roof.compute and roof.serial == pytest.approx(sum(roof))


def test_changes_make_it_fit():
  deep = dataclasses.replace(MODEL, remat='dots')
  said = train_step.changes(planned(), deep)
  # 20 GiB for four rows at a time; 14 are left: two rows at a time.
  assert said[0].startswith('accumulation 4 (now 2): 2 rows a chip') and 'remat' in said[1] and 'more chips' in said[-1] and len(said) == 3
  one = train_step.changes(planned(rows=8), dataclasses.replace(MODEL, remat='full'))
  assert one[0].startswith('mesh.tensor=2') and 'data.row_length=1024' in one[1]
  full = train_step.changes(planned(state=20 * topology.GIB), dataclasses.replace(MODEL, remat='full'))
  assert len(full) == 1 and '20.0 of 16 GiB on 4 chips, and 60% of 9 chips' in full[0]
  assert train_step.changes(planned(memory=Memory(argument=1)), deep) == []


def test_a_plan_that_was_refused_is_json_and_a_table():
  refused = planned(memory=Memory(refused=20 * topology.GIB), traffic=None, flops_xla=None)
  facts = json.loads(json.dumps(stage.as_json(refused, ['x'])))
  assert facts['fits'] is False and facts['collectives'] is None and facts['step_seconds'] is None and facts['run'] is None
  text = '\n'.join(stage.table(refused, ['x']))
  assert '20.00 GiB of 16.00 GiB: does not fit' in text and 'to make it fit: x' in text
  assert np.isfinite(facts['flops']['hardware'])
