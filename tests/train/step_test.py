"""The train step: packing, sharding and accumulation change neither loss nor gradients."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, TrainConfig
from polar_jax.data.layout import pair_batch, pair_segment, text_batch
from polar_jax.data.packing import first_fit
from polar_jax.model.heads import make_model
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import NEXT_TOKEN, RANKING
from polar_jax.train.optimizer import make_optimizer

CONFIG = ModelConfig(
  vocab_size=40, num_layers=2, d_model=16, d_ff=32, num_heads=8, num_kv_heads=2, head_dim=4, init_std=0.2, v_head_init='normal'
)
# A large eps: with the usual one, a parameter whose gradient is rounding noise would still move by a whole learning rate.
TRAIN = TrainConfig(learning_rate=0.01, warmup_ratio=0.0, eps=1e-3, weight_decay=0.1)
MESHES = {'8x1': MeshConfig(fsdp=8), '4x2': MeshConfig(fsdp=4, tensor=2), '2x2x2': MeshConfig(data=2, fsdp=2, tensor=2)}
MESHES |= {
  '1x8': MeshConfig(fsdp=1, tensor=8),
  'context 4': MeshConfig(fsdp=2, context=4),
  'context 2': MeshConfig(fsdp=2, tensor=2, context=2),
}
ROWS, REAL, LENGTH, PAIRS = 16, 30, 32, 4  # rows, triplets, tokens of a row, and pairs of a row at most
COUNT = REAL - 4  # pairs that are not masked


def _batch(seed=0, packed=True):
  """Return 30 triplets of different lengths in 16 rows, two of which are empty, or each in its own row; four are masked."""
  rng = np.random.default_rng(seed)
  triplets = []
  for _ in range(REAL):
    prefix = rng.integers(1, 39, rng.integers(2, 8)).tolist()
    triplets.append(pair_segment(*(prefix + rng.integers(1, 39, rng.integers(0, 7)).tolist() + [39] for _ in range(2))))
  rows = first_fit([len(t.tokens) for t in triplets], LENGTH, PAIRS) if packed else [[i] for i in range(REAL)]
  total = ROWS if packed else 2 * ROWS
  assert len(rows) <= total - 2
  batch = pair_batch(triplets, range(REAL), [*rows, *[[]] * (total - len(rows))], LENGTH, PAIRS if packed else 1)
  # Micro-batches of rows (a, a + A, ...) then hold different numbers of pairs for every A.
  batch.pair_mask_BP[np.isin(batch.index_BP, [3, 11, 12, 20])] = 0
  return batch


def _mesh(config: MeshConfig | None):
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if config is None else sharding.make_mesh(config)


def _optimizer():
  """Return the optimizer of a run after a transformation that keeps the last gradients in its state."""
  return optax.chain(optax.trace(decay=0.0), make_optimizer(TRAIN, 10))


def _steps(mesh_config, accumulation=1, steps=1, objective=RANKING, batches=None):
  """Take steps on a mesh. Returns the functions, the last state, and the first output, gradients and parameters."""
  mesh = _mesh(mesh_config)
  with jax.set_mesh(mesh):
    functions = step_lib.build(objective, CONFIG, _optimizer(), mesh, accumulation)
    state = functions.init(jax.random.key(3), None)
    first = None
    for s in range(steps):
      batch = _batch(s) if batches is None else batches
      state, out = functions.train(state, sharding.put_local(batch, mesh))
      first = first or jax.device_get((out, state.opt_state[0].trace, state.params))
  return functions, state, first


@pytest.fixture(scope='module')
def single():
  return _steps(None)[2]


def _assert_same(one, other, atol=1e-5):
  (out, gradients, params), (expected, expected_gradients, expected_params) = one, other
  assert 0.1 < np.abs(expected_gradients['v_head']).max() < 10
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), out['scalars'], expected['scalars'])
  np.testing.assert_allclose(out['rows']['rewards_BPC'], expected['rows']['rewards_BPC'], atol=atol)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), gradients, expected_gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), params, expected_params)


def test_the_mean_is_over_real_pairs_only(single):
  out, _, _ = single
  batch = _batch()
  real = batch.pair_mask_BP > 0
  assert real.sum() == COUNT and real.sum(axis=1).max() > 1
  rewards = out['rows']['rewards_BPC'][real].astype(np.float64)
  margin = rewards[:, 0] - rewards[:, 1]
  scalars = out['scalars']
  np.testing.assert_allclose(scalars['loss'], np.log1p(np.exp(-margin)).mean(), rtol=1e-5)
  np.testing.assert_allclose(scalars['margin'], margin.mean(), rtol=1e-5)
  np.testing.assert_allclose(scalars['accuracy'], ((margin > 0) + (margin == 0) / 2).mean(), rtol=1e-5)
  np.testing.assert_allclose(scalars['chosen_reward'], rewards[:, 0].mean(), rtol=1e-4)


def test_packing_changes_no_result(single):
  """With several triplets in a row or one: the loss, the metrics, the gradients and the rewards of each triplet."""
  out, gradients, params = single
  alone, expected_gradients, expected_params = _steps(None, batches=_batch(packed=False))[2]
  for name, value in alone['scalars'].items():
    np.testing.assert_allclose(out['scalars'][name], value, rtol=1e-6 if name == 'loss' else 1e-5, err_msg=name)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, expected_gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected_params)
  by_triplet = []
  for rows in (out['rows'], alone['rows']):
    real = rows['index'] >= 0
    by_triplet.append(rows['rewards_BPC'][real][np.argsort(rows['index'][real])])
  assert len(by_triplet[0]) == REAL
  np.testing.assert_allclose(*by_triplet, atol=3e-6)


def test_norms_are_those_of_gradients_and_new_parameters(single):
  out, gradients, params = single
  norm = lambda tree: np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in jax.tree.leaves(tree)))
  np.testing.assert_allclose(out['scalars']['grad_norm'], norm(gradients), rtol=1e-5)
  np.testing.assert_allclose(out['scalars']['parameter_norm'], norm(params), rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=pytest.mark.slow) if n in ('8x1', '1x8', '4x2', 'context 4') else n for n in MESHES]
)
def test_sharded_equals_single_device(single, name, capfd):
  functions, state, first = _steps(MESHES[name], steps=3)
  _assert_same(first, single)
  assert functions.train._cache_size() == 1
  assert int(state.step) == 3
  # XLA writes this to stderr when it has to gather a whole array to change its layout.
  assert 'rematerialization' not in capfd.readouterr().err
  # Created sharded, and still sharded after three steps.
  jax.tree.map(lambda x, a: _assert_layout(x, a.sharding), state, functions.abstract)
  with jax.set_mesh(_mesh(MESHES[name])):
    initial = functions.init(jax.random.key(0), None)
  jax.tree.map(lambda x, a: _assert_layout(x, a.sharding), initial, functions.abstract)
  fsdp, tensor = MESHES[name].fsdp, MESHES[name].tensor
  layers = state.params['decoder']['layers']
  assert layers['wq'].addressable_shards[0].data.shape == (2, 16 // fsdp, 8 // tensor, 4)
  assert layers['w_down'].addressable_shards[0].data.shape == (2, 32 // tensor, 16 // fsdp)
  moments = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu')]
  assert len(moments) == 1
  for moment in (moments[0].mu, moments[0].nu):
    assert moment['decoder']['layers']['wq'].sharding.is_equivalent_to(layers['wq'].sharding, 4)


@pytest.mark.parametrize('context', [1, 4])
def test_the_hidden_states_of_a_row_are_divided_over_the_context_axis(context):
  mesh = sharding.make_mesh(MeshConfig(fsdp=2, context=context), jax.devices()[: 2 * context])
  model = make_model(dataclasses.replace(CONFIG, attention='reference'), 'reward', nnx.Rngs(0))
  with jax.set_mesh(mesh):
    batch = sharding.put_local(_batch(), mesh)
    hidden = jax.jit(lambda b: model.decoder(b.tokens_BT, b.positions_BT, [(b.start_BT, b.end_BT)]))(batch)
  assert hidden.addressable_shards[0].data.shape == (ROWS // 2, LENGTH // context, 16)


def _assert_layout(x, expected):
  assert x.sharding.is_equivalent_to(expected, x.ndim), (x.shape, x.sharding, expected)


@pytest.mark.long
@pytest.mark.parametrize(
  ('accumulation', 'mesh'), [pytest.param(2, None, marks=pytest.mark.slow), (4, None), (2, MeshConfig(data=2, fsdp=2, tensor=2))]
)
def test_accumulation_changes_no_result(single, accumulation, mesh, capfd):
  mask = _batch().pair_mask_BP.reshape(-1, accumulation, PAIRS)
  assert len(set(mask.sum(axis=(0, 2)).tolist())) > 1  # micro-batches hold different numbers of pairs
  _assert_same(_steps(mesh, accumulation)[2], single)
  assert 'rematerialization' not in capfd.readouterr().err


def test_a_batch_of_only_padding_is_finite():
  batch = _batch()
  batch.pair_mask_BP[:] = 0
  out, gradients, params = _steps(None, batches=batch)[2]
  assert out['scalars']['loss'] == 0
  jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gradients)
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(params))


@pytest.mark.long
def test_next_token_objective_is_trained_by_the_same_step():
  rng = np.random.default_rng(0)
  windows = [rng.integers(0, 40, 13) for _ in range(6)]
  batch = text_batch([*windows, None, None], [*range(6), -1, -1], 12)
  whole = _steps(None, objective=NEXT_TOKEN, batches=batch, steps=2)
  parts = _steps(MeshConfig(data=2, fsdp=2, tensor=2), 2, objective=NEXT_TOKEN, batches=batch, steps=2)
  for a, b in zip(parts[2][1:], whole[2][1:], strict=True):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
  np.testing.assert_allclose(parts[2][0]['scalars']['loss'], whole[2][0]['scalars']['loss'], atol=1e-5)
  assert 3 < whole[2][0]['scalars']['loss'] < 6  # about ln 40


@pytest.mark.long
def test_training_learns_one_batch():
  batch = _batch()
  mesh = _mesh(None)
  with jax.set_mesh(mesh):
    functions = step_lib.build(RANKING, CONFIG, make_optimizer(TrainConfig(learning_rate=0.01, warmup_ratio=0.0), 40), mesh)
    state = functions.init(jax.random.key(0), None)
    losses = []
    for _ in range(40):
      state, out = functions.train(state, sharding.put_local(batch, mesh))
      losses.append(float(out['scalars']['loss']))
    evaluated = jax.device_get(functions.evaluate(state.params, sharding.put_local(batch, mesh)))
  assert losses[-1] < 0.05 < losses[0]
  assert evaluated['count'] == COUNT
  assert evaluated['sums']['accuracy'] == COUNT
  assert evaluated['sums']['loss'] / COUNT < losses[-1] + 0.01


def test_start_parameters_replace_the_initial_ones_and_no_others():
  mesh = _mesh(None)
  with jax.set_mesh(mesh):
    functions = step_lib.build(RANKING, CONFIG, _optimizer(), mesh)
    fresh = functions.init(jax.random.key(1), None)
    decoder = jax.tree.map(lambda p: p + 1, fresh.params['decoder'])
    started = functions.init(jax.random.key(1), {'decoder': decoder})
  jax.tree.map(np.testing.assert_array_equal, started.params['decoder'], decoder)
  np.testing.assert_array_equal(started.params['v_head'], fresh.params['v_head'])


def test_parameters_do_not_depend_on_the_mesh():
  one, eight = (_initial_params(mesh) for mesh in (None, MESHES['2x2x2']))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, eight)


def _initial_params(mesh_config):
  mesh = _mesh(mesh_config)
  with jax.set_mesh(mesh):
    return jax.device_get(step_lib.build(RANKING, CONFIG, _optimizer(), mesh).init(jax.random.key(5), None).params)
