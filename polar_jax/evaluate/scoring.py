"""Rewards of every row of a data set, in order."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.data import pipeline
from polar_jax.data.template import Template
from polar_jax.train import step
from polar_jax.train.checkpoint import load_params
from polar_jax.train.objectives import RANKING
from polar_jax.train.stages import pair_validation
from polar_jax.types import Triplet


class Scorer:
  """A trained reward model with its template, loaded from the folder of a run."""

  def __init__(self, folder: pathlib.Path, model: ModelConfig, template: Template, mesh: Mesh, batch_size: int):
    self._mesh, self._template = mesh, template
    with jax.set_mesh(mesh):
      # Scoring has no optimizer; the identity keeps its state empty.
      self._functions = step.build(RANKING, model, optax.identity(), mesh)
      self._params = load_params(folder, self._functions.abstract.params, RANKING.name)
    shards = sharding.batch_shards(mesh)
    self._plan = pipeline.BatchPlan(batch_size, shards, step.local_share(mesh))

  def __call__(self, rows: Sequence[Triplet]) -> np.ndarray:
    """Rewards (rows, 2): of the chosen and of the rejected candidate, float32."""
    # Rows of data.row_length need not hold what is scored here: the length is chosen for these triplets.
    batches = pair_validation(pipeline.PairTokens(rows, self._template), self._plan, None)
    with jax.set_mesh(self._mesh):
      outputs = [self._functions.evaluate(self._params, step.to_device(batch, self._mesh))['rows'] for batch in batches]
    rewards = np.full((len(rows), 2), np.nan, np.float32)
    for out in jax.device_get(outputs):
      real_BP = out['index'] >= 0
      rewards[out['index'][real_BP]] = out['rewards_BPC'][real_BP]
    return rewards
