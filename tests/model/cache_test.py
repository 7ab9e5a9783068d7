"""Reading tokens one by one through the cache gives what reading them at once gives."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RolloutConfig
from polar_jax.model import cache
from polar_jax.model.language_model import LanguageModel
from polar_jax.ppo.rollout import RolloutEngine

BASE = ModelConfig(
  vocab_size=29, num_layers=2, d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.4, attention='reference'
)
CONFIGS = {
  'plain': dataclasses.replace(BASE, attention='auto'),
  'biased, tied, unrolled': dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=True, scan_unroll=2),
  'llama3': dataclasses.replace(BASE, rope_scaling='llama3', rope_factor=8.0, rope_original_length=16),
}
LENGTHS = np.array([11, 3, 1, 7], np.int32)
ONE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

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
    self._read = jax.jit(self._fill)
    self._next = jax.jit(lambda params, *state: nnx.merge(graphdef, params).next(*state))
    self._append = jax.jit(cache.KVCache.append)
    self._graphdef = graphdef
    self.engine = RolloutEngine(config, ONE, RolloutConfig(max_prompt=11, max_new=8, max_concurrent=4, temperature=0.0), ())

  def _fill(self, params, tokens, positions, start, slot, memory, length):
    end = jnp.where(slot < 0, start, start + positions + 1)
    keys, values = nnx.merge(self._graphdef, params).decoder.read(tokens, positions, [(start, end)])
    return memory.fill(keys, values, slot, positions, length)

  def read(self, texts, order, capacity):
    """A cache whose row `order[i]` holds text i; the texts lie one behind the other in one row."""
    width = 32
    tokens, positions, start, slot = (np.zeros((1, width), np.int32) for _ in range(4))
    slot[:], low, length = -1, 0, np.zeros(len(texts), np.int32)
    for text, row in zip(texts, order, strict=True):
      at = np.s_[0, low : low + len(text)]
      tokens[at], positions[at], start[at], slot[at] = text, np.arange(len(text)), low, row
      length[row] = len(text)
      low += len(text)
    return self._read(self.params, tokens, positions, start, slot, cache.empty(self.config, len(texts), capacity), length)

  def next(self, tokens, memory, recent, step):
    return self._next(self.params, jnp.asarray(tokens, jnp.int32), memory, recent, jnp.int32(step))

  def append(self, memory, recent, count):
    return self._append(memory, recent, jnp.asarray(count, jnp.int32))

  def greedy(self, texts):
    rollouts = self.engine.generate(self.params, texts, (0,))
    return [row[:n].tolist() for row, n in zip(rollouts.tokens_RT, rollouts.length_R, strict=True)]

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


def test_tokens_one_by_one_behind_prompts_of_any_length(model, prompts):
  """Logits are those of the full forward, whatever the rows' lengths, and wherever a row's tokens were put meanwhile."""
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS - 1)]
  order = [2, 0, 3, 1]
  rows = [texts[order.index(b)] for b in range(4)]
  memory, rng = model.read(texts, order, 24), np.random.default_rng(3)
  assert memory.length_B.tolist() == [len(row) for row in rows]
  for steps in (3, 1, 3):
    recent, count = cache.no_recent(model.config, 4, 3), rng.integers(0, steps + 1, 4)
    count[0] = steps
    for step in range(steps):
      new = rng.integers(1, 29, 4)
      logits, recent = model.next(new, memory, recent, step)
      for b in np.flatnonzero(step < count):  # others have ended: their tokens are dropped
        rows[b].append(int(new[b]))
        np.testing.assert_allclose(logits[b], model.full(rows[b])[-1], atol=2e-5)
    memory = model.append(memory, recent, count)
    assert memory.length_B.tolist() == [len(row) for row in rows]


def test_more_than_one_block_of_keys():
  """Rows longer than the blocks that attention reads, and a row without a token."""
  rng = np.random.default_rng(5)
  kv, query = (2, 3, 2, 2 * cache.BLOCK, 6), rng.normal(size=(3, 4, 6)).astype(np.float32)
  keys, values = (rng.normal(size=kv).astype(np.float32) for _ in range(2))
  recent = cache.Recent(*(rng.normal(size=(2, 3, 2, 5, 6)).astype(np.float32) for _ in range(2)))
  length = np.array([cache.BLOCK + 9, 0, cache.BLOCK], np.int32)
  attend = jax.jit(lambda memory, *rest: memory.attend(*rest))
  got = attend(cache.KVCache(keys, values, length), 1, recent, 3, query)
  for b, head in np.ndindex(3, 4):
    join = lambda old, new, b=b, k=head // 2: np.concatenate([old[1, b, k, : length[b]], new[1, b, k, :4]])
    scores = join(keys, recent.k_LBKMH) @ query[b, head] / 6**0.5
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(got[b, head], weights @ join(values, recent.v_LBKMH) / weights.sum(), atol=1e-5)


def test_greedy_is_the_likeliest_token_of_the_full_forward(model, prompts):
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS)]
  for text, answer in zip(texts, model.greedy(texts), strict=True):
    whole = list(text)
    for _ in range(8):
      whole.append(int(model.full(whole)[-1].argmax()))
    assert answer == whole[len(text) :]
