"""The value model of PPO: what reward a policy may still expect, at every token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model.attention import Interval
from polar_jax.model.layers import param
from polar_jax.model.reward_model import read_head
from polar_jax.model.transformer import Decoder


class ValueModel(nnx.Module):
  """A decoder with one bias-free scalar per token. Its parameters have the names and shapes of a `RewardModel`'s."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.decoder = Decoder(config, rngs=rngs)
    self.v_head = param(rngs, (config.d_model,), ('act_embed',), 0 if config.v_head_init == 'zero' else config.init_std)

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, start_BT: jax.Array, end_BT: jax.Array) -> jax.Array:
    """Values (B, T) in float32."""
    return self.values(tokens_BT, positions_BT, [(start_BT, end_BT)])

  def values(self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval]) -> jax.Array:
    """The same where a token sees the keys of several intervals."""
    return read_head(self.decoder(tokens_BT, positions_BT, intervals), self.v_head[...])
