from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.data.layout import pair_batch, pair_segment, text_batch
from polar_jax.model import flops
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.presets import PRESETS
from polar_jax.model.reward_model import RewardModel, pair_rewards
from polar_jax.types import PairBatch, TextBatch, UserError

SMALL = ModelConfig(vocab_size=11, num_layers=2, d_model=3, d_ff=5, num_heads=2, num_kv_heads=1, head_dim=4)
# Matmuls dominate; the scan is unrolled because XLA counts a loop's body once.
LARGE = ModelConfig(vocab_size=512, num_layers=3, d_model=256, d_ff=512, num_heads=4, num_kv_heads=2, head_dim=64, scan_unroll=3)


def test_reward_model_by_hand():
  """Chosen [1 7 8 R], rejected [1 7 R]: 5 tokens in one row, two in the chosen tail, two shared, one in the rejected tail."""
  batch = pair_batch([pair_segment([1, 7, 8, 10], [1, 7, 10])], [0], [[0], []], 12, 1)
  # keys seen: chosen tail, stored backwards: 4 (reward), 3; prefix: 1, 2; rejected: 3
  first_layer = 5 * 2 * ((3 * 8) + 2 * (3 * 4) + (8 * 3) + 3 * (3 * 5)) + (4 + 3 + 1 + 2 + 3) * 2 * 2 * 8
  last_layer = 5 * 2 * 2 * (3 * 4) + 2 * 2 * ((3 * 8) + (8 * 3) + 3 * (3 * 5)) + (4 + 3) * 2 * 2 * 8
  head = 2 * 2 * 3
  assert flops.reward_model_flops(SMALL, batch) == first_layer + last_layer + head


def test_the_same_pairs_as_two_sequences_by_hand():
  rows = [pair_segment([1, 7, 8, 10], [1, 7, 10])]
  layer = 7 * 2 * ((3 * 8) + 2 * (3 * 4) + (8 * 3) + 3 * (3 * 5)) + (1 + 2 + 3 + 4 + 1 + 2 + 3) * 2 * 2 * 8
  for packed, most in (([[0]], 1), ([[0], []], 3)):  # padding costs nothing
    assert flops.two_sequences_flops(SMALL, pair_batch(rows, [0], packed, 12, most)) == 2 * layer + 2 * 2 * 3


def test_a_shared_prefix_saves_its_flops():
  """|prompt| = |reference| = |candidate|: a pair is 8 parts of tokens as two rows and 5 as one. The last layer saves too."""
  part = 64
  deep = dataclasses.replace(SMALL, num_layers=200)  # makes the last layer negligible
  shared = [1] * 3 * part  # prompt, reference, prompt
  batch = pair_batch([pair_segment([*shared, *[2] * part], [*shared, *[3] * part])], [0], [[0]], 5 * part, 1)
  wide = dataclasses.replace(deep, d_model=512, d_ff=1024)  # makes attention negligible
  assert flops.two_sequences_flops(wide, batch) / flops.reward_model_flops(wide, batch) == pytest.approx(1.6, rel=0.01)


def test_language_model_by_hand():
  batch = text_batch([np.arange(4), None], [0, -1], 3)
  layer = 3 * 2 * ((3 * 8) + 2 * (3 * 4) + (8 * 3) + 3 * (3 * 5)) + (1 + 2 + 3) * 2 * 2 * 8
  assert flops.language_model_flops(SMALL, batch) == 2 * layer + 3 * 2 * 3 * 11


def test_windows_by_hand():
  """A local and a global layer, a window of 2: the pairs of positions 0, 1, 2, ... are 1, 2, 2, ... in the local layer."""
  windowed = dataclasses.replace(SMALL, sliding_window=2, global_every=2)
  pair = 2 * 2 * 8
  texts = text_batch([np.arange(5)], [0], 4)
  assert flops.language_model_flops(SMALL, texts) - flops.language_model_flops(windowed, texts) == (1 + 2) * pair
  # Chosen [1 7 8 R], rejected [1 7 R]: in the local first layer, 4, 3 and 3 keys become 2.
  batch = pair_batch([pair_segment([1, 7, 8, 10], [1, 7, 10])], [0], [[0]], 12, 1)
  assert flops.reward_model_flops(SMALL, batch) - flops.reward_model_flops(windowed, batch) == (2 + 1 + 1) * pair
  local_last = dataclasses.replace(SMALL, sliding_window=2)  # of the last layer, only the rewards count: 4 and 3
  assert flops.reward_model_flops(windowed, batch) - flops.reward_model_flops(local_last, batch) == (2 + 1) * pair
  assert flops.two_sequences_flops(SMALL, batch) - flops.two_sequences_flops(windowed, batch) == (1 + 2 + 1) * pair


@pytest.mark.parametrize('preset', sorted(PRESETS))
def test_parameters_of_every_preset(preset):
  config = ModelConfig(**{'vocab_size': 1_000} | PRESETS[preset])
  for make, count in ((RewardModel, flops.reward_model_parameters), (LanguageModel, flops.language_model_parameters)):
    model = nnx.eval_shape(lambda make=make: make(config, rngs=nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    sizes = {jax.tree_util.keystr(path): math.prod(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    found = count(config)
    assert found.total == sum(sizes.values())
    assert found.embedding == sum(size for name, size in sizes.items() if 'embed' in name) > 0
    assert found.without_embedding == found.total - found.embedding


def test_padding_costs_nothing():
  rows = [pair_segment([1, 7, 8, 10], [1, 7, 10]), pair_segment([1, 10], [1, 5, 10])]
  alone = flops.reward_model_flops(SMALL, pair_batch(rows, [0, 1], [[0], [1]], 6, 1))
  assert flops.reward_model_flops(SMALL, pair_batch(rows, [0, 1], [[0], [1], [], []], 30, 1)) == alone
  # Packed, with room for more pairs than there are.
  assert flops.reward_model_flops(SMALL, pair_batch(rows, [0, 1], [[0, 1], []], 30, 5)) == alone


def _dense(batch, length):
  """Return intervals over the whole row, the only masks for which XLA's dense attention does no excess work."""
  tokens = np.ones((batch, length), np.int32)
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  return tokens, positions, np.zeros_like(tokens), np.full_like(tokens, length)


def _xla_flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


@pytest.mark.parametrize('layers', [1, 3])
def test_language_model_against_xla(layers):
  config = dataclasses.replace(LARGE, num_layers=layers)
  graphdef, params = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)))
  inputs = _dense(2, 64)
  batch = TextBatch(*inputs, inputs[0], np.ones((2, 64), np.float32), np.zeros(2, np.int32))
  measured = _xla_flops(lambda p: nnx.merge(graphdef, p)(*inputs[:2], [inputs[2:]]), params)
  np.testing.assert_allclose(flops.language_model_flops(config, batch), measured, rtol=0.05)


@pytest.mark.parametrize('layers', [1, 3])
def test_reward_model_against_xla(layers):
  config = dataclasses.replace(LARGE, num_layers=layers)
  graphdef, params = nnx.split(RewardModel(config, rngs=nnx.Rngs(0)))
  batch = PairBatch(*_dense(2, 64), np.array([[[5, 63]], [[7, 9]]], np.int32), np.ones((2, 1), np.float32), np.zeros((2, 1), np.int32))
  measured = _xla_flops(lambda p: pair_rewards(nnx.merge(graphdef, p), batch), params)
  np.testing.assert_allclose(flops.reward_model_flops(config, batch), measured, rtol=0.05)


def test_a_training_step_costs_three_forward_passes():
  graphdef, params = nnx.split(LanguageModel(LARGE, rngs=nnx.Rngs(0)))
  inputs = _dense(2, 64)
  batch = TextBatch(*inputs, inputs[0], np.ones((2, 64), np.float32), np.zeros(2, np.int32))
  measured = _xla_flops(jax.grad(lambda p: nnx.merge(graphdef, p)(*inputs[:2], [inputs[2:]]).sum()), params)
  np.testing.assert_allclose(3 * flops.language_model_flops(LARGE, batch), measured, rtol=0.1)


class _Device:
  def __init__(self, kind, **more):
    self.device_kind = kind
    vars(self).update(more)


# What JAX calls the devices of every TPU that libtpu can describe, and NVIDIA its data-center GPUs. Peaks are those of a device: JAX makes
# two devices of a v2, v3 or 7x.
@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA H100 NVL', 835e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA H200 NVL', 835e12),
    ('NVIDIA GH200 480GB', 989e12),
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('TPU v2', 23e12),
    ('TPU v3', 61.5e12),
    ('TPU v4', 275e12),
    ('TPU v4 lite', 138e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5e', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('TPU v6e', 918e12),
    ('TPU7x', 1_153.5e12),
  ],
)
def test_peaks_of_known_devices(kind, peak):
  value, source = flops.peak_flops(_Device(kind))
  assert value == peak
  assert kind in source


@pytest.mark.parametrize(
  ('kind', 'cores', 'peak'), [('TPU v4', 1, 137.5e12), ('TPU v4', 2, 275e12), ('TPU v5', 2, 459e12), ('TPU v2', 1, 23e12)]
)
def test_the_peak_of_a_device_is_that_of_its_cores(kind, cores, peak):
  assert flops.peak_flops(_Device(kind, num_cores=cores))[0] == peak


@pytest.mark.parametrize('kind', ['TPU v5 next', 'TPU v9', 'TPU8i', 'TPU v7 lite'])
def test_an_unknown_tpu_is_refused_and_not_measured(kind):
  with pytest.raises(UserError, match=f"the peak FLOP/s of a '{kind}'.* set profile.peak_flops") as caught:
    flops.peak_flops(_Device(kind))
  assert len(str(caught.value)) <= 500


def test_the_peak_of_a_cpu_is_measured_and_shared_by_fake_devices():
  value, source = flops.peak_flops(jax.devices()[0])
  assert 1e8 < value < 1e13
  assert 'measured' in source
