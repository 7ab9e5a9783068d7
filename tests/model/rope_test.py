from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.config import ConfigError, ModelConfig, default_config, parse
from polar_jax.model import layers


def _config(**changes):
  return ModelConfig(vocab_size=8, head_dim=16, rope_theta=5e5, **changes)


def _frequencies(config, positions):
  return np.asarray(layers.rope_frequencies(config, jnp.asarray(positions, jnp.int32)), np.float64)


def _plain(head_dim, theta):
  return [1 / theta ** (2 * i / head_dim) for i in range(head_dim // 2)]


ROW = np.arange(10)[None]


def test_linear_scaling_divides_positions():
  got = _frequencies(_config(rope_scaling='linear', rope_factor=4.0), ROW)
  np.testing.assert_allclose(got[0], [f / 4 for f in _plain(16, 5e5)], rtol=1e-6)


def _llama3(frequency, factor, low, high, original):
  """Return one frequency by the rule of Llama 3.1, in terms of wavelengths."""
  wavelength = 2 * np.pi / frequency
  if wavelength < original / high:
    return frequency
  if wavelength > original / low:
    return frequency / factor
  smooth = (original / wavelength - low) / (high - low)
  return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize(('factor', 'low', 'high', 'original'), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (8.0, 2.0, 3.0, 100)])
def test_llama3_scaling_by_wavelength(factor, low, high, original):
  config = ModelConfig(
    head_dim=128, rope_theta=5e5, rope_scaling='llama3', rope_factor=factor, rope_low_freq_factor=low, rope_high_freq_factor=high,
    rope_original_length=original,
  )  # fmt: skip
  expected = [_llama3(f, factor, low, high, original) for f in _plain(128, 5e5)]
  np.testing.assert_allclose(_frequencies(config, ROW)[0], expected, rtol=1e-6)
  ratio = np.array(expected) / _plain(128, 5e5)
  assert ratio.max() == 1 and np.isclose(ratio.min(), 1 / factor) and ((ratio < 0.99) & (ratio > 1.01 / factor)).any()  # all three kinds


def test_dynamic_scaling_acts_beyond_max_position_and_per_row():
  config = _config(rope_scaling='dynamic', rope_factor=2.0, max_position=20)
  rows = np.stack([np.arange(40), np.minimum(np.arange(40), 19)])  # one sequence of 40 tokens, one of 20
  long, short = _frequencies(config, rows)
  theta = 5e5 * (2.0 * 40 / 20 - (2.0 - 1)) ** (16 / 14)
  np.testing.assert_allclose(long, _plain(16, theta), rtol=2e-6)
  np.testing.assert_array_equal(short, np.float32(_plain(16, 5e5)))


@pytest.mark.parametrize(('factor', 'fast', 'slow', 'original'), [(4.0, 32.0, 1.0, 32_768), (8.0, 8.0, 2.0, 100), (3.0, 32.0, 1.0, 4)])
def test_yarn_scaling_by_rotations(factor, fast, slow, original):
  """Pairs that rotate more than `fast` times over the original length are kept, those below `slow` divided, others interpolated."""
  config = ModelConfig(
    head_dim=64, rope_theta=1e6, rope_scaling='yarn', rope_factor=factor, rope_original_length=original, rope_beta_fast=fast,
    rope_beta_slow=slow,
  )  # fmt: skip
  plain = _plain(64, 1e6)
  # The pair at which the number of rotations passes a limit, between pairs.
  passes = lambda limit: 32 * math.log(original / (2 * math.pi * limit)) / math.log(1e6)
  low, high = max(math.floor(passes(fast)), 0), min(math.ceil(passes(slow)), 63)
  share = [min(max((i - low) / (high - low or 0.001), 0), 1) for i in range(32)]
  expected = [f * (1 - s) + f / factor * s for f, s in zip(plain, share, strict=True)]
  np.testing.assert_allclose(_frequencies(config, ROW)[0], expected, rtol=1e-6)
  if original == 32_768:
    rotations = original * np.array(plain) / (2 * math.pi)
    ratio = np.array(expected) / plain
    assert (ratio[rotations > 45] == 1).all() and np.allclose(ratio[rotations < 0.7], 1 / factor)


@pytest.mark.parametrize(('given', 'expected'), [(None, 0.1 * math.log(4.0) + 1), (1.25, 1.25)])
def test_yarn_scales_logits_by_the_square_of_its_attention_factor(given, expected):
  config = _config(rope_scaling='yarn', rope_factor=4.0, rope_original_length=32, rope_attention_factor=given)
  cos, sin = layers.rope_tables(config, jnp.asarray(ROW))
  np.testing.assert_allclose(np.hypot(cos, sin), expected, rtol=1e-6)


def test_no_scaling_at_any_length():
  np.testing.assert_array_equal(_frequencies(_config(max_position=4), np.arange(40)[None])[0], np.float32(_plain(16, 5e5)))


@pytest.mark.parametrize(('name', 'value'), [('rope_low_freq_factor', 4.0), ('rope_beta_slow', 32.0)])
def test_bounds_of_llama3_and_yarn_scaling_are_checked(name, value):
  config = default_config()
  setattr(config.model, name, value)
  with pytest.raises(ConfigError, match=name):
    parse(config)
