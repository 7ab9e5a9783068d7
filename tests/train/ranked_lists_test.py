"""Training on ranked lists: the loss against its definition, and packed, sharded and resumed runs against each candidate on its own."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from training_runs import killed_at

from polar_jax import api_training, sharding
from polar_jax.config import CheckpointingConfig, LossConfig, MeshConfig, ModelConfig, TemplateConfig, TrainConfig
from polar_jax.data import layout, pipeline
from polar_jax.data.examples import as_triplets
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model import flops
from polar_jax.model.heads import abstract_model
from polar_jax.model.reward_model import sequence_rewards
from polar_jax.train import losses
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import ranking
from polar_jax.types import RankedList, Triplet, UserError

RANKS = [[0, 1, 2, 3], [0, 1], [0, 0, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1], [0, 1, 2, 2, 3]]
LARGEST = 5
BOTH = [LossConfig(), LossConfig('plackett_luce')]


def _arrays(seed=0, scale=3.0):
  """Return rewards (2, 4, 5), ranks and mask of the lists `RANKS` in two rows; rewards of padding are not finite."""
  rng = np.random.default_rng(seed)
  rewards = np.full((2, 4, LARGEST), np.nan, np.float32)
  rank, mask = np.full((2, 4, LARGEST), -1, np.int32), np.zeros((2, 4), np.float32)
  for place, ranks in zip(itertools.product(range(2), range(3)), RANKS, strict=True):
    rewards[place][: len(ranks)], rank[place][: len(ranks)], mask[place] = scale * rng.normal(size=len(ranks)), ranks, 1
  return rewards, rank, mask


def _pairs(rewards, ranks):
  """Yield the rewards of each pair of candidates of different rank: that of the better one, that of the worse one."""
  for i, j in itertools.product(range(len(ranks)), repeat=2):
    if ranks[i] < ranks[j]:
      yield float(rewards[i]), float(rewards[j])


def _expected(options, rewards, ranks):
  """Return the loss of a list by its definition."""
  if options.name == 'plackett_luce':
    total = 0.0
    for i, rank in enumerate(ranks):
      worse = [math.exp(r) for r, other in zip(rewards, ranks, strict=True) if other > rank]
      total -= math.log(math.exp(rewards[i]) / (math.exp(rewards[i]) + sum(worse))) if worse else 0.0
    return total
  of_pair = {'bradley_terry': lambda p: -math.log(p), 'focal': lambda p: (1 - 2 * max(p - 0.5, 0)) ** 2 * -math.log(p)}[options.name]
  probabilities = [1 / (1 + math.exp(r - c)) for c, r in _pairs(rewards, ranks)]
  smoothing = options.label_smoothing
  return np.mean([(1 - smoothing) * of_pair(p) + smoothing * of_pair(1 - p) for p in probabilities])


@pytest.mark.parametrize('options', [*BOTH, LossConfig('focal'), LossConfig(label_smoothing=0.2)])
@pytest.mark.parametrize('weights', [False, True])
def test_loss_and_metrics_of_lists_against_their_definitions(options, weights):
  rewards, rank, mask = _arrays()
  weight = np.random.default_rng(1).random(mask.shape).astype(np.float32) if weights else None
  loss, sums = losses.list_sums(jnp.asarray(rewards), rank, mask, options, weight)
  expected = dict.fromkeys(('loss', 'accuracy', 'margin', 'chosen_reward', 'rejected_reward'), 0.0)
  for place, ranks in zip(itertools.product(range(2), range(3)), RANKS, strict=True):
    of_list, w = rewards[place][: len(ranks)], 1.0 if weight is None else float(weight[place])
    pairs = list(_pairs(of_list, ranks))
    expected['loss'] += w * _expected(options, of_list.tolist(), ranks)
    expected['accuracy'] += w * np.mean([c > r for c, r in pairs])
    expected['margin'] += w * np.mean([c - r for c, r in pairs])
    expected['chosen_reward'] += w * of_list[0]
    expected['rejected_reward'] += w * of_list[-1]
  np.testing.assert_allclose([float(loss), *(float(sums[name]) for name in list(expected)[1:])], list(expected.values()), rtol=2e-5)


def test_one_positive_among_equal_negatives_is_the_cross_entropy_of_a_softmax():
  rewards = np.random.default_rng(0).normal(size=(1, 1, 6)).astype(np.float32)
  loss, _ = losses.list_sums(jnp.asarray(rewards), np.array([[[0, 1, 1, 1, 1, 1]]]), np.ones((1, 1)), LossConfig('plackett_luce'))
  np.testing.assert_allclose(loss, -jax.nn.log_softmax(rewards[0, 0])[0], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
  'options', [*BOTH, LossConfig('focal'), LossConfig(center_rewards_coefficient=0.1, penalty='log_barrier', label_smoothing=0.1)]
)
@pytest.mark.parametrize('padding', [0, 3])
def test_a_list_of_two_is_a_pair_to_the_bit(options, padding):
  rewards = 4 * np.random.default_rng(2).normal(size=(3, 5, 2)).astype(np.float32)
  rewards[0, 0] = 1.5
  mask, weight = np.ones((3, 5), np.float32), np.random.default_rng(3).random((3, 5)).astype(np.float32)
  wide = np.concatenate([rewards, np.zeros((3, 5, padding), np.float32)], axis=-1)
  rank = np.broadcast_to([0, 1, *[-1] * padding], wide.shape)
  pair = lambda r: losses.pair_sums(r, mask, options, None, weight)
  of_list = lambda r: losses.list_sums(r, rank, mask, options, weight)
  (a, sums), gradient = jax.value_and_grad(pair, has_aux=True)(jnp.asarray(rewards))
  (b, list_sums), list_gradient = jax.value_and_grad(of_list, has_aux=True)(jnp.asarray(wide))
  assert float(a) == float(b) and {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in list_sums.items()}
  if options.penalty == 'none':
    np.testing.assert_array_equal(gradient, list_gradient[..., :2])
  else:  # the gradients of loss and penalty are added in another order
    np.testing.assert_allclose(gradient, list_gradient[..., :2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('options', [*BOTH, LossConfig(penalty='log_barrier', center_rewards_coefficient=1.0)])
def test_gradients_are_finite_and_padding_has_none(options):
  rewards, rank, mask = _arrays(scale=1e4)
  gradient = jax.grad(lambda r: losses.list_sums(r, rank, mask, options)[0])(jnp.asarray(rewards))
  assert np.isfinite(gradient).all() and not np.any(np.asarray(gradient)[rank < 0])


CONFIG = ModelConfig(
  vocab_size=264, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.2, v_head_init='normal'
)


def _examples(size=10):
  """Return ranked lists of up to five candidates in their three forms, with weights."""
  rng = np.random.default_rng(0)
  word = lambda: bytes(rng.integers(97, 123, rng.integers(1, 9)).tolist()).decode()
  out = []
  for i in range(size):
    texts = [word() + str(c) for c in range(2 + i % 4)]
    base = {'prompt': word(), 'reference': word(), 'weight': 0.5 + i % 3}
    cut = 1 + len(texts) // 3
    out.append(base | ({'ranked': texts} if i % 2 else {'chosen': texts[:cut], 'rejected': texts[cut:]}))
  return out


@pytest.fixture(scope='module')
def template():
  return Template(TemplateConfig(), ByteTokenizer())


@pytest.fixture(scope='module')
def alone(template):
  """Parameters, and the loss and gradients of the weighted mean over lists, with each candidate read in a row of its own."""
  examples = as_triplets(_examples())
  graphdef, params = nnx.split(abstract_model(CONFIG, 'reward'))
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  functions = step_lib.build(ranking(LossConfig()), CONFIG, optax.identity(), mesh)
  params = jax.device_get(functions.init(jax.random.key(0), None).params)
  ranked = [(e.candidates, e.ranks) if isinstance(e, RankedList) else ((e.chosen, e.rejected), (0, 1)) for e in examples]
  ids = [
    sequence
    for e, (candidates, _) in zip(examples, ranked, strict=True)
    for sequence in template.encode_candidates(e.prompt, e.reference, candidates)
  ]
  batch = layout.sequence_batch(ids, max(map(len, ids)), len(ids))
  weights = np.array([e.metadata['weight'] for e in examples])

  def loss(params, name):
    rewards, total, at = sequence_rewards(nnx.merge(graphdef, params), batch), 0.0, 0
    for weight, (_, ranks) in zip(weights, ranked, strict=True):
      of_list, at = rewards[at : at + len(ranks)], at + len(ranks)
      better = [(i, [j for j, other in enumerate(ranks) if other > rank]) for i, rank in enumerate(ranks)]
      if name == 'plackett_luce':
        value = sum(jax.nn.logsumexp(of_list[np.array([i, *worse])]) - of_list[i] for i, worse in better if worse)
      else:
        value = jnp.mean(jnp.array([-jax.nn.log_sigmoid(of_list[i] - of_list[j]) for i, worse in better for j in worse]))
      total = total + weight * value
    return total / weights.sum()

  found = {
    name: jax.device_get(jax.jit(jax.value_and_grad(lambda p, name=name: loss(p, name)))(params))
    for name in ('bradley_terry', 'plackett_luce')
  }
  return examples, params, found


@pytest.mark.long
@pytest.mark.parametrize(
  ('name', 'mesh', 'accumulation'),
  [
    ('bradley_terry', None, 1),
    ('plackett_luce', MeshConfig(data=2, fsdp=2, tensor=2), 2),
    ('bradley_terry', MeshConfig(fsdp=2, context=4), 1),
  ],
)
def test_packed_and_sharded_lists_equal_candidates_on_their_own(alone, template, name, mesh, accumulation):
  examples, params, found = alone
  loss, gradients = found[name]
  devices = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else sharding.make_mesh(mesh)
  segments = pipeline.open_segments(examples, template, ('weight',))
  assert isinstance(segments, pipeline.ListSegments) and segments.max_candidates == 5
  plan = pipeline.BatchPlan(len(examples), sharding.batch_shards(devices) * accumulation)
  pack = pipeline.plan_packing(segments, plan, 256, steps=1, seed=0)
  (batch,) = list(pipeline.pair_batches(segments, plan, pack, steps=1, seed=0))
  assert (batch.pair_mask_BP.sum(axis=1) > 1).any() and batch.rank_BPC.max() > 2
  with jax.set_mesh(devices):
    functions = step_lib.build(ranking(LossConfig(name, weights=True)), CONFIG, optax.trace(decay=0.0), devices, accumulation)
    state = functions.init(jax.random.key(0), params)
    state, out = functions.train(state, sharding.put_local(batch, devices))
  np.testing.assert_allclose(out['scalars']['loss'], loss, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max())), state.opt_state.trace, gradients)


def test_the_prefix_of_a_list_is_held_and_counted_once(template):
  """Tokens are those of one prefix and all tails; the FLOPs are those of a pair where a list has two candidates."""
  segments = pipeline.ListSegments([Triplet('prompt', 'reference', 'good', 'worse')], template)
  pair = pipeline.TripletSegments(segments.source, template)
  assert len(segments[0].tokens) == len(pair[0].tokens) == segments.most_tokens([0], 1)[0]
  pack = pipeline.PackPlan(128, 1, 1, 1)
  of_list, of_pair = (s.batch([s[0]], [0], [[0]], pack) for s in (segments, pair))
  assert flops.reward_model_flops(CONFIG, of_list) == flops.reward_model_flops(CONFIG, of_pair) > 0
  longer = pipeline.ListSegments(as_triplets([{'prompt': 'p', 'reference': 'r' * 50, 'ranked': list('abcdefgh')}]), template)
  assert len(longer[0].tokens) < 2 * len(template.encode_candidates('p', 'r' * 50, ['a'])[0])


def test_lists_have_no_margins(template):
  with pytest.raises(UserError, match='a margin is that of a pair; set loss'):
    pipeline.open_segments(as_triplets(_examples()), template, ('margin',))


@pytest.mark.long
def test_a_killed_run_on_lists_resumes_to_the_bit(tmp_path):
  args = TrainConfig(steps=6, batch_size=4, learning_rate=3e-3, loss=LossConfig('plackett_luce', weights=True, mean='official'))
  model = ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8)
  run = lambda folder, loss=args.loss, examples=None: api_training.train_reward_model(
    examples or _examples(),
    _examples(5),
    init='scratch',
    output_dir=tmp_path / folder,
    args=TrainConfig(steps=6, batch_size=4, learning_rate=3e-3, loss=loss),
    model=model,
    tokenizer='byte',
    mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=3)),
  )
  whole = run('whole')
  records = [record for record in whole.metrics if 'loss' in record]
  assert len(records) == 6 and 'validation_accuracy' in whole.summary
  with killed_at(6):  # one is the batch of validation, which is compiled before the first step
    run('killed')
  resumed = run('killed')
  assert [r['loss'] for r in resumed.metrics if 'loss' in r] == [r['loss'] for r in records]
  jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)
  with pytest.raises(UserError, match=r"loss\.mean was 'official', is 'example'; loss\.name was 'plackett_luce', is 'bradley_terry'"):
    run('killed', LossConfig(weights=True))
  heavier = [example | {'weight': 7.0} for example in _examples()]
  with pytest.raises(UserError, match='the training data'):
    run('killed', examples=heavier)
