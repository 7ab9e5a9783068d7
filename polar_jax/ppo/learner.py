"""The updates of PPO: pure functions of a model and a micro-batch, jitted once per head, mesh and model.

Gradients are sums over micro-batches of weighted terms, and the weights are those of the whole mini-batch: an update does not depend on
how its responses are packed into rows, micro-batches or devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import LoraConfig, ModelConfig, OptimizerConfig, RftConfig
from polar_jax.model import heads, lora
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.value_model import ValueModel
from polar_jax.ppo import advantages, losses
from polar_jax.train import step as step_lib
from polar_jax.train.optimizer import make_optimizer, without_schedule
from polar_jax.train.step import TrainState
from polar_jax.types import PolicyBatch

# Most logits in memory at once, in elements. Beyond that they are computed, used and dropped in pieces of a row.
_LOGITS = 1 << 25


class ActorTargets(NamedTuple):
  """Inputs of the actor's loss at each response token; `weight_BT` sums to 1 over an update and is 0 outside the responses."""

  old_logprob_BT: Any
  reference_logprob_BT: Any
  advantage_BT: Any
  weight_BT: Any


class CriticTargets(NamedTuple):
  """Inputs of the critic's loss at each response token; weights as for the actor."""

  old_value_BT: Any
  return_BT: Any
  weight_BT: Any


class ModelFunctions(NamedTuple):
  """The jitted functions that run and train one model, and the layout of its state.

  With adapters the state, its gradients and the arguments of `init` and `zeros` hold the trained parameters alone.

  Attributes:
    init: (key, initial parameters or None) -> TrainState, created sharded. Initial parameters replace random ones of the same name.
    forward: (params, batch) -> outputs at every token: of the actor (log-probability of the target, entropy), of the critic (value,).
    zeros: params -> (gradients, sums) for `accumulate` to start from.
    accumulate: (gradients, sums, params, batch, targets, kl_coef) -> (gradients, sums) with one more micro-batch; donates the first two.
    apply: (state, gradients) -> (state after one step of the optimizer, norm of the gradients); donates the state.
    abstract: shapes, types and shardings of the state.
    abstract_params: those of all parameters.
  """

  init: Callable[..., TrainState]
  forward: Callable[..., tuple[jax.Array, ...]]
  zeros: Callable[..., tuple[Any, dict[str, jax.Array]]]
  accumulate: Callable[..., tuple[Any, dict[str, jax.Array]]]
  apply: Callable[..., tuple[TrainState, jax.Array]]
  abstract: TrainState
  abstract_params: dict[str, Any]


def actor_forward(
  model: LanguageModel, batch: PolicyBatch, temperature: float, shared: bool, early_stops: tuple[int, Sequence[int]] = (1, ())
) -> tuple[jax.Array, jax.Array]:
  """Return the (log-probability of each target, entropy) of the policy, both (B, T), float32.

  They are those of the distribution that tokens are sampled from, but for top-k and top-p. If stop tokens kept their probability where
  none is sampled, a policy could lower its KL divergence by raising it.

  Args:
    model: the policy.
    batch: a micro-batch.
    temperature: that of sampling; 0 counts as 1.
    shared: whether responses may share a prompt.
    early_stops: (`min_new`, stop tokens); these have probability 0 before a response has `min_new` tokens.
  """
  hidden_BTD = model.decoder(batch.tokens_BT, batch.positions_BT, intervals(batch, shared))
  scale = 1.0 / temperature if temperature else 1.0
  min_new, stop_ids = early_stops

  def piece(hidden_BtD, target_Bt, index_Bt):
    logits_BtV = scale * model.logits(hidden_BtD)
    if min_new > 1:
      is_stop_V = jnp.isin(jnp.arange(logits_BtV.shape[-1]), jnp.asarray(stop_ids, jnp.int32))
      logits_BtV = jnp.where((index_Bt + 1 < min_new)[..., None] & is_stop_V[None, None], -jnp.inf, logits_BtV)
    return losses.logprob_and_entropy(logits_BtV, target_Bt)

  rows, length = batch.target_BT.shape
  vocabulary = model.decoder.config.vocab_size or 1
  pieces = next(n for n in range(1, length + 1) if length % n == 0 and (rows * (length // n) * vocabulary <= _LOGITS or n == length))
  if pieces == 1:
    return piece(hidden_BTD, batch.target_BT, batch.target_index_BT)
  cut = lambda x: x.reshape(rows, pieces, length // pieces, *x.shape[2:]).swapaxes(0, 1)
  # Recomputed in the backward pass, which would otherwise keep the logits of all pieces.
  inputs = (cut(hidden_BTD), cut(batch.target_BT), cut(batch.target_index_BT))
  results = jax.lax.map(lambda xs: jax.checkpoint(piece)(*xs), inputs)
  logprob_BT, entropy_BT = (x.swapaxes(0, 1).reshape(rows, length) for x in results)
  return logprob_BT, entropy_BT


def critic_forward(model: ValueModel, batch: PolicyBatch, shared: bool) -> tuple[jax.Array]:
  """Return (values,), (B, T), float32: the return that the critic expects before each target."""
  return (model(batch.tokens_BT, batch.positions_BT, intervals(batch, shared)),)


def intervals(batch: PolicyBatch, shared: bool) -> list[tuple[Any, Any]]:
  """Return the key intervals that each token attends to. The second one costs time, so it is left out where nothing is shared."""
  return batch.intervals if shared else batch.intervals[:1]


def actor_loss(
  config: RftConfig, model: LanguageModel, batch: PolicyBatch, targets: ActorTargets, kl_coef: jax.Array, stop_ids: Sequence[int] = ()
):
  """Return the (loss, sums of metrics) of a micro-batch: clipped policy gradient minus entropy bonus, plus KL where `kl_in` is 'loss'.

  Args:
    config: of the run.
    model: the policy.
    batch: a micro-batch.
    targets: at each token of the batch.
    kl_coef: weight of the KL to the reference policy.
    stop_ids: tokens that end a response.
  """
  logprob_BT, entropy_BT = actor_forward(
    model, batch, config.rollout.temperature, config.num_generations > 1, (config.rollout.min_new, stop_ids)
  )
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
  """Return the (loss, sums of metrics) of a micro-batch: half the squared error of the values, clipped.

  Args:
    config: of the run.
    model: the critic.
    batch: a micro-batch.
    targets: at each token of the batch.
    kl_coef: unused; the actor's loss has the same arguments.
  """
  del kl_coef
  (value_BT,) = critic_forward(model, batch, config.num_generations > 1)
  t = targets
  total = lambda x_BT: jnp.sum(jnp.where(t.weight_BT > 0, x_BT, 0.0) * t.weight_BT)
  error_BT, clipped_BT = losses.value_loss(value_BT, t.old_value_BT, t.return_BT, config.value_clip)
  loss = total(error_BT)
  return loss, {'value_loss': loss, 'value_clip_fraction': total(clipped_BT)}


def build_actor(model: ModelConfig, config: RftConfig, updates: int, mesh: Mesh, stop_ids: Sequence[int] = ()) -> ModelFunctions:
  """Build the functions of the policy.

  Args:
    model: its shape.
    config: of the run.
    updates: of the whole run; the schedule of the learning rate spans them.
    mesh: of the run.
    stop_ids: tokens that end a response, and are not sampled before it has `rollout.min_new` tokens.
  """
  fixed = _shared(config)
  shared = _build_actor(model, fixed, mesh, tuple(stop_ids) if fixed.rollout.min_new > 1 else ())
  return shared._replace(init=step_lib.scheduled_init(shared.init, config.actor, updates))


def build_critic(model: ModelConfig, config: RftConfig, updates: int, mesh: Mesh) -> ModelFunctions:
  """Build the functions of the critic, a model of its own with a value at every token. Arguments as for `build_actor`."""
  fixed = _shared(config)
  shared = _build_critic(model, dataclasses.replace(fixed, rollout=dataclasses.replace(fixed.rollout, min_new=1)), mesh)
  return shared._replace(init=step_lib.scheduled_init(shared.init, config.critic, updates))


def _shared(config: RftConfig) -> RftConfig:
  """Fix the settings that the functions do not depend on, so that PPO and supervised tuning share one compilation."""
  actor, critic, rollout = without_schedule(config.actor), without_schedule(config.critic), config.rollout
  if config.method == 'sft':  # references are not sampled: they may end early
    rollout = dataclasses.replace(rollout, min_new=1)
  return dataclasses.replace(config, method='ppo', track_kl=True, actor=actor, critic=critic, rollout=rollout)


@functools.cache
def _build_actor(model: ModelConfig, config: RftConfig, mesh: Mesh, stop_ids: tuple[int, ...]) -> ModelFunctions:
  early_stops = (config.rollout.min_new, stop_ids)
  forward = functools.partial(
    actor_forward, temperature=config.rollout.temperature, shared=config.num_generations > 1, early_stops=early_stops
  )
  loss = functools.partial(actor_loss, config, stop_ids=stop_ids)
  names = ('policy_loss', 'entropy', 'clip_fraction', 'approx_kl')
  return _build(model, 'lm', forward, loss, names, config.actor, mesh, config.lora)


@functools.cache
def _build_critic(model: ModelConfig, config: RftConfig, mesh: Mesh) -> ModelFunctions:
  loss = functools.partial(critic_loss, config)
  names = ('value_loss', 'value_clip_fraction')
  forward = functools.partial(critic_forward, shared=config.num_generations > 1)
  return _build(model, 'value', forward, loss, names, config.critic, mesh, config.lora)


def _build(
  model: ModelConfig,
  head: str,
  forward: Callable[..., tuple[jax.Array, ...]],
  loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
  sums: tuple[str, ...],
  optimizer: OptimizerConfig,
  mesh: Mesh,
  adapters: LoraConfig,
) -> ModelFunctions:
  """Jit the functions of one model.

  Args:
    model: shape of the model.
    head: its head, as in `polar_jax.model.heads`.
    forward: (module, batch) -> outputs at every token.
    loss: (module, batch, targets, kl_coef) -> (loss, sums of metrics).
    sums: names of these metrics.
    optimizer: its schedule is ignored: see `_scheduled`.
    mesh: of the run.
    adapters: of the model.
  """
  tx = step_lib.keep_frozen(make_optimizer(optimizer, 1), model, adapters)
  abstract_model = heads.abstract_model(model, head, adapters)
  graphdef, _ = nnx.split(abstract_model)

  def init(key: jax.Array, initial: dict[str, Any] | None) -> TrainState:
    params, _ = lora.split(nnx.to_pure_dict(nnx.state(heads.make_model(model, head, nnx.Rngs(params=key), adapters), nnx.Param)), adapters)
    params = params | (initial or {})
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32))

  def accumulate(grads, totals, params, batch, targets, kl_coef):
    trained, frozen = lora.split(params, adapters)
    objective = lambda p: loss(nnx.merge(graphdef, lora.join(p, frozen)), batch, targets, kl_coef)
    (_, batch_sums), batch_grads = jax.value_and_grad(objective, has_aux=True)(trained)
    return jax.tree.map(jnp.add, grads, batch_grads), jax.tree.map(jnp.add, totals, batch_sums)

  def zeros(params):
    return jax.tree.map(jnp.zeros_like, params), {name: jnp.zeros((), jnp.float32) for name in sums}

  def apply(state: TrainState, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), optax.tree.norm(grads)

  abstract, shardings = step_lib.state_layout(abstract_model, init, tx, mesh, adapters)
  abstract_params = lora.abstract_params(abstract_model, mesh, adapters)
  whole, rows = NamedSharding(mesh, PartitionSpec()), sharding.batch_sharding(mesh)
  params, grads = jax.tree.map(lambda a: a.sharding, abstract_params), shardings.params
  return ModelFunctions(
    init=jax.jit(init, out_shardings=shardings),
    forward=jax.jit(lambda p, batch: forward(nnx.merge(graphdef, p), batch), in_shardings=(params, rows), out_shardings=whole),
    zeros=jax.jit(zeros, in_shardings=(grads,), out_shardings=(grads, whole)),
    accumulate=jax.jit(
      accumulate, in_shardings=(grads, whole, params, rows, rows, whole), out_shardings=(grads, whole), donate_argnums=(0, 1)
    ),
    apply=jax.jit(apply, in_shardings=(shardings, grads), out_shardings=(shardings, whole), donate_argnums=0),
    abstract=abstract,
    abstract_params=abstract_params,
  )
