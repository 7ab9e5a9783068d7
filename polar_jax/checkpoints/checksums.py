"""Checksums of arrays, computed on the devices that hold them. They do not depend on how an array is sharded.

Each element is hashed with its position, by bijections of 32 bits, and the hashes are added modulo 2^32. A sum of integers is the same in
any order, so every mesh and number of processes gives the same checksum. A change of one element always changes it; any other change
goes unnoticed once in 4 billion times. It costs one pass over the array; only small ones are copied to the host.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

_MAX_ON_HOST = 2**20  # bytes of an array that numpy takes: XLA would compile for longer than that


def of_arrays(tree: Any) -> dict[str, int]:
  """Return the checksum of every array of a tree, by its path. With several processes, all of them must call this."""
  leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if isinstance(leaf, (jax.Array, np.ndarray))]
  started = [_start(leaf) for _, leaf in leaves]
  # uint32 all along: sums wrap around.
  sums = np.array([np.sum([np.asarray(part)[0] for part in parts], dtype=np.uint32) for parts, _ in started], np.uint32)
  if jax.process_count() > 1:
    of_all = np.asarray(multihost_utils.process_allgather(sums)).sum(axis=0, dtype=np.uint32)
    sums = np.where([is_shared for _, is_shared in started], of_all, sums)
  names = [jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in leaves]
  return {name: int(value) for name, value in zip(names, sums, strict=True)}


def of_json(value: Any) -> int:
  """Return the CRC-32 of a JSON value, which does not depend on the order of keys."""
  return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())  # twice: JSON turns keys into strings


def digest(value: Any) -> str:
  """Return 32 hex digits of the SHA-256 of a JSON value, such as the checksums of a model."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def changed(tree: Any, stored: Mapping[str, int]) -> list[str]:
  """Return the paths of arrays whose checksum is not the `stored` one; those without a stored one are left out.

  With several processes, all of them must call this.
  """
  return [name for name, value in of_arrays(tree).items() if stored.get(name, value) != value]


def _start(array: Any) -> tuple[list[Any], bool]:
  """Start the checksum of an array on its devices.

  Returns:
    (checksums of parts that this process holds, each of shape (1,); whether other processes hold other parts).
  """
  if _is_small(array):
    return [_on_host(np.asarray(array))], False
  if not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
    return [_one_device(array)], False
  by_device = _program(array.sharding, array.shape)(array)
  parts = {shard.device: shard.data for shard in by_device.addressable_shards}
  return [parts[shard.device] for shard in array.addressable_shards if shard.replica_id == 0], not array.is_fully_addressable


@jax.jit
def _one_device(x: jax.Array) -> jax.Array:
  return _checksum(x, x.shape, (0,) * x.ndim)


@functools.cache
def _program(sharding: NamedSharding, shape: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
  """Return a function from an array to the checksums of its shards, one for each device of the mesh.

  No device waits for another: on CPU, several programs with collectives at a time may block each other forever.
  """
  mesh, spec = sharding.mesh, sharding.spec

  def of_shard(x: jax.Array) -> jax.Array:
    starts = []
    for size, part in itertools.zip_longest(x.shape, spec):
      index = 0
      for axis in () if part is None else (part,) if isinstance(part, str) else part:
        index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
      starts.append(index * size)
    return _checksum(x, shape, starts)

  return jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(mesh.axis_names), check_vma=False))


def _checksum(x: jax.Array, shape: Sequence[int], starts: Sequence[Any]) -> jax.Array:
  """Return the checksum (1,) of a part of an array, uint32.

  Args:
    x: the part.
    shape: of the whole array.
    starts: where the part begins in each dimension.
  """
  x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')).astype(jnp.uint32)
  words = (bits.shape[-1],) if bits.ndim > x.ndim else ()  # of an element of 8 bytes
  position, stride = jnp.zeros(bits.shape, jnp.uint32), 1
  for axis, (size, start) in reversed(list(enumerate(zip((*shape, *words), (*starts, *(0 for _ in words)), strict=True)))):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + jnp.asarray(start, jnp.uint32)
    position += index * jnp.uint32(stride % 2**32)
    stride *= size
  return jnp.sum(_mixed(bits ^ _mixed(position)), dtype=jnp.uint32)[None]


def _is_small(array: Any) -> bool:
  return array.nbytes <= _MAX_ON_HOST and (isinstance(array, np.ndarray) or array.is_fully_addressable)


def _on_host(x: np.ndarray) -> np.ndarray:
  """Return what `_checksum` returns for a whole array, by numpy."""
  x = np.ascontiguousarray(x).reshape(-1)
  bits = x.view(f'u{min(x.dtype.itemsize, 4)}').astype(np.uint32)
  return np.array([np.sum(_mixed(bits ^ _mixed(np.arange(bits.size, dtype=np.uint32))), dtype=np.uint32)])


def _mixed(x: Any) -> Any:
  """Return a bijection of 32 bits in which every bit of the input affects every bit of the output (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
