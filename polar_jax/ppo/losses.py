"""Losses of PPO per token. The caller weights and sums them, so that no result depends on how responses are packed into rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LOG_RATIO = 20.0  # nats; verl's bound of a log-ratio before it is exponentiated


def policy_loss(
  logprob: jax.Array,
  old_logprob: jax.Array,
  advantage: jax.Array,
  clip_low: jax.Array | float,
  clip_high: jax.Array | float,
  dual_clip: jax.Array | float | None,
) -> tuple[jax.Array, jax.Array]:
  """Return (loss, 1 where the clip is active), elementwise: PPO's clipped surrogate (Schulman et al. 2017, equation 7), negated.

  The ratio of new to old probability has no effect beyond 1 + clip_high (positive advantages) or 1 - clip_low (negative advantages); the
  two bounds are separate as in DAPO (Yu et al. 2025). Where the clip is active, the loss has no gradient. As in verl 0.5, the log-ratio is
  kept within +-20, and the flag ignores the dual clip.

  Args:
    logprob: of the policy, for the sampled tokens.
    old_logprob: of the policy that sampled them.
    advantage: of each token.
    clip_low: how far the ratio may fall below 1.
    clip_high: how far it may rise above 1.
    dual_clip: above 1; a negative advantage costs at most this many times its size, without gradient beyond (dual clip,
      Ye et al. 2020). None: no bound.
  """
  ratio = jnp.exp(jnp.clip(logprob - old_logprob, -LOG_RATIO, LOG_RATIO))
  free, bound = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
  clipped = bound > free
  loss = jnp.where(clipped, bound, free)
  if dual_clip is not None:
    max_loss = -advantage * dual_clip
    loss = jnp.where((advantage < 0) & (loss > max_loss), max_loss, loss)
  return loss, clipped.astype(jnp.float32)


def value_loss(value: jax.Array, old_value: jax.Array, return_: jax.Array, clip: jax.Array | float | None) -> tuple[jax.Array, jax.Array]:
  """Return (loss, 1 where the clip is active), elementwise: half the squared error of the value, or of the value clipped to the old one.

  The larger of the two errors counts, as in OpenAI's baselines and verl 0.5; where that is the clipped one, there is no gradient.

  Args:
    value: of the critic.
    old_value: of the critic before the updates of this step.
    return_: the target.
    clip: how far a value may move from `old_value`, in units of reward. None: anywhere.
  """
  free = jnp.square(value - return_)
  if clip is None:
    return 0.5 * free, jnp.zeros_like(free)
  bound = jnp.square(jnp.clip(value, old_value - clip, old_value + clip) - return_)
  clipped = bound > free
  return 0.5 * jnp.where(clipped, bound, free), clipped.astype(jnp.float32)


def logprob_and_entropy(logits_BTV: jax.Array, target_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return (log-probability of each target, entropy), both (B, T), float32, in nats.

  Logits may have any offset, and may be -inf, but not all of them.
  """
  logits_BTV = logits_BTV.astype(jnp.float32)
  shifted_BTV = logits_BTV - jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
  norm_BT = jnp.log(jnp.sum(jnp.exp(shifted_BTV), axis=-1))
  prob_BTV = jnp.exp(shifted_BTV - norm_BT[..., None])
  # 0 * -inf is NaN, in the entropy and, if only the product were guarded, in its gradient.
  finite_BTV = jnp.where(prob_BTV > 0, shifted_BTV, 0.0)
  entropy_BT = norm_BT - jnp.sum(prob_BTV * finite_BTV, axis=-1)
  return jnp.take_along_axis(shifted_BTV, target_BT[..., None], axis=-1)[..., 0] - norm_BT, entropy_BT
