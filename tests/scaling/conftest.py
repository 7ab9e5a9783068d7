"""Rows that a tiny model learns in a few steps, and sweeps over them."""

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
def sweep_rows(tmp_path_factory) -> pathlib.Path:
  folder, rng = tmp_path_factory.mktemp('rows'), np.random.default_rng(0)
  made = [
    {'prompt': f'p{i}', 'reference': 'a' * int(rng.integers(3, 9)), 'chosen': 'a' * 5, 'rejected': 'b' * int(rng.integers(3, 9))}
    for i in range(100)
  ]
  (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, made)))
  (folder / 'text.txt').write_text('hello world, this is a text. ' * 200)
  return folder


@pytest.fixture(scope='module')
def make(sweep_rows):
  """Context of a sweep in `workdir`; `changes` are to the grid, or by their names to the config."""

  def of(workdir: pathlib.Path, log: list[str] | None = None, **changes) -> Context:
    known = {f.name for f in dataclasses.fields(SweepConfig)}
    train = TrainConfig(batch_size=8, steps=5, start_from='pretrain_lm', learning_rate=1e-2, sequence_length=16)
    config = Config(
      stage='sweep',
      tokenizer=TokenizerConfig(kind='byte'),
      data=DataConfig(
        triplets=str(sweep_rows / 'rows.jsonl'), validation=str(sweep_rows / 'rows.jsonl'), text=str(sweep_rows / 'text.txt')
      ),
      model=ModelConfig(num_layers=1, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=8),
      pretrain_lm=dataclasses.replace(train, start_from='scratch'),
      pretrain=train,
      checkpointing=CheckpointingConfig(every_steps=2),
      sweep=dataclasses.replace(GRID, **{k: v for k, v in changes.items() if k in known}),
    )
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if k not in known})
    return Context(config, workdir, sharding.make_mesh(MeshConfig(), jax.devices()[:1]), (lambda _: None) if log is None else log.append)

  return of
