"""AdamW with warm-up, cosine decay and global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import optax

from polar_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Linear from 0 over `warmup_ratio * steps` steps, then a cosine down to `final_lr_ratio` of the peak at `steps`."""
  warmup = round(config.warmup_ratio * steps)
  if warmup >= steps:
    return optax.linear_schedule(0.0, config.learning_rate, warmup)
  end = config.final_lr_ratio * config.learning_rate
  return optax.warmup_cosine_decay_schedule(0.0 if warmup else config.learning_rate, config.learning_rate, warmup, steps, end)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer of a run. Weight decay leaves norm scales and the reward head alone."""
  clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
  adamw = optax.adamw(
    learning_rate_schedule(config, steps),
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    mask=_decayed,
  )
  return optax.chain(clip, adamw)


def _decayed(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, _: 'norm' not in str(path[-1]) and 'v_head' not in str(path[-1]), params)
