"""How often the 95% interval of an exponent holds the true one, by the way it is made and the number of runs.

    python benchmarks/intervals.py

Losses on a known power law with noise: normal, or normal of which a tenth has eight times the deviation. Beside the interval of
`polar_jax.scaling.fit` stand percentiles of a bootstrap of the rows, and of one of the residuals of the least-squares line. The last line
is a JSON object. Two and a half minutes.
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
  """Intervals of the slope of `y` over `x` that most people would draw."""
  slope, level = np.polyfit(x, y, 1)
  line = level + slope * x
  which = rng.integers(len(x), size=(RESAMPLES, len(x)))
  which = which[np.ptp(which, axis=1) > 0]
  drawn = {'rows': (x[which], y[which]), 'residuals': (np.broadcast_to(x, which.shape), line + (y - line)[which])}
  out = {}
  for name, (xs, ys) in drawn.items():
    centred = xs - xs.mean(axis=1, keepdims=True)
    slopes = (centred * ys).sum(axis=1) / (centred**2).sum(axis=1)
    low, high = np.quantile(slopes, [0.025, 0.975])
    out[f'percentiles of {name}'] = (float(low), float(high))
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--trials', type=int, default=400)
  trials = parser.parse_args().trials
  rows, figures = [], dict[str, Any]()
  for outliers in (False, True):
    for n in RUNS:
      held: dict[str, int] = {}
      for trial in range(trials):
        rng = np.random.default_rng([outliers, n, trial])
        x = np.geomspace(5e7, 1e9, n)
        noise = rng.normal(0, NOISE, n) * (np.where(rng.random(n) < 0.1, 8, 1) if outliers else 1)
        loss = BETA * x**ALPHA * np.exp(noise)
        found = fit.fit_power_law(x, loss, seed=trial)
        for name, (low, high) in {'fit': (found.low, found.high), **percentiles(np.log(x), np.log(loss), rng)}.items():
          held[name] = held.get(name, 0) + (low <= ALPHA <= high)
      kind = 'a tenth outliers' if outliers else 'normal'
      rows.append((kind, str(n), *(f'{100 * count / trials:.1f}' for count in held.values())))
      figures |= {f'{kind} {n} {name}': count / trials for name, count in held.items()}
  print(timing.table(('noise', 'runs', 'fit, %', 'percentiles of rows, %', 'percentiles of residuals, %'), rows))
  timing.report(**{name.replace(' ', '_'): value for name, value in figures.items()})


if __name__ == '__main__':
  main()
