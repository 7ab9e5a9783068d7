"""What a step of PPO knows of its answers before it learns from them: scores, old log-probabilities, values, advantages, returns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import RftConfig
from polar_jax.ppo import advantages, rows
from polar_jax.types import PolicyBatch, Rollouts


class Experience(NamedTuple):
  """Arrays are numpy float32 (R, T), 0 off the answers. What a method does without is 0."""

  mask_RT: np.ndarray
  old_logprob_RT: np.ndarray
  reference_logprob_RT: np.ndarray
  entropy_RT: np.ndarray
  value_RT: np.ndarray
  advantage_RT: np.ndarray
  return_RT: np.ndarray


def read(function: Any, params: Any, batches: Sequence[PolicyBatch], mesh: Mesh, rollouts: Rollouts, outputs: int) -> list[np.ndarray]:
  """What a model says of every token of the answers: `outputs` arrays (R, T) float32."""
  # All are under way before the first is waited for.
  found = [function(params, sharding.put_global(batch, mesh)) for batch in batches]
  out = [np.zeros(rollouts.tokens_RT.shape, np.float32) for _ in range(outputs)]
  for batch, values in zip(batches, jax.device_get(found), strict=True):
    for into_RT, values_BT in zip(out, values, strict=True):
      rows.collect(values_BT, batch, into_RT)
  return out


def rows_of_batch(config: RftConfig, mesh: Mesh) -> int:
  """Rows of a micro-batch: `rft.micro_batch_rows`, rounded up to what the mesh divides."""
  shards = sharding.batch_shards(mesh)
  return -(-config.micro_batch_rows // shards) * shards


@functools.partial(jax.jit, static_argnames=('config', 'groups'))
def estimate(
  config: RftConfig,
  groups: int,
  score_R: jax.Array,
  kl_RT: jax.Array,
  value_RT: jax.Array,
  mask_RT: jax.Array,
  group_R: jax.Array,
  kl_coef: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """(advantages, returns), both (R, T), by `rft.advantage`. Where KL is no part of the reward its coefficient is taken as 0.

  Without a critic an answer's reward is one number, from which its group's mean is taken, and all its tokens share the result.
  """
  coef = kl_coef if config.kl_in == 'reward' else jnp.zeros_like(kl_coef)
  reward_RT = advantages.token_rewards(score_R, kl_RT, mask_RT, coef)
  if config.advantage == 'gae':
    advantage_RT, return_RT = advantages.gae(reward_RT, value_RT, mask_RT, config.gamma, config.gae_lambda)
    return (advantages.whiten(advantage_RT, mask_RT) if config.whiten else advantage_RT), return_RT
  compare = {'grpo': advantages.grpo, 'rloo': advantages.rloo}[config.advantage]
  advantage_RT = compare(jnp.sum(reward_RT, axis=1), group_R, groups)[:, None] * mask_RT
  return advantage_RT, jnp.zeros_like(advantage_RT)
