"""The language model that reward models start from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model.cache import KVCache
from polar_jax.model.layers import param
from polar_jax.model.transformer import Decoder


class LanguageModel(nnx.Module):
  """A decoder with a vocabulary projection; `tie_embeddings` reuses the embedding table."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.decoder = Decoder(config, rngs=rngs)
    if not config.tie_embeddings:
      self.lm_head = param(rngs, (config.vocab_size or 0, config.d_model), ('vocab', 'embed'), config.init_std)

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, start_BT: jax.Array, end_BT: jax.Array) -> jax.Array:
    """Next-token logits (B, T, V) in float32."""
    return self.logits(self.decoder(tokens_BT, positions_BT, [(start_BT, end_BT)]))

  def extend(self, tokens_BT: jax.Array, count_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Logits (B, V) of what follows the last of each row's `count_B` new tokens, and the cache with them. See `Decoder.extend`."""
    hidden_BTD, cache = self.decoder.extend(tokens_BT, count_B, cache)
    last_B1D = jnp.take_along_axis(hidden_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    return self.logits(last_B1D)[:, 0], cache

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """(B, T, V) in float32 of hidden states."""
    head = self.decoder.embedding if self.decoder.config.tie_embeddings else self.lm_head
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, head[...].astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
