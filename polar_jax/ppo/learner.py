"""The updates of PPO: pure functions of a model and a micro-batch, jitted once for every head, mesh and number of micro-batches.

Gradients are sums over micro-batches of weighted terms, and the weights are those of the whole minibatch: an update does not depend on
how its answers are packed into rows, micro-batches or devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig, OptimizerConfig, RftConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.value_model import ValueModel
from polar_jax.ppo import advantages, losses
from polar_jax.train import step as step_lib
from polar_jax.train.optimizer import make_optimizer, with_schedule, without_schedule
from polar_jax.train.step import TrainState
from polar_jax.types import PolicyBatch

# Logits that may be in memory at once, in elements: beyond it they are made, used and dropped piece by piece of a row.
_LOGITS = 1 << 25


class ActorTargets(NamedTuple):
  """What the actor's loss needs at each answer token; `weight_BT` sums to 1 over an update and is 0 off the answers."""

  old_logprob_BT: Any
  reference_logprob_BT: Any
  advantage_BT: Any
  weight_BT: Any


class CriticTargets(NamedTuple):
  """What the critic's loss needs at each answer token; weights as for the actor."""

  old_value_BT: Any
  return_BT: Any
  weight_BT: Any


class Learner(NamedTuple):
  """The jitted functions of one model and the layout of its state.

  Attributes:
    init: (key, parameters to start from or None) -> TrainState, born sharded.
    read: (params, batch) -> what the model says at every token: the actor (log-probability of the target, entropy), the critic (value,).
    accumulate: (gradients, sums, params, batch, targets, kl_coef) -> (gradients, sums) with one micro-batch more; donates the first two.
    zeros: params -> what `accumulate` begins with.
    apply: (state, gradients) -> (state after one step of the optimizer, norm of the gradients); the state is donated.
  """

  init: Callable[..., TrainState]
  read: Callable[..., tuple[jax.Array, ...]]
  zeros: Callable[..., tuple[Any, dict[str, jax.Array]]]
  accumulate: Callable[..., tuple[Any, dict[str, jax.Array]]]
  apply: Callable[..., tuple[TrainState, jax.Array]]
  abstract: TrainState


def read_actor(model: LanguageModel, batch: PolicyBatch, temperature: float, shared: bool) -> tuple[jax.Array, jax.Array]:
  """(log-probability of each target, entropy), both (B, T) float32, of the law at `temperature` (0: as at 1).

  Args:
    shared: whether answers may share a prompt.
  """
  hidden_BTD = model.decoder(batch.tokens_BT, batch.positions_BT, intervals(batch, shared))
  scale = 1.0 / temperature if temperature else 1.0

  def piece(hidden_BtD, target_Bt):
    return losses.logprob_and_entropy(scale * model.logits(hidden_BtD), target_Bt)

  rows, length = batch.target_BT.shape
  vocabulary = model.decoder.config.vocab_size or 1
  pieces = next(n for n in range(1, length + 1) if length % n == 0 and (rows * (length // n) * vocabulary <= _LOGITS or n == length))
  if pieces == 1:
    return piece(hidden_BTD, batch.target_BT)
  cut = lambda x: x.reshape(rows, pieces, length // pieces, *x.shape[2:]).swapaxes(0, 1)
  # Recomputed in the backward pass: kept, the logits of all pieces would be in memory after all.
  found = jax.lax.map(lambda xs: jax.checkpoint(piece)(*xs), (cut(hidden_BTD), cut(batch.target_BT)))
  logprob_BT, entropy_BT = (x.swapaxes(0, 1).reshape(rows, length) for x in found)
  return logprob_BT, entropy_BT


def read_critic(model: ValueModel, batch: PolicyBatch, shared: bool) -> tuple[jax.Array]:
  """(values (B, T) in float32,): what the model expects before each target."""
  return (model.values(batch.tokens_BT, batch.positions_BT, intervals(batch, shared)),)


def intervals(batch: PolicyBatch, shared: bool) -> list[tuple[Any, Any]]:
  """The keys that each token sees. The second interval costs time, so it is left out where nothing is shared."""
  own = [(batch.start_BT, batch.end_BT)]
  return [*own, (batch.prefix_start_BT, batch.prefix_end_BT)] if shared else own


def actor_loss(config: RftConfig, model: LanguageModel, batch: PolicyBatch, targets: ActorTargets, kl_coef: jax.Array):
  """(loss, sums of metrics) of a micro-batch: clipped policy gradient, less the entropy bonus, plus KL to the start where it is a loss."""
  logprob_BT, entropy_BT = read_actor(model, batch, config.rollout.temperature, config.num_generations > 1)
  t = targets
  total = lambda x_BT: jnp.sum(jnp.where(t.weight_BT > 0, x_BT, 0.0) * t.weight_BT)
  high = config.clip if config.clip_high is None else config.clip_high
  policy_BT, clipped_BT = losses.policy_loss(logprob_BT, t.old_logprob_BT, t.advantage_BT, config.clip, high, config.dual_clip)
  policy, entropy = total(policy_BT), total(entropy_BT)
  loss = policy - config.entropy_coef * entropy
  if config.kl_in == 'loss':
    loss += kl_coef * total(advantages.kl(logprob_BT, t.reference_logprob_BT, config.kl_estimator))
  sums = {
    'policy_loss': policy,
    'entropy': entropy,
    'clip_fraction': total(clipped_BT),
    'approx_kl': total(t.old_logprob_BT - logprob_BT),
  }
  return loss, sums


def critic_loss(config: RftConfig, model: ValueModel, batch: PolicyBatch, targets: CriticTargets, kl_coef: jax.Array):
  """(loss, sums of metrics) of a micro-batch: half the squared error of the returns, clipped."""
  del kl_coef
  (value_BT,) = read_critic(model, batch, config.num_generations > 1)
  t = targets
  total = lambda x_BT: jnp.sum(jnp.where(t.weight_BT > 0, x_BT, 0.0) * t.weight_BT)
  error_BT, clipped_BT = losses.value_loss(value_BT, t.old_value_BT, t.return_BT, config.value_clip)
  loss = total(error_BT)
  return loss, {'value_loss': loss, 'value_clip_fraction': total(clipped_BT)}


def build_actor(model: ModelConfig, config: RftConfig, updates: int, mesh: Mesh) -> Learner:
  """The policy. `updates`: of the whole run, which the learning rate's schedule is over."""
  return _scheduled(_build_actor(model, _shared(config), mesh), config.actor, updates)


def build_critic(model: ModelConfig, config: RftConfig, updates: int, mesh: Mesh) -> Learner:
  """The critic: a backbone of its own, with a value at every token."""
  return _scheduled(_build_critic(model, _shared(config), mesh), config.critic, updates)


def _shared(config: RftConfig) -> RftConfig:
  """What the functions do not depend on is set to the same for all, so that PPO and supervised tuning share them."""
  actor, critic = without_schedule(config.actor), without_schedule(config.critic)
  return dataclasses.replace(config, method='ppo', track_kl=True, actor=actor, critic=critic)


def _scheduled(shared: Learner, optimizer: OptimizerConfig, updates: int) -> Learner:
  def init(key: jax.Array, start: dict[str, Any] | None) -> TrainState:
    state = shared.init(key, start)
    return state._replace(opt_state=with_schedule(state.opt_state, optimizer, updates))

  return shared._replace(init=init)


@functools.cache
def _build_actor(model: ModelConfig, config: RftConfig, mesh: Mesh) -> Learner:
  read = functools.partial(read_actor, temperature=config.rollout.temperature, shared=config.num_generations > 1)
  loss = functools.partial(actor_loss, config)
  names = ('policy_loss', 'entropy', 'clip_fraction', 'approx_kl')
  return _build(lambda rngs: LanguageModel(model, rngs=rngs), read, loss, names, config.actor, mesh)


@functools.cache
def _build_critic(model: ModelConfig, config: RftConfig, mesh: Mesh) -> Learner:
  loss = functools.partial(critic_loss, config)
  names = ('value_loss', 'value_clip_fraction')
  read = functools.partial(read_critic, shared=config.num_generations > 1)
  return _build(lambda rngs: ValueModel(model, rngs=rngs), read, loss, names, config.critic, mesh)


def _build(
  make: Callable[[nnx.Rngs], nnx.Module],
  read: Callable[..., tuple[jax.Array, ...]],
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  sums: tuple[str, ...],
  optimizer: OptimizerConfig,
  mesh: Mesh,
) -> Learner:
  tx = make_optimizer(optimizer, 1)
  abstract_model = nnx.eval_shape(lambda: make(nnx.Rngs(params=0)))
  graphdef, _ = nnx.split(abstract_model)

  def init(key: jax.Array, start: dict[str, Any] | None) -> TrainState:
    params = nnx.to_pure_dict(nnx.state(make(nnx.Rngs(params=key)), nnx.Param)) | (start or {})
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

  def accumulate(grads, totals, params, batch, targets, kl_coef):
    objective = lambda p: loss(nnx.merge(graphdef, p), batch, targets, kl_coef)
    (_, found), more = jax.value_and_grad(objective, has_aux=True)(params)
    return jax.tree.map(jnp.add, grads, more), jax.tree.map(jnp.add, totals, found)

  def zeros(params):
    return jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros((), jnp.float32) for name in sums}

  def apply(state: TrainState, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), optax.tree.norm(grads)

  abstract, shardings = step_lib.state_layout(abstract_model, init, tx, mesh)
  whole, rows = NamedSharding(mesh, PartitionSpec()), sharding.batch_sharding(mesh)
  params = shardings.params
  return Learner(
    init=jax.jit(init, out_shardings=shardings),
    read=jax.jit(lambda p, batch: read(nnx.merge(graphdef, p), batch), in_shardings=(params, rows), out_shardings=whole),
    zeros=jax.jit(zeros, in_shardings=(params,), out_shardings=(params, whole)),
    accumulate=jax.jit(
      accumulate, in_shardings=(params, whole, params, rows, rows, whole), out_shardings=(params, whole), donate_argnums=(0, 1)
    ),
    apply=jax.jit(apply, in_shardings=(shardings, params), out_shardings=(shardings, whole), donate_argnums=0),
    abstract=abstract,
  )
