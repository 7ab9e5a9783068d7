"""Losses and their metrics as pure functions. Sums, not means: the train step divides by the count of the global batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from polar_jax.config import LossConfig

_BRADLEY_TERRY = LossConfig()
_BARRIER_EPSILON = 1e-3  # distance from the bounds at which the log barrier ends


def bradley_terry(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """Return -log sigmoid(chosen - rejected), elementwise (equations 7 and 8). Stable for margins of any size."""
  return jax.nn.softplus(rejected - chosen)


def focal(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
  """Return (1 - p)^2 times the Bradley-Terry loss, with p = max(2 sigmoid(chosen - rejected) - 1, 0), elementwise.

  Pairs that are ranked right count less, and those ranked wrong as before: the focal ranking loss of InternLM2 (arXiv 2403.17297),
  as XTuner computes it.
  """
  confidence = 2 * jax.nn.relu(jax.nn.sigmoid(chosen - rejected) - 0.5)
  return (1 - confidence) ** 2 * bradley_terry(chosen, rejected)


def smoothed_bradley_terry(chosen: jax.Array, rejected: jax.Array, label_smoothing: float) -> jax.Array:
  """Return the expected Bradley-Terry loss if a share `label_smoothing` of the labels is wrong, elementwise (arXiv 2401.06080)."""
  return (1 - label_smoothing) * bradley_terry(chosen, rejected) + label_smoothing * bradley_terry(rejected, chosen)


def log_barrier(rewards: jax.Array, bound: float) -> jax.Array:
  """Return -log(bound - r) - log(bound + r), elementwise: the penalty of InternLM2 (arXiv 2403.17297), whose bound is 5.

  As in XTuner, rewards are clamped 0.001 inside the bounds, so that one outside has a finite penalty and no gradient of it.
  """
  distance = lambda x: jnp.clip(x, _BARRIER_EPSILON, 2 * bound - _BARRIER_EPSILON)  # clamped after the subtraction, which rounds
  return -jnp.log(distance(bound - rewards)) - jnp.log(distance(bound + rewards))


def pair_loss(chosen: jax.Array, rejected: jax.Array, options: LossConfig) -> jax.Array:
  """Return the loss that the options name of pairs of rewards, elementwise. Plackett-Luce is Bradley-Terry for two candidates."""
  if options.name == 'focal':
    return focal(chosen, rejected)
  if options.label_smoothing:
    return smoothed_bradley_terry(chosen, rejected, options.label_smoothing)
  return bradley_terry(chosen, rejected)


def pair_regularization(chosen: jax.Array, rejected: jax.Array, options: LossConfig) -> jax.Array | None:
  """Return what the options add to the loss of each pair, elementwise; None: nothing.

  That is TRL's `center_rewards_coefficient` times (chosen + rejected)^2 (arXiv 2312.09244), and the penalties of both rewards.
  """
  terms = []
  if options.center_rewards_coefficient:
    terms.append(options.center_rewards_coefficient * (chosen + rejected) ** 2)
  if options.penalty != 'none':
    terms.append(options.penalty_weight * (_penalty(chosen, options) + _penalty(rejected, options)))
  return sum(terms[1:], terms[0]) if terms else None


def _penalty(rewards: jax.Array, options: LossConfig) -> jax.Array:
  return log_barrier(rewards, options.penalty_bound) if options.penalty == 'log_barrier' else rewards**2


def pair_sums(
  rewards_BPC: jax.Array,
  pair_mask_BP: jax.Array,
  options: LossConfig = _BRADLEY_TERRY,
  margin_BP: jax.Array | None = None,
  weight_BP: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the sum of the loss over real pairs and the sums of its metrics. A tie counts as half correct.

  Args:
    rewards_BPC: rewards of the chosen and rejected candidates.
    pair_mask_BP: positive for a real pair.
    options: which loss.
    margin_BP: subtracted from the difference of the rewards in the loss (Llama 2, arXiv 2307.09288, equation 2); None: 0.
    weight_BP: of each pair in the sums; None: 1.
  """
  chosen_BP, rejected_BP = rewards_BPC[..., 0], rewards_BPC[..., 1]
  total = functools.partial(_total, real_BP=pair_mask_BP > 0, weight_BP=weight_BP)
  margin_of_rewards_BP = chosen_BP - rejected_BP
  sums = {
    'accuracy': total(_correct(margin_of_rewards_BP)),
    'margin': total(margin_of_rewards_BP),
    'chosen_reward': total(chosen_BP),
    'rejected_reward': total(rejected_BP),
  }
  loss = total(pair_loss(chosen_BP if margin_BP is None else chosen_BP - margin_BP, rejected_BP, options))
  added_BP = pair_regularization(chosen_BP, rejected_BP, options)
  if added_BP is None:
    return loss, sums
  added = total(added_BP)
  return loss + added, sums | {'regularization': added}


def _total(values_BP: jax.Array, real_BP: jax.Array, weight_BP: jax.Array | None) -> jax.Array:
  """Return the sum of values over real examples."""
  return jnp.sum(jnp.where(real_BP, values_BP if weight_BP is None else weight_BP * values_BP, 0.0))


def _correct(difference: jax.Array) -> jax.Array:
  return jnp.where(difference > 0, 1.0, jnp.where(difference == 0, 0.5, 0.0))


def list_sums(
  rewards_BPC: jax.Array, rank_BPC: jax.Array, pair_mask_BP: jax.Array, options: LossConfig, weight_BP: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the sum of the loss over real ranked lists and the sums of its metrics. For two candidates it is that of `pair_sums`.

  The loss of a list is the mean of the loss of its pairs of candidates of different rank, or -log of the likelihood of the ranking in
  the model of Plackett and Luce (`plackett_luce`). Accuracy and margin are means over its pairs.

  Args:
    rewards_BPC: rewards of the candidates, best first.
    rank_BPC: rank of each candidate; -1: padding.
    pair_mask_BP: positive for a real list.
    options: which loss.
    weight_BP: of each list in the sums; None: 1.
  """
  total = functools.partial(_total, real_BP=pair_mask_BP > 0, weight_BP=weight_BP)
  real_BPC = rank_BPC >= 0
  rewards_BPC = jnp.where(real_BPC, rewards_BPC, 0.0)  # those of padding are meaningless, and could make a gradient NaN
  # In the last two axes: the better candidate, then the worse one.
  better_BPCC = (rank_BPC[..., :, None] < rank_BPC[..., None, :]) & real_BPC[..., :, None]
  mean_over_pairs = lambda values_BPCC: (
    jnp.sum(jnp.where(better_BPCC, values_BPCC, 0.0), (-2, -1)) / jnp.maximum(jnp.sum(better_BPCC, (-2, -1)), 1)
  )
  if options.name == 'plackett_luce':
    loss_BP = plackett_luce(rewards_BPC, better_BPCC)
  else:
    loss_BP = mean_over_pairs(pair_loss(rewards_BPC[..., :, None], rewards_BPC[..., None, :], options))
  difference_BPCC = rewards_BPC[..., :, None] - rewards_BPC[..., None, :]
  last_BP = jnp.maximum(jnp.sum(real_BPC, axis=-1) - 1, 0)
  sums = {
    'accuracy': total(mean_over_pairs(_correct(difference_BPCC))),
    'margin': total(mean_over_pairs(difference_BPCC)),
    'chosen_reward': total(rewards_BPC[..., 0]),
    'rejected_reward': total(jnp.take_along_axis(rewards_BPC, last_BP[..., None], axis=-1)[..., 0]),
  }
  added_BP = _list_regularization(rewards_BPC, real_BPC, options)
  loss = total(loss_BP)
  if added_BP is None:
    return loss, sums
  added = total(added_BP)
  return loss + added, sums | {'regularization': added}


def plackett_luce(rewards_PC: jax.Array, better_PCC: jax.Array) -> jax.Array:
  """Return -log of the likelihood of rankings (Plackett 1975; ListMLE, Xia et al. 2008).

  That is the sum over candidates i that are better than others of -log(exp(r_i) / (exp(r_i) + sum of exp(r_j) over all worse j)): the
  likelihood of choosing the best, then the best of the rest, and so on. With ties, each of several equal candidates is compared with the
  worse ones alone; one positive and K - 1 equal negatives give the softmax cross entropy of the positive (InfoNCE).

  Args:
    rewards_PC: (..., C) rewards.
    better_PCC: (..., C, C) whether the first candidate is better than the second.
  """
  difference_PCC = rewards_PC[..., None, :] - rewards_PC[..., :, None]  # worse - better
  is_better_PC = jnp.any(better_PCC, axis=-1)
  # A log-sum-exp over nothing has no gradient: candidates that are better than none get some terms, which the sum leaves out.
  terms_PC = jax.nn.softplus(jax.nn.logsumexp(difference_PCC, axis=-1, where=better_PCC | ~is_better_PC[..., None]))
  return jnp.sum(jnp.where(is_better_PC, terms_PC, 0.0), axis=-1)


def _list_regularization(rewards_BPC: jax.Array, real_BPC: jax.Array, options: LossConfig) -> jax.Array | None:
  """Return `pair_regularization` for lists: means over candidates in place of halves of sums over the two of a pair."""
  per_candidate_BP = 2 / jnp.maximum(jnp.sum(real_BPC, axis=-1), 1)
  over_list = lambda values_BPC: per_candidate_BP * jnp.sum(jnp.where(real_BPC, values_BPC, 0.0), axis=-1)
  terms = []
  if options.center_rewards_coefficient:
    terms.append(options.center_rewards_coefficient * over_list(rewards_BPC) ** 2)
  if options.penalty != 'none':
    terms.append(options.penalty_weight * over_list(_penalty(rewards_BPC, options)))
  return sum(terms[1:], terms[0]) if terms else None


def next_token_sums(logits_BTV: jax.Array, target_BT: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Return the sum of the next-token cross entropy in nats over real targets and the sums of its metrics."""
  picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
  loss_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
  correct_BT = (jnp.argmax(logits_BTV, axis=-1) == target_BT).astype(jnp.float32)
  real_BT = mask_BT > 0
  return jnp.sum(jnp.where(real_BT, loss_BT, 0.0)), {'accuracy': jnp.sum(jnp.where(real_BT, correct_BT, 0.0))}
