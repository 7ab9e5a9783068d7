"""Coverage of 95% intervals of a scaling exponent, by method and number of runs, and of those of one more run.

    python benchmarks/intervals.py
    python benchmarks/intervals.py --trials 4000 --runs 5 8 12 --noise normal

Losses follow a known power law with noise: normal, or normal with eight times the deviation for a tenth of the runs. Compares the
interval of `polar_jax.scaling.fit` with the percentiles of a bootstrap of the runs, and of one of the residuals of the least-squares
line. The run that is predicted has a larger size, half the range of the others beyond them. Takes two and a half minutes. The last line is
a JSON object.
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
OUTLIERS = 'a tenth outliers'
KINDS = ('normal', OUTLIERS)


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
  parser.add_argument('--runs', type=int, nargs='+', default=RUNS)
  parser.add_argument('--noise', nargs='+', choices=KINDS, default=KINDS)
  args = parser.parse_args()
  rows, coverage = [], dict[str, Any]()
  for kind in args.noise:
    for n in args.runs:
      covered: dict[str, int] = {}
      log_x = np.linspace(np.log(5e7), np.log(1e9), n)
      log_x = np.append(log_x, 1.5 * log_x[-1] - 0.5 * log_x[0])
      for trial in range(args.trials):
        rng = np.random.default_rng([KINDS.index(kind), n, trial])
        noise = rng.normal(0, NOISE, n + 1) * (np.where(rng.random(n + 1) < 0.1, 8, 1) if kind == OUTLIERS else 1)
        x, loss = np.exp(log_x), np.exp(np.log(BETA) + ALPHA * log_x + noise)
        law = fit.fit_power_law(x[:-1], loss[:-1], seed=trial)
        held = {'fit': law.low <= ALPHA <= law.high}
        held |= {name: low <= ALPHA <= high for name, (low, high) in percentiles(log_x[:-1], np.log(loss[:-1]), rng).items()}
        _, low, high = law.predict(x[-1])
        held['one more run'] = bool(low <= loss[-1] <= high)
        covered = {name: covered.get(name, 0) + holds for name, holds in held.items()}
      rows.append((kind, str(n), *(f'{100 * count / args.trials:.1f}' for count in covered.values())))
      coverage |= {f'{kind} {n} {name}': count / args.trials for name, count in covered.items()}
  header = ('noise', 'runs', 'fit, %', 'percentiles of rows, %', 'percentiles of residuals, %', 'one more run, %')
  print(timing.table(header, rows))
  timing.report(**{name.replace(' ', '_'): value for name, value in coverage.items()})


if __name__ == '__main__':
  main()
