"""Examples that a tiny model learns in a few steps, and sweeps over them."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, Config, DataConfig, MeshConfig, ModelConfig, SweepConfig, TokenizerConfig, TrainConfig
from polar_jax.stages.context import Context

GRID = SweepConfig(sizes=('16x1', '8x1'), tokens=(600, 300), learning_rates=(3e-3,), batches=(4,))


@pytest.fixture(scope='module')
def sweep_examples(tmp_path_factory) -> pathlib.Path:
  folder, rng = tmp_path_factory.mktemp('examples'), np.random.default_rng(0)
  examples = [
    {'prompt': f'p{i}', 'reference': 'a' * int(rng.integers(3, 9)), 'chosen': 'a' * 5, 'rejected': 'b' * int(rng.integers(3, 9))}
    for i in range(100)
  ]
  (folder / 'triplets.jsonl').write_text('\n'.join(map(json.dumps, examples)))
  (folder / 'text.txt').write_text('hello world, this is a text. ' * 200)
  return folder


@pytest.fixture(scope='module')
def make_sweep(sweep_examples):
  """Return a function that makes the context of a sweep in `workdir`; `changes` are fields of SweepConfig or of Config."""

  def make(workdir: pathlib.Path, log: list[str] | None = None, **changes) -> Context:
    grid_fields = {f.name for f in dataclasses.fields(SweepConfig)}
    train = TrainConfig(batch_size=8, steps=5, start_from='pretrain_lm', learning_rate=1e-2, sequence_length=16)
    triplets = str(sweep_examples / 'triplets.jsonl')
    config = Config(
      stage='sweep',
      tokenizer=TokenizerConfig(kind='byte'),
      data=DataConfig(triplets=triplets, validation=triplets, text=str(sweep_examples / 'text.txt')),
      model=ModelConfig(num_layers=1, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=8),
      pretrain_lm=dataclasses.replace(train, start_from='scratch'),
      pretrain=train,
      checkpointing=CheckpointingConfig(every_steps=2),
      sweep=dataclasses.replace(GRID, **{k: v for k, v in changes.items() if k in grid_fields}),
    )
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if k not in grid_fields})
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return Context(config, workdir, mesh, (lambda _: None) if log is None else log.append)

  return make
