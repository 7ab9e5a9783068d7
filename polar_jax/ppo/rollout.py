"""Sampling of responses by the policy: slots that decode together, and a queue of prompts that refills every slot that becomes free.

A response is a pure function of the seed, the index of its prompt and the logits: its slot, and the content of the other slots, change it
only as far as logits round differently.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig, RolloutConfig
from polar_jax.model import cache, generation
from polar_jax.model.generation import Answered, Entering, Slots
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.transformer import Block
from polar_jax.types import Rollouts, UserError

_SHORTEST_ROW, _LONGEST_ROW = 64, 512  # tokens of a row of packed prompts; longer if max_prompt requires it
_POWERS = tuple(1 << i for i in range(32))


class Weights(NamedTuple):
  """The parameters of a policy in the form that sampling needs."""

  params: dict[str, Any]  # in the compute dtype
  blocks: list[Block] | None  # a copy of the layers, if they are unrolled: `Decoder.blocks`


class _Functions(NamedTuple):
  """The jitted functions of one model, mesh and configuration."""

  prepare: Callable[[dict[str, Any]], Weights]
  vacant: Callable[[], Slots]
  admit: Callable[[Weights, Slots, Entering], Slots]
  advance: Callable[[Weights, Slots, Any, Any], tuple[Slots, Answered]]


class RolloutEngine:
  """A sampler of responses from a policy.

  Args:
    model: shape of the policy, a `LanguageModel`.
    mesh: of its parameters.
    config: lengths, sampling, and how many responses are decoded at a time.
    stop_ids: tokens that end a response.
  """

  def __init__(self, model: ModelConfig, mesh: Mesh, config: RolloutConfig, stop_ids: Sequence[int]):
    shards = sharding.batch_shards(mesh)
    slots = -(-config.max_concurrent // shards) * shards
    # Settings that the functions do not depend on are fixed, so that engines share one compilation.
    self._config = dataclasses.replace(config, max_concurrent=slots, stop=None, chat='auto')
    self._mesh, self._rows, self._stop_ids = mesh, shards, tuple(sorted(set(stop_ids)))
    self._functions = _build(dataclasses.replace(model, remat='none'), mesh, self._config, self._stop_ids)
    longest_prompt = config.max_prompt - 1  # without its last token
    self._longest = max(_row_length(longest_prompt), min(_LONGEST_ROW, _row_length(longest_prompt * -(-slots // shards))))
    self._lengths = tuple(length for length in _POWERS if _SHORTEST_ROW <= length <= self._longest)  # not compiled yet

  def generate(
    self, params: dict[str, Any], prompts: Sequence[Sequence[int]], seed: tuple[int, ...], limits: Sequence[int] | None = None
  ) -> Rollouts:
    """Sample a response to every prompt. In a run of several processes all call this with the same arguments and get all rollouts.

    Args:
      params: a pure dict of a `LanguageModel`'s parameters, laid out on the mesh.
      prompts: token ids.
      seed: non-negative integers; the same seed gives the same rollouts.
      limits: most tokens of each response, where that is less than `max_new`.

    Raises:
      UserError: a prompt is empty, or longer than `max_prompt`.
    """
    self._check(prompts)
    c, f = self._config, self._functions
    limit_R = np.full(len(prompts), c.max_new, np.int32) if limits is None else np.clip(np.asarray(limits, np.int32), 1, c.max_new)
    out = _Responses(len(prompts), c.max_new)
    key = np.random.SeedSequence(seed).generate_state(2)
    waiting, running = deque(range(len(prompts))), np.full(c.max_concurrent, -1)
    place_B = np.zeros(c.max_concurrent, np.int32)
    with jax.set_mesh(self._mesh):
      weights, slots = f.prepare(params), f.vacant()
      for length in self._lengths:  # compile all lengths now: which of them occur depends on the sampled tokens
        slots = f.admit(weights, slots, self._empty(length))
      self._lengths = ()
      while waiting or (running >= 0).any():
        while waiting and (running < 0).any():
          entering = self._pack(prompts, limit_R, waiting, running)
          place_B[entering.fresh_B > 0] = 0
          slots = f.admit(weights, slots, entering)
        # Return as soon as enough responses have ended to be replaced; with an empty queue there is no reason to return early.
        leave = max(1, c.max_concurrent // 32) if waiting else c.max_concurrent + 1
        slots, answered = f.advance(weights, slots, key, np.int32(leave))
        answered = jax.device_get(answered)
        out.append(running, place_B, answered)
        place_B = answered.place_B.copy()
        running[~answered.active_B] = -1
    stopped_R = np.isin(out.tokens_RT[np.arange(len(prompts)), out.length_R - 1], self._stop_ids)
    return Rollouts(prompts, out.tokens_RT, out.length_R, out.logprob_RT, stopped_R)

  def calls(self, params: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return (name, jitted function, shapes of its arguments) of all functions that `generate` calls, for prompts of full length."""
    f = self._functions
    weights, slots = jax.eval_shape(f.prepare, params), jax.eval_shape(f.vacant)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    entering = jax.tree.map(lambda a: shape(a.shape, a.dtype), self._empty(self._longest))
    decoded = (weights, slots, shape((2,), np.uint32), shape((), np.int32))
    return [
      ('prepare', f.prepare, (params,)),
      ('vacant', f.vacant, ()),
      ('admit', f.admit, (weights, slots, entering)),
      ('advance', f.advance, decoded),
    ]

  def _check(self, prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
      if not len(prompt):
        raise UserError(f'prompt {i} has no tokens; a policy needs at least one')
      if len(prompt) > self._config.max_prompt:
        raise UserError(
          f'prompt {i} has {len(prompt)} tokens, more than rollout.max_prompt={self._config.max_prompt}; raise it, or remove the prompt'
        )

  def _pack(self, prompts: Sequence[Sequence[int]], limit_R: np.ndarray, waiting: deque[int], running: np.ndarray) -> Entering:
    """Take prompts off the queue, as many as fit the free slots and the longest rows, and pack them into rows.

    Args:
      prompts: token ids of all prompts.
      limit_R: most tokens of each response.
      waiting: the queue of indices of prompts.
      running: the prompt in each slot, or -1; updated.
    """
    rows: list[list[tuple[int, int]]] = [[] for _ in range(self._rows)]  # (prompt, slot)
    used = [0] * self._rows
    for slot in np.flatnonzero(running < 0).tolist():
      if not waiting:
        break
      size = len(prompts[waiting[0]]) - 1
      row = used.index(min(used))
      if used[row] + size > self._longest:
        break
      running[slot] = waiting.popleft()
      rows[row].append((int(running[slot]), slot))
      used[row] += size
    new = self._empty(_row_length(max(used)))
    for p, entries in enumerate(rows):
      low = 0
      for i, slot in entries:
        size = len(prompts[i]) - 1
        at = np.s_[p, low : low + size]
        new.tokens_PT[at], new.positions_PT[at] = prompts[i][:-1], np.arange(size)
        new.start_PT[at], new.slot_PT[at] = low, slot
        new.fresh_B[slot], new.length_B[slot], new.token_B[slot] = 1, size, prompts[i][-1]
        new.rollout_B[slot], new.limit_B[slot] = i, limit_R[i]
        low += size
    return new

  def _empty(self, length: int) -> Entering:
    """Return rows of a length without prompts."""
    packed, each = (self._rows, length), (self._config.max_concurrent,)
    new = Entering._make(np.zeros(shape, np.int32) for shape in (packed,) * 4 + (each,) * 5)
    new.slot_PT[:] = -1
    return new


class _Responses:
  """The tokens of all responses so far."""

  def __init__(self, prompts: int, max_new: int):
    self.tokens_RT = np.zeros((prompts, max_new), np.int32)
    self.logprob_RT = np.zeros((prompts, max_new), np.float32)
    self.length_R = np.zeros(prompts, np.int32)

  def append(self, running: np.ndarray, place_B: np.ndarray, answered: Answered) -> None:
    """Append the tokens that one call of `advance` sampled for each slot."""
    for b in np.flatnonzero(running >= 0):
      i, low, high = running[b], place_B[b], answered.place_B[b]
      self.tokens_RT[i, low:high] = answered.tokens_MB[: high - low, b]
      self.logprob_RT[i, low:high] = answered.logprob_MB[: high - low, b]
      self.length_R[i] = high


def _row_length(tokens: int) -> int:
  """Return a power of two that holds some tokens, so that few lengths are compiled."""
  return max(_SHORTEST_ROW, 1 << max(tokens - 1, 0).bit_length())


@functools.cache
def _build(model: ModelConfig, mesh: Mesh, config: RolloutConfig, stop_ids: tuple[int, ...]) -> _Functions:
  """Jit the functions of an engine.

  Args:
    model: shape of the policy.
    mesh: of its parameters.
    config: lengths and sampling; `max_concurrent` is a multiple of the mesh's batch shards.
    stop_ids: tokens that end a response.
  """
  abstract = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
  graphdef, _ = nnx.split(abstract)
  # Prompts run through layers in a loop, because that is compiled for several lengths and takes the smaller part of the time.
  looped, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(dataclasses.replace(model, scan_unroll=1), rngs=nnx.Rngs(0))))
  replicated = NamedSharding(mesh, PartitionSpec())
  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    cached = NamedSharding(mesh, cache.spec(model.num_kv_heads))
  slots = Slots._make((cache.KVCache._make((cached, cached, rows)), *(rows,) * 5))

  # Decoding reads every weight for every token, so the weights must not be gathered from other devices each time.
  params = jax.tree.map(lambda a: NamedSharding(mesh, _without(a.sharding.spec, 'fsdp')), sharding.abstract_params(abstract, mesh))
  whole = Weights(params, None)  # XLA chooses the layout of the blocks

  def prepare(given: dict[str, Any]) -> Weights:
    cast = jax.lax.with_sharding_constraint(jax.tree.map(lambda p: p.astype(model.compute_dtype), given), params)
    return Weights(cast, nnx.merge(graphdef, cast).decoder.blocks())

  def admit(weights: Weights, slots: Slots, new: Entering) -> Slots:
    return generation.admit(nnx.merge(looped, weights.params), slots, new)

  def advance(weights: Weights, slots: Slots, key: Any, leave: Any) -> tuple[Slots, Answered]:
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return generation.advance(nnx.merge(graphdef, weights.params), weights.blocks, slots, key, leave, config, stop_ids)

  return _Functions(
    prepare=jax.jit(prepare, out_shardings=whole),
    vacant=jax.jit(lambda: generation.vacant(model, config.max_concurrent, config.max_prompt + config.max_new), out_shardings=slots),
    admit=jax.jit(admit, in_shardings=(whole, slots, replicated), out_shardings=slots, donate_argnums=1),
    advance=jax.jit(advance, in_shardings=(whole, slots, replicated, replicated), out_shardings=(slots, replicated), donate_argnums=1),
  )


def _without(spec: PartitionSpec, axis: str) -> PartitionSpec:
  """Return a spec without one axis of the mesh."""
  keep = lambda part: None if part == axis else tuple(a for a in part if a != axis) or None if isinstance(part, tuple) else part
  return PartitionSpec(*map(keep, spec))
