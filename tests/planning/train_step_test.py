"""The plan of a training step: shapes and FLOPs in this process, a compiled step in its own process."""

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
from polar_jax.planning.hlo import Traffic
from polar_jax.planning.train_step import Plan
from polar_jax.runtime import chips
from polar_jax.runtime.compiled import Memory
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
  """Run the stage in its own process: libtpu reads its environment once, and flags for CPUs must not reach the compiled step."""
  (folder / 'small.py').write_text(CONFIG)
  files = [f'--config={folder / "small.py"}', f'--workdir={folder / "run"}']
  command = [sys.executable, '-m', 'polar_jax.main', *files, '--config.stage=plan']
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((folder / 'run' / 'plan.json').read_text()) | {'output': done.stdout}


@pytest.mark.long
@needs_libtpu
def test_plan_of_a_compiled_step(tmp_path):
  plan = plan_of(tmp_path)
  model = dataclasses.replace(MODEL, head_dim=128)
  assert plan['fits'] is True and plan['parameters'] == flops.reward_model_parameters(model).total
  assert plan['chips'] == 4 and plan['mesh'] == {'data': 1, 'fsdp': 2, 'tensor': 2, 'context': 1}
  # 24 triplets of 200 tokens, in rows of 512 that divide among 2 x 4.
  assert plan['batch'] == {'rows': 16, 'row_length': 512, 'accumulation': 4, 'rows_per_chip': 2, 'tokens': 4_800}
  memory = plan['memory']
  assert memory['hbm'] == 16 << 30 and memory['peak'] < memory['hbm'] and memory['refused'] == 0
  # Weights and two moments in float32, split over four chips except for the norms.
  assert memory['state'] == pytest.approx(3 * 4 * plan['parameters'] / 4, rel=0.03)
  assert memory['state'] < memory['argument'] < memory['peak']
  # XLA counts the bodies of the loops (three layers, four micro-batches) once.
  assert plan['flops']['model'] < plan['flops']['hardware'] and plan['flops']['hardware'] > 4 * plan['flops']['xla']
  # Both mesh axes are used: activations are summed over tensor and gradients over fsdp, at least once per layer and micro-batch.
  assert plan['collectives']['all-reduce']['count'] >= 2 * 4 * 3
  assert all(kind['sent'] > 0 and kind['bytes'] > 0 for kind in plan['collectives'].values())
  seconds, run = plan['step_seconds'], plan['run']
  assert seconds['overlapped'] == max(seconds[name] for name in ('compute', 'memory', 'network'))
  assert seconds['compute'] == pytest.approx(plan['flops']['hardware'] / 4 / 197e12)
  assert run['tokens'] == 100 * 4_800 and run['tokens_per_second']['serial'] == pytest.approx(4_800 / seconds['serial'])
  assert run['chip_hours']['serial'] == pytest.approx(4 * 100 * seconds['serial'] / 3600)
  assert plan['change'] == [] and 'fits' in plan['output'] and 'all-reduce' in plan['output']


@pytest.mark.slow  # the same code as above
@needs_libtpu
def test_plan_of_adapters(tmp_path):
  """The base is counted in its own type and without moments, and the step saves the weight gradients."""
  full = plan_of(tmp_path)
  plan = plan_of(tmp_path, '--config.pretrain.lora.rank=4', '--config.pretrain.lora.base_dtype=bfloat16')
  widths = 2 * (256 + 512) + 2 * (256 + 256) + 3 * (256 + 512)
  assert plan['trained'] == 3 * 4 * widths + 256 and full['trained'] == full['parameters'] == plan['parameters']
  # Each factor of an adapter has one axis that is divided, weights have two.
  assert plan['memory']['state'] == pytest.approx(2 * plan['parameters'] / 4 + 12 * plan['trained'] / 2, rel=0.03)
  assert (
    plan['memory']['state'] < full['memory']['state'] / 4
  )  # at this size temporaries are most of the peak, and adapters have some of their own
  assert plan['flops']['model'] == pytest.approx(2 / 3 * full['flops']['model'])
  assert plan['flops']['hardware'] < 0.85 * full['flops']['hardware']
  assert f'and {plan["trained"]:,} trained' in plan['output']


@pytest.mark.slow  # the same code as above, and `changes` below
@needs_libtpu
def test_plan_of_a_step_that_does_not_fit(tmp_path):
  plan = plan_of(
    tmp_path, '--config.pretrain.batch_size=400_000', '--config.pretrain.gradient_accumulation_steps=1', '--config.model.remat=none'
  )
  assert plan['fits'] is False and plan['memory']['peak'] > plan['memory']['hbm']
  assert any('accumulation' in line for line in plan['change']) and any('remat' in line for line in plan['change'])
  assert 'does not fit' in plan['output'] and 'to make it fit: gradient_accumulation_steps' in plan['output']


@needs_libtpu
@pytest.mark.parametrize(('slice_name', 'chips'), [('v5e:1x1', 1), ('v6e:1x2', 2), ('v5p:1x1x1', 1), ('v6e:2x2', 4), ('v5p:2x2x1', 4)])
def test_slices_of_a_host_or_less(slice_name, chips):
  _, _, devices = topology.open_slice(slice_name)
  assert len(devices) == chips


@needs_libtpu
def test_open_slice_refuses_unknown_slices():
  for name in ('v2:2x2', 'v5p', 'v5p:banana', 'v5p:3x5x7'):
    with pytest.raises(ConfigError, match=name):
      topology.open_slice(name)


def mesh(**sizes):
  return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:8])


def config(**changes):
  return Config(data=DataConfig(row_length=600), pretrain=TrainConfig(batch_size=50), plan=PlanConfig(triplet_tokens=140), **changes)


def test_ranking_shape_counts_what_packed_rows_cost():
  """Fifty triplets of 140 tokens, packed into real rows, have the FLOPs and pairs of the plan."""
  c = config()
  batch, tokens, seen, model_flops = train_step._ranking_shape(c, c.pretrain, MODEL, mesh())
  shared, tail = [0] * 60, 40
  rows = [pair_segment(shared + [1] * tail, shared + [2] * tail)] * 50
  packed = packing.first_fit([140] * 50, 600, 50)
  real = pair_batch(rows, list(range(50)), packed, 600, 4)
  assert tokens == 50 * 140 == (real.end_BT > real.start_BT).sum()
  assert seen == (real.end_BT - real.start_BT).sum()
  assert model_flops == pytest.approx(3 * flops.reward_model_flops(MODEL, real))
  assert batch.tokens_BT.shape == (16, 600)  # more than twelve rows, rounded up to a multiple of eight


def test_rows_are_a_multiple_of_chips_and_micro_batches():
  c = config()
  settings = dataclasses.replace(c.pretrain, gradient_accumulation_steps=3)
  assert train_step._ranking_shape(c, settings, MODEL, mesh(fsdp=4, tensor=2))[0].tokens_BT.shape[0] == 12
  whole = dataclasses.replace(c, plan=PlanConfig())  # every triplet fills a row
  assert train_step._ranking_shape(whole, settings, MODEL, mesh(fsdp=4, tensor=2))[0].tokens_BT.shape[0] == 60


def test_row_length_must_be_set():
  c = dataclasses.replace(config(), data=DataConfig())
  with pytest.raises(ConfigError, match=r'data\.row_length'):
    train_step._ranking_shape(c, c.pretrain, MODEL, mesh())


def test_attention_flops_follow_the_seen_pairs():
  count = train_step._attention(1_000.0)
  ints, q, kv = (2, 8), (2, 4, 512, 64), (2, 2, 512, 64)
  # Two multiplications forward, seven backward, each of 2 x 64 FLOPs per pair, for two rows of four heads.
  assert sum(count(f'attention_{name}', [ints, q, kv, kv]) for name in ('forward', 'dq', 'dkv')) == 9 * 2 * 64 * 1_000 * 2 * 4
  assert count('attention_forward', [ints, (2, 4, 128, 64), kv, kv]) == 2 * 2 * 64 * (128 * 512 / 2) * 2 * 4
  with pytest.raises(ValueError, match='sorting'):
    count('sorting', [q, kv])


def planned(**changes) -> Plan:
  """A step with 1 GiB of state and 20 GiB of temporaries on four v5e chips."""
  gib = chips.GIB
  plan = Plan(
    topology='v5e:2x2',
    mesh={'data': 1, 'fsdp': 4, 'tensor': 1, 'context': 1},
    chip=chips.CHIPS['v5e'],
    peak_flops=197e12,
    parameters=10**9,
    trained=10**9,
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


def test_roofline_by_hand():
  roof = planned().roofline
  assert roof == pytest.approx((2e15 / 4 / 197e12, 0.01, 0.03))
  assert roof.overlapped == roof.compute and roof.serial == pytest.approx(sum(roof))


def test_changes_are_ordered_by_cost():
  deep = dataclasses.replace(MODEL, remat='dots')
  lines = train_step.changes(planned(), deep)
  # 20 GiB for four rows at a time; 14 are left: two rows at a time.
  assert lines[0].startswith('gradient_accumulation_steps 4 (now 2): 2 rows per chip')
  assert 'remat' in lines[1] and 'more chips' in lines[-1] and len(lines) == 3
  one = train_step.changes(planned(rows=8), dataclasses.replace(MODEL, remat='full'))
  assert one[0].startswith('mesh.tensor=2') and 'data.row_length=1024' in one[1]
  full = train_step.changes(planned(state=20 * chips.GIB), dataclasses.replace(MODEL, remat='full'))
  assert len(full) == 1 and '20.0 of 16 GiB on 4 chips, and 60% of 9 chips' in full[0]
  assert train_step.changes(planned(memory=Memory(argument=1)), deep) == []


def test_a_refused_plan_converts_to_json_and_a_table():
  refused = planned(memory=Memory(refused=20 * chips.GIB), traffic=None, flops_xla=None)
  facts = json.loads(json.dumps(stage.as_json(refused, ['x'])))
  assert facts['fits'] is False and facts['collectives'] is None and facts['step_seconds'] is None and facts['run'] is None
  text = '\n'.join(stage.table(refused, ['x']))
  assert '20.00 GiB of 16.00 GiB: does not fit' in text and 'to make it fit: x' in text
  assert np.isfinite(facts['flops']['hardware'])
