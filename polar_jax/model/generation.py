"""Continues texts with a language model, many at a time: the part that runs on the device.

A slot holds one text. Texts enter with their prompts packed into few rows (`admit`), then every slot gets one token at a time
(`advance`) until some have ended and others can enter. The last token of a prompt is not read when the text enters: it is the
first that `advance` reads, so every answer's token comes from the same computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from polar_jax.config import ModelConfig, RolloutConfig
from polar_jax.model import cache, sampling
from polar_jax.model.cache import KVCache
from polar_jax.model.language_model import LanguageModel

STEPS = 32  # tokens at most between two looks of the host


class Slots(NamedTuple):
  """Texts in the making."""

  memory: KVCache
  token_B: jax.Array  # int32, each text's last token, which the model has not read yet
  rollout_B: jax.Array  # int32, which text this is
  place_B: jax.Array  # int32, tokens of its answer so far
  limit_B: jax.Array  # int32, the most it may have
  active_B: jax.Array  # bool


class Entering(NamedTuple):
  """Texts that enter slots. Their prompts, without the last tokens, are packed into rows."""

  tokens_PT: jax.Array
  positions_PT: jax.Array
  start_PT: jax.Array  # a prompt's first column, at each of its tokens
  slot_PT: jax.Array  # -1: padding
  fresh_B: jax.Array  # bool: which slots are taken
  length_B: jax.Array  # tokens of each prompt without its last
  token_B: jax.Array
  rollout_B: jax.Array
  limit_B: jax.Array


class Answered(NamedTuple):
  """What one call of `advance` appended: the first `place_B` minus the earlier `place_B` steps of each slot."""

  tokens_MB: jax.Array  # int32, M is STEPS
  logprob_MB: jax.Array  # float32
  place_B: jax.Array
  active_B: jax.Array


def vacant(config: ModelConfig, slots: int, capacity: int) -> Slots:
  """Slots without texts, each with room for `capacity` tokens."""
  zeros = lambda: jnp.zeros(slots, jnp.int32)
  return Slots(cache.empty(config, slots, capacity), zeros(), zeros(), zeros(), zeros(), jnp.zeros(slots, bool))


def admit(model: LanguageModel, slots: Slots, new: Entering) -> Slots:
  """Reads the prompts of the texts that enter. Meant to be jitted, with `slots` donated."""
  positions_PT, end_PT = new.positions_PT, new.start_PT + new.positions_PT + 1
  k_LPTKH, v_LPTKH = model.decoder.read(new.tokens_PT, positions_PT, [(new.start_PT, jnp.where(new.slot_PT < 0, new.start_PT, end_PT))])
  either = lambda new_B, old_B: jnp.where(new.fresh_B, new_B, old_B)
  memory = slots.memory.fill(k_LPTKH, v_LPTKH, new.slot_PT, positions_PT, either(new.length_B, slots.memory.length_B))
  return Slots(
    memory,
    either(new.token_B, slots.token_B),
    either(new.rollout_B, slots.rollout_B),
    either(0, slots.place_B),
    either(new.limit_B, slots.limit_B),
    slots.active_B | new.fresh_B,
  )


def advance(
  model: LanguageModel, slots: Slots, key: jax.Array, leave: jax.Array, config: RolloutConfig, stop_ids: Sequence[int]
) -> tuple[Slots, Answered]:
  """Up to `STEPS` tokens for every active slot, or until `leave` of them have ended. Meant to be jitted, with `slots` donated."""
  batch = len(slots.token_B)
  stops_I = jnp.asarray(tuple(stop_ids), jnp.int32)
  vocab = model.decoder.config.vocab_size or 0
  start = jnp.sum(slots.active_B)
  # Only what changes travels through the loop.
  fixed_rollout_B, fixed_limit_B = slots.rollout_B, slots.limit_B

  def unfinished(state):
    step, _, _, _, active_B, *_ = state
    left = jnp.sum(active_B)
    return (step < STEPS) & (left > 0) & (start - left < leave)

  def one(state):
    step, memory, token_B, place_B, active_B, tokens_MB, logprob_MB = state
    logits_BV, memory = model.next(token_B, memory, active_B)
    noise_BM = sampling.noise(key, fixed_rollout_B, place_B, vocab)
    drawn_B, logprob_B = sampling.draw(
      logits_BV, noise_BM, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k
    )
    token_B = jnp.where(active_B, drawn_B, token_B)
    place_B = place_B + active_B.astype(jnp.int32)
    put = lambda all_MB, new_B: jax.lax.dynamic_update_index_in_dim(all_MB, jnp.where(active_B, new_B, 0), step, axis=0)
    tokens_MB, logprob_MB = put(tokens_MB, token_B), put(logprob_MB, logprob_B)
    active_B &= ~jnp.any(token_B[:, None] == stops_I[None], axis=1) & (place_B < fixed_limit_B)
    return step + 1, memory, token_B, place_B, active_B, tokens_MB, logprob_MB

  out = (jnp.zeros((STEPS, batch), jnp.int32), jnp.zeros((STEPS, batch), jnp.float32))
  state = (jnp.int32(0), slots.memory, slots.token_B, slots.place_B, slots.active_B, *out)
  _, memory, token_B, place_B, active_B, *out = jax.lax.while_loop(unfinished, one, state)
  slots = Slots(memory, token_B, fixed_rollout_B, place_B, fixed_limit_B, active_B)
  return slots, Answered(*out, place_B, active_B)
