"""The language model that reward models start from."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model.cache import KVCache, Recent
from polar_jax.model.layers import param
from polar_jax.model.transformer import Block, Decoder


class LanguageModel(nnx.Module):
  """A decoder with a vocabulary projection; `tie_embeddings` reuses the embedding table."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.decoder = Decoder(config, rngs=rngs)
    if not config.tie_embeddings:
      self.lm_head = param(rngs, (config.vocab_size or 0, config.d_model), ('vocab', 'embed'), config.init_std)

  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, start_BT: jax.Array, end_BT: jax.Array) -> jax.Array:
    """Next-token logits (B, T, V) in float32."""
    return self.logits(self.decoder(tokens_BT, positions_BT, [(start_BT, end_BT)]))

  def next(
    self, token_B: jax.Array, cache: KVCache, recent: Recent, step: jax.Array, blocks: Sequence[Block] | None = None
  ) -> tuple[jax.Array, Recent]:
    """Logits (B, V) of what follows one more token of each row, number `step` of `recent`, and `recent` with it."""
    hidden_BD, recent = self.decoder.next(token_B, cache, recent, step, blocks)
    return self.logits(hidden_BD[:, None])[:, 0], recent

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """(B, T, V) in float32 of hidden states."""
    head = self.decoder.embedding if self.decoder.config.tie_embeddings else self.lm_head
    return jnp.einsum('BTD,VD->BTV', hidden_BTD, head[...].astype(hidden_BTD.dtype), preferred_element_type=jnp.float32)
