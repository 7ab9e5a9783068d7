"""A reward model with random parameters, as arrays and as the folder of a run."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.config import MeshConfig, ModelConfig, TemplateConfig, TokenizerConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.model.reward_model import RewardModel
from polar_jax.scoring.exact import ExactScorer

# The backend 'reference' compiles fastest, and compilation takes most of the time of these tests.
_SIZES = {'num_layers': 2, 'd_model': 32, 'd_ff': 64, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 8}
MODEL = ModelConfig(vocab_size=261, init_std=0.3, v_head_init='normal', attention='reference', **_SIZES)


@pytest.fixture(scope='session')
def template() -> Template:
  return Template(TemplateConfig(), load_tokenizer(TokenizerConfig(kind='byte')))


@pytest.fixture(scope='session')
def make_params() -> Callable[..., dict[str, Any]]:
  def make(**changes: Any) -> dict[str, Any]:
    model = dataclasses.replace(MODEL, **changes)
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(RewardModel(model, rngs=nnx.Rngs(params=0)), nnx.Param)))()

  return make


@pytest.fixture(scope='session')
def make_exact(template, make_params) -> Callable[..., ExactScorer]:
  """Return a function that makes an exact scorer on a number of devices, once for each model; `changes` apply to the model."""

  @functools.cache
  def make(devices: int = 1, mesh: MeshConfig | None = None, **changes: Any) -> ExactScorer:
    on = sharding.make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    model = dataclasses.replace(MODEL, **changes)
    abstract = sharding.abstract_params(nnx.eval_shape(lambda: RewardModel(model, rngs=nnx.Rngs(params=0))), on)
    params = jax.device_put(make_params(**changes), jax.tree.map(lambda a: a.sharding, abstract))
    return ExactScorer(params, model, template, on)

  return make


@pytest.fixture(scope='session')
def reward_run(tmp_path_factory, make_params) -> pathlib.Path:
  """Return the folder of a run with these parameters."""
  folder = tmp_path_factory.mktemp('reward_run')
  model = {f'model.{name}': value for name, value in dataclasses.asdict(MODEL).items()}
  checkpoint.save_params(folder, make_params(), {'objective': 'ranking', 'tokenizer': 'byte', **model})
  return folder
