"""Synthetic triplets and a text that a tiny model learns in a few steps, and contexts of runs on them."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, Config, DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig
from polar_jax.model import flops
from polar_jax.stages.context import Context

EXAMPLES = 40


@pytest.fixture(scope='session')
def world(tmp_path_factory) -> pathlib.Path:
  """A folder with triplets, whose chosen response has only the letter a and whose rejected one only b, and with a text."""
  folder, rng = tmp_path_factory.mktemp('world'), np.random.default_rng(0)
  examples = [
    {'prompt': f'p{i}', 'reference': 'a' * int(rng.integers(3, 9)), 'chosen': 'a' * 5, 'rejected': 'b' * int(rng.integers(3, 9))}
    for i in range(EXAMPLES)
  ]
  (folder / 'examples.jsonl').write_text('\n'.join(map(json.dumps, examples)))
  (folder / 'text.txt').write_text('hello world, this is a text. ' * 200)
  return folder


@pytest.fixture(scope='session')
def make_context(world) -> Callable[..., Context]:
  """Return a function that makes the context of a run of 12 steps, with changes to the options of TrainConfig or Config by name."""

  def make(workdir: pathlib.Path, log: list[str] | None = None, devices: int = 1, **changes: Any) -> Context:
    base = TrainConfig(steps=12, batch_size=8, start_from='scratch', learning_rate=3e-3, warmup_ratio=0.25, log_every=5, evaluate_every=4)
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    train = dataclasses.replace(base, **{k: v for k, v in changes.items() if k in known})
    examples = str(world / 'examples.jsonl')
    config = Config(
      tokenizer=TokenizerConfig(kind='byte'),
      data=DataConfig(triplets=examples, preferences=examples, validation=examples, text=str(world / 'text.txt')),
      model=ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8),
      pretrain_lm=dataclasses.replace(train, sequence_length=16),
      pretrain=train,
      finetune=train,
      checkpointing=CheckpointingConfig(every_steps=3),
    )
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if k not in known})
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    return Context(config, workdir, mesh, (lambda message: None) if log is None else log.append)

  return make


# For the modules of this folder alone: a session fixture would change the setting for all later files of the process.
@pytest.fixture(scope='module', autouse=True)
def known_peak():
  """Fix the peak FLOP/s, which is measured on a CPU, for every run."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flops, 'peak_flops', lambda device: (1e9, 'of the tests'))
    yield


@pytest.fixture(scope='session')
def compiled(tmp_path_factory) -> pathlib.Path:
  """Folder of the compilation cache."""
  return tmp_path_factory.mktemp('compiled')


@pytest.fixture(scope='module', autouse=True)
def compile_once(compiled):
  """Share compiled functions between runs of the same shape: compiling takes most of the time of a short run."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  old = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(compiled), 0), strict=True):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, old, strict=True):
    jax.config.update(name, value)
