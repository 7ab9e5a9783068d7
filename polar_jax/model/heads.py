"""The registry of heads: which model class each head is, and which objective trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model import lora as lora_lib
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel


class Head(NamedTuple):
  """A model class, called as (tokens, positions, intervals[, index]), and the name of its objective in a run's checkpoint."""

  model: Callable[..., Any]
  objective: str


HEADS = {
  'lm': Head(LanguageModel, 'next_token'),
  'reward': Head(RewardModel, 'ranking'),
  'value': Head(ValueModel, 'value'),
}


def head_of(objective: str) -> str:
  """Return the name of the head that `objective` trains.

  Raises:
    KeyError: no head has this objective.
  """
  return {head.objective: name for name, head in HEADS.items()}[objective]


def make_model(config: ModelConfig, head: str, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()) -> Any:
  """Create the model of a head with initial parameters, with adapters if `lora` has a rank."""
  return HEADS[head].model(config, rngs=rngs, lora=lora)


def abstract_model(config: ModelConfig, head: str, lora: LoraConfig = LoraConfig()) -> Any:
  """Create the model of a head with shapes in place of arrays."""
  return nnx.eval_shape(lambda: make_model(config, head, nnx.Rngs(params=0), lora))


def abstract_trained(config: ModelConfig, head: str, lora: LoraConfig) -> dict[str, Any]:
  """Return the shapes of the parameters that a run trains: all of them, or adapters and scalar head."""
  return lora_lib.split(nnx.to_pure_dict(nnx.state(abstract_model(config, head, lora), nnx.Param)), lora)[0]


def num_trained(config: ModelConfig, head: str, lora: LoraConfig) -> int:
  """Count the parameters that a run trains."""
  return sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(config, head, lora)))


def init_params(config: ModelConfig, head: str, mesh: Mesh, seed: int) -> dict[str, Any]:
  """Create initial parameters of a model, sharded on `mesh` from the start.

  Args:
    config: shape of the model.
    head: one of `HEADS`.
    mesh: devices.
    seed: of the random numbers.
  """
  shardings = jax.tree.map(lambda a: a.sharding, sharding.abstract_params(abstract_model(config, head), mesh))
  make = lambda key: nnx.to_pure_dict(nnx.state(make_model(config, head, nnx.Rngs(params=key)), nnx.Param))
  with jax.set_mesh(mesh):
    return jax.jit(make, out_shardings=shardings)(jax.random.key(seed))
