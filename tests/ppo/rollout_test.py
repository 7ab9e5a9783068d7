"""Responses equal those of the full forward pass, whatever the slots, the refills and the devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RftConfig, RolloutConfig
from polar_jax.data import layout
from polar_jax.model.generation import STEPS
from polar_jax.model.language_model import LanguageModel
from polar_jax.ppo import experience, learner
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.types import UserError

MODEL = ModelConfig(vocab_size=31, num_layers=2, d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.4)
CONFIG = RolloutConfig(max_prompt=12, max_new=9, temperature=0.0, max_concurrent=3)
STOP = 16
WIDTH = 24


def mesh_of(devices: int = 1, **axes: int):
  return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


@pytest.fixture(scope='module')
def params():
  make = jax.jit(lambda: nnx.to_pure_dict(nnx.state(LanguageModel(MODEL, rngs=nnx.Rngs(2)), nnx.Param)))
  return jax.device_get(make())


@pytest.fixture(scope='module')
def prompts() -> list[list[int]]:
  rng = np.random.default_rng(0)
  return [rng.integers(0, 31, n).tolist() for n in (3, 12, 1, 7, 5, 2, 9)]


@jax.jit
def _forward(params, sequence):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(MODEL, rngs=nnx.Rngs(0))))
  position = jnp.arange(WIDTH, dtype=jnp.int32)[None]
  return nnx.merge(graphdef, params)(sequence, position, [(jnp.zeros_like(position), position + 1)])


def logits_after(params, sequence) -> np.ndarray:
  """Return the float64 logits (tokens, V) after each token of a sequence, by one forward pass."""
  row = np.zeros((1, WIDTH), np.int32)
  row[0, : len(sequence)] = sequence
  return np.asarray(_forward(params, row)[0, : len(sequence)], np.float64)


def greedy(params, prompt, stop=STOP, max_new=9, min_new=1) -> list[int]:
  response: list[int] = []
  while len(response) < max_new and (not response or response[-1] not in np.atleast_1d(stop)):
    logits = logits_after(params, prompt + response)[-1]
    if len(response) + 1 < min_new:
      logits[stop] = -np.inf
    response.append(int(logits.argmax()))
  return response


def responses(rollouts) -> list[list[int]]:
  return [row[:n].tolist() for row, n in zip(rollouts.tokens_RT, rollouts.length_R, strict=True)]


@pytest.fixture(scope='module')
def expected(params, prompts):
  return [greedy(params, prompt) for prompt in prompts]


@pytest.mark.long
@pytest.mark.parametrize('slots', [1, 3, 16])
def test_greedy_is_the_likeliest_token_of_the_full_forward(params, prompts, expected, slots):
  engine = RolloutEngine(MODEL, mesh_of(), dataclasses.replace(CONFIG, max_concurrent=slots), [STOP])
  got = engine.generate(params, prompts, (0,))
  assert responses(got) == expected
  assert got.stopped_R.tolist() == [a[-1] == STOP for a in expected] and got.prompts == prompts
  assert len({len(a) for a in expected}) > 1  # some end early, so that slots are refilled while others run
  assert not got.tokens_RT[np.arange(9)[None] >= got.length_R[:, None]].any()


@pytest.mark.long
@pytest.mark.parametrize('unroll', [1, 2])
def test_devices_do_not_matter(params, prompts, expected, unroll):
  mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, jax.tree.map(lambda a: a.sharding, sharding.abstract_params(_abstract(), mesh)))
  engine = RolloutEngine(dataclasses.replace(MODEL, scan_unroll=unroll), mesh, CONFIG, [STOP])
  got = engine.generate(placed, prompts, (0,))
  assert responses(got) == expected
  sizes = [f._cache_size() for f in engine._functions[1:]]
  assert responses(engine.generate(placed, prompts, (1,))) == expected
  assert [f._cache_size() for f in engine._functions[1:]] == sizes


@pytest.mark.parametrize('unroll', [1, 2])
def test_the_memory_of_decoding_is_that_of_its_arrays(params, unroll):
  mesh = mesh_of(8, data=2, fsdp=2, tensor=2)
  model = dataclasses.replace(MODEL, scan_unroll=unroll)
  config = dataclasses.replace(CONFIG, max_concurrent=8)
  engine = RolloutEngine(model, mesh, config, [STOP])
  with jax.set_mesh(mesh):
    abstract = sharding.abstract_params(_abstract(), mesh)
    placed = jax.device_put(params, jax.tree.map(lambda a: a.sharding, abstract))
    held = jax.tree.leaves((engine._functions.prepare(placed), engine._functions.init_state()))
  of_first = sum(shard.data.nbytes for array in held for shard in array.addressable_shards if shard.device == mesh.devices.flat[0])
  found = engine.memory(abstract)
  # The layout of the copy of the blocks is XLA's, and small parameters are on all devices.
  assert found.output == pytest.approx(of_first, rel=0.1 if unroll > 1 else 0)
  more = RolloutEngine(model, mesh, dataclasses.replace(config, max_concurrent=16), [STOP]).memory(abstract)
  assert more.output > found.output


def _abstract():
  return nnx.eval_shape(lambda: LanguageModel(MODEL, rngs=nnx.Rngs(0)))


def test_log_probabilities_are_those_before_truncation(params, prompts):
  config = dataclasses.replace(CONFIG, temperature=0.8, top_p=0.9, top_k=6)
  got = RolloutEngine(MODEL, mesh_of(), config, [STOP]).generate(params, prompts, (1,))
  for r, response in enumerate(responses(got)):
    logits = logits_after(params, prompts[r] + response)[len(prompts[r]) - 1 : -1] / 0.8
    wanted = logits[np.arange(len(response)), response] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(got.logprob_RT[r, : len(response)], wanted, atol=2e-5)
    assert not got.logprob_RT[r, len(response) :].any()
    for row, token in zip(logits, response, strict=True):
      assert (row > row[token]).sum() < 6


@pytest.mark.long
@pytest.mark.parametrize('method', ['ppo', 'sft'])
@pytest.mark.parametrize('min_new', [1, 6])
def test_log_probabilities_are_those_of_the_update_and_sum_to_one(params, prompts, min_new, method):
  """Most tokens end a response here, so that it matters whether they keep their probability where they are not sampled."""
  config = RftConfig(method=method, rollout=dataclasses.replace(CONFIG, temperature=0.8, min_new=min_new))
  stops, mesh = list(range(1, 20)), mesh_of()
  got = RolloutEngine(MODEL, mesh, config.rollout, stops).generate(params, prompts, (1,))
  actor = learner.build_actor(MODEL, config, 1, mesh, stops)
  batches = layout.policy_batches(got, range(len(prompts)), WIDTH, 2)
  again_RT, entropy_RT = experience.run_forward(actor.forward, params, batches, mesh, got, 2)
  for r, response in enumerate(responses(got)):
    logits = logits_after(params, prompts[r] + response)[len(prompts[r]) - 1 : -1] / 0.8
    if method == 'ppo':
      np.testing.assert_allclose(got.logprob_RT[r], again_RT[r], atol=2e-5)
      logits[: min_new - 1, stops] = -np.inf
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(again_RT[r, : len(response)], logprobs[np.arange(len(response)), response], atol=2e-5)
    entropy = -(np.exp(logprobs) * np.where(np.isfinite(logprobs), logprobs, 0)).sum(-1)
    np.testing.assert_allclose(entropy_RT[r, : len(response)], entropy, atol=2e-5)


@pytest.mark.long
def test_the_seed_determines_the_responses_and_the_slots_do_not(params, prompts):
  config = dataclasses.replace(CONFIG, temperature=1.0)
  engine = RolloutEngine(MODEL, mesh_of(), config, [STOP])
  first, again, other = (engine.generate(params, prompts, seed) for seed in ((3, 1), (3, 1), (3, 2)))
  assert first.tokens_RT.tobytes() == again.tokens_RT.tobytes() and first.logprob_RT.tobytes() == again.logprob_RT.tobytes()
  assert responses(first) != responses(other)
  more = RolloutEngine(MODEL, mesh_of(), dataclasses.replace(config, max_concurrent=16), [STOP]).generate(params, prompts, (3, 1))
  assert responses(more) == responses(first)  # the noise belongs to the response, not to the slot
  same = engine.generate(params, [prompts[0]] * 6, (4,))
  assert len({tuple(a) for a in responses(same)}) > 3  # responses to one prompt differ


@pytest.mark.long
def test_limits_stop_tokens_and_min_new(params, prompts, expected):
  engine = RolloutEngine(MODEL, mesh_of(), CONFIG, [STOP])
  limits = [2, 9, 1, 4, 3, 9, 5]
  got = engine.generate(params, prompts, (0,), limits)
  assert responses(got) == [a[:n] for a, n in zip(expected, limits, strict=True)]
  longer = RolloutEngine(MODEL, mesh_of(), dataclasses.replace(CONFIG, min_new=6), [STOP]).generate(params, prompts, (0,))
  assert responses(longer) == [greedy(params, prompt, min_new=6) for prompt in prompts] and longer.length_R.min() >= 6
  stops = list(range(1, 31))  # every token but one ends a response, as soon as it may
  early = RolloutEngine(MODEL, mesh_of(), dataclasses.replace(CONFIG, min_new=3), stops).generate(params, prompts, (0,))
  assert early.length_R.min() == 3 and responses(early) == [greedy(params, prompt, stops, min_new=3) for prompt in prompts]
  never = RolloutEngine(MODEL, mesh_of(), CONFIG, []).generate(params, prompts, (0,))
  assert (never.length_R == 9).all() and not never.stopped_R.any()


def test_engines_share_their_compiled_functions(params, prompts):
  engine = RolloutEngine(MODEL, mesh_of(), CONFIG, [STOP])
  engine.generate(params, [[1]], (0,))
  sizes = [f._cache_size() for f in engine._functions[1:]]
  engine.generate(params, [[2] * 12] * 5, (1,))  # three of them need a longer row
  engine.generate(params, prompts, (1,))
  RolloutEngine(MODEL, mesh_of(), CONFIG, [STOP]).generate(params, prompts[:2], (2,))
  assert [f._cache_size() for f in engine._functions[1:]] == sizes


def test_prompts_without_tokens_or_too_long_are_named(params):
  engine = RolloutEngine(MODEL, mesh_of(), CONFIG, [STOP])
  with pytest.raises(UserError, match='prompt 1 has no tokens'):
    engine.generate(params, [[1], []], (0,))
  with pytest.raises(UserError, match='prompt 0 has 13 tokens'):
    engine.generate(params, [[1] * 13], (0,))


def test_a_response_of_which_nothing_more_is_needed_makes_room(params, prompts):
  engine = RolloutEngine(MODEL, mesh_of(), dataclasses.replace(CONFIG, max_new=40), [])
  seen: list[int] = []

  def ended(index: int, ids: np.ndarray) -> bool:
    seen.append(len(ids))
    return index % 2 == 0

  whole = engine.generate(params, prompts, (0,))
  found = engine.generate(params, prompts, (0,), ended=ended)
  assert set(whole.length_R.tolist()) == {40} and min(seen) > 0
  for r, length in enumerate(found.length_R.tolist()):
    assert length == (STEPS if r % 2 == 0 else 40)
    assert (found.tokens_RT[r, :length] == whole.tokens_RT[r, :length]).all()
