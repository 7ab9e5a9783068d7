"""What an answer's tokens were worth: KL estimates, rewards and advantages of PPO, and the weights of its losses.

Pure functions. Arrays (R, T) are float32; `mask_RT` is 1 on the tokens of an answer. Of a function that is given the mask, what stands
elsewhere, NaN included, reaches no result and no gradient, and results are 0 there. "verl" is its version 0.5, which the official
scripts run on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polar_jax.ppo.losses import LOG_RATIO

_K3 = 10.0  # nats; verl's bound of the third estimator


def kl(logprob: jax.Array, reference_logprob: jax.Array, estimator: str) -> jax.Array:
  """Estimates of KL(policy || reference) from tokens that the policy sampled, in nats, elementwise.

  With x = log(policy / reference): k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman 2020, "Approximating KL divergence"). In
  expectation k1 and k3 are the KL; k3 is never negative. Minimised as a loss, k1 does nothing: its gradient has mean 0. k2's gradient is
  that of the KL. For k3, verl's bounds hold: the log-ratio within +-20, the estimate at most 10; beyond them it has no gradient.

  Raises:
    ValueError: `estimator` is none of k1, k2, k3.
  """
  log_ratio = logprob - reference_logprob
  if estimator == 'k1':
    return log_ratio
  if estimator == 'k2':
    return 0.5 * jnp.square(log_ratio)
  if estimator == 'k3':
    inverse = jnp.clip(-log_ratio, -LOG_RATIO, LOG_RATIO)
    # expm1, since exp(x) - 1 - x of a small x would be nothing but rounding.
    return jnp.minimum(jnp.expm1(inverse) - inverse, _K3)
  raise ValueError(f'no KL estimator {estimator!r}: k1, k2 or k3')


def token_rewards(score_R: jax.Array, kl_RT: jax.Array, mask_RT: jax.Array, kl_coef: jax.Array | float) -> jax.Array:
  """(R, T): an answer's score on its last token, and -kl_coef * kl on every token."""
  real_RT = mask_RT > 0
  last_RT = real_RT & (jnp.cumsum(real_RT, axis=1) == jnp.sum(real_RT, axis=1)[:, None])
  return jnp.where(last_RT, score_R[:, None], 0.0) - kl_coef * jnp.where(real_RT, kl_RT, 0.0)


def gae(
  rewards_RT: jax.Array, values_RT: jax.Array, mask_RT: jax.Array, gamma: jax.Array | float, lam: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
  """(advantages, returns), both (R, T): generalised advantage estimation (Schulman et al. 2016, equation 16).

  An answer's value is 0 behind its end, also where it was cut at the most tokens allowed. Returns are the advantages, not whitened, plus
  the values. Tokens inside an answer that the mask leaves out are stepped over, as in verl.
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
  """`x_RT` at mean 0 and variance 1 over all real tokens; the variance is the unbiased one, plus 1e-8 (verl's masked_whiten).

  Of fewer than two tokens, where verl stops with an error, only the mean is removed.
  """
  real_RT = mask_RT > 0
  count = jnp.sum(real_RT)
  mean = jnp.sum(jnp.where(real_RT, x_RT, 0.0)) / jnp.maximum(count, 1)
  centred_RT = jnp.where(real_RT, x_RT - mean, 0.0)
  variance = jnp.sum(jnp.square(centred_RT)) / jnp.maximum(count - 1, 1)
  return centred_RT * jnp.where(count > 1, jax.lax.rsqrt(variance + 1e-8), 1.0)


def grpo(score_R: jax.Array, group_R: jax.Array, num_groups: int, eps: float = 1e-6) -> jax.Array:
  """(R,): each score minus its group's mean, over the group's unbiased standard deviation + eps (Shao et al. 2024, section 4.1.2).

  A group of one gives 0. verl takes mean 0 and deviation 1 for it, so that its advantage is the bare score: were every reward raised by
  a constant, lone answers would be reinforced for nothing.

  Args:
    group_R: which group each score belongs to, in [0, num_groups); scores of a group need not be neighbours.
  """
  centred_R, count_R = _centred(score_R, group_R, num_groups)
  variance_G = jax.ops.segment_sum(jnp.square(centred_R), group_R, num_groups)
  return centred_R / (jnp.sqrt(variance_G[group_R] / jnp.maximum(count_R - 1, 1)) + eps)


def rloo(score_R: jax.Array, group_R: jax.Array, num_groups: int) -> jax.Array:
  """(R,): each score minus the mean of the others of its group (Ahmadian et al. 2024).

  A group of one gives 0, for the reason given at `grpo`; verl gives the bare score.
  """
  centred_R, count_R = _centred(score_R, group_R, num_groups)
  return centred_R * count_R / jnp.maximum(count_R - 1, 1)


def _centred(score_R: jax.Array, group_R: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
  """(score minus the group's mean, size of the group), both (R,)."""
  # Equal scores must come out as exactly 0, since grpo divides by their deviation. They do if the mean taken is that of zeros.
  shifted_R = score_R - jax.ops.segment_min(score_R, group_R, num_groups)[group_R]
  count_R = jax.ops.segment_sum(jnp.ones_like(score_R), group_R, num_groups)[group_R]
  return shifted_R - jax.ops.segment_sum(shifted_R, group_R, num_groups)[group_R] / count_R, count_R


def next_kl_coef(coef: float, kl: float, target: float, horizon: float, answers: int) -> float:
  """The KL coefficient after a step of `answers` answers whose mean KL was `kl` (Ziegler et al. 2019, as in verl; host floats).

  The relative error kl / target - 1 counts for at most +-0.2.

  Raises:
    ValueError: the horizon is so short that the coefficient could turn to 0 or below.
  """
  if horizon <= 0.2 * answers:
    raise ValueError(f'a horizon of {horizon} answers cannot steer steps of {answers}: more than {0.2 * answers:g} are needed')
  error = min(max(kl / target - 1, -0.2), 0.2)
  return coef * (1 + error * answers / horizon)


def loss_weights(mask_RT: jax.Array, mode: str) -> jax.Array:
  """(R, T), summing to 1: sum(weights * loss) is the mean over tokens ('token'), or over answers of each one's mean ('sequence').

  These are verl's token-mean and seq-mean-token-mean; an answer without tokens counts for nothing, where verl divides by 0.

  Raises:
    ValueError: `mode` is neither.
  """
  real_RT = (mask_RT > 0).astype(jnp.float32)
  length_R = jnp.sum(real_RT, axis=1)
  if mode == 'token':
    return real_RT / jnp.maximum(jnp.sum(length_R), 1)
  if mode == 'sequence':
    return real_RT / (jnp.maximum(length_R, 1) * jnp.maximum(jnp.sum(length_R > 0), 1))[:, None]
  raise ValueError(f"no mean {mode!r} of losses: 'token' or 'sequence'")
