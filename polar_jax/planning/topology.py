"""TPU slices to compile for without having them."""

from __future__ import annotations

import importlib.util

import jax
from jax.experimental import topologies

from polar_jax.config import ConfigError
from polar_jax.runtime.chips import CHIPS, Chip


def open_slice(topology: str) -> tuple[str, Chip, list[jax.Device]]:
  """Return (name of the chip, the chip, devices) of a slice such as v5p:4x4x4. libtpu knows its shape; no TPU is needed.

  Raises:
    ConfigError: the chip is unknown, the slice does not exist, or libtpu is not installed.
  """
  name = topology.split(':')[0]
  known = [chip for chip, figures in CHIPS.items() if figures.hbm]
  if name not in known:
    raise ConfigError(f'topology {topology!r}: the chip must be one of {", ".join(known)}, as in v5p:4x4x4')
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError("plan: needs libtpu, which is not installed; run: pip install -e '.[tpu]'")
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology, **_small_host(topology)).devices
  except Exception as error:
    raise ConfigError(f'topology {topology!r}: {" ".join(str(error).split())[:200]}') from error
  return name, CHIPS[name], list(devices)


def _small_host(topology: str) -> dict[str, list[int]]:
  """Return what libtpu must be told of a slice of less than a host, which has 2 x 2 chips where nothing is said, such as v5e:1x1."""
  sizes = topology.partition(':')[2].split('x')
  if len(sizes) < 2 or not all(size.isdecimal() and int(size) for size in sizes):
    return {}
  chips = [min(int(size), 2) for size in sizes[:2]]
  return {} if chips == [2, 2] else {'chips_per_host_bounds': [*chips, 1]}
