"""Optimizers with warm-up, cosine decay, global-norm clipping and decoupled weight decay: AdamW, Adafactor and Muon.

The numbers of the learning-rate schedule are part of the optimizer state instead of constants of the step, so that runs of any length and
any learning rate share one compiled step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from polar_jax.config import OptimizerConfig
from polar_jax.train.compact_adam import scale_by_compact_adam

# The matrices that Muon orthogonalizes, each with its input and output axes. The axis of layers is not one of them.
_MATRICES = {
  **dict.fromkeys(('wq', 'wk', 'wv'), MuonDimensionNumbers((1,), (2, 3))),
  'wo': MuonDimensionNumbers((1, 2), (3,)),
  **dict.fromkeys(('w_gate', 'w_up', 'w_down'), MuonDimensionNumbers((1,), (2,))),
}


class Schedule(NamedTuple):
  """Learning rate: linear from 0 to `peak` over `warmup` updates, then a cosine down to `final * peak` at update `steps`.

  Attributes:
    count: updates so far, an int32 scalar; the other attributes are float32 scalars.
  """

  count: Any
  peak: Any
  warmup: Any
  steps: Any
  final: Any

  @classmethod
  def of(cls, config: OptimizerConfig, steps: int) -> Schedule:
    """Return the schedule of a run of `steps` updates, before the first one."""
    numbers = (config.learning_rate, round(config.warmup_ratio * steps), steps, config.final_lr_ratio)
    return cls(np.zeros((), np.int32), *(np.float32(number) for number in numbers))

  def rate(self) -> jax.Array:
    """Return the learning rate of the next update."""
    count = jnp.asarray(self.count, jnp.float32)
    decayed = jnp.clip((count - self.warmup) / jnp.maximum(self.steps - self.warmup, 1), 0, 1)
    cosine = self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * decayed))
    return self.peak * jnp.where(count < self.warmup, count / jnp.maximum(self.warmup, 1), cosine)


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], jax.Array]:
  """Return the function from update (0, 1, ...) to learning rate of a run of `steps` updates."""
  return lambda count: Schedule.of(config, steps)._replace(count=count).rate()


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Return the optimizer of a run of `steps` updates. Norm scales and the reward head have no weight decay.

  Raises:
    ConfigError: a choice is unknown, or two options contradict each other.
  """
  config.check_optimizer()
  optimizer = optax.chain(
    optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
    _direction(config),
    optax.add_decayed_weights(config.weight_decay, _decayed),
    _scale_by_schedule(config, steps),
  )
  return offloaded(optimizer) if config.offload else optimizer


class Offloaded(optax.GradientTransformation):
  """An optimizer whose state is in host memory between its updates."""


def offloaded(optimizer: optax.GradientTransformation) -> Offloaded:
  """Return an optimizer that takes its state from host memory; the caller's output shardings put it back (`step.state_layout`)."""

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return optimizer.update(updates, jax.device_put(state, jax.memory.Space.Device), params)

  return Offloaded(optimizer.init, update)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
  """Return the transformation from gradients to updates of unit size, which the learning rate scales."""
  if config.optimizer == 'adafactor':
    # Without the relative step size of arXiv 1804.04235, so that the learning rate means the same as for AdamW.
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
  if config.optimizer == 'muon':
    return optax.partition({'muon': _muon(config), 'adam': adam}, _muon_labels)
  return adam if config.moments == 'float32' else scale_by_compact_adam(config.b1, config.b2, config.eps, config.moments)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
  """Return the orthogonalized Nesterov momentum of matrices (Jordan et al. 2024), with the root mean square of an update of AdamW.

  That is 0.2 times the root of the larger dimension (arXiv 2502.16982), so that both share a learning rate.
  """
  axes = lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: _MATRICES[_name(path)], tree)

  def rescale(update: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
    fans = [math.prod(update.shape[axis] for axis in group) for group in (axes.reduction_axis, axes.output_axis)]
    return 0.2 * math.sqrt(max(fans)) * update

  scale = optax.stateless(lambda updates, _: jax.tree.map(rescale, updates, axes(updates)))
  return optax.chain(optax.contrib.scale_by_muon(beta=config.b1, weight_dimension_numbers=axes), scale)


def _muon_labels(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if _name(path) in _MATRICES else 'adam', params)


def _name(path: Any) -> str:
  return str(getattr(path[-1], 'key', path[-1]))


def _scale_by_schedule(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  def init(_: Any) -> Schedule:
    return jax.tree.map(jnp.asarray, Schedule.of(config, steps))

  def update(updates: Any, state: Schedule, _: Any = None) -> tuple[Any, Schedule]:
    rate = state.rate()
    return jax.tree.map(lambda u: -rate * u, updates), state._replace(count=state.count + 1)

  return optax.GradientTransformation(init, update)


def without_schedule(config: OptimizerConfig) -> OptimizerConfig:
  """Return the settings that a compiled step depends on: equal for runs that differ only in their schedule."""
  default = OptimizerConfig()
  names = ('learning_rate', 'warmup_ratio', 'final_lr_ratio')
  own = {f.name: getattr(config, f.name) for f in dataclasses.fields(OptimizerConfig)}
  return OptimizerConfig(**own | {name: getattr(default, name) for name in names})


def with_schedule(opt_state: Any, config: OptimizerConfig, steps: int) -> Any:
  """Return a fresh state of `make_optimizer(without_schedule(config), ...)` with the schedule of a run of `steps` updates."""

  def replace(part: Any) -> Any:
    if not isinstance(part, Schedule):
      return part
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), Schedule.of(config, steps), part)

  return jax.tree.map(replace, opt_state, is_leaf=lambda part: isinstance(part, Schedule))


def _decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: 'norm' not in str(path[-1]) and 'v_head' not in str(path[-1]), params)
