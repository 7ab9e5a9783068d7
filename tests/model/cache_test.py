"""Reading tokens bit by bit through the cache gives what reading them at once gives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig
from polar_jax.model import cache, generation
from polar_jax.model.language_model import LanguageModel

BASE = ModelConfig(vocab_size=29, num_layers=3, d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.4, scan_unroll=2)
CONFIGS = {
  'plain': BASE,
  'biased, tied': dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=True),
  'llama3': dataclasses.replace(BASE, rope_scaling='llama3', rope_factor=8.0, rope_original_length=16),
}
LENGTHS = np.array([11, 3, 1, 7], np.int32)


@pytest.fixture(scope='module', params=list(CONFIGS))
def model(request):
  model = LanguageModel(CONFIGS[request.param], rngs=nnx.Rngs(1))
  rng = np.random.default_rng(0)
  for parameter in jax.tree.leaves(nnx.state(model, nnx.Param), is_leaf=lambda x: isinstance(x, nnx.Param)):
    parameter[...] = parameter[...] + jnp.asarray(rng.normal(0, 0.1, parameter.shape), jnp.float32)  # biases and scales too
  nnx.update(model, nnx.state(model))
  return model


@pytest.fixture(scope='module')
def prompts():
  return np.random.default_rng(2).integers(1, 29, (4, 11)).astype(np.int32)


def _full(model, tokens):
  """Logits (T, V) of one sequence read at once."""
  position = np.arange(len(tokens), dtype=np.int32)[None]
  return np.asarray(model(np.asarray(tokens, np.int32)[None], position, np.zeros_like(position), position + 1)[0])


@pytest.mark.parametrize('sizes', [(11,), (1,) * 11, (4, 1, 6), (2, 9)])
def test_tokens_read_in_parts_of_any_size(model, prompts, sizes):
  memory = cache.empty(model.decoder.config, 1, 14)
  low, got = 0, []
  for size in sizes:
    logits, memory = model.extend(prompts[:1, low : low + size], jnp.array([size], jnp.int32), memory)
    low += size
    got.append(logits[0])
  assert memory.length_B.tolist() == [11]
  np.testing.assert_allclose(np.stack(got), _full(model, prompts[0])[np.cumsum(sizes) - 1], atol=2e-5)


def test_rows_of_different_lengths_and_pauses(model, prompts):
  """Padding behind a prompt leaves no trace; a row that gets no token (count 0) keeps its place."""
  logits, memory = model.extend(prompts, jnp.asarray(LENGTHS), cache.empty(model.decoder.config, 4, 20))
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS)]
  for b, text in enumerate(texts):
    np.testing.assert_allclose(logits[b], _full(model, text)[-1], atol=2e-5)
  rng = np.random.default_rng(3)
  for _ in range(6):
    new, count = rng.integers(1, 29, (4, 2)).astype(np.int32), rng.integers(0, 3, 4).astype(np.int32)
    logits, memory = model.extend(new, jnp.asarray(count), memory)
    for b in range(4):
      texts[b] += new[b, : count[b]].tolist()
      if count[b]:
        np.testing.assert_allclose(logits[b], _full(model, texts[b])[-1], atol=2e-5)
    assert memory.length_B.tolist() == [len(t) for t in texts]


def test_greedy_is_the_likeliest_token_of_the_full_forward(model, prompts):
  tokens, count = jax.jit(lambda p, n: generation.greedy(model, p, n, max_new=8))(prompts, LENGTHS)
  assert count.tolist() == [8] * 4
  for b, n in enumerate(LENGTHS):
    text = prompts[b, :n].tolist()
    for _ in range(8):
      text.append(int(_full(model, text)[-1].argmax()))
    assert tokens[b].tolist() == text[n:]


def test_greedy_ends_at_stop_tokens(model, prompts):
  free, _ = generation.greedy(model, prompts, LENGTHS, max_new=8)
  stops = [int(free[0, 2]), int(free[1, 5])]
  tokens, count = generation.greedy(model, prompts, LENGTHS, max_new=8, stop_ids=stops)
  for b in range(4):
    expected = free[b].tolist()
    ends = [i for i, token in enumerate(expected) if token in stops]
    size = ends[0] + 1 if ends else 8
    assert count[b] == size
    assert tokens[b].tolist() == expected[:size] + [0] * (8 - size)
  assert count[0] <= 3


def test_padding_of_prompts_does_not_matter(model, prompts):
  free, _ = generation.greedy(model, prompts, LENGTHS, max_new=5)
  for b, n in enumerate(LENGTHS):
    other = np.full((1, 14), 5, np.int32)
    other[0, :n] = prompts[b, :n]
    alone, _ = generation.greedy(model, other, LENGTHS[b : b + 1], max_new=5)
    assert alone[0].tolist() == free[b].tolist()


def test_sharded_decoding_is_decoding(prompts):
  model = LanguageModel(BASE, rngs=nnx.Rngs(1))
  expected, _ = generation.greedy(model, prompts, LENGTHS, max_new=6)
  graphdef, params = nnx.split(model)
  for sizes in ({'fsdp': 4, 'tensor': 2}, {'data': 2, 'fsdp': 1, 'tensor': 4}):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
      placed = jax.tree.map(lambda a, p: jax.device_put(p, a.sharding), sharding.abstract_params(model, mesh), nnx.to_pure_dict(params))
      tokens, _ = jax.jit(lambda p, x, n: generation.greedy(nnx.merge(graphdef, p), x, n, max_new=6))(placed, prompts, LENGTHS)
    assert tokens.tolist() == expected.tolist()
