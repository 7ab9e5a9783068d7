"""The train step: one pure function, jitted once, for every objective, mesh and accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.model import heads
from polar_jax.train.objectives import Objective


class TrainState(NamedTuple):
  """Everything that a step changes. `params` is a pure dict of float32 arrays."""

  params: dict[str, Any]
  opt_state: optax.OptState
  step: jax.Array


class StepFunctions(NamedTuple):
  """A run's jitted functions and the layout of its state."""

  init: Callable[[jax.Array, dict[str, Any] | None], TrainState]
  train: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
  evaluate: Callable[[dict[str, Any], Any], dict[str, Any]]
  abstract: TrainState  # ShapeDtypeStructs with shardings


def _loss_and_grads(graphdef: Any, objective: Objective, params: Any, batch: Any, accumulation: int):
  """Mean loss over the global batch, its gradients, metric sums and per-row arrays, over `accumulation` micro-batches.

  The count is that of the whole batch before any split, so the result does not depend on how pairs fall into micro-batches.
  """
  count = jnp.maximum(objective.count(batch), 1.0)

  def mean_loss(params, micro):
    loss, sums, rows = objective.loss_sums(nnx.merge(graphdef, params), micro)
    return loss / count, (sums, rows)

  value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
  if accumulation == 1:
    (loss, (sums, rows)), grads = value_and_grad(params, batch)
  else:
    # Micro-batch a takes rows a, a + A, ...: rows stay on the device that holds them.
    split = lambda x: sharding.constrain(x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), None, 'batch', *(None,) * (x.ndim - 1))
    micros = jax.tree.map(split, batch)

    def body(carry, micro):
      (loss, (sums, rows)), grads = value_and_grad(params, micro)
      return jax.tree.map(jnp.add, carry, (loss, sums, grads)), rows

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros))
    (loss_shape, (sums_shape, _)), grads_shape = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss_shape, sums_shape, grads_shape))
    (loss, sums, grads), rows = jax.lax.scan(body, zeros, micros)
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
  metrics = {'loss': loss} | {name: value / count for name, value in sums.items()}
  return metrics, rows, grads


def build(
  objective: Objective, model_config: ModelConfig, tx: optax.GradientTransformation, mesh: Mesh, accumulation: int = 1
) -> StepFunctions:
  """Jits init, train and evaluate for a mesh. Parameters and optimizer state are born sharded."""
  abstract_model = heads.abstract_model(model_config, objective.head)
  graphdef, _ = nnx.split(abstract_model)

  def init(key: jax.Array, start: dict[str, Any] | None) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(heads.make_model(model_config, objective.head, nnx.Rngs(params=key)), nnx.Param))
    params = params | (start or {})  # a language model brings its decoder, a reward model its head too
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

  def train(state: TrainState, batch: Any):
    metrics, rows, grads = _loss_and_grads(graphdef, objective, state.params, batch, accumulation)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Counted here, where the batch of all processes is.
    tokens = jnp.sum(batch.end_BT > batch.start_BT)
    metrics |= {'grad_norm': optax.tree.norm(grads), 'parameter_norm': optax.tree.norm(params), 'tokens': tokens}
    return TrainState(params, opt_state, state.step + 1), {'scalars': metrics, 'rows': rows}

  def evaluate(params: Any, batch: Any):
    loss, sums, rows = objective.loss_sums(nnx.merge(graphdef, params), batch)
    return {'count': objective.count(batch), 'sums': {'loss': loss, **sums}, 'rows': rows}

  abstract, shardings = state_layout(abstract_model, init, tx, mesh)
  replicated = NamedSharding(mesh, PartitionSpec())
  rows_sharding = sharding.batch_sharding(mesh)
  return StepFunctions(
    init=jax.jit(init, out_shardings=shardings),
    # Without out_shardings the partitioner may move the state's layout after a step, and compile again.
    train=jax.jit(train, in_shardings=(shardings, rows_sharding), out_shardings=(shardings, replicated), donate_argnums=0),
    evaluate=jax.jit(evaluate, in_shardings=(shardings.params, rows_sharding), out_shardings=replicated),
    abstract=abstract,
  )


def state_layout(
  abstract_model: nnx.Module, init: Callable[..., TrainState], tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
  """(shapes and types, shardings) of what `init` makes: moments lie where their parameters lie."""
  abstract = jax.eval_shape(lambda: init(jax.random.key(0), None))
  replicated = NamedSharding(mesh, PartitionSpec())
  param_shardings = jax.tree.map(lambda a: a.sharding, sharding.abstract_params(abstract_model, mesh))
  opt_shardings = optax.tree_map_params(tx, lambda _, s: s, abstract.opt_state, param_shardings, transform_non_params=lambda _: replicated)
  shardings: Any = TrainState(param_shardings, opt_shardings, cast(Any, replicated))
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings), shardings
