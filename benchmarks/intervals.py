"""Coverage of 95% intervals of a scaling exponent, by method and number of runs.

    python benchmarks/intervals.py

Losses follow a known power law with noise: normal, or normal with eight times the deviation for a tenth of the runs. Compares the
interval of `polar_jax.scaling.fit` with the percentiles of a bootstrap of the runs, and of one of the residuals of the least-squares
line. Takes two and a half minutes. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import timing

from polar_jax.scaling import fit

ALPHA, BETA, NOISE = -0.0425, 0.9, 0.005
RUNS = (4, 5, 6, 10, 25)
RESAMPLES = 1_000


def percentiles(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
  """Return the usual percentile intervals of the slope of `y` over `x`."""
  slope, level = np.polyfit(x, y, 1)
  line = level + slope * x
  which = rng.integers(len(x), size=(RESAMPLES, len(x)))
  which = which[np.ptp(which, axis=1) > 0]
  drawn = {'rows': (x[which], y[which]), 'residuals': (np.broadcast_to(x, which.shape), line + (y - line)[which])}
  out = {}
  for name, (xs, ys) in drawn.items():
    centered = xs - xs.mean(axis=1, keepdims=True)
    slopes = (centered * ys).sum(axis=1) / (centered**2).sum(axis=1)
    low, high = np.quantile(slopes, [0.025, 0.975])
    out[f'percentiles of {name}'] = (float(low), float(high))
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--trials', type=int, default=400)
  trials = parser.parse_args().trials
  rows, coverage = [], dict[str, Any]()
  for outliers in (False, True):
    for n in RUNS:
      covered: dict[str, int] = {}
      for trial in range(trials):
        rng = np.random.default_rng([outliers, n, trial])
        x = np.geomspace(5e7, 1e9, n)
        noise = rng.normal(0, NOISE, n) * (np.where(rng.random(n) < 0.1, 8, 1) if outliers else 1)
        loss = BETA * x**ALPHA * np.exp(noise)
        law = fit.fit_power_law(x, loss, seed=trial)
        for name, (low, high) in {'fit': (law.low, law.high), **percentiles(np.log(x), np.log(loss), rng)}.items():
          covered[name] = covered.get(name, 0) + (low <= ALPHA <= high)
      kind = 'a tenth outliers' if outliers else 'normal'
      rows.append((kind, str(n), *(f'{100 * count / trials:.1f}' for count in covered.values())))
      coverage |= {f'{kind} {n} {name}': count / trials for name, count in covered.items()}
  print(timing.table(('noise', 'runs', 'fit, %', 'percentiles of rows, %', 'percentiles of residuals, %'), rows))
  timing.report(**{name.replace(' ', '_'): value for name, value in coverage.items()})


if __name__ == '__main__':
  main()
