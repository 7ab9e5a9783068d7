"""The train step: one pure function for every objective, mesh and number of micro-batches, jitted once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ConfigError, LoraConfig, ModelConfig, OptimizerConfig
from polar_jax.model import heads, lora
from polar_jax.train.objectives import Objective
from polar_jax.train.optimizer import Offloaded, with_schedule


class TrainState(NamedTuple):
  """The arrays that a step changes. `params` is a pure dict of float32 arrays: with adapters, the trained ones alone."""

  params: dict[str, Any]
  opt_state: optax.OptState
  step: jax.Array


class Frozen(NamedTuple):
  """The arrays of a run with adapters that no step changes.

  Attributes:
    params: those parameters that are not trained.
    seed: of the dropout in adapters, uint32; each step has its own random numbers.
  """

  params: dict[str, Any]
  seed: Any


class StepFunctions(NamedTuple):
  """A run's jitted functions and the layout of its state.

  Attributes:
    init: (key, trained parameters to start from or None) -> state.
    train: (state, batch) -> (new state, {'scalars': means over the batch, 'rows': arrays for each row}); the old state is donated. With
      adapters it takes a `Frozen` as well.
    evaluate: (params, batch) -> {'count', 'sums': of the loss and metrics, 'rows'}, given all parameters.
    abstract: the state as ShapeDtypeStructs with shardings.
    abstract_frozen: the arguments of `train` after the batch, likewise.
  """

  init: Callable[[jax.Array, dict[str, Any] | None], TrainState]
  train: Callable[..., tuple[TrainState, dict[str, Any]]]
  evaluate: Callable[[dict[str, Any], Any], dict[str, Any]]
  abstract: TrainState
  abstract_frozen: tuple[Frozen, ...]


def _loss_and_grads(model_of: Callable[[Any, Any], Any], objective: Objective, params: Any, batch: Any, accumulation: int):
  """Return the means of the loss and metrics over the global batch, arrays for each row, and the gradients of the mean loss.

  Args:
    model_of: (parameters, number of the micro-batch) -> model.
    objective: its loss.
    params: the trained parameters.
    batch: the global batch.
    accumulation: number of micro-batches. Sums are divided by the count of the whole batch, so the result does not depend on how pairs
      are distributed over micro-batches.
  """
  nonzero = lambda count: jnp.where(count > 0, count, 1.0)
  count = nonzero(objective.count(batch))
  loss_count = count if objective.loss_count is None else nonzero(objective.loss_count(batch))

  def mean_loss(params, micro, number):
    loss, sums, rows = objective.loss_sums(model_of(params, number), micro)
    return loss / loss_count, (sums, rows)

  value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
  if accumulation == 1:
    (loss, (sums, rows)), grads = value_and_grad(params, batch, 0)
  else:
    # Micro-batch a takes rows a, a + A, ..., so that rows stay on their device.
    split = lambda x: sharding.constrain(x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), None, 'batch', *(None,) * (x.ndim - 1))
    micros = jax.tree.map(split, batch)

    def body(carry, numbered):
      (loss, (sums, rows)), grads = value_and_grad(params, *numbered)
      return jax.tree.map(jnp.add, carry, (loss, sums, grads)), rows

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros), 0)
    (loss_shape, (sums_shape, _)), grads_shape = shapes
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss_shape, sums_shape, grads_shape))
    (loss, sums, grads), rows = jax.lax.scan(body, zeros, (micros, jnp.arange(accumulation)))
    rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
  metrics = {'loss': loss} | {name: value / count for name, value in sums.items()}
  return metrics, rows, grads


def keep_frozen(tx: optax.GradientTransformation, model: ModelConfig, adapters: LoraConfig) -> optax.GradientTransformation:
  """Return an optimizer that leaves the embedding and the first `frozen_layers` layers as they are.

  Args:
    tx: the optimizer.
    model: the model, in which no derivative passes through the frozen layers. But a tied head has a gradient of the embedding, and weight
      decay needs no gradient.
    adapters: of the model.

  Raises:
    ConfigError: no layer would be trained, or there are adapters, which freeze all of them.
  """
  n = model.frozen_layers
  if not n:
    return tx
  if n >= model.num_layers:
    raise ConfigError(f'model.frozen_layers is {n}, and the model has {model.num_layers} layers; leave at least one')
  if adapters.rank is not None:
    raise ConfigError('model.frozen_layers is set, but adapters freeze every layer already; set lora.rank to None, or frozen_layers to 0')

  def without(tree: Any) -> Any:
    decoder = tree['decoder']
    layers = jax.tree.map(lambda x: x.at[:n].set(0), decoder['layers'])
    return tree | {'decoder': decoder | {'embedding': jnp.zeros_like(decoder['embedding']), 'layers': layers}}

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = tx.update(without(grads), state, params)
    return without(updates), state

  return type(tx)(tx.init, update)


def build(
  objective: Objective,
  model_config: ModelConfig,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  accumulation: int = 1,
  lora_config: LoraConfig = LoraConfig(),
) -> StepFunctions:
  """Jit init, train and evaluate for a mesh. Parameters and optimizer state are created sharded.

  Args:
    objective: the head of the model and its loss.
    model_config: the shape of the model.
    tx: the optimizer.
    mesh: the devices.
    accumulation: micro-batches of a step.
    lora_config: adapters.
  """
  tx = keep_frozen(tx, model_config, lora_config)
  abstract_model = heads.abstract_model(model_config, objective.head, lora_config)
  graphdef, _ = nnx.split(abstract_model)

  def init(key: jax.Array, start: dict[str, Any] | None) -> TrainState:
    model = heads.make_model(model_config, objective.head, nnx.Rngs(params=key), lora_config)
    params, _ = lora.split(nnx.to_pure_dict(nnx.state(model, nnx.Param)), lora_config)
    params = params | (start or {})  # a language model has a decoder alone, a reward model its head too
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

  def train(state: TrainState, batch: Any, *frozen: Frozen):
    def model_of(params: Any, number: Any) -> Any:
      if not frozen:
        return nnx.merge(graphdef, params)
      model = nnx.merge(graphdef, lora.join(params, frozen[0].params))
      lora.start_dropout(model, jax.random.fold_in(jax.random.fold_in(jax.random.key(frozen[0].seed), state.step), number))
      return model

    metrics, rows, grads = _loss_and_grads(model_of, objective, state.params, batch, accumulation)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Counted here, because no process has the whole batch.
    tokens = jnp.sum(batch.end_BT > batch.start_BT)
    metrics |= {'grad_norm': optax.tree.norm(grads), 'parameter_norm': optax.tree.norm(params), 'tokens': tokens}
    return TrainState(params, opt_state, state.step + 1), {'scalars': metrics, 'rows': rows}

  def evaluate(params: Any, batch: Any):
    loss, sums, rows = objective.loss_sums(nnx.merge(graphdef, params), batch)
    return {'count': objective.count(batch), 'sums': {'loss': loss, **sums}, 'rows': rows}

  abstract, shardings = state_layout(abstract_model, init, tx, mesh, lora_config)
  replicated = NamedSharding(mesh, PartitionSpec())
  rows_sharding = sharding.batch_sharding(mesh)
  abstract_params = lora.abstract_params(abstract_model, mesh, lora_config)
  frozen = (
    ()
    if lora_config.rank is None
    else (Frozen(lora.split(abstract_params, lora_config)[1], jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)),)
  )
  placed = jax.tree.map(lambda a: a.sharding, (abstract_params, frozen))
  return StepFunctions(
    init=jax.jit(init, out_shardings=shardings),
    # Without out_shardings the partitioner may change the layout of the state, and the next step compiles again.
    train=jax.jit(train, in_shardings=(shardings, rows_sharding, *placed[1]), out_shardings=(shardings, replicated), donate_argnums=0),
    evaluate=jax.jit(evaluate, in_shardings=(placed[0], rows_sharding), out_shardings=replicated),
    abstract=abstract,
    abstract_frozen=frozen,
  )


def state_layout(
  abstract_model: nnx.Module, init: Callable[..., TrainState], tx: optax.GradientTransformation, mesh: Mesh, lora_config: LoraConfig
) -> tuple[TrainState, TrainState]:
  """Return the state of `init` as ShapeDtypeStructs with shardings, and the shardings alone.

  Moments are sharded like parameters. What an optimizer keeps in other shapes, such as the scales of 8-bit moments or the rows and columns
  of Adafactor, is small, and every device holds all of it. Those of an `Offloaded` optimizer are in host memory.

  Args:
    abstract_model: the model, with shapes in place of arrays.
    init: (key, parameters to start from or None) -> state.
    tx: the optimizer.
    mesh: the devices.
    lora_config: adapters.
  """
  abstract = jax.eval_shape(lambda: init(jax.random.key(0), None))
  replicated = NamedSharding(mesh, PartitionSpec())
  trained, _ = lora.split(sharding.abstract_params(abstract_model, mesh), lora_config)
  param_shardings = jax.tree.map(lambda a: a.sharding, trained)

  def layout(leaf: Any, param_sharding: NamedSharding, param: Any) -> Any:
    if isinstance(leaf, optax.MaskedNode):  # a parameter that another transformation updates
      return leaf
    placed = param_sharding if leaf.shape == param.shape else replicated
    return placed.with_memory_kind('pinned_host') if isinstance(tx, Offloaded) else placed

  opt_shardings = optax.tree_map_params(
    tx,
    layout,
    abstract.opt_state,
    param_shardings,
    abstract.params,
    transform_non_params=lambda _: replicated,
    is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
  )
  shardings: Any = TrainState(param_shardings, opt_shardings, cast(Any, replicated))
  return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings), shardings


def scheduled_init(init: Callable[..., TrainState], optimizer: OptimizerConfig, steps: int) -> Callable[..., TrainState]:
  """Return an `init` whose learning rate follows the schedule of one run.

  Args:
    init: of functions that several runs share, made for `without_schedule(optimizer)`.
    optimizer: settings of the run.
    steps: optimizer updates of the run.
  """

  def init_run(key: jax.Array, start: dict[str, Any] | None) -> TrainState:
    state = init(key, start)
    return state._replace(opt_state=with_schedule(state.opt_state, optimizer, steps))

  return init_run
