"""Free disk space for the checkpoints of a run, compared with their size before its first step."""

from __future__ import annotations

import math
import pathlib
import shutil
from typing import Any

import jax

from polar_jax.config import CheckpointingConfig, ConfigError
from polar_jax.runtime import paths
from polar_jax.runtime.units import in_units


def size_of(abstract: Any) -> int:
  """Return the bytes of a state of arrays, or of shapes of them, on all devices together."""
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def most_at_once(config: CheckpointingConfig, step: int, steps: int, evaluate_every: int | None) -> int:
  """Return how many more checkpoints the rest of a run can have on disk at once: those it keeps, and the one that it is writing.

  Args:
    config: when to save, and what to keep.
    step: the step to continue from.
    steps: of the whole run.
    evaluate_every: steps between evaluations that are followed by a checkpoint; None: there are none but the last.
  """
  most, saves = config.keep + config.keep_best + 1, 0
  for number in range(step + 1, steps + 1):
    due = number % config.every_steps == 0 or number == steps or (evaluate_every is not None and number % evaluate_every == 0)
    saves += due
    if saves == most:
      break
  return saves


def check(name: str, folder: pathlib.Path, config: CheckpointingConfig, needed: int) -> None:
  """Check that a disk has room for checkpoints. Buckets are taken to have room for everything.

  Args:
    name: of the run or runs, for the message.
    folder: of their checkpoints; need not exist yet.
    config: what to keep, for the message.
    needed: bytes.

  Raises:
    ConfigError: there is too little space; the message says how much is needed, and what to change.
  """
  if paths.in_bucket(folder):
    return
  existing = next(parent for parent in (paths.absolute(folder), *paths.absolute(folder).parents) if parent.exists())
  free = shutil.disk_usage(existing).free
  if needed > free:
    raise ConfigError(
      f'{name}: checkpoints will take up to {in_units(needed)} (checkpointing.keep={config.keep}, keep_best={config.keep_best}, and one '
      f'being written), but {existing} has {in_units(free)} free: make room, set checkpointing.folder to another disk, or lower '
      'checkpointing.keep or keep_best'
    )
