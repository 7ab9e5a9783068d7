"""The runs of train/conftest.py's contexts, and what they leave on disk."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from polar_jax.checkpoints.checkpointer import FOLDER, load_params
from polar_jax.stages.context import Context
from polar_jax.train import trainer as loop
from polar_jax.train.objectives import RANKING

STEPS, BATCH, EXAMPLES = 12, 8, 40  # of the contexts of make_context


def checkpoints(folder: pathlib.Path) -> list[int]:
  """Return the steps of the checkpoints in the folder of a run."""
  return sorted(int(path.name) for path in (folder / FOLDER).iterdir())


@contextlib.contextmanager
def killed_at(batch: int) -> Iterator[None]:
  """End the training run of the block as Ctrl-C does, when it puts a batch on the devices, counted from 1, that of validation too."""
  put, calls = loop.sharding.put_local, []

  def kill(*arguments: Any) -> Any:
    calls.append(1)
    if len(calls) == batch:
      raise KeyboardInterrupt
    return put(*arguments)

  with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(loop.sharding, 'put_local', kill)
    yield


def parameters(folder: pathlib.Path, like: Context) -> dict[str, Any]:
  """Return the parameters of the newest checkpoint in `folder` as numpy arrays, for the model of the context `like`."""
  model = like.model_config()
  functions = loop.step_lib.build(RANKING, model, loop.make_optimizer(like.config.pretrain, STEPS), like.mesh)
  return jax.device_get(load_params(folder, functions.abstract.params))
