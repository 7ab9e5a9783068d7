"""Continues texts with a language model: one pass over the prompts, then one token at a time from the cache."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from polar_jax.model import cache
from polar_jax.model.language_model import LanguageModel


def greedy(
  model: LanguageModel, prompt_BT: jax.Array, length_B: jax.Array, *, max_new: int, stop_ids: Sequence[int] = ()
) -> tuple[jax.Array, jax.Array]:
  """The likeliest token after each prompt, `max_new` times, or until a stop token. Meant to be jitted.

  Args:
    prompt_BT: prompts, padded on the right.
    length_B: tokens of each prompt, at least 1.

  Returns:
    (tokens (B, max_new), their number (B,)), a stop token included; what stands behind it is 0.
  """
  batch, width = prompt_BT.shape
  config = model.decoder.config
  logits_BV, memory = model.extend(prompt_BT, length_B, cache.empty(config, batch, width + max_new))
  stops_S = jnp.asarray(tuple(stop_ids), jnp.int32)

  def unfinished(state):
    step, *_, done_B = state
    return (step < max_new) & ~jnp.all(done_B)

  def one(state):
    step, logits_BV, memory, out_BM, done_B = state
    token_B = jnp.where(done_B, 0, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32))
    out_BM = out_BM.at[:, step].set(token_B)
    count_B = jnp.where(done_B, 0, 1).astype(jnp.int32)
    done_B = done_B | jnp.any(token_B[:, None] == stops_S[None], axis=-1)
    logits_BV, memory = model.extend(token_B[:, None], count_B, memory)
    return step + 1, logits_BV, memory, out_BM, done_B

  out_BM, done_B = jnp.zeros((batch, max_new), jnp.int32), jnp.zeros(batch, bool)
  *_, memory, out_BM, _ = jax.lax.while_loop(unfinished, one, (jnp.int32(0), logits_BV, memory, out_BM, done_B))
  return out_BM, memory.length_B - length_B
