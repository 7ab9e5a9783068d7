"""Moments in two bytes and in one: rounding, closeness to float32, size, sharding and resuming."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_runs import killed_at

from polar_jax import api_training, sharding
from polar_jax.checkpoints.checkpointer import Checkpointer
from polar_jax.config import CheckpointingConfig, ConfigError, MeshConfig, ModelConfig, TrainConfig
from polar_jax.planning.train_step import bytes_of_a_device
from polar_jax.train import compact_adam
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import RANKING
from polar_jax.train.optimizer import make_optimizer

KINDS = [{'moments': 'bfloat16'}, {'moments': 'int8'}, {'optimizer': 'adafactor'}, {'optimizer': 'muon'}]
NAMES = ['bfloat16', 'int8', 'adafactor', 'muon']
MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, d_ff=64, num_heads=4, num_kv_heads=2, head_dim=16)


def _many(function, shape, count=4_000):
  """Return the results of `function` for many arrays of random halves of 32 bits."""
  random = jax.random.bits(jax.random.key(0), (count, *shape), jnp.uint16).astype(jnp.uint32)
  return np.asarray(jax.jit(jax.vmap(function))(random), np.float64)


def _half(shape):
  return jnp.full(shape, 2**15, jnp.uint32)


def test_bfloat16_is_one_of_two_neighbors_and_right_on_average():
  x = np.array([1.0, 1.001, -3.14159, 1e-30, 0.0, 65504.123, -2.0], np.float32)
  rounded = _many(lambda random: compact_adam.to_bfloat16(x, random).astype(jnp.float32), x.shape)
  for i, value in enumerate(x.astype(np.float64)):
    seen = np.unique(rounded[:, i])
    exact = float(jnp.bfloat16(value)) == value
    assert len(seen) == (1 if exact else 2) and (exact or seen[0] < value < seen[1])
    spread = 0.0 if exact else seen[1] - seen[0]
    assert abs(rounded[:, i].mean() - value) <= 4 * spread / 2 / np.sqrt(len(rounded))


@pytest.mark.parametrize('code', [compact_adam._FIRST, compact_adam._SECOND])
def test_eight_bits_are_one_of_two_codes_and_right_on_average(code):
  power, largest = code
  rng = np.random.default_rng(0)
  x = (10 ** rng.uniform(-3, 2, (2, 40))).astype(np.float32)  # blocks of 20, hence of the whole axis of 40
  x = x * rng.choice([-1, 1], x.shape).astype(np.float32) if code == compact_adam._FIRST else x
  x[0, 3] = 0
  codes, scale = compact_adam.encode(x, _half(x.shape), code)
  assert codes.dtype == (jnp.int8 if code == compact_adam._FIRST else jnp.uint8) and codes.shape == x.shape
  np.testing.assert_array_equal(scale, np.abs(x).max(axis=1, keepdims=True))
  decoded = _many(lambda random: compact_adam.decode(*compact_adam.encode(x, random, code), code), x.shape)
  assert (decoded[:, 0, 3] == 0).all()
  top = np.abs(x).argmax(axis=1)
  for row, column in enumerate(top):  # the largest value is exact
    np.testing.assert_allclose(decoded[:, row, column], x[row, column], rtol=1e-6)
  positions = largest * (np.abs(x) / np.abs(x).max(axis=1, keepdims=True)).astype(np.float64) ** (1 / power)
  low, high = (((np.floor(positions) + up) / largest) ** power * np.abs(x).max(axis=1, keepdims=True) for up in (0, 1))
  magnitude = np.abs(decoded)
  assert (magnitude >= low * (1 - 1e-4)).all() and (magnitude <= high * (1 + 1e-4)).all()
  error = np.abs(decoded.mean(axis=0) - x)
  assert (error <= 4 * (high - low) / 2 / np.sqrt(len(decoded)) + 1e-5 * np.abs(x)).all()


def test_a_positive_second_moment_is_never_zero():
  x = np.array([1.0, *[1e-14] * 15], np.float32)
  codes, _ = compact_adam.encode(x, _half(16), compact_adam._SECOND)
  assert codes[0] == 255 and (np.asarray(codes[1:]) == 1).all()
  assert not np.any(compact_adam.encode(jnp.zeros(16), _half(16), compact_adam._SECOND)[0])


@pytest.mark.parametrize(('size', 'block'), [(2048, 256), (128, 128), (8, 8), (600, 200), (257, 257), (11_008, 256), (1, 1)])
def test_blocks_divide_the_last_axis(size, block):
  assert compact_adam._block(size) == block and compact_adam._scale_shape((3, size)) == (3, size // block)


@pytest.mark.parametrize('moments', ['bfloat16', 'int8'])
def test_the_first_update_is_that_of_adam_and_later_ones_are_close(moments):
  tx, exact = compact_adam.scale_by_compact_adam(0.9, 0.95, 1e-8, moments), optax.scale_by_adam(0.9, 0.95, 1e-8)
  rng = np.random.default_rng(0)
  size = (10 ** rng.uniform(-3, 0, (8, 256))).astype(np.float32)  # gradients of entries differ by three orders of magnitude
  params = {'w': jnp.zeros((8, 256))}
  state, exact_state, update = tx.init(params), exact.init(params), jax.jit(tx.update)
  errors = []
  for step in range(30):
    grads = {'w': jnp.asarray(size * rng.normal(0.5, 1, size.shape).astype(np.float32))}
    found, state = update(grads, state)
    expected, exact_state = exact.update(grads, exact_state)
    if step == 0:
      np.testing.assert_allclose(found['w'], expected['w'], rtol=1e-6)
    errors.append(np.sqrt(np.mean((found['w'] - expected['w']) ** 2) / np.mean(expected['w'] ** 2)))
  assert max(errors) < {'bfloat16': 0.01, 'int8': 0.3}[moments], errors
  assert np.mean(errors[-5:]) > 1e-5  # it is rounded indeed


@pytest.mark.parametrize('moments', ['bfloat16', 'int8'])
def test_a_second_moment_that_nearest_rounding_would_keep_decays(moments):
  tx = compact_adam.scale_by_compact_adam(0.9, 0.999, 1e-8, moments)
  params = {'w': jnp.zeros((64, 256))}
  state, update = tx.init(params), jax.jit(tx.update)
  one = jnp.ones((64, 256)).at[:, 0].set(2.0)  # the largest value of every block has a gradient throughout
  _, state = update({'w': one}, state)
  for _ in range(300):
    _, state = update({'w': jnp.zeros((64, 256)).at[:, 0].set(2.0)}, state)
  nu = (
    state.nu['w'].astype(jnp.float32)
    if moments == 'bfloat16'
    else compact_adam.decode(state.nu['w'], state.nu_scale['w'], compact_adam._SECOND)
  )
  np.testing.assert_allclose(np.mean(nu[:, 1:]), 0.001 * 0.999**300, rtol=0.05)


def test_bytes_of_the_state():
  params = {'w': jnp.zeros((2, 64, 512)), 'b': jnp.zeros((2, 128))}
  size = lambda **kind: (
    sum(x.nbytes for x in jax.tree.leaves(make_optimizer(TrainConfig(**kind), 1).init(params))) - 4 * 6
  )  # count, schedule
  values = 2 * 64 * 512 + 2 * 128
  assert size() == 8 * values and size(moments='bfloat16') == 4 * values
  assert size(moments='int8') == 2 * values + 8 * (2 * 64 * 2 + 2)
  matrices = {'layers': {'w_up': jnp.zeros((2, 256, 512))}}
  small = make_optimizer(TrainConfig(optimizer='adafactor'), 1).init(matrices)
  assert sum(x.nbytes for x in jax.tree.leaves(small)) < 4 * 2 * (256 + 512) + 64
  assert sum(x.nbytes for x in jax.tree.leaves(make_optimizer(TrainConfig(optimizer='muon'), 1).init(matrices))) < 4 * 2 * 256 * 512 + 64


@pytest.fixture(scope='module')
def gradients():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  params = step_lib.build(RANKING, MODEL, optax.identity(), mesh).init(jax.random.key(0), None).params
  draw = lambda seed: jax.tree.map(lambda p: np.random.default_rng(seed).normal(size=p.shape).astype(np.float32), params)
  return jax.device_get(params), [draw(seed) for seed in range(3)]


@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS, ids=NAMES)
def test_sharded_updates_and_restored_states_equal_those_of_one_device(kind, gradients, tmp_path):
  """Moments to the bit: rounding depends on nothing but the number of the update. The matrix products of Muon add in another order."""
  params, grads = gradients
  tx = make_optimizer(TrainConfig(learning_rate=0.1, warmup_ratio=0.0, clip_norm=None, **kind), 10)
  found, meshes = [], [sharding.make_mesh(MeshConfig(), jax.devices()[:1]), sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))]
  for mesh in meshes:
    functions = step_lib.build(RANKING, MODEL, tx, mesh)
    with jax.set_mesh(mesh):
      state, layout = functions.init(jax.random.key(0), params), jax.tree.map(lambda a: a.sharding, functions.abstract)
      update = jax.jit(tx.update, out_shardings=(layout.params, layout.opt_state))
      place = lambda tree, layout=layout: jax.tree.map(jax.device_put, tree, layout.params)
      opt_state = state.opt_state
      for step in grads[:2]:
        _, opt_state = update(place(step), opt_state, state.params)
      jax.tree.map(
        lambda x, a: np.testing.assert_equal(x.sharding.is_equivalent_to(a.sharding, x.ndim), True), opt_state, functions.abstract.opt_state
      )
      found.append(jax.device_get(update(place(grads[2]), opt_state, state.params)))
  saved = state._replace(opt_state=opt_state)
  checkpointer = Checkpointer(tmp_path, CheckpointingConfig(asynchronous=False), 'm', best_is_lower=True)
  checkpointer.save(2, saved, {'step': 2}, kind, {})
  restored, _ = checkpointer.restore(functions.abstract, kind)
  with pytest.raises(ConfigError, match='was made with other settings'):
    checkpointer.restore(functions.abstract, {'optimizer': 'adamw', 'moments': 'float32'})
  checkpointer.close()
  jax.tree.map(np.testing.assert_array_equal, restored.opt_state, saved.opt_state)
  with jax.set_mesh(meshes[1]):
    again = jax.device_get(update(place(grads[2]), restored.opt_state, state.params))
  jax.tree.map(np.testing.assert_array_equal, again, found[1])
  exact = 'moments' in kind
  compare = (
    np.testing.assert_array_equal
    if exact
    else lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 if 'muon' in kind.values() else 1e-5)
  )
  jax.tree.map(compare, found[1][1], found[0][1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3 if 'muon' in kind.values() else 1e-6), found[1][0], found[0][0])
  assert bytes_of_a_device(functions.abstract.opt_state) < sum(x.nbytes for x in jax.tree.leaves(found[0][1]))


def test_rows_and_columns_of_adafactor_against_a_numpy_oracle():
  rng = np.random.default_rng(0)
  grads = [(rng.normal(size=(2, 128, 160)) * np.linspace(0.1, 3, 160)).astype(np.float32) for _ in range(3)]
  tx = make_optimizer(TrainConfig(optimizer='adafactor', learning_rate=0.5, warmup_ratio=0.0, final_lr_ratio=1.0, clip_norm=None), 10)
  params = {'w_up': jnp.zeros((2, 128, 160))}
  state, rows, columns = tx.init(params), np.zeros((2, 128)), np.zeros((2, 160))
  for t, g in enumerate(grads, 1):
    updates, state = tx.update({'w_up': jnp.asarray(g)}, state, params)
    decay, squared = 1 - t**-0.8, g.astype(np.float64) ** 2 + 1e-30
    rows = decay * rows + (1 - decay) * squared.mean(axis=2)
    columns = decay * columns + (1 - decay) * squared.mean(axis=1)
    v = rows[:, :, None] * columns[:, None, :] / rows.mean(axis=1)[:, None, None]
    direction = g / np.sqrt(v)
    direction /= max(1, np.sqrt(np.mean(direction**2)))
    np.testing.assert_allclose(updates['w_up'], -0.5 * direction, rtol=2e-4, atol=1e-5)


def test_muon_makes_the_matrices_of_each_layer_orthogonal_and_leaves_the_rest_to_adam():
  rng = np.random.default_rng(0)
  shapes = {'embedding': (20, 32), 'layers': {'wq': (2, 32, 4, 8), 'wo': (2, 4, 8, 32), 'w_down': (2, 64, 32), 'mlp_norm': (2, 32)}}
  draw = lambda: jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
  config = TrainConfig(optimizer='muon', learning_rate=1.0, warmup_ratio=0.0, final_lr_ratio=1.0, clip_norm=None)
  tx, adam = make_optimizer(config, 10), make_optimizer(TrainConfig(**{**vars(config), 'optimizer': 'adamw'}), 10)
  params = draw()
  state, adam_state = tx.init(params), adam.init(params)
  for _ in range(2):
    grads = draw()
    updates, state = tx.update(grads, state, params)
    expected, adam_state = adam.update(grads, adam_state, params)
  for name in ('embedding', 'mlp_norm'):
    of = lambda tree, name=name: tree[name] if name in tree else tree['layers'][name]
    np.testing.assert_array_equal(of(updates), of(expected))
  for name, rows in (('wq', 32), ('wo', 32), ('w_down', 64)):
    for layer in np.asarray(updates['layers'][name]):
      values = np.linalg.svd(layer.reshape(rows, -1), compute_uv=False) / (0.2 * np.sqrt(max(rows, 32)))
      assert np.quantile(values, 0.1) > 0.6 and values.max() < 1.3  # a random square matrix has one singular value near 0


def test_contradictory_options_are_refused():
  with pytest.raises(ConfigError, match=r"finetune\.moments is 'int8', which only finetune\.optimizer='adamw' has"):
    TrainConfig(optimizer='muon', moments='int8').check_optimizer('finetune')
  with pytest.raises(ConfigError, match=r"args\.optimizer is 'lion'; it must be one of: adamw, adafactor, muon"):
    make_optimizer(TrainConfig(optimizer='lion'), 1)
  with pytest.raises(ConfigError, match='moments'):
    make_optimizer(TrainConfig(optimizer='adafactor', moments='bfloat16'), 1)


def _train(folder, **kind):
  examples = [{'prompt': f'p{i}', 'reference': 'aaaa', 'chosen': 'aaaaa', 'rejected': 'bbbb'} for i in range(16)]
  result = api_training.train_reward_model(
    examples,
    init='scratch',
    output_dir=folder,
    args=TrainConfig(steps=8, batch_size=8, learning_rate=2e-2, warmup_ratio=0.0, **kind),
    model=ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8),
    tokenizer='byte',
    mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
    settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=3)),
  )
  return result, [record['loss'] for record in result.metrics if 'loss' in record]


@pytest.mark.long
def test_a_killed_run_with_eight_bits_resumes_to_the_bit_and_ends_like_one_in_float32(tmp_path):
  whole, losses = _train(tmp_path / 'whole', moments='int8')
  _, exact = _train(tmp_path / 'exact')
  assert exact[-1] < 0.5 * exact[0] and losses[0] == exact[0]
  np.testing.assert_allclose(losses, exact, atol=0.02)
  with killed_at(6):
    _train(tmp_path / 'killed', moments='int8')
  with pytest.raises(ConfigError, match=r"moments was 'int8', is 'float32'"):
    _train(tmp_path / 'killed')
  resumed, again = _train(tmp_path / 'killed', moments='int8')
  assert again == losses
  jax.tree.map(np.testing.assert_array_equal, resumed.model.params, whole.model.params)
