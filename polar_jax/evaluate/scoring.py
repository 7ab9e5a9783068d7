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
    padded = pipeline.plan_batch(batch_size, shards).padded
    self._plan = pipeline.plan_batch(batch_size, shards, step.local_rows(mesh, padded))

  def __call__(self, rows: Sequence[Triplet]) -> np.ndarray:
    """Rewards (rows, 2): of the chosen and of the rejected candidate, float32."""
    tokens = pipeline.PairTokens(rows, self._template)
    batches = pair_validation(tokens, self._plan, pipeline.longest_row(tokens))
    rewards = []
    with jax.set_mesh(self._mesh):
      for batch in batches:
        out = self._functions.evaluate(self._params, step.to_device(batch, self._mesh, self._plan.padded))
        rewards.append(out['rows']['rewards_BPC'].reshape(-1, 2)[: self._plan.rows])
    return np.concatenate(jax.device_get(rewards))[: len(rows)]
