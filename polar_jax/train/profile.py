"""Capture of a few steps with JAX's profiler, for TensorBoard or xprof."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from polar_jax.config import ProfileConfig

FOLDER = 'profile'


class Profiler:
  """Captures `config.steps` steps, once in each start, after skipping the first `config.skip`, which compile."""

  def __init__(self, config: ProfileConfig, folder: pathlib.Path, log: Callable[[str], None]):
    self._config, self._folder, self._log, self._active = config, folder / FOLDER, log, False

  def before(self, steps: int) -> None:
    """Start the capture if it is due. Call it before each step with the number of steps taken in this start."""
    if self._config.steps and steps == self._config.skip:
      jax.profiler.start_trace(str(self._folder))
      self._active = True

  def after(self, steps: int, results: Any) -> None:
    """End the capture if it is due. Call it after each step with the number of steps taken, this one included."""
    if self._active and steps == self._config.skip + self._config.steps:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """End a capture that is still active, because the run is shorter than the capture."""
    if self._active:
      self._active = False
      jax.profiler.stop_trace()
      self._log(f'profile of {self._config.steps} steps: tensorboard --logdir {self._folder}')
