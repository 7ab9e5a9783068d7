from __future__ import annotations

import collections
import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import MeshConfig
from polar_jax.data.layout import sequence_batch
from polar_jax.scoring import exact
from polar_jax.scoring.scorer import Scorer
from polar_jax.types import Group, Triplet


def draw(rng, count, longest=250):
  """Token sequences of all lengths up to `longest`: two row lengths."""
  return [[*rng.integers(0, 256, int(n)).tolist(), 260] for n in rng.integers(1, longest, count)]


def bits(rewards):
  assert rewards.dtype == np.float32
  return rewards.view(np.int32)


def test_ladder():
  rungs = sorted({n for k in range(4, 14) for n in (2**k, 3 * 2**k) if n % 128 == 0})
  assert rungs[:9] == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072]
  for length in range(1, 4_200):
    assert exact.ladder_length(length) == min(rung for rung in rungs if rung >= length)


# Meshes differ in the last bits; each mesh must always give the same ones. The models are at least 64 by 192, because smaller matmuls
# round alike whatever their shape.
@pytest.mark.long
@pytest.mark.parametrize(
  ('devices', 'mesh', 'changes'),
  [
    (1, MeshConfig(), {'d_model': 64, 'd_ff': 192, 'head_dim': 24, 'attention': 'chunked'}),
    (8, MeshConfig(data=2, tensor=2), {}),
    pytest.param(1, MeshConfig(), {'d_model': 64, 'd_ff': 192, 'head_dim': 6, 'compute_dtype': 'bfloat16'}, marks=pytest.mark.slow),
    pytest.param(8, MeshConfig(), {}, marks=pytest.mark.slow),
    pytest.param(4, MeshConfig(context=4), {}, marks=pytest.mark.slow),
  ],
)
def test_a_reward_depends_on_its_example_alone(make_exact, devices, mesh, changes):
  scorer, rng = make_exact(devices, mesh, **changes), np.random.default_rng(0)
  sequences = draw(rng, 21)
  rewards = scorer.score_sequences(sequences)
  assert len(np.unique(rewards)) == len(sequences)
  for _ in range(3):
    order = rng.permutation(len(sequences))
    np.testing.assert_array_equal(bits(scorer.score_sequences([sequences[i] for i in order])), bits(rewards)[order])
  some = [4, 0, 4, 4, 20, 7]  # with other neighbors, and with copies of itself
  np.testing.assert_array_equal(bits(scorer.score_sequences([sequences[i] for i in some])), bits(rewards)[some])
  for window in (1, 2, 5, 20):
    parts = [scorer.score_sequences(sequences[low : low + window]) for low in range(0, len(sequences), window)]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(rewards))
  neighbors = draw(rng, 9)
  np.testing.assert_array_equal(bits(scorer.score_sequences([*neighbors, *sequences]))[9:], bits(rewards))


@pytest.mark.parametrize('devices', [1, 8])
def test_every_device_gets_one_row_shaped_by_its_own_length(make_exact, devices):
  """On CPUs a wrong shape changes only some rewards, so the test checks the shapes themselves too."""
  scorer, sequences = copy.copy(make_exact(devices)), draw(np.random.default_rng(4), 13, 900)
  called = []

  def record(params, batch):
    assert jax.sharding.get_abstract_mesh().size == devices  # otherwise the partitioner could gather the rows
    assert {shard.data.shape[0] for shard in batch.tokens_BT.addressable_shards} == {1}
    tokens, sizes = np.asarray(batch.tokens_BT), np.asarray(batch.end_BT).max(axis=1)
    called.extend((tokens.shape, tuple(row[:size])) for row, size in zip(tokens, sizes, strict=True) if size)
    return np.zeros(devices, np.float32)

  scorer._forward = record
  scorer.score_sequences(sequences)
  assert sorted(ids for _, ids in called) == sorted(map(tuple, sequences))
  assert {(shape, exact.ladder_length(len(ids))) for shape, ids in called} == {((devices, n), n) for n in (128, 256, 384, 512, 768, 1024)}


def test_one_compilation_for_each_row_length(make_exact):
  scorer = make_exact(init_std=0.2)  # used by no other test, so that its cache starts empty
  for longest in (100, 250, 250):
    scorer.score_sequences(draw(np.random.default_rng(longest), 12, longest))
  assert scorer._forward._cache_size() == 2


@pytest.mark.long
@pytest.mark.parametrize('head_dim', [4, 8, 80])
def test_rewards_equal_those_of_packed_groups(make_exact, template, head_dim):
  exact_scorer = make_exact(head_dim=head_dim)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  packed = Scorer(exact_scorer.params, exact_scorer.model, template, mesh)
  rng = np.random.default_rng(1)
  word = lambda: ''.join(rng.choice(list('abcdé '), int(rng.integers(0, 20))))
  groups = [Group(word(), word(), [word() for _ in range(k)], wrapper) for k, wrapper in ((3, 'sft'), (1, 'pretrain'), (2, 'sft'))]
  alone = [Group(g.prompt, g.reference, [c], g.wrapper) for g in groups for c in g.candidates]
  rewards = exact_scorer.score(alone)
  assert np.ptp(rewards) > 0.1
  np.testing.assert_allclose(rewards, np.concatenate(packed.score(groups)), atol=1e-5)
  np.testing.assert_allclose(rewards, np.concatenate(packed.score(alone)), atol=1e-5)
  g = groups[0]
  pair = packed.score_pairs([Triplet(g.prompt, g.reference, *g.candidates[:2], g.wrapper)])
  np.testing.assert_allclose(rewards[:2], pair[0], atol=1e-5)


@pytest.mark.long
def test_devices_agree_except_for_the_last_bits(make_exact):
  sequences = draw(np.random.default_rng(3), 9)
  np.testing.assert_allclose(make_exact(8).score_sequences(sequences), make_exact().score_sequences(sequences), atol=1e-5)


def test_content_and_place_of_padding_do_not_matter(make_exact):
  scorer, (sequence,) = make_exact(), draw(np.random.default_rng(2), 1, 100)
  size, (reward,) = len(sequence), scorer.score_sequences([sequence])
  batch = sequence_batch([sequence], 128, 1)

  def run(batch):
    with jax.set_mesh(scorer._mesh):
      return np.asarray(scorer._forward(scorer.params, jax.tree.map(jnp.asarray, batch)))[0]

  tokens = batch.tokens_BT.copy()
  tokens[:, size:] = 77
  assert run(batch._replace(tokens_BT=tokens)) == reward
  shift = 128 - size
  assert shift > 0
  left = {name: np.roll(getattr(batch, name), shift, axis=1) for name in ('tokens_BT', 'positions_BT')}
  seen = np.arange(128)[None] >= shift
  left |= {'start_BT': np.where(seen, shift, 0), 'end_BT': np.where(seen, np.arange(128)[None] + 1, 0)}
  np.testing.assert_allclose(run(batch._replace(**left, reward_index_B=np.full(1, 127))), reward, atol=1e-5)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_float32_is_multiplied_as_float32(make_exact, template, dtype):
  exact_scorer = make_exact(compute_dtype=dtype)
  packed = Scorer(exact_scorer.params, exact_scorer.model, template, sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
  batches = []  # as the packed scorer passes them to its model

  def record(params, batch):
    batches.append(batch)
    return np.zeros(batch.reward_index_BQ.shape, np.float32)

  forward, packed._forward = packed._forward, record
  packed.score([Group('p', 'r', ['a', 'b'])])
  for jitted, batch in ((exact_scorer._forward, sequence_batch([[1, 2]], 128, 1)), (forward, batches[0])):
    dots = re.findall(r'dot_general.*', jitted.lower(exact_scorer.params, batch).as_text())
    assert len(dots) > 8
    exact_dots = sum('HIGHEST' in dot for dot in dots)
    assert exact_dots == (len(dots) if dtype == 'float32' else 1)  # the head is always float32


def test_sharded_parameters_are_gathered_rather_than_their_products(make_exact):
  scorer = make_exact(8)  # fsdp=8
  with jax.set_mesh(scorer._mesh):
    text = scorer._forward.lower(scorer.params, sequence_batch([[1, 2]] * 8, 128, 8)).compile().as_text()
  found = collections.Counter(re.findall(r' (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(', text))
  assert found['all-gather'] > 8
  assert set(found) == {'all-gather'}


def test_nothing_to_score(make_exact):
  assert make_exact().score([]).shape == (0,)


@pytest.mark.parametrize(
  ('example', 'expected'),
  [
    (Group('p', 'r', ['a', 'b']), 'example 1: has 2 candidates'),
    (Group('p', 'r', []), 'example 1: has 0 candidates'),
    (Group('p', 'r', [3]), 'example 1: .*must be a string or a list of messages, not int'),
    (Group('p', 'r', ['a'], wrapper='chat'), "example 1: wrapper is 'chat'"),
  ],
)
def test_bad_examples_are_named(make_exact, example, expected):
  with pytest.raises(exact.ExampleError, match=expected) as caught:
    make_exact().score([Group('p', 'r', ['a']), example])
  assert caught.value.index == 1


@pytest.mark.parametrize(('wrong', 'expected'), [([1, 261], 'the token 261.*0 to 260'), ([-1, 3], 'the token -1'), ([], 'no tokens')])
def test_tokens_that_the_model_does_not_have_are_named(make_exact, wrong, expected):
  with pytest.raises(exact.ExampleError, match=f'example 2: has {expected}'):
    make_exact().score_sequences([[1], [2], wrong])


def test_rewards_that_are_not_finite_are_named(make_exact):
  scorer = copy.copy(make_exact())
  poisoned = scorer.params['decoder']['embedding'].at[99].set(jnp.inf)
  scorer.params = {**scorer.params, 'decoder': {**scorer.params['decoder'], 'embedding': poisoned}}
  with pytest.raises(exact.ExampleError, match='example 3: its reward is nan'):
    scorer.score_sequences([[1], [2] * 200, [3], [99, 1], [4]])
