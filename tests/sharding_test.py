from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from polar_jax import sharding
from polar_jax.config import ConfigError, MeshConfig, ModelConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.presets import PRESETS
from polar_jax.model.reward_model import RewardModel


@pytest.fixture(autouse=True, scope='module')
def eight_devices():
  if jax.device_count() != 8:
    pytest.fail(f'these tests need 8 fake devices, there are {jax.device_count()} (tests/conftest.py sets XLA_FLAGS)')


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    ((1, -1, 1, 1), (1, 8, 1, 1)),
    ((-1, 2, 2, 1), (2, 2, 2, 1)),
    ((2, 2, -1, 1), (2, 2, 2, 1)),
    ((2, 2, 2, -1), (2, 2, 2, 1)),
    ((8, 1, 1, 1), (8, 1, 1, 1)),
    ((2, 4, 1, -1), (2, 4, 1, 1)),
  ],
)
def test_mesh_sizes(sizes, expected):
  mesh = sharding.make_mesh(MeshConfig(*sizes))
  assert mesh.axis_names == ('data', 'fsdp', 'tensor', 'context')
  assert mesh.devices.shape == expected
  # Automatic axes: the code states layouts as constraints, not as types.
  assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


@pytest.mark.parametrize('sizes', [(3, 1, 1, 1), (3, -1, 1, 1), (2, 2, 1, 1), (16, 1, 1, 1), (16, -1, 1, 1)])
def test_mesh_that_does_not_fit_names_both_numbers(sizes):
  with pytest.raises(ConfigError) as error:
    sharding.make_mesh(MeshConfig(*sizes))
  numbers = {abs(size) for size in sizes}
  product = 1
  for size in sizes:
    product *= abs(size)
  assert '8' in str(error.value)
  assert str(product) in str(error.value) or all(str(n) in str(error.value) for n in numbers)


def test_mesh_over_some_devices():
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
  assert mesh.devices.size == 2


@pytest.mark.parametrize(
  ('axes', 'expected'),
  [
    (('batch', 'length', 'act_embed'), P(('data', 'fsdp'), 'context', None)),
    (('embed', 'mlp'), P('fsdp', 'tensor')),
    (('vocab', 'embed'), P('tensor', 'fsdp')),
    (('layers', 'embed', 'heads', 'head_dim'), P(None, 'fsdp', 'tensor', None)),
    ((None, 'batch'), P(None, ('data', 'fsdp'))),
  ],
)
def test_spec(axes, expected):
  assert sharding.spec(*axes) == expected


def test_unknown_axis_names_the_known_ones():
  with pytest.raises(ValueError, match=r"'head'.*kv_heads"):
    sharding.spec('embed', 'head')


@pytest.mark.parametrize('axes', [('heads', 'mlp'), ('batch', 'embed'), ('embed', 'embed')])
def test_two_axes_on_one_mesh_axis_are_refused(axes):
  with pytest.raises(ValueError, match='mesh axis') as error:
    sharding.spec(*axes)
  assert all(repr(axis) in str(error.value) for axis in axes)


def test_fit_leaves_undividable_dimensions_whole():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  fit = lambda spec, shape: sharding.fit(spec, shape, mesh).spec
  assert fit(P('fsdp', 'tensor'), (4, 6)) == P('fsdp', 'tensor')
  assert fit(P('fsdp', 'tensor'), (3, 6)) == P(None, 'tensor')
  assert fit(P(('data', 'fsdp'), None), (8, 5)) == P(('data', 'fsdp'), None)
  assert fit(
    P(
      ('data', 'fsdp'),
    ),
    (6, 5),
  ) == P(None, None)
  assert fit(P(None, 'tensor'), (3, 2, 7)) == P(None, 'tensor', None)


def test_batch_shards():
  assert sharding.batch_shards(sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) == 4
  assert sharding.batch_shards(sharding.make_mesh(MeshConfig())) == 8


MESHES = {'8x1': MeshConfig(fsdp=8), '4x2': MeshConfig(fsdp=4, tensor=2), '2x2x2': MeshConfig(data=2, fsdp=2, tensor=2)}


def _mesh(name: str):
  return sharding.make_mesh(MESHES[name])


def test_one_process_holds_every_shard():
  for name, shards in {'8x1': 8, '4x2': 4, '2x2x2': 4}.items():
    assert sharding.local_share(_mesh(name)) == (0, shards, shards)


def test_share_rows_divide_a_batch():
  shares = [sharding.Share(0, 1, 4), sharding.Share(1, 3, 4), sharding.Share(3, 4, 4)]
  assert [list(range(12))[share.rows(12)] for share in shares] == [[0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11]]


def test_put_local_divides_rows_over_data_and_fsdp():
  batch = {'tokens_BT': np.arange(16 * 6).reshape(16, 6), 'index_B': np.arange(16)}
  placed = sharding.put_local(batch, _mesh('2x2x2'))
  assert placed['tokens_BT'].sharding.spec == P(('data', 'fsdp'))
  assert placed['tokens_BT'].addressable_shards[0].data.shape == (4, 6)
  for name, value in batch.items():
    np.testing.assert_array_equal(placed[name], value)


def test_put_global_places_the_rows_of_this_process(monkeypatch):
  batch = (np.arange(8), np.arange(16).reshape(8, 2))
  for one, other in zip(sharding.put_global(batch, _mesh('4x2')), batch, strict=True):
    assert one.sharding.spec == P(('data', 'fsdp'))
    np.testing.assert_array_equal(one, other)
  monkeypatch.setattr(sharding, 'local_share', lambda mesh: sharding.Share(1, 3, 4))
  monkeypatch.setattr(sharding, 'put_local', lambda rows, mesh: rows)
  index_B, tokens_BT = sharding.put_global(batch, _mesh('4x2'))
  assert index_B.tolist() == [2, 3, 4, 5]
  np.testing.assert_array_equal(tokens_BT, batch[1][2:6])


def test_every_parameter_has_a_spec():
  config = ModelConfig(vocab_size=32, num_layers=2, d_model=8, d_ff=16, num_heads=2, num_kv_heads=2, head_dim=4)
  specs = sharding.param_specs(nnx.eval_shape(lambda: RewardModel(config, rngs=nnx.Rngs(0))))
  assert specs['decoder']['embedding'] == P('tensor', 'fsdp')
  assert specs['decoder']['layers']['wq'] == P(None, 'fsdp', 'tensor', None)
  assert specs['decoder']['layers']['w_down'] == P(None, 'tensor', 'fsdp')
  assert specs['decoder']['norm'] == P(None)
  assert specs['v_head'] == P(None)


def test_constrain_without_a_mesh_is_the_identity():
  x = jax.numpy.ones((2, 3))
  assert sharding.constrain(x, 'batch', 'length') is x


def test_constrain_lays_out_activations():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.constrain(x * 2, 'batch', 'length', 'heads', 'head_dim'))(jax.numpy.ones((4, 3, 2, 5)))
  assert y.addressable_shards[0].data.shape == (1, 3, 1, 5)


# The mesh axes of every dimension of every parameter. Layers are stacked, so their first dimension is the layer.
LAYERS = {
  'attention_norm': (None, None),
  'mlp_norm': (None, None),
  'wq': (None, 'fsdp', 'tensor', None),
  'wk': (None, 'fsdp', 'tensor', None),
  'wv': (None, 'fsdp', 'tensor', None),
  'wo': (None, 'tensor', None, 'fsdp'),
  'w_gate': (None, 'fsdp', 'tensor'),
  'w_up': (None, 'fsdp', 'tensor'),
  'w_down': (None, 'tensor', 'fsdp'),
}
BIASES = {'bq': (None, 'tensor', None), 'bk': (None, 'tensor', None), 'bv': (None, 'tensor', None)}
TABLE = ('tensor', 'fsdp')  # vocabulary by width


@pytest.mark.parametrize(
  ('preset', 'make', 'layers', 'head'),
  [
    ('polar_1_8b', RewardModel, LAYERS, {'v_head': (None,)}),
    ('polar_7b', RewardModel, LAYERS, {'v_head': (None,)}),
    ('qwen2_5_32b_instruct', LanguageModel, LAYERS | BIASES, {'lm_head': TABLE}),
  ],
)
def test_golden_specs(preset, make, layers, head):
  model = nnx.eval_shape(lambda: make(ModelConfig(**PRESETS[preset]), rngs=nnx.Rngs(0)))
  decoder = {'embedding': TABLE, 'norm': (None,), 'layers': layers}
  golden = jax.tree.map(lambda axes: P(*axes), {'decoder': decoder} | head, is_leaf=lambda x: isinstance(x, tuple))
  assert sharding.param_specs(model) == golden
