"""The reward model: one bias-free scalar read at the reward token (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model.layers import param
from polar_jax.model.transformer import Decoder
from polar_jax.types import GroupBatch, Interval, PairBatch, RankedBatch, SequenceBatch


def read_head(hidden_BQD: jax.Array, v_head_D: jax.Array) -> jax.Array:
  """Compute scalars (B, Q) in true float32, which accelerators use only on request; a product this small costs nothing."""
  return jnp.einsum('BQD,D->BQ', hidden_BQD.astype(jnp.float32), v_head_D.astype(jnp.float32), precision='highest')


class RewardModel(nnx.Module):
  """A decoder with `v_head`. It has no vocabulary projection and never builds logits."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()):
    self.decoder = Decoder(config, rngs=rngs, lora=lora)
    self.v_head = param(rngs, (config.d_model,), ('act_embed',), 0 if config.v_head_init == 'zero' else config.init_std)

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval], index_BQ: jax.Array | None = None
  ) -> jax.Array:
    """Compute rewards (B, Q) in float32 at the tokens `index_BQ`, or (B, T) at every token.

    Args:
      tokens_BT: token ids.
      positions_BT: positions in the original sequences.
      intervals: the keys that each token sees: those of all intervals.
      index_BQ: indices of the reward tokens.
    """
    return read_head(self.decoder(tokens_BT, positions_BT, intervals, index_BQ), self.v_head[...])


def pair_rewards(model: RewardModel, batch: PairBatch | RankedBatch) -> jax.Array:
  """Compute the rewards (B, P, C) of a batch of pairs or of ranked lists, in float32. Those of padding are meaningless."""
  shape = batch.reward_index_BPC.shape
  return model(batch.tokens_BT, batch.positions_BT, batch.intervals, batch.reward_index_BPC.reshape(shape[0], -1)).reshape(shape)


def group_rewards(model: RewardModel, batch: GroupBatch) -> jax.Array:
  """Compute the rewards (B, Q) of a batch of groups, in float32. Those of padding are meaningless."""
  return model(batch.tokens_BT, batch.positions_BT, batch.intervals, batch.reward_index_BQ)


def sequence_rewards(model: RewardModel, batch: SequenceBatch) -> jax.Array:
  """Compute the rewards (B,) of a batch of single sequences, in float32. Those of padding rows are meaningless."""
  return model(batch.tokens_BT, batch.positions_BT, batch.intervals, batch.reward_index_B[:, None])[:, 0]
