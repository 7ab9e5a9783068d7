"""Training objectives: next-token prediction, and ranking of pairs by reward. One trainer serves both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from polar_jax.model.heads import HEADS
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.train import losses

# (model, batch) -> (sum of the loss, sums of metrics, arrays for each row). The array 'index' has the number of the example, -1: padding.
LossSums = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Objective:
  """A head of `polar_jax.model.heads` with its loss.

  Attributes:
    head: name of the head.
    loss_sums: see `LossSums`.
    count: batch -> number of terms that the loss is the mean of.
  """

  head: str
  loss_sums: LossSums
  count: Callable[[Any], jax.Array]

  @property
  def name(self) -> str:
    """The objective's name in checkpoints."""
    return HEADS[self.head].objective


def _pair_loss(model: RewardModel, batch: Any):
  rewards_BPC = pair_rewards(model, batch)
  loss, sums = losses.pair_sums(rewards_BPC, batch.pair_mask_BP)
  return loss, sums, {'rewards_BPC': rewards_BPC, 'index': batch.index_BP}


def _text_loss(model: LanguageModel, batch: Any):
  logits_BTV = model(batch.tokens_BT, batch.positions_BT, batch.intervals)
  loss, sums = losses.next_token_sums(logits_BTV, batch.target_BT, batch.target_mask_BT)
  return loss, sums, {'largest_logit_B': jnp.max(jnp.abs(logits_BTV), axis=(1, 2)), 'index': batch.index_B}


RANKING = Objective('reward', _pair_loss, lambda b: jnp.sum(b.pair_mask_BP))
NEXT_TOKEN = Objective('lm', _text_loss, lambda b: jnp.sum(b.target_mask_BT))
