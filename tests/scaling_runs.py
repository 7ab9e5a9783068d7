"""Results of a sweep whose scaling laws are known, for tests of the analysis and of the fit stage."""

from __future__ import annotations

import numpy as np

from polar_jax.scaling.results import Results

SIZES, RATIOS = np.geomspace(5e7, 1e9, 5), np.geomspace(2, 40, 6)


def sweep(noise: float = 0.0, seed: int = 0) -> Results:
  """Return runs whose lower envelope is a power law: each size is best at 20 tokens per parameter, and loses by the squared log ratio."""
  n, ratio = (a.ravel() for a in np.meshgrid(SIZES, RATIOS, indexing='ij'))
  flops = 6 * n * n * ratio
  excess = 0.004 * np.log(ratio / 20) ** 2
  loss = 2.4 * flops**-0.0342 * np.exp(excess + np.random.default_rng(seed).normal(0, noise, len(n)))
  return Results(n, n * ratio, flops, loss)
