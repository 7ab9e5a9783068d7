"""Continues texts with a language model, many at a time: the part that runs on the device.

A slot holds one text. Texts enter with their prompts packed into few rows (`admit`), then every slot gets one token at a time
(`advance`) until some have ended and others can enter. The last token of a prompt is not read when the text enters: it is the
first that `advance` reads, so every answer's token comes from the same computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polar_jax.config import ModelConfig, RolloutConfig
from polar_jax.model import cache, sampling
from polar_jax.model.cache import KVCache
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.transformer import Block

STEPS = 16  # tokens at most between two looks of the host


class Slots(NamedTuple):
  """Texts in the making."""

  memory: KVCache
  token_B: jax.Array  # int32, each text's last token, which the model has not read yet
  rollout_B: jax.Array  # int32, which text this is
  place_B: jax.Array  # int32, tokens of its answer so far
  limit_B: jax.Array  # int32, the most it may have
  active_B: jax.Array  # bool


class Entering(NamedTuple):
  """Texts that enter slots. Their prompts, without the last tokens, are packed into rows. int32."""

  tokens_PT: Any
  positions_PT: Any
  start_PT: Any  # a prompt's first column, at each of its tokens
  slot_PT: Any  # -1: padding
  fresh_B: Any  # 1 at the slots that are taken
  length_B: Any  # tokens of each prompt without its last
  token_B: Any
  rollout_B: Any
  limit_B: Any


class Answered(NamedTuple):
  """What one call of `advance` appended: the first `place_B` minus the earlier `place_B` steps of each slot."""

  tokens_MB: jax.Array  # int32, M is STEPS
  logprob_MB: jax.Array  # float32
  place_B: jax.Array
  active_B: jax.Array


def vacant(config: ModelConfig, slots: int, capacity: int) -> Slots:
  """Slots without texts, each with room for `capacity` tokens."""
  zeros = lambda: jnp.zeros(slots, jnp.int32)
  return Slots(cache.empty(config, slots, capacity + STEPS), zeros(), zeros(), zeros(), zeros(), jnp.zeros(slots, bool))


def admit(model: LanguageModel, slots: Slots, new: Entering) -> Slots:
  """Reads the prompts of the texts that enter. Meant to be jitted, with `slots` donated."""
  positions_PT, end_PT = new.positions_PT, new.start_PT + new.positions_PT + 1
  k_LPTKH, v_LPTKH = model.decoder.read(new.tokens_PT, positions_PT, [(new.start_PT, jnp.where(new.slot_PT < 0, new.start_PT, end_PT))])
  either = lambda new_B, old_B: jnp.where(new.fresh_B > 0, new_B, old_B)
  memory = slots.memory.fill(k_LPTKH, v_LPTKH, new.slot_PT, positions_PT, either(new.length_B, slots.memory.length_B))
  return Slots(
    memory,
    either(new.token_B, slots.token_B),
    either(new.rollout_B, slots.rollout_B),
    either(0, slots.place_B),
    either(new.limit_B, slots.limit_B),
    slots.active_B | (new.fresh_B > 0),
  )


def advance(
  model: LanguageModel,
  blocks: Sequence[Block] | None,
  slots: Slots,
  key: jax.Array,
  leave: jax.Array,
  config: RolloutConfig,
  stop_ids: Sequence[int],
) -> tuple[Slots, Answered]:
  """Up to `STEPS` tokens for every active slot, or until `leave` of them have ended. Meant to be jitted, with `slots` donated.

  `blocks`: what `Decoder.blocks` gave.
  """
  batch = len(slots.token_B)
  stops_I = jnp.asarray(tuple(stop_ids), jnp.int32)
  vocab = model.decoder.config.vocab_size or 0
  start = jnp.sum(slots.active_B)
  # A slot whose text has ended has nothing that must be read.
  memory = slots.memory._replace(length_B=jnp.where(slots.active_B, slots.memory.length_B, 0))

  def unfinished(state):
    step, _, _, _, active_B, *_ = state
    left = jnp.sum(active_B)
    return (step < STEPS) & (left > 0) & (start - left < leave)

  def one(state):
    step, recent, token_B, place_B, active_B, tokens_MB, logprob_MB = state
    logits_BV, recent = model.next(token_B, memory, recent, step, blocks)
    noise_BM = sampling.noise(key, slots.rollout_B, place_B, vocab)
    barred_BV = (place_B + 1 < config.min_new)[:, None] & jnp.isin(jnp.arange(vocab), stops_I)[None] if config.min_new > 1 else None
    drawn_B, logprob_B = sampling.draw(
      logits_BV, noise_BM, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, barred_BV=barred_BV
    )
    token_B = jnp.where(active_B, drawn_B, token_B)
    place_B = place_B + active_B.astype(jnp.int32)
    put = lambda all_MB, new_B: jax.lax.dynamic_update_index_in_dim(all_MB, jnp.where(active_B, new_B, 0), step, axis=0)
    tokens_MB, logprob_MB = put(tokens_MB, token_B), put(logprob_MB, logprob_B)
    active_B &= ~jnp.any(token_B[:, None] == stops_I[None], axis=1) & (place_B < slots.limit_B)
    return step + 1, recent, token_B, place_B, active_B, tokens_MB, logprob_MB

  out = (jnp.zeros((STEPS, batch), jnp.int32), jnp.zeros((STEPS, batch), jnp.float32))
  recent = cache.no_recent(model.decoder.config, batch, STEPS)
  state = (jnp.int32(0), recent, slots.token_B, slots.place_B, slots.active_B, *out)
  _, recent, token_B, place_B, active_B, tokens_MB, logprob_MB = jax.lax.while_loop(unfinished, one, state)
  memory = memory.append(recent, place_B - slots.place_B)
  slots = Slots(memory, token_B, slots.rollout_B, place_B, slots.limit_B, active_B)
  return slots, Answered(tokens_MB, logprob_MB, place_B, active_B)
