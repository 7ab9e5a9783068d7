"""The value model (critic) of PPO: the expected return of a partial response, at every token."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model.layers import param
from polar_jax.model.reward_model import read_head
from polar_jax.model.transformer import Decoder
from polar_jax.types import Interval


class ValueModel(nnx.Module):
  """A decoder with one bias-free scalar per token. Its parameters have the names and shapes of a `RewardModel`'s."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()):
    self.decoder = Decoder(config, rngs=rngs, lora=lora)
    self.v_head = param(rngs, (config.d_model,), ('act_embed',), 0 if config.v_head_init == 'zero' else config.init_std)

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval], index_BQ: jax.Array | None = None
  ) -> jax.Array:
    """Compute values (B, T) in float32, or (B, Q) at the tokens `index_BQ`. Arguments are those of `RewardModel`."""
    return read_head(self.decoder(tokens_BT, positions_BT, intervals, index_BQ), self.v_head[...])
