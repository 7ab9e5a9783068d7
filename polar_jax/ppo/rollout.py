"""Sampling of responses by the policy: slots that decode together, and a queue of prompts that refills every slot that becomes free.

A response is a pure function of the seed, the index of its prompt and the logits: its slot, and the content of the other slots, change it
only as far as logits round differently.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import LoraConfig, ModelConfig, RolloutConfig
from polar_jax.model import generation, heads, kv_cache, lora
from polar_jax.model.generation import Decoded, DecodeState, NewSequences
from polar_jax.model.transformer import Block
from polar_jax.runtime import preemption
from polar_jax.runtime.compiled import Memory, bytes_of_a_device, executables
from polar_jax.types import Rollouts, UserError

_SHORTEST_ROW, _LONGEST_ROW = 64, 512  # tokens of a row of packed prompts; longer if max_prompt requires it
_POWERS = tuple(1 << i for i in range(32))


class Weights(NamedTuple):
  """The parameters of a policy in the form that sampling needs."""

  params: dict[str, Any]  # in the compute dtype
  blocks: list[Block] | None  # a copy of the layers, if they are unrolled: `Decoder.transposed_blocks`


class _Functions(NamedTuple):
  """The jitted functions of one model, mesh and configuration."""

  shardings: tuple[Any, DecodeState]  # of the parameters in `Weights`, and of the state
  prepare: Callable[[dict[str, Any]], Weights]
  init_state: Callable[[], DecodeState]
  prefill: Callable[[Weights, DecodeState, NewSequences], DecodeState]
  decode: Callable[[Weights, DecodeState, Any, Any], tuple[DecodeState, Decoded]]


class RolloutEngine:
  """A sampler of responses from a policy.

  Args:
    model: shape of the policy, a `LanguageModel`.
    mesh: of its parameters.
    config: lengths, sampling, and how many responses are decoded at a time.
    stop_ids: tokens that end a response.
    adapters: of the policy, merged into its weights for sampling.
  """

  def __init__(self, model: ModelConfig, mesh: Mesh, config: RolloutConfig, stop_ids: Sequence[int], adapters: LoraConfig = LoraConfig()):
    shards = sharding.batch_shards(mesh)
    slots = sharding.round_up(config.max_concurrent, shards)
    # Settings that the functions do not depend on are fixed, so that engines share one compilation.
    self._config = dataclasses.replace(config, max_concurrent=slots, stop=None, chat='auto')
    self._mesh, self._rows, self._stop_ids = mesh, shards, tuple(sorted(set(stop_ids)))
    self._functions = _build(dataclasses.replace(model, remat='none'), mesh, self._config, self._stop_ids, adapters)
    longest_prompt = config.max_prompt - 1  # without its last token
    self._longest = max(_row_length(longest_prompt), min(_LONGEST_ROW, _row_length(longest_prompt * -(-slots // shards))))
    self._lengths = tuple(length for length in _POWERS if _SHORTEST_ROW <= length <= self._longest)  # not compiled yet

  def generate(
    self,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    seed: tuple[int, ...],
    limits: Sequence[int] | None = None,
    ended: Callable[[int, np.ndarray], bool] | None = None,
  ) -> Rollouts:
    """Sample a response to every prompt. In a run of several processes all call this with the same arguments and get all rollouts.

    Args:
      params: a pure dict of a `LanguageModel`'s parameters, laid out on the mesh.
      prompts: token ids.
      seed: non-negative integers; the same seed gives the same rollouts.
      limits: most tokens of each response, where that is less than `max_new`.
      ended: (index of a prompt, tokens of its response so far) -> whether nothing more is needed of it. It is asked after every call of
        the device, so that a response has up to `generation.STEPS` tokens too many.

    Raises:
      UserError: a prompt is empty, or longer than `max_prompt`.
      StopRequested: SIGTERM arrived.
    """
    self._check(prompts)
    c, f = self._config, self._functions
    prefill, decode = executables(f.prefill), executables(f.decode)
    limit_R = np.full(len(prompts), c.max_new, np.int32) if limits is None else np.clip(np.asarray(limits, np.int32), 1, c.max_new)
    out = _Responses(len(prompts), c.max_new)
    key = np.random.SeedSequence(seed).generate_state(2)
    waiting, running = deque(range(len(prompts))), np.full(c.max_concurrent, -1)
    num_generated_B = np.zeros(c.max_concurrent, np.int32)
    with jax.set_mesh(self._mesh):
      weights, state = f.prepare(params), f.init_state()
      for length in self._lengths:  # compile all lengths now: which of them occur depends on the sampled tokens
        preemption.check()
        state = prefill(weights, state, self._empty(length))
      self._lengths = ()
      while waiting or (running >= 0).any():
        preemption.check()
        while waiting and (running < 0).any():
          entering = self._pack(prompts, limit_R, waiting, running)
          num_generated_B[entering.is_new_B > 0] = 0
          state = prefill(weights, state, entering)
        # Return as soon as enough responses have ended to be replaced; with an empty queue there is no reason to return early.
        leave = max(1, c.max_concurrent // 32) if waiting else c.max_concurrent + 1
        state, decoded = decode(weights, state, key, np.int32(leave))
        decoded = jax.device_get(decoded)
        out.append(running, num_generated_B, decoded)
        num_generated_B = decoded.num_generated_B.copy()
        running[~decoded.active_B] = -1
        if ended is not None:
          # Its slot goes on until the next prompt enters it, or the last response ends.
          running[[b for b in np.flatnonzero(running >= 0) if ended(int(running[b]), out.response(running[b]))]] = -1
    stopped_R = np.isin(out.tokens_RT[np.arange(len(prompts)), out.length_R - 1], self._stop_ids)
    return Rollouts(prompts, out.tokens_RT, out.length_R, out.logprob_RT, stopped_R)

  @property
  def concurrent(self) -> int:
    """Responses that are decoded at a time."""
    return self._config.max_concurrent

  def memory(self, params: Any) -> Memory:
    """Return the memory of what `generate` holds while it decodes, per device: its copy of the parameters, keys and values.

    Nothing is compiled for it, so that the activations of prompts are not counted.

    Args:
      params: the policy's, or their shapes.
    """
    f = self._functions
    with jax.set_mesh(self._mesh):
      weights, state = jax.eval_shape(f.prepare, params), jax.eval_shape(f.init_state)
    whole, placed = f.shardings
    size = lambda array, sharding: math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize
    held = sum(jax.tree.leaves(jax.tree.map(size, (weights.params, state), (whole, placed))))
    # XLA chooses the layout of the second copy of the blocks, which is divided as the first one is.
    return Memory(output=held + bytes_of_a_device(weights.blocks) // self._mesh.shape['tensor'])

  def calls(self, params: Any) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return (name, jitted function, shapes of its arguments) of all functions that `generate` calls, for prompts of full length."""
    f = self._functions
    weights, state = jax.eval_shape(f.prepare, params), jax.eval_shape(f.init_state)
    shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype)
    entering = jax.tree.map(lambda a: shape(a.shape, a.dtype), self._empty(self._longest))
    arguments = (weights, state, shape((2,), np.uint32), shape((), np.int32))
    return [
      ('prepare', f.prepare, (params,)),
      ('init_state', f.init_state, ()),
      ('prefill', f.prefill, (weights, state, entering)),
      ('decode', f.decode, arguments),
    ]

  def _check(self, prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
      if not len(prompt):
        raise UserError(f'prompt {i} has no tokens; a policy needs at least one')
      if len(prompt) > self._config.max_prompt:
        raise UserError(
          f'prompt {i} has {len(prompt)} tokens, more than rollout.max_prompt={self._config.max_prompt}; raise it, or remove the prompt'
        )

  def _pack(self, prompts: Sequence[Sequence[int]], limit_R: np.ndarray, waiting: deque[int], running: np.ndarray) -> NewSequences:
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
        new.is_new_B[slot], new.length_B[slot], new.token_B[slot] = 1, size, prompts[i][-1]
        new.rollout_B[slot], new.max_new_B[slot] = i, limit_R[i]
        low += size
    return new

  def _empty(self, length: int) -> NewSequences:
    """Return rows of a length without prompts."""
    packed, each = (self._rows, length), (self._config.max_concurrent,)
    new = NewSequences._make(np.zeros(shape, np.int32) for shape in (packed,) * 4 + (each,) * 5)
    new.slot_PT[:] = -1
    return new


class _Responses:
  """The tokens of all responses so far."""

  def __init__(self, prompts: int, max_new: int):
    self.tokens_RT = np.zeros((prompts, max_new), np.int32)
    self.logprob_RT = np.zeros((prompts, max_new), np.float32)
    self.length_R = np.zeros(prompts, np.int32)

  def response(self, prompt: int) -> np.ndarray:
    """Return the tokens of a response so far."""
    return self.tokens_RT[prompt, : self.length_R[prompt]]

  def append(self, running: np.ndarray, num_generated_B: np.ndarray, decoded: Decoded) -> None:
    """Append the tokens that one call of `decode` sampled for each slot."""
    for b in np.flatnonzero(running >= 0):
      i, low, high = running[b], num_generated_B[b], decoded.num_generated_B[b]
      self.tokens_RT[i, low:high] = decoded.tokens_MB[: high - low, b]
      self.logprob_RT[i, low:high] = decoded.logprob_MB[: high - low, b]
      self.length_R[i] = high


def _row_length(tokens: int) -> int:
  """Return a power of two that holds some tokens, so that few lengths are compiled."""
  return max(_SHORTEST_ROW, 1 << max(tokens - 1, 0).bit_length())


@functools.cache
def _build(model: ModelConfig, mesh: Mesh, config: RolloutConfig, stop_ids: tuple[int, ...], adapters: LoraConfig) -> _Functions:
  """Jit the functions of an engine.

  Args:
    model: shape of the policy.
    mesh: of its parameters.
    config: lengths and sampling; `max_concurrent` is a multiple of the mesh's batch shards.
    stop_ids: tokens that end a response.
    adapters: of the parameters that `prepare` is given.
  """
  abstract = heads.abstract_model(model, 'lm')
  graphdef, _ = nnx.split(abstract)
  # Prompts run through layers in a loop, because that is compiled for several lengths and takes the smaller part of the time.
  looped, _ = nnx.split(heads.abstract_model(dataclasses.replace(model, scan_unroll=1), 'lm'))
  replicated = NamedSharding(mesh, PartitionSpec())
  rows = sharding.batch_sharding(mesh)
  with jax.set_mesh(mesh):
    cached = NamedSharding(mesh, kv_cache.partition_spec(model.num_kv_heads))
  state = DecodeState._make((kv_cache.KVCache._make((cached, cached, rows)), *(rows,) * 5))

  # Decoding reads every weight for every token, so the weights must not be gathered from other devices each time.
  params = jax.tree.map(lambda a: NamedSharding(mesh, _without(a.sharding.spec, 'fsdp')), sharding.abstract_params(abstract, mesh))
  whole = Weights(params, None)  # XLA chooses the layout of the blocks

  def prepare(given: dict[str, Any]) -> Weights:
    cast = jax.lax.with_sharding_constraint(lora.merge(given, adapters, model.compute_dtype), params)
    return Weights(cast, nnx.merge(graphdef, cast).decoder.transposed_blocks())

  def prefill(weights: Weights, state: DecodeState, new: NewSequences) -> DecodeState:
    return generation.prefill(nnx.merge(looped, weights.params), state, new)

  def decode(weights: Weights, state: DecodeState, key: Any, max_ended: Any) -> tuple[DecodeState, Decoded]:
    key = jax.random.wrap_key_data(key, impl='threefry2x32')
    return generation.decode(nnx.merge(graphdef, weights.params), weights.blocks, state, key, max_ended, config, stop_ids)

  return _Functions(
    shardings=(params, state),
    prepare=jax.jit(prepare, out_shardings=whole),
    init_state=jax.jit(
      lambda: generation.init_state(model, config.max_concurrent, config.max_prompt + config.max_new), out_shardings=state
    ),
    prefill=jax.jit(prefill, in_shardings=(whole, state, replicated), out_shardings=state, donate_argnums=1),
    decode=jax.jit(decode, in_shardings=(whole, state, replicated, replicated), out_shardings=(state, replicated), donate_argnums=1),
  )


def _without(spec: PartitionSpec, axis: str) -> PartitionSpec:
  """Return a spec without one axis of the mesh."""
  keep = lambda part: None if part == axis else tuple(a for a in part if a != axis) or None if isinstance(part, tuple) else part
  return PartitionSpec(*map(keep, spec))
