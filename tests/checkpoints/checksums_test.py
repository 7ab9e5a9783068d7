"""Tests of checksums: equal on every mesh, and different after any change."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.checkpoints import checksums
from polar_jax.config import MeshConfig


def mixed(x: int) -> int:
  x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
  x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
  return x ^ (x >> 16)


def expected(array: np.ndarray) -> int:
  """The checksum by Python's integers, element by element."""
  elements = array.reshape(-1).view(f'u{array.dtype.itemsize}').tolist()
  return sum(mixed(bits ^ mixed(i)) for i, bits in enumerate(elements)) % 2**32


def random(dtype, shape=(8, 4, 6)) -> np.ndarray:
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_])
@pytest.mark.parametrize('on_host', [True, False])
def test_checksums_on_every_mesh(dtype, on_host, monkeypatch):
  monkeypatch.setattr(checksums, '_MAX_ON_HOST', 2**20 if on_host else -1)
  array, sums = random(dtype), set()
  for sizes in ((1, 1, 1, 1), (2, 2, 2, 1), (1, 8, 1, 1)):
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    for spec in (PartitionSpec(), PartitionSpec('fsdp'), PartitionSpec(None, None, 'tensor')):
      (value,) = checksums.of_arrays({'a': jax.device_put(array, NamedSharding(mesh, spec))}).values()
      sums.add(value)
  assert sums == {expected(array)} == set(checksums.of_arrays([array, 'text', 3]).values())


def test_every_bit_counts():
  array = random(np.float32, (3, 2))
  stored = checksums.of_arrays({'x': {'y': array}})
  for bit in range(array.nbytes * 8):
    other = array.copy()
    other.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
    assert checksums.changed({'x': {'y': other}}, stored) == ['x.y']
  assert checksums.changed({'x': {'y': array[::-1].copy()}}, stored) == ['x.y']
  assert checksums.changed({'x': {'y': jnp.asarray(array), 'new': array}}, stored) == []


def test_two_bits_of_the_same_weight_do_not_cancel():
  array = np.ones(64, np.float32)
  stored, other = checksums.of_arrays([array]), array.copy()
  other[[5, 40]] *= -1
  assert checksums.changed([other], stored) == ['0']


def test_json_is_compared_by_value():
  value = {'b': (1, 2.5, None), 'a': {10: True, 9: 'é'}}
  assert checksums.of_json(value) == checksums.of_json({'a': {'9': 'é', '10': True}, 'b': [1, 2.5, None]})
  assert checksums.of_json(value) != checksums.of_json({**value, 'b': [1, 2.5, 0]})
