"""Training of adapters: gradients, devices, micro-batches, checkpoints that hold adapters alone, and their bases."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from reward_server import running
from training_runs import checkpoints

import polar_jax
from polar_jax import sharding
from polar_jax.checkpoints import checkpointer
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import (
  CheckpointingConfig,
  Config,
  ConfigError,
  DataConfig,
  LoraConfig,
  MeshConfig,
  ModelConfig,
  TokenizerConfig,
  TrainConfig,
)
from polar_jax.data.layout import pair_batch, pair_segment
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model import heads, lora
from polar_jax.stages import evaluate, score
from polar_jax.stages.context import Context
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import RANKING
from polar_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(
  vocab_size=261, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=4, init_std=0.2, v_head_init='normal'
)
LORA = LoraConfig(rank=2, alpha=4.0)
TRAIN = TrainConfig(steps=6, batch_size=8, learning_rate=0.02, warmup_ratio=0.0, log_every=100, lora=LORA)


def _batch(packed=True):
  """Return 16 pairs with shared prefixes, two in a row or each in its own."""
  rng = np.random.default_rng(0)
  segments = []
  for _ in range(16):
    prefix = rng.integers(1, 250, 5).tolist()
    segments.append(pair_segment(*(prefix + rng.integers(1, 250, rng.integers(1, 5)).tolist() + [260] for _ in range(2))))
  rows = [[i, i + 8] for i in range(8)] if packed else [[i] for i in range(16)]
  return pair_batch(segments, range(16), rows, 40, 2)


def _start(config, seed=0):
  """Return (trained, frozen) random parameters on the host."""
  shapes = nnx.to_pure_dict(nnx.state(heads.abstract_model(MODEL, 'reward', config), nnx.Param))
  rng = np.random.default_rng(seed)
  fill = lambda path, x: (rng.normal(0, 0.2, x.shape) + ('norm' in str(path[-1]))).astype(np.float32)
  return lora.split(jax.tree_util.tree_map_with_path(fill, shapes), config)


def _step(config=LORA, mesh_config=None, accumulation=1, packed=True, seed=0):
  """Take one step; returns the state, the output, the gradients and the new parameters."""
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh_config is None else sharding.make_mesh(mesh_config)
  tx = optax.chain(optax.trace(decay=0.0), make_optimizer(dataclasses.replace(TRAIN, eps=1e-3), 10))
  trained, frozen = _start(config)
  with jax.set_mesh(mesh):
    functions = step_lib.build(RANKING, MODEL, tx, mesh, accumulation, config)
    place = lambda values, like: jax.tree.map(lambda x, a: jax.device_put(x.astype(a.dtype), a.sharding), values, like)
    state = functions.init(jax.random.key(0), place(trained, functions.abstract.params))
    arguments = (step_lib.Frozen(place(frozen, functions.abstract_frozen[0].params), np.uint32(seed)),)
    state, out = functions.train(state, sharding.put_local(_batch(packed), mesh), *arguments)
  return state, *jax.device_get((out, state.opt_state[0].trace, state.params))


@pytest.fixture(scope='module')
def single():
  return _step()


def test_gradients_follow_from_those_of_the_merged_weights(single):
  """By the chain rule: dA = scale * dW B^T and dB = scale * A^T dW, with the gradient dW of a model without adapters."""
  _, out, gradients, _ = single
  trained, frozen = _start(LORA)
  merged = lora.merge(lora.join(trained, frozen), LORA)
  graphdef, _ = nnx.split(heads.abstract_model(MODEL, 'reward'))
  batch = _batch()

  def loss(params):
    return RANKING.loss_sums(nnx.merge(graphdef, params), batch)[0] / RANKING.count(batch)

  value, whole = jax.jit(jax.value_and_grad(loss))(merged)
  np.testing.assert_allclose(out['scalars']['loss'], value, rtol=1e-5)
  np.testing.assert_allclose(gradients['v_head'], whole['v_head'], atol=1e-5)
  assert set(gradients['decoder']['layers']) == {'lora'} and set(gradients) == {'decoder', 'v_head'}
  for name, own in gradients['decoder']['layers']['lora'].items():
    d_weight = np.asarray(whole['decoder']['layers'][name], np.float64)
    factors = trained['decoder']['layers']['lora'][name]
    for layer in range(2):
      a, b = (factors[f][layer].astype(np.float64) for f in 'ab')
      a, b = a.reshape(-1, 2), b.reshape(2, -1)
      d_w = d_weight[layer].reshape(len(a), -1)
      np.testing.assert_allclose(own['a'][layer].reshape(a.shape), 2.0 * d_w @ b.T, atol=2e-5, err_msg=name)
      np.testing.assert_allclose(own['b'][layer].reshape(b.shape), 2.0 * a.T @ d_w, atol=2e-5, err_msg=name)
    assert np.abs(own['a']).max() > 1e-3 and np.abs(own['b']).max() > 1e-3


def test_state_holds_adapters_and_the_head_alone(single):
  state, _, _, params = single
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert count == 16 + 2 * 2 * sum((16 + 16, 16 + 8, 16 + 8, 16 + 16, 16 + 32, 16 + 32, 32 + 16))
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
  assert sum(leaf.size for leaf in moments) == 3 * count  # two of AdamW, and the copy of the gradients


@pytest.mark.long
@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'mesh_config': MeshConfig(fsdp=2, tensor=2, data=2), 'accumulation': 2}, id='8 devices and micro-batches'),
    pytest.param({'packed': False}, id='unpacked'),
  ],
)
def test_layout_changes_no_result(single, changes):
  _, out, gradients, params = single
  _, *other = _step(**changes)
  for name, value in out['scalars'].items():
    np.testing.assert_allclose(other[0]['scalars'][name], value, rtol=1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (other[1], other[2]), (gradients, params))


@pytest.mark.long
def test_dropout_depends_on_the_seed_and_not_on_devices():
  config = dataclasses.replace(LORA, dropout=0.5, targets=('wo',))
  losses = {
    name: float(_step(config, **changes)[1]['scalars']['loss'])
    for name, changes in {'one': {}, 'eight': {'mesh_config': MeshConfig(fsdp=8)}, 'seed': {'seed': 1}}.items()
  }
  assert losses['one'] == pytest.approx(losses['eight'], rel=1e-5) and abs(losses['one'] - losses['seed']) > 1e-4


def example(i: int) -> dict:
  """Return an example whose chosen text repeats the letter of the reference."""
  mine, other = 'ab' if i % 2 else 'ba'
  return {'prompt': f'p{i}', 'reference': mine * (3 + i % 4), 'chosen': mine * (2 + i % 3), 'rejected': other * (2 + i % 5)}


EXAMPLES = [example(i) for i in range(24)]


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def base(tmp_path_factory, mesh):
  """The folder of a reward model with random parameters."""
  folder = tmp_path_factory.mktemp('workdir') / 'base'
  polar_jax.RewardModel.init(MODEL, 'byte', mesh=mesh, seed=1).save(folder)
  return folder


def train(base, folder, mesh, **changes):
  config = dataclasses.replace(TRAIN, **changes)
  settings = polar_jax.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=3, keep=3))
  return polar_jax.train_reward_model(
    EXAMPLES, EXAMPLES[:4], init=base, output_dir=folder, args=config, mesh=mesh, data=DataConfig(row_length=64), settings=settings
  )


@pytest.fixture(scope='module')
def trained(base, mesh):
  return train(base, base.parent / 'run', mesh)


@pytest.mark.long
def test_a_run_opens_as_base_and_adapters(trained, base, mesh):
  loaded, start = polar_jax.load(trained.folder, mesh=mesh), polar_jax.load(base, mesh=mesh)
  before, after, opened = (m.score_pairs(EXAMPLES) for m in (start, trained.model, loaded))
  np.testing.assert_array_equal(opened, after)
  assert np.abs(after - before).max() > 0.1
  assert trained.summary['loss'] < trained.metrics[0]['loss']
  jax.tree.map(np.testing.assert_array_equal, loaded.params['decoder']['embedding'], start.params['decoder']['embedding'])
  assert loaded.params['decoder']['layers']['wq'].shape == start.params['decoder']['layers']['wq'].shape
  halves = polar_jax.load(trained.folder, mesh=mesh, dtype='bfloat16').params
  assert {leaf.dtype.name for leaf in jax.tree.leaves(halves)} == {'bfloat16'}


def test_checkpoints_hold_adapters_and_the_head_alone(trained, base):
  opened = open_pretrained(trained.folder)
  assert opened.lora == LORA and opened.base.path == base
  count = sum(leaf.size for leaf in jax.tree.leaves(_start(LORA)[0]))
  metadata = checkpointer.ocp.StandardCheckpointer().metadata(trained.folder / checkpointer.FOLDER / '6' / 'state').item_metadata
  stored = lambda part: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(metadata[part]) if leaf.shape)
  assert (stored('params'), stored('opt_state')) == (count, 2 * count)


def test_a_stopped_run_continues_bit_for_bit(trained, base, mesh):
  folder = base.parent / 'resumed'
  shutil.copytree(trained.folder, folder)
  shutil.rmtree(folder / checkpointer.FOLDER / '6')
  assert checkpoints(folder) == [3]
  again = train(base, folder, mesh)
  assert checkpoints(folder) == [3, 6]
  jax.tree.map(np.testing.assert_array_equal, again.model.params, trained.model.params)


def test_a_moved_workdir_opens_and_a_wrong_base_is_refused(trained, base, mesh, tmp_path):
  workdir = tmp_path / 'moved'
  shutil.copytree(base.parent, workdir)
  base.rename(base.with_name('hidden'))
  try:
    np.testing.assert_array_equal(polar_jax.load(workdir / 'run', mesh=mesh).score_pairs(EXAMPLES), trained.model.score_pairs(EXAMPLES))
    assert open_pretrained(workdir / 'run').base.path == workdir / 'base'
    shutil.rmtree(workdir / 'base')
    with pytest.raises(ConfigError, match=r'run: holds adapters, and there is no base at .*base: put it back'):
      open_pretrained(workdir / 'run')
    polar_jax.RewardModel.init(MODEL, 'byte', mesh=mesh, seed=2).save(workdir / 'base')
    with pytest.raises(ConfigError, match='trained on other parameters than those in'):
      polar_jax.load(workdir / 'run', mesh=mesh)
    shutil.rmtree(workdir / 'base')
    polar_jax.RewardModel.init(dataclasses.replace(MODEL, d_ff=40), 'byte', mesh=mesh, seed=1).save(workdir / 'base')
    with pytest.raises(ConfigError, match=r'its adapters do not fit the base .*model\.d_ff is 32, the base has 40'):
      open_pretrained(workdir / 'run')
  finally:
    base.with_name('hidden').rename(base)


def test_a_resumed_run_refuses_another_base(trained, base, mesh, tmp_path):
  folder = tmp_path / 'base'
  polar_jax.RewardModel.init(MODEL, 'byte', mesh=mesh, seed=2).save(folder)
  with pytest.raises(ConfigError, match='the base of the adapters'):
    train(folder, trained.folder, mesh)


@pytest.mark.long
def test_adapters_on_adapters_and_on_a_language_model_in_bfloat16(trained, base, mesh):
  """The base of the second run is the merged model of the first, whose head it takes; a language model gives its decoder alone."""
  second = train(trained.folder, base.parent / 'second', mesh, steps=1)
  opened = polar_jax.load(second.folder, mesh=mesh)
  np.testing.assert_array_equal(opened.score_pairs(EXAMPLES), second.model.score_pairs(EXAMPLES))
  assert opened.source.base.path == trained.folder
  language_model = base.parent / 'language_model'
  polar_jax.LanguageModel.init(MODEL, 'byte', mesh=mesh, seed=3).save(language_model)
  config = dataclasses.replace(LORA, base_dtype='bfloat16', targets=('wq', 'wv'))
  third = train(language_model, base.parent / 'third', mesh, steps=2, lora=config, start_layers=1)
  opened = polar_jax.load(third.folder, mesh=mesh)
  np.testing.assert_array_equal(opened.score_pairs(EXAMPLES), third.model.score_pairs(EXAMPLES))
  layers = opened.params['decoder']['layers']
  assert (layers['wq'].dtype, layers['wo'].dtype) == (np.float32, jax.numpy.bfloat16) and len(layers['wq']) == 1


@pytest.mark.long
def test_every_stage_that_reads_a_reward_model_reads_a_run_with_adapters(trained, base, mesh, tmp_path):
  """Evaluation, the score stage and the server give the rewards of the merged model."""
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(e) + '\n' for e in EXAMPLES[:6]))
  expected = trained.model.score_pairs(EXAMPLES[:6])
  assert np.abs(expected - polar_jax.load(base, mesh=mesh).score_pairs(EXAMPLES[:6])).max() > 1e-3
  config = Config(
    checkpoint=str(trained.folder), input=str(path), output=str(tmp_path / 'out'), tokenizer=TokenizerConfig(kind='checkpoint')
  )
  evaluate.evaluate(Context(config, tmp_path, mesh, lambda line: None))
  with gzip.open(tmp_path / 'out' / 'scores.jsonl.gz', 'rt') as file:
    np.testing.assert_allclose([json.loads(line)['rewards'] for line in file], expected, atol=1e-5)
  rows = [{name: e[name] for name in ('prompt', 'reference')} | {'output': e['chosen']} for e in EXAMPLES[:6]]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  score.score(Context(dataclasses.replace(config, output=str(tmp_path / 'scored.jsonl')), tmp_path, mesh, lambda line: None))
  found = [json.loads(line)['reward'] for line in (tmp_path / 'scored.jsonl').read_text().splitlines()]
  np.testing.assert_allclose(found, expected[:, 0], atol=1e-5)
  with running(polar_jax.load(trained.folder, mesh=mesh)) as server:
    one = EXAMPLES[0]
    body = {'prompt': one['prompt'], 'reference': one['reference'], 'outputs': [one['chosen'], one['rejected']]}
    np.testing.assert_allclose(server.client.post('/score', body).body['rewards'], expected[0], atol=1e-5)


@pytest.mark.long
def test_a_quantized_base(base, mesh):
  """The run opens as the merged model that it trained, and on any mesh in the layout of any model."""
  config = dataclasses.replace(LORA, base_dtype='nf4')
  run = train(base, base.parent / 'nf4', mesh, steps=1, lora=config)
  opened, eight = open_pretrained(run.folder), sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
  params = opened.params(mesh)
  jax.tree.map(np.testing.assert_array_equal, params, run.model.params)
  start = polar_jax.load(base, mesh=mesh).params['decoder']['layers']['wo']
  assert 0 < np.abs(params['decoder']['layers']['wo'] - start).mean() < 0.05
  spread = opened.params(eight)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(spread), jax.device_get(params))
  wanted = sharding.abstract_params(heads.abstract_model(MODEL, 'reward'), eight)
  assert jax.tree.map(lambda x: x.sharding, spread) == jax.tree.map(lambda a: a.sharding, wanted)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (LoraConfig(rank=0), r'lora\.rank is 0; it must be >= 1, or None'),
    (
      LoraConfig(rank=2, targets=('wq', 'q_proj')),
      r"targets is \('wq', 'q_proj'\); the weights .* are: wq, wk, wv, wo, w_gate, w_up, w_down",
    ),
    (LoraConfig(base_dtype='int8'), r"lora\.base_dtype is 'int8', but lora\.rank is None: without adapters all parameters are trained"),
  ],
)
def test_bad_adapters_are_one_line(base, mesh, tmp_path, config, message):
  with pytest.raises(ConfigError, match=message):
    train(base, tmp_path / 'run', mesh, lora=config)


def test_a_base_must_be_on_disk(base, mesh, tmp_path):
  for init, message in (('scratch', 'there is no base'), (polar_jax.load(base, mesh=mesh), 'a base in memory')):
    with pytest.raises(ConfigError, match=message):
      polar_jax.train_reward_model(
        EXAMPLES, init=init, output_dir=tmp_path / 'run', args=TRAIN, model=MODEL, tokenizer=ByteTokenizer(), mesh=mesh
      )
