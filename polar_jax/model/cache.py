"""Keys and values of the tokens that a language model has read, so that the next token costs one token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from polar_jax.config import ModelConfig
from polar_jax.sharding import constrain


class KVCache(NamedTuple):
  """Head-major: the slots of one head lie together, which is how decoding reads them. Slot s of a row holds its token s."""

  k_LBKSH: jax.Array
  v_LBKSH: jax.Array
  length_B: jax.Array  # int32, tokens that each row holds

  @property
  def capacity(self) -> int:
    """Slots of a row."""
    return self.k_LBKSH.shape[3]

  def write(self, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> KVCache:
    """Puts keys and values behind each row's last token, in one layer. Lengths stay: they are the same for all layers."""

    def put(all_LBKSH: jax.Array, new_BTKH: jax.Array) -> jax.Array:
      batch, tokens, heads, _ = new_BTKH.shape
      row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
      slot_B1T = self.length_B[:, None, None] + jnp.arange(tokens)[None, None]
      return all_LBKSH.at[layer, row, head, slot_B1T].set(new_BTKH.swapaxes(1, 2).astype(all_LBKSH.dtype), mode='drop')

    return self._replace(k_LBKSH=put(self.k_LBKSH, k_BTKH), v_LBKSH=put(self.v_LBKSH, v_BTKH))

  def read(self, layer: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(k_BSKH, v_BSKH) of one layer: every slot, filled or not."""
    one = lambda all_LBKSH: jax.lax.dynamic_index_in_dim(all_LBKSH, layer, keepdims=False).swapaxes(1, 2).astype(dtype)
    return one(self.k_LBKSH), one(self.v_LBKSH)


def empty(config: ModelConfig, batch: int, capacity: int) -> KVCache:
  """A cache without tokens, in the compute dtype."""
  shape = (config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim)
  zeros = lambda: constrain(jnp.zeros(shape, config.compute_dtype), 'layers', 'batch', 'kv_heads', 'length', 'head_dim')
  return KVCache(zeros(), zeros(), jnp.zeros(batch, jnp.int32))
