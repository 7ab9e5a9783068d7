"""Training objectives: next-token prediction, and ranking of pairs by reward. One trainer serves both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from polar_jax.config import LossConfig
from polar_jax.model.heads import HEADS
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.train import losses
from polar_jax.types import RankedBatch

# (model, batch) -> (sum of the loss, sums of metrics, arrays for each row). The array 'index' has the number of the example, -1: padding.
LossSums = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A head of `polar_jax.model.heads` with its loss.

  Attributes:
    head: name of the head.
    loss_sums: see `LossSums`.
    count: batch -> number of terms that the metrics, and of validation the loss, are the mean of; with weights, their sum.
    loss_count: what the training loss is divided by; None: `count`.
  """

  head: str
  loss_sums: LossSums
  count: Callable[[Any], jax.Array]
  loss_count: Callable[[Any], jax.Array] | None = None

  @property
  def name(self) -> str:
    """The objective's name in checkpoints."""
    return HEADS[self.head].objective


@functools.lru_cache
def ranking(options: LossConfig) -> Objective:
  """Return the objective of a reward model; one object for equal options, so that runs share their compiled step.

  Raises:
    ConfigError: a choice is unknown, or two options contradict each other.
  """
  options.check()
  loss_count = _official_count if options.mean == 'official' else None
  return Objective('reward', functools.partial(_pair_loss, options=options), _weight_of_pairs, loss_count)


def _pair_loss(model: RewardModel, batch: Any, options: LossConfig):
  rewards_BPC = pair_rewards(model, batch)
  if isinstance(batch, RankedBatch):
    loss, sums = losses.list_sums(rewards_BPC, batch.rank_BPC, batch.pair_mask_BP, options, batch.weight_BP)
    real_BPC = batch.rank_BPC >= 0
    last_BP1 = jnp.maximum(jnp.sum(real_BPC, axis=-1, keepdims=True) - 1, 0)
    ends_BPC = jnp.concatenate([rewards_BPC[..., :1], jnp.take_along_axis(rewards_BPC, last_BP1, axis=-1)], axis=-1)
    all_BPC = jnp.where(real_BPC, rewards_BPC, 0.0)
    return loss, sums, {'rewards_BPC': ends_BPC, 'candidate_rewards_BPC': all_BPC, 'index': batch.index_BP}
  loss, sums = losses.pair_sums(rewards_BPC, batch.pair_mask_BP, options, batch.margin_BP, batch.weight_BP)
  return loss, sums, {'rewards_BPC': rewards_BPC, 'index': batch.index_BP}


def _weight_of_pairs(batch: Any) -> jax.Array:
  return jnp.sum(_pair_weights(batch))


def _pair_weights(batch: Any) -> jax.Array:
  """Return the weights (B, P) of the pairs of a batch; padding has 0."""
  return batch.pair_mask_BP if batch.weight_BP is None else batch.pair_mask_BP * batch.weight_BP


def _official_count(batch: Any) -> jax.Array:
  """Return what the official trainer divides the sum of the loss by, if every row that has pairs is the pack of a device.

  XTuner multiplies the sum over the pairs of each device by the mean over devices of 1 / (pairs of a device), and averages over devices:
  R / mean(1 / n_r) for R rows of n_r pairs, which is the number of all pairs only if all rows have equally many.
  """
  pairs_B = jnp.sum(_pair_weights(batch), axis=1)
  real_B = pairs_B > 0
  rows, inverse = jnp.sum(real_B), jnp.sum(jnp.where(real_B, 1 / jnp.where(real_B, pairs_B, 1.0), 0.0))
  return rows**2 / jnp.maximum(inverse, jnp.finfo(jnp.float32).tiny)


def _text_loss(model: LanguageModel, batch: Any):
  logits_BTV = model(batch.tokens_BT, batch.positions_BT, batch.intervals)
  loss, sums = losses.next_token_sums(logits_BTV, batch.target_BT, batch.target_mask_BT)
  return loss, sums, {'largest_logit_B': jnp.max(jnp.abs(logits_BTV), axis=(1, 2)), 'index': batch.index_B}


RANKING = ranking(LossConfig())
NEXT_TOKEN = Objective('lm', _text_loss, lambda b: jnp.sum(b.target_mask_BT))
