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

BASE = ModelConfig(
  vocab_size=29, num_layers=2, d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.4, attention='reference'
)
CONFIGS = {
  'plain': dataclasses.replace(BASE, attention='auto'),
  'biased, tied': dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=True),
  'llama3': dataclasses.replace(BASE, rope_scaling='llama3', rope_factor=8.0, rope_original_length=16),
}
LENGTHS = np.array([11, 3, 1, 7], np.int32)


WIDTH = 24  # of every full forward: one compilation


class Compiled:
  """A model with its calls jitted: called as they are, they would be compiled anew each time."""

  def __init__(self, config: ModelConfig):
    model = LanguageModel(config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(model)
    # Biases and scales too.
    self.params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.1, p.shape), jnp.float32), nnx.to_pure_dict(state))
    self.config = config
    self._forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch))
    self._extend = jax.jit(lambda params, *batch: nnx.merge(graphdef, params).extend(*batch))
    self._greedy = jax.jit(
      lambda params, tokens, length, max_new, stop_ids: generation.greedy(
        nnx.merge(graphdef, params), tokens, length, max_new=max_new, stop_ids=stop_ids
      ),
      static_argnums=(3, 4),
    )

  def extend(self, tokens, count, memory):
    return self._extend(self.params, tokens, jnp.asarray(count, jnp.int32), memory)

  def greedy(self, tokens, length, max_new, stop_ids=()):
    return self._greedy(self.params, tokens, length, max_new, tuple(stop_ids))

  def full(self, tokens) -> np.ndarray:
    """Logits (T, V) of one sequence read at once."""
    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(tokens)] = tokens
    position = np.arange(WIDTH, dtype=np.int32)[None]
    return np.asarray(self._forward(self.params, row, position, np.zeros_like(position), position + 1)[0, : len(tokens)])


@pytest.fixture(scope='module', params=list(CONFIGS))
def model(request):
  return Compiled(CONFIGS[request.param])


@pytest.fixture(scope='module')
def prompts():
  return np.random.default_rng(2).integers(1, 29, (4, 11)).astype(np.int32)


@pytest.mark.parametrize('sizes', [(11,), (1,) * 11, (4, 1, 6), (2, 9)])
def test_tokens_read_in_parts_of_any_size(model, prompts, sizes):
  memory = cache.empty(model.config, 1, 14)
  low, got = 0, []
  for size in sizes:
    logits, memory = model.extend(prompts[:1, low : low + size], [size], memory)
    low += size
    got.append(logits[0])
  assert memory.length_B.tolist() == [11]
  np.testing.assert_allclose(np.stack(got), model.full(prompts[0])[np.cumsum(sizes) - 1], atol=2e-5)


def test_rows_of_different_lengths_and_pauses(model, prompts):
  """Padding behind a prompt leaves no trace; a row that gets no token (count 0) keeps its place."""
  logits, memory = model.extend(prompts, LENGTHS, cache.empty(model.config, 4, 20))
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS)]
  for b, text in enumerate(texts):
    np.testing.assert_allclose(logits[b], model.full(text)[-1], atol=2e-5)
  rng = np.random.default_rng(3)
  for _ in range(6):
    new, count = rng.integers(1, 29, (4, 2)).astype(np.int32), rng.integers(0, 3, 4).astype(np.int32)
    logits, memory = model.extend(new, count, memory)
    for b in range(4):
      texts[b] += new[b, : count[b]].tolist()
      if count[b]:
        np.testing.assert_allclose(logits[b], model.full(texts[b])[-1], atol=2e-5)
    assert memory.length_B.tolist() == [len(t) for t in texts]


def test_greedy_is_the_likeliest_token_of_the_full_forward(model, prompts):
  tokens, count = model.greedy(prompts, LENGTHS, 8)
  assert count.tolist() == [8] * 4
  for b, n in enumerate(LENGTHS):
    text = prompts[b, :n].tolist()
    for _ in range(8):
      text.append(int(model.full(text)[-1].argmax()))
    assert tokens[b].tolist() == text[n:]


def test_greedy_ends_at_stop_tokens(model, prompts):
  free, _ = model.greedy(prompts, LENGTHS, 8)
  stops = [int(free[0, 2]), int(free[1, 5])]
  tokens, count = model.greedy(prompts, LENGTHS, 8, stops)
  for b in range(4):
    expected = free[b].tolist()
    ends = [i for i, token in enumerate(expected) if token in stops]
    size = ends[0] + 1 if ends else 8
    assert count[b] == size
    assert tokens[b].tolist() == expected[:size] + [0] * (8 - size)
  assert count[0] <= 3


def test_padding_of_prompts_does_not_matter(model, prompts):
  free, _ = model.greedy(prompts, LENGTHS, 5)
  for b, n in enumerate(LENGTHS):
    other = np.full((4, 11), 5, np.int32)  # the same shape, which is compiled already
    other[0, :n] = prompts[b, :n]
    alone, _ = model.greedy(other, np.full(4, n, np.int32), 5)
    assert alone[0].tolist() == free[b].tolist()


def test_sharded_decoding_is_decoding(prompts):
  model = LanguageModel(BASE, rngs=nnx.Rngs(1))
  graphdef, params = nnx.split(model)
  expected, _ = jax.jit(lambda p, x, n: generation.greedy(nnx.merge(graphdef, p), x, n, max_new=6))(params, prompts, LENGTHS)
  for sizes in ({'fsdp': 4, 'tensor': 2}, {'data': 2, 'fsdp': 1, 'tensor': 4}):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
      placed = jax.tree.map(lambda a, p: jax.device_put(p, a.sharding), sharding.abstract_params(model, mesh), nnx.to_pure_dict(params))
      tokens, _ = jax.jit(lambda p, x, n: generation.greedy(nnx.merge(graphdef, p), x, n, max_new=6))(placed, prompts, LENGTHS)
    assert tokens.tolist() == expected.tolist()
