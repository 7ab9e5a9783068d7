"""Capture of a few steps by JAX's profiler, for TensorBoard or xprof."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from polar_jax.config import ProfileConfig

FOLDER = 'profile'


class Profiler:
  """Traces `config.steps` steps after the first `config.skip` of a start, which compile; then never again in this process."""

  def __init__(self, config: ProfileConfig, folder: pathlib.Path, log: Callable[[str], None]):
    self._config, self._folder, self._log, self._active = config, folder / FOLDER, log, False

  def before(self, steps: int) -> None:
    """To be called before each step. `steps`: taken since the start."""
    if self._config.steps and steps == self._config.skip:
      jax.profiler.start_trace(str(self._folder))
      self._active = True

  def after(self, steps: int, results: Any) -> None:
    """To be called behind each step. `steps`: with this one."""
    if self._active and steps == self._config.skip + self._config.steps:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Ends a capture that is going on: a run may be shorter than it."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      self._log(f'profile of {self._config.steps} steps: tensorboard --logdir {self._folder}')
