"""KL estimates, token rewards and advantages of PPO, and the weights of its losses.

Pure functions. Arrays (R, T) are float32; `mask_RT` is 1 on the tokens of a response. In functions that take the mask, values elsewhere,
NaN included, affect neither results nor gradients, and results are 0 there. "verl" is its version 0.5, which the official scripts use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polar_jax.ppo.losses import LOG_RATIO

_K3 = 10.0  # nats; verl's bound of the third estimator


def kl(logprob: jax.Array, reference_logprob: jax.Array, estimator: str) -> jax.Array:
  """Estimate KL(policy || reference policy) from tokens that the policy sampled, in nats, elementwise.

  With x = log(policy / reference policy): k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman 2020, "Approximating KL divergence").
  k1 and k3 are unbiased; k3 is never negative. As a loss k1 has no effect, because its gradient has mean 0; the gradient of k2 is that
  of the KL. k3 has verl's bounds: the log-ratio within +-20, the estimate at most 10; beyond them it has no gradient.

  Raises:
    ValueError: `estimator` is not k1, k2 or k3.
  """
  log_ratio = logprob - reference_logprob
  if estimator == 'k1':
    return log_ratio
  if estimator == 'k2':
    return 0.5 * jnp.square(log_ratio)
  if estimator == 'k3':
    inverse = jnp.clip(-log_ratio, -LOG_RATIO, LOG_RATIO)
    # expm1, because exp(x) - 1 - x of a small x would be rounding error only.
    return jnp.minimum(jnp.expm1(inverse) - inverse, _K3)
  raise ValueError(f'KL estimator {estimator!r} does not exist; choose k1, k2 or k3')


def token_rewards(score_R: jax.Array, kl_RT: jax.Array, mask_RT: jax.Array, kl_coef: jax.Array | float) -> jax.Array:
  """Return (R, T): the score of a response on its last token, and -kl_coef * kl on every token.

  Args:
    score_R: shaped rewards.
    kl_RT: KL estimates.
    mask_RT: 1 on the tokens of a response.
    kl_coef: weight of the KL.
  """
  real_RT = mask_RT > 0
  last_RT = real_RT & (jnp.cumsum(real_RT, axis=1) == jnp.sum(real_RT, axis=1)[:, None])
  return jnp.where(last_RT, score_R[:, None], 0.0) - kl_coef * jnp.where(real_RT, kl_RT, 0.0)


def gae(
  rewards_RT: jax.Array, values_RT: jax.Array, mask_RT: jax.Array, gamma: jax.Array | float, lam: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
  """Return (advantages, returns), both (R, T), by generalized advantage estimation (Schulman et al. 2016, equation 16).

  The value after the end of a response is 0, also where it was cut at the most tokens allowed. Returns are the advantages, before
  whitening, plus the values. Tokens inside a response that the mask leaves out are skipped, as in verl.

  Args:
    rewards_RT: of each token.
    values_RT: of the critic, before each token.
    mask_RT: 1 on the tokens of a response.
    gamma: discount per token.
    lam: lambda of the estimator.
  """
  real_RT = mask_RT > 0
  rewards_RT, values_RT = jnp.where(real_RT, rewards_RT, 0.0), jnp.where(real_RT, values_RT, 0.0)

  def back(carry, now):
    next_value_R, next_advantage_R = carry
    reward_R, value_R, real_R = now
    advantage_R = reward_R + gamma * next_value_R - value_R + gamma * lam * next_advantage_R
    carry = jnp.where(real_R, value_R, next_value_R), jnp.where(real_R, advantage_R, next_advantage_R)
    return carry, jnp.where(real_R, advantage_R, 0.0)

  start_R = jnp.zeros_like(values_RT[:, 0])
  _, advantage_TR = jax.lax.scan(back, (start_R, start_R), (rewards_RT.T, values_RT.T, real_RT.T), reverse=True)
  return advantage_TR.T, advantage_TR.T + values_RT


def whiten(x_RT: jax.Array, mask_RT: jax.Array) -> jax.Array:
  """Scale `x_RT` to mean 0 and variance 1 over all real tokens, by the unbiased variance plus 1e-8 (verl's masked_whiten).

  With fewer than two tokens, where verl raises an error, only the mean is removed.
  """
  real_RT = mask_RT > 0
  count = jnp.sum(real_RT)
  mean = jnp.sum(jnp.where(real_RT, x_RT, 0.0)) / jnp.maximum(count, 1)
  centered_RT = jnp.where(real_RT, x_RT - mean, 0.0)
  variance = jnp.sum(jnp.square(centered_RT)) / jnp.maximum(count - 1, 1)
  return centered_RT * jnp.where(count > 1, jax.lax.rsqrt(variance + 1e-8), 1.0)


def grpo(score_R: jax.Array, group_R: jax.Array, num_groups: int, eps: float = 1e-6) -> jax.Array:
  """Return (R,): each score minus its group's mean, over the group's unbiased standard deviation + eps (Shao et al. 2024, section 4.1.2).

  A group of one gives 0. verl takes mean 0 and deviation 1 for it, so that its advantage is the raw score: adding a constant to every
  reward would then reinforce lone responses.

  Args:
    score_R: shaped rewards.
    group_R: which group each score belongs to, in [0, num_groups); scores of a group need not be adjacent.
    num_groups: static.
    eps: added to the deviation.
  """
  centered_R, count_R = _centered(score_R, group_R, num_groups)
  variance_G = jax.ops.segment_sum(jnp.square(centered_R), group_R, num_groups)
  return centered_R / (jnp.sqrt(variance_G[group_R] / jnp.maximum(count_R - 1, 1)) + eps)


def rloo(score_R: jax.Array, group_R: jax.Array, num_groups: int) -> jax.Array:
  """Return (R,): each score minus the mean of the others of its group (Ahmadian et al. 2024).

  A group of one gives 0, for the reason stated in `grpo`; verl gives the raw score.
  """
  centered_R, count_R = _centered(score_R, group_R, num_groups)
  return centered_R * count_R / jnp.maximum(count_R - 1, 1)


def _centered(score_R: jax.Array, group_R: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
  """Return (score minus the group's mean, size of the group), both (R,)."""
  # Equal scores must give exactly 0, because grpo divides by their deviation. Subtracting the minimum first makes their mean exact.
  shifted_R = score_R - jax.ops.segment_min(score_R, group_R, num_groups)[group_R]
  count_R = jax.ops.segment_sum(jnp.ones_like(score_R), group_R, num_groups)[group_R]
  return shifted_R - jax.ops.segment_sum(shifted_R, group_R, num_groups)[group_R] / count_R, count_R


def next_kl_coef(coef: float, kl: float, target: float, horizon: float, responses: int) -> float:
  """Return the next KL coefficient of an adaptive controller (Ziegler et al. 2019, as in verl; host floats).

  The relative error kl / target - 1 is clipped to +-0.2.

  Args:
    coef: of this step.
    kl: mean of this step, in nats per token.
    target: of the KL.
    horizon: in responses.
    responses: of this step.

  Raises:
    ValueError: the horizon is so short that the coefficient could reach 0.
  """
  if horizon <= 0.2 * responses:
    raise ValueError(f'a horizon of {horizon} responses is too short for steps of {responses}; it must exceed {0.2 * responses:g}')
  error = min(max(kl / target - 1, -0.2), 0.2)
  return coef * (1 + error * responses / horizon)


def loss_weights(mask_RT: jax.Array, mode: str) -> jax.Array:
  """Return weights (R, T) that sum to 1.

  sum(weights * loss) is the mean over tokens ('token'), or the mean over responses of the mean over their tokens ('sequence'). These are
  verl's token-mean and seq-mean-token-mean; a response without tokens is ignored, where verl divides by 0.

  Raises:
    ValueError: `mode` is neither.
  """
  real_RT = (mask_RT > 0).astype(jnp.float32)
  length_R = jnp.sum(real_RT, axis=1)
  if mode == 'token':
    return real_RT / jnp.maximum(jnp.sum(length_R), 1)
  if mode == 'sequence':
    return real_RT / (jnp.maximum(length_R, 1) * jnp.maximum(jnp.sum(length_R > 0), 1))[:, None]
  raise ValueError(f"mean {mode!r} of losses does not exist; choose 'token' or 'sequence'")
