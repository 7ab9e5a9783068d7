"""From a checkpoint on disk straight onto a mesh, tensor by tensor.

The destination arrays are born sharded and filled in place, so that the host holds only one stored tensor in addition to them and the
slices of it that its devices need: never a layer stack, never a second copy of the model.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from polar_jax.checkpoints import families
from polar_jax.checkpoints.families import Part, Stored
from polar_jax.checkpoints.formats.storage import CheckpointFileError, TensorInfo, TensorSource
from polar_jax.types import UserError

# Buffers in older checkpoints that are computed from the config.
_BUFFERS = ('rotary_emb.inv_freq', 'attn.bias', 'attn.masked_bias')

OnTensor = Callable[[str, np.ndarray], None]


def check(source: TensorSource, stored: list[Stored], *, compare_tied: bool = True) -> dict[str, Stored]:
  """Return the tensors to read, by name.

  Args:
    source: the checkpoint.
    stored: the tensors of the model.
    compare_tied: compare an output projection that is stored although it is tied with the embedding, which reads both.

  Raises:
    CheckpointFileError: a tensor is missing, does not belong to the model, or does not have the shape that follows from the config.
  """
  wanted, present = {s.name: s for s in stored}, source.tensors()
  missing = [name for name, s in wanted.items() if name not in present and s.parts]  # a constant may be absent
  extra = [
    name for name in present if name not in wanted and not name.endswith(_BUFFERS) and not _is_tied_head(source, name, wanted, compare_tied)
  ]
  if missing:
    why = f'it has {extra[0][:80]!r}{_others(extra)} instead; another family?' if extra else 'is the download complete?'
    raise CheckpointFileError(f'{source.path}: tensor {missing[0]!r} is missing{_others(missing)}; {why}')
  if extra:
    file, others = present[extra[0]].file, _others(extra)
    raise CheckpointFileError(f'{file}: tensor {extra[0][:80]!r} does not belong to the model of its config{others}; another family?')
  wanted = {name: s for name, s in wanted.items() if name in present}
  for name, s in wanted.items():
    if present[name].shape != s.shape:
      raise CheckpointFileError(f'{present[name].file}: tensor {name!r} has shape {present[name].shape}, but its config implies {s.shape}')
  return wanted


def _others(names: list[str]) -> str:
  return f' (and {len(names) - 1} more)' if len(names) > 1 else ''


def _is_tied_head(source: TensorSource, name: str, wanted: Mapping[str, Stored], compare: bool) -> bool:
  """Return whether a tensor is the output projection of a tied language model, stored a second time.

  Raises:
    CheckpointFileError: it differs from the embedding.
  """
  embedding = families.TIED_HEADS.get(name, '')
  if embedding not in wanted or any(part.path == ('v_head',) for s in wanted.values() for part in s.parts):
    return False
  if not compare:
    return True
  tensors = source.tensors()
  dtype = jnp.promote_types(tensors[name].dtype, tensors[embedding].dtype)
  if checksum(source.read(name).astype(dtype, copy=False)) != checksum(source.read(embedding).astype(dtype, copy=False)):
    raise CheckpointFileError(f'{tensors[name].file}: tensor {name!r} differs from the embedding that its config ties it to')
  return True


def load(
  source: TensorSource, stored: list[Stored], abstract: dict[str, Any], dtype: str | None = None, on_tensor: OnTensor | None = None
) -> dict[str, Any]:
  """Read parameters with the shapes and shardings of `abstract` (see `sharding.abstract_params`).

  Args:
    source: the checkpoint.
    stored: the tensors of the model.
    abstract: the parameters to read; tensors that it does not need are skipped.
    dtype: dtype of the parameters; None: as stored.
    on_tensor: called with the name and the array of every stored tensor that is read.

  Raises:
    CheckpointFileError: as `check`; or a tensor contains NaN or infinity, or numbers too large for `dtype`.
  """
  tensors = check(source, stored)
  target = _Target(abstract, _parameter_dtypes(source.tensors(), tensors.values(), dtype))
  for name, s in tensors.items():
    if s.parts and not any(target.wants(part) for part in s.parts):
      continue
    array, named = source.read(name), f'{source.tensors()[name].file}: tensor {name!r}'
    if on_tensor is not None:
      on_tensor(name, array)
    try:
      pieces = s.split(array)
    except UserError as error:
      raise CheckpointFileError(f'{source.tensors()[name].file}: {error}') from error
    # `all` below waits for each tensor: one still being copied would stay in host memory.
    finite = [target.put(part, piece) for part, piece in zip(s.parts, pieces, strict=True) if target.wants(part)]
    if not all(map(bool, finite)):
      if dtype is not None and np.isfinite(array).all():
        raise CheckpointFileError(f'{named} reaches {np.abs(array).max():.3g}, which {dtype} cannot hold; convert to another dtype')
      raise CheckpointFileError(f'{named} contains NaN or infinity; the checkpoint is corrupt')
  return target.finished()


def _parameter_dtypes(infos: Mapping[str, TensorInfo], stored: Iterable[Stored], dtype: str | None) -> dict[tuple[str, ...], np.dtype]:
  """Return the dtype of each parameter: `dtype`, or else the narrowest that holds every layer as stored, without rounding."""
  dtypes: dict[tuple[str, ...], np.dtype] = {}
  for s in stored:
    for part in s.parts:
      own = infos[s.name].dtype
      dtypes[part.path] = jnp.dtype(dtype) if dtype else jnp.promote_types(dtypes.get(part.path, own), own)
  return dtypes


def held_dtypes(source: TensorSource, stored: list[Stored], dtype: str | None = None) -> dict[str, np.dtype]:
  """Return by name the dtype in which `load` holds each stored tensor; for a tensor without parameters that of the scalar head."""
  infos = source.tensors()
  present = [s for s in stored if s.name in infos]
  dtypes = _parameter_dtypes(infos, present, dtype)
  return {s.name: dtypes[s.parts[0].path if s.parts else ('v_head',)] for s in present}


class _Target:
  """The parameters while they are filled. `dtypes`: of each parameter, by path."""

  def __init__(self, abstract: dict[str, Any], dtypes: Mapping[tuple[str, ...], np.dtype]):
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    self._abstract = {tuple(k.key for k in path): leaf for path, leaf in leaves}
    self._tree = jax.tree.structure(abstract)
    self._dtypes = dtypes
    self._arrays: dict[tuple[str, ...], jax.Array] = {}

  def wants(self, part: Part) -> bool:
    """Return whether a part belongs to the parameters to read."""
    return part.path in self._abstract

  def put(self, part: Part, piece: np.ndarray) -> jax.Array:
    """Place one part. Returns whether all of it is finite in the dtype of the parameter."""
    wanted, dtype = self._abstract[part.path], self._dtypes[part.path]
    if part.layer is None:
      whole = _place(piece, wanted.sharding)
      self._arrays[part.path] = whole if whole.dtype == dtype else whole.astype(dtype)
      return _is_finite(self._arrays[part.path])
    if part.path not in self._arrays:
      self._arrays[part.path] = _zeros(wanted.sharding)(wanted.shape, dtype.name)
    one_layer = NamedSharding(wanted.sharding.mesh, PartitionSpec(*wanted.sharding.spec[1:]))
    self._arrays[part.path], is_finite = _fill(wanted.sharding)(self._arrays[part.path], _place(piece, one_layer), part.layer)
    return is_finite

  def finished(self) -> dict[str, Any]:
    """Return the parameter tree."""
    return jax.tree.unflatten(self._tree, [self._arrays[path] for path in self._abstract])


def _place(piece: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Copy to every device its own slice only."""
  # Slices are views: the runtime transposes them while copying, three times as fast as numpy.
  return jax.make_array_from_callback(piece.shape, sharding, lambda index: piece[index])


@functools.cache
def _zeros(sharding: NamedSharding) -> Callable[[tuple[int, ...], str], jax.Array]:
  return jax.jit(lambda shape, dtype: jnp.zeros(shape, dtype), static_argnums=(0, 1), out_shardings=sharding)


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))


@functools.cache
def _fill(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]:
  """Return a function that writes one layer into a stack in place, and returns (stack, is the layer finite)."""

  def fill(stack: jax.Array, piece: jax.Array, layer: int) -> tuple[jax.Array, jax.Array]:
    start = (layer,) + (0,) * piece.ndim
    piece = piece.astype(stack.dtype)
    return jax.lax.dynamic_update_slice(stack, piece[None], start), jnp.all(jnp.isfinite(piece))

  return jax.jit(fill, out_shardings=(sharding, NamedSharding(sharding.mesh, PartitionSpec())), donate_argnums=0)


def checksum(array: np.ndarray) -> str:
  """Return the SHA-256 of a tensor's bytes in hex."""
  return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
