from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model import layers, presets, transformer
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.types import PairBatch

CONFIG = ModelConfig(vocab_size=13, num_layers=3, d_model=12, d_ff=20, num_heads=6, num_kv_heads=2, head_dim=4, init_std=0.3)


def _params(model) -> dict:
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _randomised(config=CONFIG, seed=0):
  """Return a decoder whose norm scales are not ones and whose biases are not zeros, so that omitting one is detected."""
  model = transformer.Decoder(config, rngs=nnx.Rngs(seed))
  graphdef, state = nnx.split(model)
  rng = np.random.default_rng(seed)
  drawn = [f'[{name!r}]' for name in ('attention_norm', 'mlp_norm', 'norm', 'bq', 'bk', 'bv')]
  params = jax.tree_util.tree_map_with_path(
    lambda path, p: jnp.asarray(rng.uniform(0.5, 1.5, p.shape), jnp.float32) if str(path[-1]) in drawn else p, nnx.to_pure_dict(state)
  )
  return graphdef, params


def _apply(graphdef, params, tokens, positions, start, end, *index):
  return nnx.merge(graphdef, params)(tokens, positions, [(start, end)], *index)


def _inputs(seed=0, batch=2, length=7):
  """Return inputs with ragged intervals that include each query itself."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, CONFIG.vocab_size, (batch, length)).astype(np.int32)
  positions = rng.integers(0, 50, (batch, length)).astype(np.int32)
  index = np.arange(length)
  start = rng.integers(0, index + 1, (batch, length)).astype(np.int32)
  end = (index + 1 + rng.integers(0, length - index, (batch, length))).astype(np.int32)
  return tokens, positions, start, end


def _oracle(c, params, tokens, positions, start, end):
  """The decoder in float64, token by token."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  layers = {'bq': np.zeros((99, 99, 1)), 'bk': np.zeros((99, 99, 1)), 'bv': np.zeros((99, 99, 1))} | p['layers']

  def norm(x, scale):
    return x / np.sqrt((x * x).sum() / len(x) + c.norm_eps) * scale

  def rotate(head, position):
    half, out = c.head_dim // 2, np.empty_like(head)
    for i in range(half):
      angle = position / c.rope_theta ** (2 * i / c.head_dim)
      z = complex(head[i], head[i + half]) * np.exp(1j * angle)
      out[i], out[i + half] = z.real, z.imag
    return out

  hidden = np.empty((*tokens.shape, c.d_model))
  for b in range(len(tokens)):
    x = np.stack([p['embedding'][t] for t in tokens[b]])
    for layer in range(c.num_layers):
      h = np.stack([norm(row, layers['attention_norm'][layer]) for row in x])
      keys, values = np.empty((2, len(x), c.num_kv_heads, c.head_dim))
      for s in range(len(x)):
        for n in range(c.num_kv_heads):
          keys[s, n] = rotate(h[s] @ layers['wk'][layer][:, n] + layers['bk'][layer, n], positions[b, s])
          values[s, n] = h[s] @ layers['wv'][layer][:, n] + layers['bv'][layer, n]
      y = x.copy()
      for t in range(len(x)):
        for n in range(c.num_heads):
          kv = n // (c.num_heads // c.num_kv_heads)
          query = rotate(h[t] @ layers['wq'][layer][:, n] + layers['bq'][layer, n], positions[b, t])
          span = slice(start[b, t], end[b, t])
          weights = np.exp(keys[span, kv] @ query / np.sqrt(c.head_dim))
          y[t] += (weights / weights.sum()) @ values[span, kv] @ layers['wo'][layer][n]
        m = norm(y[t], layers['mlp_norm'][layer])
        gate = m @ layers['w_gate'][layer]
        y[t] += (gate / (1 + np.exp(-gate)) * (m @ layers['w_up'][layer])) @ layers['w_down'][layer]
      x = y
    hidden[b] = [norm(row, p['norm']) for row in x]
  return hidden


@pytest.mark.long
@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'qkv_bias': True},
    {'num_heads': 4, 'num_kv_heads': 4, 'num_layers': 1},
    {'num_heads': 3, 'num_kv_heads': 1, 'rope_theta': 100.0, 'norm_eps': 0.1},
  ],
)
def test_decoder_against_the_oracle(changes):
  config = dataclasses.replace(CONFIG, **changes)
  graphdef, params = _randomised(config)
  inputs = _inputs()
  expected = _oracle(config, params, *inputs)
  got = jax.jit(_apply, static_argnums=0)(graphdef, params, *inputs)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(got, expected, atol=3e-5)


@pytest.mark.long
@pytest.mark.parametrize('layers', [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 2])
def test_hidden_states_at_chosen_tokens_are_those_of_the_full_path(layers):
  graphdef, params = _randomised(dataclasses.replace(CONFIG, num_layers=layers))
  inputs = _inputs(1)
  index = np.array([[0, 6, 3, 3], [5, 1, 2, 6]], np.int32)

  def both(params):
    full = _apply(graphdef, params, *inputs)
    picked = _apply(graphdef, params, *inputs, index)
    return jnp.take_along_axis(full, index[..., None], axis=1), picked

  weights = np.random.default_rng(2).normal(size=(2, 4, CONFIG.d_model)).astype(np.float32)
  full, picked = jax.jit(both)(params)
  np.testing.assert_allclose(picked, full, atol=2e-6)
  gradients = jax.jit(lambda p: [jax.grad(lambda p, i=i: jnp.sum(both(p)[i] * weights))(p) for i in range(2)])(params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * max(1, np.abs(b).max())), *gradients)


def test_causality_by_gradient():
  """The output at t depends on the embeddings of tokens <= t and on all of those."""
  graphdef, params = _randomised()
  length = 6
  tokens = np.arange(length, dtype=np.int32)[None]  # a different embedding row for each position
  position = tokens.copy()

  def output(embedding):
    return _apply(graphdef, params | {'embedding': embedding}, tokens, position, np.zeros_like(tokens), position + 1)[0].sum(-1)

  # The sum over D of a normed vector has a gradient, because the norm's scales differ.
  jacobian = jax.jit(jax.jacobian(output))(params['embedding'])[:, :length]
  depends = np.abs(jacobian).max(-1) > 1e-6
  np.testing.assert_array_equal(depends, np.tril(np.ones((length, length), bool)))
  assert not np.any(np.triu(np.abs(jacobian).max(-1), 1))


def test_tokens_outside_the_interval_have_no_influence():
  graphdef, params = _randomised()
  tokens, positions, _, _ = _inputs(3)
  start, end = np.full_like(tokens, 2), np.full_like(tokens, 5)
  apply = jax.jit(_apply, static_argnums=0)
  before = apply(graphdef, params, tokens, positions, start, end)
  tokens[:, 5:] = (tokens[:, 5:] + 1) % CONFIG.vocab_size
  after = apply(graphdef, params, tokens, positions, start, end)
  np.testing.assert_array_equal(after[:, :5], before[:, :5])


def test_only_differences_of_positions_matter():
  graphdef, params = _randomised()
  tokens, positions, start, end = _inputs(4)
  apply = jax.jit(_apply, static_argnums=0)
  base = apply(graphdef, params, tokens, positions, start, end)
  np.testing.assert_allclose(apply(graphdef, params, tokens, positions + 1000, start, end), base, atol=5e-4)
  assert np.abs(apply(graphdef, params, tokens, positions * 2, start, end) - base).max() > 1e-2


def test_rotary_angles_are_exact_at_large_positions():
  positions = np.array([[0, 1, 255, 256, 257, 16_383, 32_767]])
  cos, sin = layers.rope_tables(dataclasses.replace(CONFIG, head_dim=128, rope_theta=1e6), jnp.asarray(positions))
  angle = positions[..., None] / 1e6 ** (np.arange(0, 128, 2) / 128)
  np.testing.assert_allclose(cos, np.cos(angle), atol=4e-3)
  np.testing.assert_allclose(sin, np.sin(angle), atol=4e-3)
  np.testing.assert_allclose(cos[0, :5], np.cos(angle[0, :5]), atol=4e-5)


def test_rms_norm_casts_back_before_it_scales():
  """The order of InternLM2 is matched bit for bit in bfloat16, where the other order gives different bits."""
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(4, 5, 64)).astype(ml_dtypes.bfloat16), rng.uniform(0.5, 1.5, 64).astype(np.float32)
  x32 = x.astype(np.float32)
  normed = x32 / np.sqrt((x32 * x32).mean(-1, keepdims=True) + np.float32(1e-5))
  expected = normed.astype(ml_dtypes.bfloat16) * scale.astype(ml_dtypes.bfloat16)
  other_order = (normed * scale).astype(ml_dtypes.bfloat16)
  got = np.asarray(layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5))
  assert got.dtype == ml_dtypes.bfloat16
  assert (got != expected).mean() < 0.01  # one rounding may fall either way
  assert (got != other_order).mean() > 0.05


def _reward_batch():
  tokens, positions, start, end = _inputs(5)
  index = np.array([[[0, 6]], [[2, 5]]], np.int32)
  return PairBatch(tokens, positions, start, end, index, np.ones((2, 1), np.float32), np.array([[0], [1]], np.int32))


def _reward_loss(config):
  model = RewardModel(dataclasses.replace(config, v_head_init='normal'), rngs=nnx.Rngs(1))
  graphdef, _ = nnx.split(model)

  def loss(params):
    return jnp.sum(jnp.tanh(pair_rewards(nnx.merge(graphdef, params), _reward_batch())))

  return loss, _params(model)


@pytest.fixture(scope='module')
def plain_loss_and_gradients():
  loss, params = _reward_loss(CONFIG)
  return jax.jit(jax.value_and_grad(loss))(params)


REMAT = [
  ('full', 1),
  ('offload', 1),
  ('none', 2),
  *(pytest.param(*case, marks=pytest.mark.slow) for case in (('dots', 1), ('dots_no_batch', 1), ('none', 3), ('full', 8))),
]


@pytest.mark.long
@pytest.mark.parametrize(('remat', 'unroll'), REMAT)
def test_remat_and_unrolling_change_nothing(plain_loss_and_gradients, remat, unroll):
  loss, params = _reward_loss(dataclasses.replace(CONFIG, remat=remat, scan_unroll=unroll))
  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  np.testing.assert_allclose(value, plain_loss_and_gradients[0], atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, plain_loss_and_gradients[1])


def _matmuls(remat):
  loss, params = _reward_loss(dataclasses.replace(CONFIG, remat=remat))
  return sum(e.primitive.name == 'dot_general' for e in _equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))


def _equations(jaxpr):
  """Yield every equation of a jaxpr, including those of its inner jaxprs."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        if hasattr(inner, 'jaxpr'):
          inner = inner.jaxpr
        if hasattr(inner, 'eqns'):
          yield from _equations(inner)


@pytest.mark.long
def test_remat_recomputes_according_to_its_policy():
  counts = {name: _matmuls(name) for name in ('none', 'dots', 'dots_no_batch', 'full', 'offload')}
  assert counts['none'] == counts['dots'] < counts['dots_no_batch'] < counts['full'] == counts['offload']


def test_offloading_keeps_the_inputs_of_layers_in_host_memory_and_nothing_else():
  loss, params = _reward_loss(dataclasses.replace(CONFIG, remat='offload'))
  moved = [e for e in _equations(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) if e.primitive.name == 'device_put']
  shapes = {tuple(e.invars[0].aval.shape) for e in moved}
  assert len(moved) >= 2 and shapes == {(*_reward_batch().tokens_BT.shape, CONFIG.d_model)}, moved


@pytest.mark.long
def test_bfloat16_activations_with_float32_parameters():
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  graphdef, params = _randomised(config)
  inputs = _inputs()
  hidden = jax.jit(_apply, static_argnums=0)(graphdef, params, *inputs)
  assert hidden.dtype == jnp.bfloat16
  assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  expected = _oracle(config, params, *inputs)
  error = np.abs(np.asarray(hidden, np.float64) - expected)
  assert error.mean() < 0.02 * np.abs(expected).mean()
  loss, reward_params = _reward_loss(config)
  value, gradients = jax.jit(jax.value_and_grad(loss))(reward_params)
  assert value.dtype == jnp.float32
  assert all(g.dtype == jnp.float32 and np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
  ('preset', 'hidden', 'inter', 'layers', 'heads', 'kv', 'about'),
  [('polar_1_8b', 2048, 8192, 24, 16, 8, 1.700e9), ('polar_7b', 4096, 14_336, 32, 32, 8, 7.358e9)],
)
def test_parameters_of_the_published_shapes(preset, hidden, inter, layers, heads, kv, about):
  config = ModelConfig(**presets.PRESETS[preset])
  model = nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0)))  # allocates nothing
  # Names and shapes of the published checkpoint: wqkv, wo, w1, w2, w3, two norms; then embeddings, the last norm and v_head.
  layer = (heads + 2 * kv) * 128 * hidden + hidden * heads * 128 + 3 * inter * hidden + 2 * hidden
  count = transformer.num_parameters(model)
  assert count == 92_544 * hidden + layers * layer + hidden + hidden
  assert abs(count / about - 1) < 5e-4
  assert transformer.num_parameters(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))) == count - hidden + 92_544 * hidden


def _vocabulary_arrays(function, *args, vocab):
  """Return the shapes of all arrays in a function that have a vocabulary-sized axis."""
  closed = jax.make_jaxpr(function)(*args)
  variables = [v for e in _equations(closed.jaxpr) for v in e.outvars]
  return {v.aval.shape for v in variables if vocab in getattr(v.aval, 'shape', ())}


def test_the_reward_model_never_builds_logits():
  config = dataclasses.replace(CONFIG, vocab_size=997)
  model = RewardModel(config, rngs=nnx.Rngs(0))
  graphdef, _ = nnx.split(model)
  reward = lambda params: pair_rewards(nnx.merge(graphdef, params), _reward_batch()).sum()
  table = (997, CONFIG.d_model)
  assert _vocabulary_arrays(reward, _params(model), vocab=997) <= {table}
  assert _vocabulary_arrays(jax.grad(reward), _params(model), vocab=997) <= {table}

  language_model = LanguageModel(config, rngs=nnx.Rngs(0))
  lm_graphdef, _ = nnx.split(language_model)
  logits = lambda params: _logits(nnx.merge(lm_graphdef, params), *_inputs())
  assert (2, 7, 997) in _vocabulary_arrays(logits, _params(language_model), vocab=997)  # the check can fail


def _logits(model, tokens, positions, start, end):
  return model(tokens, positions, [(start, end)])


@pytest.mark.parametrize('tie', [False, True])
def test_language_model_logits(tie):
  config = dataclasses.replace(CONFIG, tie_embeddings=tie)
  model = LanguageModel(config, rngs=nnx.Rngs(3))
  params = _params(model)
  assert ('lm_head' in params) == (not tie)
  inputs = _inputs(6)
  table = np.asarray(params['decoder']['embedding'] if tie else params['lm_head'], np.float64)
  expected = _oracle(config, params['decoder'], *inputs) @ table.T
  np.testing.assert_allclose(nnx.jit(_logits)(model, *inputs), expected, atol=1e-4)


def test_initial_scale():
  config = dataclasses.replace(CONFIG, vocab_size=400, d_model=64, d_ff=128, init_std=0.02)
  params = _params(RewardModel(config, rngs=nnx.Rngs(0)))
  assert not np.any(params['v_head'])
  for path, p in jax.tree_util.tree_leaves_with_path(params['decoder']):
    if 'norm' in str(path[-1]):
      np.testing.assert_array_equal(p, 1)
    else:
      np.testing.assert_allclose(np.std(p), 0.02, rtol=0.05)
  layers = params['decoder']['layers']['wq']
  assert np.abs(layers[0] - layers[1]).max() > 0.01


def test_a_decoder_needs_a_vocabulary():
  with pytest.raises(ValueError, match='vocab_size'):
    transformer.Decoder(dataclasses.replace(CONFIG, vocab_size=None), rngs=nnx.Rngs(0))
