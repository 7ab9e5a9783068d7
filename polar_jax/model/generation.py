"""Continuation of many texts at a time with a language model: the part that runs on the device.

A slot holds one sequence. Sequences enter with their prompts packed into few rows (`prefill`), then every slot gets one token at a
time (`decode`) until some sequences have ended and others can enter. The last token of a prompt is not part of the prefill: it is the
first token that `decode` reads, so every token of a response comes from the same computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from polar_jax.config import ModelConfig, RolloutConfig
from polar_jax.model import kv_cache, sampling
from polar_jax.model.kv_cache import KVCache
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.transformer import Block

STEPS = 16  # maximum number of tokens per slot in one device call


class DecodeState(NamedTuple):
  """The state of decoding: one sequence per slot."""

  kv_cache: KVCache
  token_B: jax.Array  # int32, each sequence's last token, which the model has not read yet
  rollout_B: jax.Array  # int32, which rollout this is
  num_generated_B: jax.Array  # int32, tokens of the response so far
  max_new_B: jax.Array  # int32, maximum number of tokens of the response
  active_B: jax.Array  # bool


class NewSequences(NamedTuple):
  """Sequences that enter slots. Their prompts, without the last tokens, are packed into rows. Arrays are int32."""

  tokens_PT: Any
  positions_PT: Any
  start_PT: Any  # index of the first token of its prompt, for each token
  slot_PT: Any  # -1: padding
  is_new_B: Any  # 1 at the slots that are filled
  length_B: Any  # tokens of each prompt without its last
  token_B: Any
  rollout_B: Any
  max_new_B: Any


class Decoded(NamedTuple):
  """The tokens that one call of `decode` appended: for each slot as many steps as its `num_generated_B` grew."""

  tokens_MB: jax.Array  # int32, M is STEPS
  logprob_MB: jax.Array  # float32
  num_generated_B: jax.Array
  active_B: jax.Array


def init_state(config: ModelConfig, slots: int, capacity: int) -> DecodeState:
  """Return `slots` empty slots, each with room for `capacity` tokens."""
  zeros = lambda: jnp.zeros(slots, jnp.int32)
  cache = kv_cache.empty_cache(config, slots, capacity + STEPS)
  return DecodeState(cache, zeros(), zeros(), zeros(), zeros(), jnp.zeros(slots, bool))


def prefill(model: LanguageModel, state: DecodeState, new: NewSequences) -> DecodeState:
  """Read the prompts of new sequences and insert them into their slots. Meant to be jitted with `state` donated."""
  positions_PT, end_PT = new.positions_PT, new.start_PT + new.positions_PT + 1
  intervals = [(new.start_PT, jnp.where(new.slot_PT < 0, new.start_PT, end_PT))]
  k_LPTKH, v_LPTKH = model.decoder.prefill(new.tokens_PT, positions_PT, intervals)
  either = lambda new_B, old_B: jnp.where(new.is_new_B > 0, new_B, old_B)
  cache = state.kv_cache.insert(k_LPTKH, v_LPTKH, new.slot_PT, positions_PT, either(new.length_B, state.kv_cache.length_B))
  return DecodeState(
    cache,
    either(new.token_B, state.token_B),
    either(new.rollout_B, state.rollout_B),
    either(0, state.num_generated_B),
    either(new.max_new_B, state.max_new_B),
    state.active_B | (new.is_new_B > 0),
  )


def decode(
  model: LanguageModel,
  blocks: Sequence[Block] | None,
  state: DecodeState,
  key: jax.Array,
  max_ended: jax.Array,
  config: RolloutConfig,
  stop_ids: Sequence[int],
) -> tuple[DecodeState, Decoded]:
  """Generate up to `STEPS` tokens for every active slot. Meant to be jitted with `state` donated.

  Args:
    model: the policy.
    blocks: the result of `Decoder.transposed_blocks`.
    state: the slots.
    key: the noise of a token is a function of this key, its rollout and its index in the response.
    max_ended: return as soon as this many sequences have ended.
    config: sampling.
    stop_ids: tokens that end a response.
  """
  batch = len(state.token_B)
  stops_I = jnp.asarray(tuple(stop_ids), jnp.int32)
  vocab = model.decoder.config.known_vocab_size
  start = jnp.sum(state.active_B)
  # Nothing needs to be read of a slot whose sequence has ended.
  cache = state.kv_cache._replace(length_B=jnp.where(state.active_B, state.kv_cache.length_B, 0))

  def unfinished(carry):
    step, _, _, _, active_B, *_ = carry
    left = jnp.sum(active_B)
    return (step < STEPS) & (left > 0) & (start - left < max_ended)

  def one(carry):
    step, buffer, token_B, num_generated_B, active_B, tokens_MB, logprob_MB = carry
    logits_BV, buffer = model.decode(token_B, cache, buffer, step, blocks)
    noise_BM = sampling.noise(key, state.rollout_B, num_generated_B, vocab)
    too_early_B = num_generated_B + 1 < config.min_new
    barred_BV = too_early_B[:, None] & jnp.isin(jnp.arange(vocab), stops_I)[None] if config.min_new > 1 else None
    drawn_B, logprob_B = sampling.draw(
      logits_BV, noise_BM, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, barred_BV=barred_BV
    )
    token_B = jnp.where(active_B, drawn_B, token_B)
    num_generated_B = num_generated_B + active_B.astype(jnp.int32)
    put = lambda all_MB, new_B: jax.lax.dynamic_update_index_in_dim(all_MB, jnp.where(active_B, new_B, 0), step, axis=0)
    tokens_MB, logprob_MB = put(tokens_MB, token_B), put(logprob_MB, logprob_B)
    active_B &= ~jnp.any(token_B[:, None] == stops_I[None], axis=1) & (num_generated_B < state.max_new_B)
    return step + 1, buffer, token_B, num_generated_B, active_B, tokens_MB, logprob_MB

  out = (jnp.zeros((STEPS, batch), jnp.int32), jnp.zeros((STEPS, batch), jnp.float32))
  buffer = kv_cache.empty_buffer(model.decoder.config, batch, STEPS)
  carry = (jnp.int32(0), buffer, state.token_B, state.num_generated_B, state.active_B, *out)
  _, buffer, token_B, num_generated_B, active_B, tokens_MB, logprob_MB = jax.lax.while_loop(unfinished, one, carry)
  cache = cache.append(buffer, num_generated_B - state.num_generated_B)
  state = DecodeState(cache, token_B, state.rollout_B, num_generated_B, state.max_new_B, active_B)
  return state, Decoded(tokens_MB, logprob_MB, num_generated_B, active_B)
