"""Losses and their metrics as pure functions. Sums, not means: the train step divides by the count of the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def bradley_terry(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """Return -log sigmoid(chosen - rejected), elementwise (equations 7 and 8). Stable for margins of any size."""
  return jax.nn.softplus(rejected - chosen)


def pair_sums(rewards_BPC: jax.Array, pair_mask_BP: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the sum of the loss over real pairs and the sums of its metrics. A tie counts as half correct."""
  chosen_BP, rejected_BP = rewards_BPC[..., 0], rewards_BPC[..., 1]
  real_BP = pair_mask_BP > 0

  def total(values_BP: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(real_BP, values_BP, 0.0))

  margin_BP = chosen_BP - rejected_BP
  sums = {
    'accuracy': total(jnp.where(margin_BP > 0, 1.0, jnp.where(margin_BP == 0, 0.5, 0.0))),
    'margin': total(margin_BP),
    'chosen_reward': total(chosen_BP),
    'rejected_reward': total(rejected_BP),
  }
  return total(bradley_terry(chosen_BP, rejected_BP)), sums


def next_token_sums(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the sum of the next-token cross entropy in nats over real targets and the sums of its metrics."""
  picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
  loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
  correct_BT = (jnp.argmax(logits_BTV, axis=-1) == target_BT).astype(jnp.float32)
  real_BT = mask_BT > 0
  return jnp.sum(jnp.where(real_BT, loss_BT, 0.0)), {'accuracy': jnp.sum(jnp.where(real_BT, correct_BT, 0.0))}
