"""TPU slices that are not there: their chips, and devices to compile for."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import jax
from jax.experimental import topologies

from polar_jax.config import ConfigError

GIB = 1 << 30


class Chip(NamedTuple):
  """A chip's figures as Google Cloud states them. The peak of its matrix units is in `polar_jax.model.flops.CHIPS`."""

  hbm: int  # bytes
  bandwidth: float  # of the HBM, bytes/s
  interconnect: float  # of all its links to other chips together, both ways, bytes/s


CHIPS = {
  'v5e': Chip(16 * GIB, 819e9, 200e9),
  'v5p': Chip(95 * GIB, 2_765e9, 600e9),
  'v6e': Chip(32 * GIB, 1_640e9, 448e9),
}


def open_slice(topology: str) -> tuple[str, Chip, list[jax.Device]]:
  """(chip's name, the chip, the devices) of a slice such as v5p:4x4x4. No TPU is looked for: libtpu alone knows the shape.

  Raises:
    ConfigError: the chip is not known, the slice does not exist, or libtpu is not installed.
  """
  name = topology.split(':')[0]
  if name not in CHIPS:
    raise ConfigError(f'topology {topology!r}: the chip must be one of {", ".join(CHIPS)}, as in v5p:4x4x4')
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError("a plan is compiled by libtpu, which is not installed: pip install -e '.[tpu]'")
  try:
    devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except Exception as error:
    raise ConfigError(f'topology {topology!r}: {" ".join(str(error).split())[:200]}') from error
  return name, CHIPS[name], list(devices)
