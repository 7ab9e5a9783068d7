"""The mesh, the one table that maps logical axes to mesh axes, and the placement of batches on devices.

Parameters name their axes where they are created (`model.layers.param`), activations where they are constrained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from polar_jax.config import ConfigError, MeshConfig

MESH_AXES = ('data', 'fsdp', 'tensor', 'context')

# Logical axis -> mesh axes. Axes that are never split are listed with (), so that a misspelled name is an error.
RULES: dict[str, tuple[str, ...]] = {
  # parameters
  'layers': (),
  'embed': ('fsdp',),
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  'rank': (),  # of adapters
  # activations
  'batch': ('data', 'fsdp'),
  'length': ('context',),  # tokens of a row, as queries
  'keys': (),  # tokens of a row, as keys and values: every device sees all those of its rows
  'act_embed': (),
}


def round_up(n: int, multiple: int) -> int:
  """Return the smallest multiple of `multiple` that is at least `n`."""
  return -(-n // multiple) * multiple


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Create a mesh over all devices; a size of -1 takes the devices that the other axes leave.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  known = math.prod(size for size in sizes if size > 0)
  if -1 in sizes and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if math.prod(sizes) != len(devices):
    shown = ', '.join(f'{axis}={getattr(config, axis)}' for axis in MESH_AXES)
    raise ConfigError(f'mesh ({shown}) does not fit {len(devices)} devices; set sizes that multiply to {len(devices)}')
  # Auto: the partitioner places arrays that are not constrained. The default axis type became Explicit in JAX 0.9.
  return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(*axes: str | None) -> PartitionSpec:
  """Return the PartitionSpec of an array with these logical axes.

  Raises:
    ValueError: an axis is unknown, or two axes map to the same mesh axis.
  """
  used: dict[str, str] = {}
  parts: list[Any] = []
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(f'unknown logical axis {axis!r}; known: {", ".join(RULES)}')
    mesh_axes = () if axis is None else RULES[axis]
    for mesh_axis in mesh_axes:
      if mesh_axis in used:
        raise ValueError(f'axes {used[mesh_axis]!r} and {axis!r} of {axes} both map to mesh axis {mesh_axis!r}')
      used[mesh_axis] = str(axis)
    parts.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
  return PartitionSpec(*parts)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Constrain the layout of an activation if a mesh is set, on CPU too.

  A dimension that its mesh axes do not divide is not split, such as a few reward tokens on a mesh that splits rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty else jax.lax.with_sharding_constraint(x, _divided(spec(*axes), x.shape, mesh))


def param_specs(abstract_model: nnx.Module) -> dict[str, Any]:
  """Return the PartitionSpec of every parameter, as a pure dict of the model's tree."""
  state = nnx.state(abstract_model, nnx.Param)
  return nnx.to_pure_dict(
    jax.tree.map(lambda p: p.replace(spec(*p.get_metadata()['axes'])), state, is_leaf=lambda p: isinstance(p, nnx.Variable))
  )


def fit(sharding: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Return `sharding` on `mesh`, without splitting dimensions that their mesh axes do not divide (8 kv heads on 16 devices)."""
  return NamedSharding(mesh, _divided(sharding, shape, mesh))


def _divided(sharding: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
  parts = []
  for size, part in zip(shape, tuple(sharding) + (None,) * (len(shape) - len(sharding)), strict=True):
    axes = () if part is None else (part,) if isinstance(part, str) else part
    parts.append(part if axes and size % math.prod(mesh.shape[a] for a in axes) == 0 else None)
  return PartitionSpec(*parts)


def abstract_params(abstract_model: nnx.Module, mesh: Mesh, dtype: str | None = None) -> dict[str, Any]:
  """Return shapes, dtypes and layouts of a model's parameters on a mesh, as a pure dict of ShapeDtypeStructs.

  Args:
    abstract_model: the model, with shapes in place of arrays.
    mesh: the mesh.
    dtype: of all parameters; None: the model's.
  """
  abstract = nnx.to_pure_dict(nnx.state(abstract_model, nnx.Param))
  place = lambda s, a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=fit(s, a.shape, mesh))
  return jax.tree.map(place, param_specs(abstract_model), abstract)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Return the layout that divides rows over all data-parallel devices."""
  return NamedSharding(mesh, spec('batch'))


def batch_shards(mesh: Mesh) -> int:
  """Return the number of devices that the rows of a batch are divided over."""
  return math.prod(mesh.shape[axis] for axis in RULES['batch'])


class Share(NamedTuple):
  """The contiguous part of every batch that one process builds: shards [low, high) of `of` equal ones."""

  low: int
  high: int
  of: int

  def rows(self, total: int) -> slice:
    """Return which of the `total` rows of a batch belong to this share; `of` must divide `total`."""
    return slice(self.low * total // self.of, self.high * total // self.of)


def local_share(mesh: Mesh) -> Share:
  """Return the part of every batch that the devices of this process hold, whatever the number of rows.

  Raises:
    ValueError: the shards of this process are not contiguous, because of an unusual device order.
  """
  shards = batch_shards(mesh)
  slices = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  ranges = sorted({index[0].indices(shards)[:2] for index in slices if index is not None})
  if any(a[1] != b[0] for a, b in itertools.pairwise(ranges)):
    raise ValueError(f'this process holds shards {ranges} of the batch, which are not contiguous; order the devices by process')
  return Share(ranges[0][0], ranges[-1][1], shards)


def put_local(rows: Any, mesh: Mesh) -> Any:
  """Build global arrays, divided over the batch axes of `mesh`, from host arrays that hold the rows of this process alone."""
  layout = batch_sharding(mesh)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout, x), rows)


def put_global(batch: Any, mesh: Mesh) -> Any:
  """Build the same from host arrays that hold the rows of all processes: each process contributes its share of them."""
  share = local_share(mesh).rows(len(jax.tree.leaves(batch)[0]))
  return put_local(jax.tree.map(lambda x: x[share], batch), mesh)
