"""Low-rank adapters of the decoder, against the formula in numpy and against weights that they are merged into."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model import heads, lora

CONFIG = ModelConfig(
  vocab_size=40, num_layers=3, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.2, v_head_init='normal'
)
LORA = LoraConfig(rank=3, alpha=6.0)
INDEX = jnp.array([[3, 11], [4, 5]])


def _params(config=LORA, seed=0):
  """Return the parameters of a reward model whose adapters are all random."""
  params = nnx.to_pure_dict(nnx.state(heads.make_model(CONFIG, 'reward', nnx.Rngs(params=0), config), nnx.Param))
  trained, frozen = lora.split(params, config)
  rng = np.random.default_rng(seed)
  return lora.join(jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), trained), frozen)


def _rewards(params, config=LORA, key=None):
  """Return the rewards (2, 2) of two rows of 12 tokens."""
  graphdef, _ = nnx.split(heads.abstract_model(CONFIG, 'reward', config))

  @jax.jit
  def compute(params, key):
    model = nnx.merge(graphdef, params)
    if key is not None:
      lora.start_dropout(model, key)
    position_BT = jnp.broadcast_to(jnp.arange(12), (2, 12))
    return model((position_BT * 7 + jnp.arange(2)[:, None]) % 40, position_BT, [(jnp.zeros_like(position_BT), position_BT + 1)], INDEX)

  return np.asarray(compute(params, key))


@pytest.mark.parametrize('name, inputs', [('wq', 1), ('wo', 2), ('w_down', 1)])
@pytest.mark.parametrize('rank_stabilized', [False, True])
def test_an_adapter_is_a_scaled_product(name, inputs, rank_stabilized):
  config = dataclasses.replace(LORA, rank_stabilized=rank_stabilized)
  block = heads.make_model(CONFIG, 'reward', nnx.Rngs(params=0), config).decoder.layers
  rng = np.random.default_rng(0)
  weight = np.asarray(getattr(block, name)[...])[1]
  a, b = rng.normal(size=(*weight.shape[:inputs], 3)), rng.normal(size=(3, *weight.shape[inputs:]))
  x = rng.normal(size=(2, 5, *weight.shape[:inputs]))
  adapter = block.lora.get(name)
  assert adapter.a.shape == (3, *a.shape) and adapter.b.shape == (3, *b.shape)
  adapter.a, adapter.b = nnx.Param(jnp.asarray(a, jnp.float32)), nnx.Param(jnp.asarray(b, jnp.float32))
  expected = np.zeros((2, 5, *weight.shape[inputs:]))
  for i in np.ndindex(2, 5):
    for r in range(3):
      expected[i] += (x[i] * a[..., r]).sum() * b[r]
  expected *= 6.0 / (np.sqrt(3) if rank_stabilized else 3)
  np.testing.assert_allclose(adapter(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


def test_new_adapters_change_no_bit():
  params = nnx.to_pure_dict(nnx.state(heads.make_model(CONFIG, 'reward', nnx.Rngs(params=0), LORA), nnx.Param))
  adapters = params['decoder']['layers']['lora']
  assert set(adapters) == set(LORA.targets)
  for name, adapter in adapters.items():
    fan_in = np.prod(adapter['a'].shape[1:-1])
    assert np.std(adapter['a']) == pytest.approx((3 * fan_in) ** -0.5, rel=0.25), name
  base = {'decoder': {**params['decoder'], 'layers': {k: v for k, v in params['decoder']['layers'].items() if k != 'lora'}}}
  plain = _rewards(base | {'v_head': params['v_head']}, LoraConfig())
  assert np.abs(plain).max() > 0.1
  np.testing.assert_array_equal(_rewards(params), plain)


@pytest.mark.long
@pytest.mark.parametrize('targets', [LORA.targets, ('wv', 'w_down')])
def test_merged_weights_compute_the_same(targets):
  config = dataclasses.replace(LORA, targets=targets, rank_stabilized=len(targets) == 2)
  params = _params(config)
  merged = lora.merge(params, config)
  assert 'lora' not in merged['decoder']['layers']
  changed = {name for name, w in merged['decoder']['layers'].items() if not np.array_equal(w, params['decoder']['layers'][name])}
  assert changed == set(targets)
  rewards = _rewards(params, config)
  np.testing.assert_allclose(_rewards(merged, LoraConfig()), rewards, atol=1e-5)
  without, _ = lora.split(params, config)
  zeros = lora.join(jax.tree.map(jnp.zeros_like, without) | {'v_head': params['v_head']}, lora.split(params, config)[1])
  assert np.abs(_rewards(zeros, config) - rewards).max() > 0.05


def test_merging_keeps_types_or_casts():
  params = _params()
  halves = lora.join(lora.split(params, LORA)[0], jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora.split(params, LORA)[1]))
  layers = lora.merge(halves, dataclasses.replace(LORA, targets=('wq',)))['decoder']['layers']
  assert layers['wq'].dtype == jnp.float32 and layers['wv'].dtype == jnp.float32 and layers['mlp_norm'].dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(lora.merge(halves, LORA, 'bfloat16'))} == {jnp.dtype(jnp.bfloat16)}


def test_split_and_join():
  params = _params()
  trained, frozen = lora.split(params, LORA)
  assert set(trained) == {'decoder', 'v_head'} and set(trained['decoder']['layers']) == {'lora'} and set(frozen) == {'decoder'}
  jax.tree.map(np.testing.assert_array_equal, lora.join(trained, frozen), params)
  assert lora.split(params, LoraConfig()) == (params, {})


def test_full_rank_represents_any_update():
  """With the identity as A, B is the update itself."""
  config = LoraConfig(rank=16, alpha=8.0, targets=('wq', 'wo'))
  params = _params(config)
  layers, update = params['decoder']['layers'], {}
  for name, shape in (('wq', (3, 16, 4, 4)), ('wo', (3, 4, 4, 16))):
    update[name] = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    a = np.broadcast_to(np.eye(16, dtype=np.float32), (3, 16, 16)).reshape(layers['lora'][name]['a'].shape)
    layers['lora'][name] = {'a': jnp.asarray(a), 'b': jnp.asarray(2 * update[name].reshape(layers['lora'][name]['b'].shape))}
  merged = lora.merge(params, config)['decoder']['layers']
  for name, expected in update.items():
    np.testing.assert_allclose(merged[name] - layers[name], expected, atol=1e-5)


def test_dropout_is_unbiased_and_differs_between_layers():
  config = LoraConfig(rank=4, dropout=0.25, targets=('wq', 'wk'))
  model = heads.make_model(CONFIG, 'reward', nnx.Rngs(params=0), config)
  lora.start_dropout(model, jax.random.key(0))
  masks = []
  for layer in range(3):
    for name in config.targets:
      adapter = model.decoder.layers.lora.get(name)
      adapter = jax.tree.map(lambda p, layer=layer: p[layer], adapter)
      adapter.a, adapter.b = nnx.Param(jnp.eye(16, 4)), nnx.Param(jnp.eye(4, 16).reshape(4, -1))
      out = np.asarray(adapter(jnp.ones((50, 100, 16))))[..., :4] / adapter.scale
      assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)} and out.mean() == pytest.approx(1, abs=0.02)
      masks.append(out)
  for i, one in enumerate(masks):
    assert all(np.mean(one == other) < 0.8 for other in masks[:i])


@pytest.mark.long
def test_dropout_follows_its_key_and_ends_without_one():
  config = dataclasses.replace(LORA, dropout=0.5, targets=('wq',))
  params = _params(config)
  one, again, other = (_rewards(params, config, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - other).max() > 1e-3
  np.testing.assert_array_equal(_rewards(params, config), _rewards(params, dataclasses.replace(config, dropout=0.0)))
