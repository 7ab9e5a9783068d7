"""The reward model: one bias-free scalar read at the reward token (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model.attention import Interval
from polar_jax.model.layers import param
from polar_jax.model.transformer import Decoder
from polar_jax.types import GroupBatch, PairBatch


def read_head(hidden_BQD: jax.Array, v_head_D: jax.Array) -> jax.Array:
  """Scalars (B, Q) in true float32, which accelerators give only when asked: a product this small costs nothing."""
  return jnp.einsum('BQD,D->BQ', hidden_BQD.astype(jnp.float32), v_head_D.astype(jnp.float32), precision='highest')


class RewardModel(nnx.Module):
  """A decoder with `v_head`. It has no vocabulary projection and never builds logits."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.decoder = Decoder(config, rngs=rngs)
    self.v_head = param(rngs, (config.d_model,), ('act_embed',), 0 if config.v_head_init == 'zero' else config.init_std)

  def __call__(self, batch: PairBatch) -> jax.Array:
    """Rewards (B, P, C) in float32; those of padding pairs are meaningless."""
    shape = batch.reward_index_BPC.shape
    index_BQ = batch.reward_index_BPC.reshape(shape[0], -1)
    return self._rewards(batch, [(batch.start_BT, batch.end_BT)], index_BQ).reshape(shape)

  def score(self, batch: GroupBatch) -> jax.Array:
    """Rewards (B, Q) of candidates that share their group's prefix, in float32; those of padding are meaningless."""
    intervals = [(batch.start_BT, batch.end_BT), (batch.prefix_start_BT, batch.prefix_end_BT)]
    return self._rewards(batch, intervals, batch.reward_index_BQ)

  def _rewards(self, batch: PairBatch | GroupBatch, intervals: Sequence[Interval], index_BQ: jax.Array) -> jax.Array:
    hidden_BQD = self.decoder(batch.tokens_BT, batch.positions_BT, intervals, index_BQ)
    return read_head(hidden_BQD, self.v_head[...])
