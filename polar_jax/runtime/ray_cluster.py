"""The connection to a Ray cluster, for as long as work runs on it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from polar_jax.config import ConfigError


def check(setting: str) -> None:
  """Check that Ray is installed.

  Args:
    setting: that asks for it, for the message.

  Raises:
    ConfigError: it is not.
  """
  if importlib.util.find_spec('ray') is None:
    raise ConfigError(f"{setting} is 'ray', which is not installed; run: pip install 'polar_jax[ray]'")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
  """Scope in which Ray is connected; yields the module. A connection that exists before is used, and left open.

  Args:
    address: of the cluster; None: RAY_ADDRESS if set, else a cluster on this machine.
  """
  import ray

  started_here = not ray.is_initialized()
  if started_here:
    ray.init(address=address, log_to_driver=False, include_dashboard=False, configure_logging=False)
  try:
    yield ray
  finally:
    if started_here:
      ray.shutdown()
