"""Experience of a PPO step, from which its updates learn: old log-probabilities, values, advantages and returns of response tokens."""

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
from polar_jax.data import layout
from polar_jax.ppo import advantages
from polar_jax.types import PolicyBatch, Rollouts


class Experience(NamedTuple):
  """Numpy arrays (R, T), float32: 0 outside the responses, and all 0 for quantities that the method does not use."""

  mask_RT: np.ndarray
  old_logprob_RT: np.ndarray
  reference_logprob_RT: np.ndarray
  entropy_RT: np.ndarray
  value_RT: np.ndarray
  advantage_RT: np.ndarray
  return_RT: np.ndarray


def run_forward(
  forward: Any, params: Any, batches: Sequence[PolicyBatch], mesh: Mesh, rollouts: Rollouts, outputs: int
) -> list[np.ndarray]:
  """Run a model on all micro-batches and collect its outputs for the tokens of the responses.

  Args:
    forward: `ModelFunctions.forward` of the actor or the critic.
    params: laid out on the mesh.
    batches: micro-batches that together hold all rollouts.
    mesh: of the run.
    rollouts: they give the shape (R, T).
    outputs: how many arrays `forward` returns.

  Returns:
    `outputs` arrays (R, T), float32, 0 outside the responses.
  """
  # All batches are dispatched before the first result is waited for.
  results = [forward(params, sharding.put_global(batch, mesh)) for batch in batches]
  out = [np.zeros(rollouts.tokens_RT.shape, np.float32) for _ in range(outputs)]
  for batch, values in zip(batches, jax.device_get(results), strict=True):
    for into_RT, values_BT in zip(out, values, strict=True):
      layout.gather_values(values_BT, batch, into_RT)
  return out


def micro_batch_rows(config: RftConfig, mesh: Mesh) -> int:
  """Return the rows of a micro-batch: `rft.micro_batch_rows`, rounded up to a multiple of the mesh's batch shards."""
  shards = sharding.batch_shards(mesh)
  return sharding.round_up(config.micro_batch_rows, shards)


@functools.partial(jax.jit, static_argnames=('config', 'groups'))
def estimate_advantages(
  config: RftConfig,
  groups: int,
  score_R: jax.Array,
  kl_RT: jax.Array,
  value_RT: jax.Array,
  mask_RT: jax.Array,
  group_R: jax.Array,
  kl_coef: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Estimate advantages and returns by `rft.advantage`.

  Without a critic the reward of a response is one number. It is compared with those of its group, and all tokens share the result.

  Args:
    config: of the run.
    groups: number of prompts of the step.
    score_R: shaped rewards.
    kl_RT: estimates of the KL to the reference policy at each token.
    value_RT: of the critic; unused without one.
    mask_RT: 1 on the tokens of the responses.
    group_R: which prompt each response belongs to, in [0, groups).
    kl_coef: counts as 0 unless the KL is part of the reward.

  Returns:
    (advantages, returns), both (R, T).
  """
  coef = kl_coef if config.kl_in == 'reward' else jnp.zeros_like(kl_coef)
  reward_RT = advantages.token_rewards(score_R, kl_RT, mask_RT, coef)
  if config.advantage == 'gae':
    advantage_RT, return_RT = advantages.gae(reward_RT, value_RT, mask_RT, config.gamma, config.gae_lambda)
    return (advantages.whiten(advantage_RT, mask_RT) if config.whiten else advantage_RT), return_RT
  compare = {'grpo': advantages.grpo, 'rloo': advantages.rloo}[config.advantage]
  advantage_RT = compare(jnp.sum(reward_RT, axis=1), group_R, groups)[:, None] * mask_RT
  return advantage_RT, jnp.zeros_like(advantage_RT)
