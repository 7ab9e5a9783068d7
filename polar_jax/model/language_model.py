"""The language model: what reward models start from, and the policy of PPO."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model.kv_cache import DecodeBuffer, KVCache
from polar_jax.model.layers import param
from polar_jax.model.transformer import Block, Decoder
from polar_jax.types import Interval


class LanguageModel(nnx.Module):
  """A decoder with a vocabulary projection; `tie_embeddings` reuses the embedding table."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()):
    self.decoder = Decoder(config, rngs=rngs, lora=lora)
    if not config.tie_embeddings:
      self.lm_head = param(rngs, (config.known_vocab_size, config.d_model), ('vocab', 'embed'), config.init_std)

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval], index_BQ: jax.Array | None = None
  ) -> jax.Array:
    """Compute next-token logits (B, T, V) in float32, or (B, Q, V) at the tokens `index_BQ`. Arguments are those of `RewardModel`."""
    return self.logits(self.decoder(tokens_BT, positions_BT, intervals, index_BQ))

  def decode(
    self, token_B: jax.Array, kv_cache: KVCache, buffer: DecodeBuffer, step: jax.Array, blocks: Sequence[Block] | None = None
  ) -> tuple[jax.Array, DecodeBuffer]:
    """Compute the logits (B, V) that follow one more token of each row. Arguments and the returned buffer are those of `Decoder.decode`."""
    hidden_BD, buffer = self.decoder.decode(token_B, kv_cache, buffer, step, blocks)
    return self.logits(hidden_BD[:, None])[:, 0], buffer

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """Compute logits (B, T, V) in float32 from hidden states."""
    head = self.decoder.embedding if self.decoder.config.tie_embeddings else self.lm_head
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, head[...].astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
