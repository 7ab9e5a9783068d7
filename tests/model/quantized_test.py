"""Weights in 8 and 4 bits, against the definitions in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model import heads, lora
from polar_jax.model.quantized import QuantizedWeight, block_size, expand, nf4_levels, quantize

# Appendix E of arXiv 2305.14314.
LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
LEVELS += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
LEVELS += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
CONFIG = ModelConfig(vocab_size=40, num_layers=2, d_model=16, d_ff=128, num_heads=4, num_kv_heads=2, head_dim=4, v_head_init='normal')


def test_levels_of_nf4_are_those_of_the_paper():
  np.testing.assert_allclose(nf4_levels(), LEVELS, atol=2e-6)


def test_blocks_divide_the_last_axis():
  assert [block_size(n) for n in (128, 64, 96, 14336, 4, 7, 130)] == [64, 64, 48, 64, 4, 7, 26]


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_every_element_becomes_the_nearest_code(kind):
  weight = np.random.default_rng(0).normal(size=(2, 3, 128)).astype(np.float32)
  weight[1, 2, :64] = 0
  stored = quantize(jnp.asarray(weight), kind)
  assert stored['codes'].shape == ((2, 3, 128) if kind == 'int8' else (2, 3, 64)) and stored['scale'].shape == (2, 3, 2)
  levels = np.arange(-127, 128) / 127 if kind == 'int8' else np.array(LEVELS)
  expected = np.zeros_like(weight)
  for i in np.ndindex(2, 3, 2):
    block = weight[i[0], i[1], 64 * i[2] : 64 * i[2] + 64]
    largest = np.abs(block).max()
    for k, value in enumerate(block):
      expected[i[0], i[1], 64 * i[2] + k] = 0 if largest == 0 else largest * levels[np.abs(levels - value / largest).argmin()]
  got = np.asarray(expand(**stored))
  np.testing.assert_allclose(got, expected, atol=1e-5)
  assert 0 < np.abs(got - weight).mean() < (0.01 if kind == 'int8' else 0.1)


@pytest.mark.parametrize('kind', ['int8', 'nf4'])
@pytest.mark.parametrize('inputs', [1, 2])
def test_products_and_gradients_are_those_of_the_expanded_weight(kind, inputs):
  rng = np.random.default_rng(1)
  weight, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((6, 4, 8), (2, 3, 6, 4)[: 2 + inputs]))
  block = QuantizedWeight(nnx.Param(weight, axes=('embed', 'heads', 'head_dim')), kind)
  stored = quantize(weight, kind)
  block.codes, block.scale = nnx.Param(stored['codes']), nnx.Param(stored['scale'])
  whole = expand(**stored)
  plain = lambda x: jnp.tensordot(x, whole, inputs)
  for got, expected in (
    (block.project(x, inputs), plain(x)),
    (jax.grad(lambda x: jnp.sum(jnp.sin(block.project(x, inputs))))(x), jax.grad(lambda x: jnp.sum(jnp.sin(plain(x))))(x)),
  ):
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_a_model_on_a_quantized_base_equals_the_merged_one(kind):
  config = LoraConfig(rank=2, base_dtype=kind)
  shapes = nnx.to_pure_dict(nnx.state(heads.abstract_model(CONFIG, 'reward', config), nnx.Param))
  rng = np.random.default_rng(0)
  plain = nnx.to_pure_dict(nnx.state(heads.make_model(CONFIG, 'reward', nnx.Rngs(params=0)), nnx.Param))
  held = lora.freeze({'decoder': plain['decoder']}, config)
  trained = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), jnp.float32), lora.split(shapes, config)[0])
  params = lora.join(trained, held)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  weights = {name: plain['decoder']['layers'][name] for name in config.targets}
  assert size({name: held['decoder']['layers'][name] for name in weights}) < size(weights) * (0.6 if kind == 'int8' else 0.5)

  def rewards(params, config):
    graphdef, _ = nnx.split(heads.abstract_model(CONFIG, 'reward', config))
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    return jax.jit(lambda p: nnx.merge(graphdef, p)(positions, positions, [(0 * positions, positions + 1)]))(params)

  expected = rewards(params, config)
  assert np.abs(expected).max() > 0.01
  np.testing.assert_allclose(rewards(lora.merge(params, config), LoraConfig()), expected, atol=1e-5)
