"""Decoding token by token through the cache equals a full forward pass."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RolloutConfig
from polar_jax.model import attention, kv_cache
from polar_jax.model.language_model import LanguageModel
from polar_jax.ppo.rollout import RolloutEngine

BASE = ModelConfig(
  vocab_size=29, num_layers=2, d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=6, init_std=0.4, attention='reference'
)
CONFIGS = {
  'plain': dataclasses.replace(BASE, attention='auto'),
  'biased, tied, unrolled': dataclasses.replace(BASE, qkv_bias=True, tie_embeddings=True, scan_unroll=2),
  'gemma': dataclasses.replace(
    BASE,
    num_layers=3,
    qk_norm=True,
    post_norms=True,
    zero_centered_norms=True,
    embedding_scale=True,
    activation='gelu_tanh',
    query_pre_attn_scalar=5.0,
    sliding_window=4,
    global_every=2,
    rope_local_theta=30.0,
  ),
  'windows, layers without rotary embeddings, unrolled': dataclasses.replace(
    BASE, num_layers=3, qk_norm=True, sliding_window=4, global_every=3, nope_every=2, scan_unroll=3
  ),
  'llama3': dataclasses.replace(BASE, rope_scaling='llama3', rope_factor=8.0, rope_original_length=16),
}
LENGTHS = np.array([11, 3, 1, 7], np.int32)
ONE = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

WIDTH = 24  # of every full forward pass, so that there is one compilation


class Compiled:
  """A model with jitted calls, which would otherwise be compiled on every call."""

  def __init__(self, config: ModelConfig):
    model = LanguageModel(config, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(model)
    # Also perturbs biases and scales.
    self.params = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.1, p.shape), jnp.float32), nnx.to_pure_dict(state))
    self.config = config
    self._forward = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch))
    self._prefill = jax.jit(self._insert)
    self._decode = jax.jit(lambda params, *state: nnx.merge(graphdef, params).decode(*state))
    self._append = jax.jit(kv_cache.KVCache.append)
    self._graphdef = graphdef
    self.engine = RolloutEngine(config, ONE, RolloutConfig(max_prompt=11, max_new=8, max_concurrent=4, temperature=0.0), ())

  def _insert(self, params, tokens, positions, start, slot, cache, length):
    end = jnp.where(slot < 0, start, start + positions + 1)
    keys, values = nnx.merge(self._graphdef, params).decoder.prefill(tokens, positions, [(start, end)])
    return cache.insert(keys, values, slot, positions, length)

  def prefill(self, texts, order, capacity):
    """Return a cache whose row `order[i]` holds text i; the texts are packed one after another into one row."""
    width = 32
    tokens, positions, start, slot = (np.zeros((1, width), np.int32) for _ in range(4))
    slot[:], low, length = -1, 0, np.zeros(len(texts), np.int32)
    for text, row in zip(texts, order, strict=True):
      at = np.s_[0, low : low + len(text)]
      tokens[at], positions[at], start[at], slot[at] = text, np.arange(len(text)), low, row
      length[row] = len(text)
      low += len(text)
    return self._prefill(self.params, tokens, positions, start, slot, kv_cache.empty_cache(self.config, len(texts), capacity), length)

  def decode(self, tokens, cache, buffer, step):
    return self._decode(self.params, jnp.asarray(tokens, jnp.int32), cache, buffer, jnp.int32(step))

  def append(self, cache, buffer, count):
    return self._append(cache, buffer, jnp.asarray(count, jnp.int32))

  def greedy(self, texts):
    rollouts = self.engine.generate(self.params, texts, (0,))
    return [row[:n].tolist() for row, n in zip(rollouts.tokens_RT, rollouts.length_R, strict=True)]

  def full(self, tokens) -> np.ndarray:
    """Return the logits (T, V) of one sequence in a full forward pass."""
    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(tokens)] = tokens
    position = np.arange(WIDTH, dtype=np.int32)[None]
    return np.asarray(self._forward(self.params, row, position, [(np.zeros_like(position), position + 1)])[0, : len(tokens)])


@pytest.fixture(scope='module', params=list(CONFIGS))
def model(request):
  return Compiled(CONFIGS[request.param])


@pytest.fixture(scope='module')
def prompts():
  return np.random.default_rng(2).integers(1, 29, (4, 11)).astype(np.int32)


@pytest.mark.long
def test_decoding_after_prompts_of_any_length(model, prompts):
  """Logits equal those of the full forward pass for rows of any length, with tokens in the buffer or in the cache."""
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS - 1)]
  order = [2, 0, 3, 1]
  rows = [texts[order.index(b)] for b in range(4)]
  cache, rng = model.prefill(texts, order, 24), np.random.default_rng(3)
  assert cache.length_B.tolist() == [len(row) for row in rows]
  for steps in (3, 1, 3):
    buffer, count = kv_cache.empty_buffer(model.config, 4, 3), rng.integers(0, steps + 1, 4)
    count[0] = steps
    for step in range(steps):
      new = rng.integers(1, 29, 4)
      logits, buffer = model.decode(new, cache, buffer, step)
      for b in np.flatnonzero(step < count):  # others have ended: their tokens are dropped
        rows[b].append(int(new[b]))
        np.testing.assert_allclose(logits[b], model.full(rows[b])[-1], atol=2e-5)
    cache = model.append(cache, buffer, count)
    assert cache.length_B.tolist() == [len(row) for row in rows]


@pytest.mark.parametrize('window', [None, 3, 12, kv_cache.BLOCK + 2])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_more_than_one_block_of_keys(platform, window):
  """Rows longer than the blocks that attention reads, and a row without tokens; row by row and all rows at once."""
  rng = np.random.default_rng(5)
  kv, query = (2, 3, 2, 2 * kv_cache.BLOCK, 6), rng.normal(size=(3, 4, 6)).astype(np.float32)
  keys, values = (rng.normal(size=kv).astype(np.float32) for _ in range(2))
  buffer = kv_cache.DecodeBuffer(*(rng.normal(size=(2, 3, 2, 5, 6)).astype(np.float32) for _ in range(2)))
  length = np.array([kv_cache.BLOCK + 9, 0, kv_cache.BLOCK], np.int32)
  attend = jax.jit(lambda cache, *rest: cache.attend(*rest))
  with attention.for_platform(platform):
    got = attend(kv_cache.KVCache(keys, values, length), 1, buffer, 3, query, window)
    assert kv_cache._rows_at_a_time(3) == (1 if platform == 'cpu' else 3)
  for b, head in np.ndindex(3, 4):
    join = lambda old, new, b=b, k=head // 2: np.concatenate([old[1, b, k, : length[b]], new[1, b, k, :4]])[-(window or 9999) :]
    scores = join(keys, buffer.k_LBKMH) @ query[b, head] / 6**0.5
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(got[b, head], weights @ join(values, buffer.v_LBKMH) / weights.sum(), atol=1e-5)


@pytest.mark.long
def test_greedy_decoding_takes_the_most_likely_token_of_the_full_forward_pass(model, prompts):
  texts = [prompts[b, :n].tolist() for b, n in enumerate(LENGTHS)]
  for text, answer in zip(texts, model.greedy(texts), strict=True):
    whole = list(text)
    for _ in range(8):
      whole.append(int(model.full(whole)[-1].argmax()))
    assert answer == whole[len(text) :]
