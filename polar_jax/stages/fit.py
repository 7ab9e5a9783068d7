"""The fit stage: fits scaling laws to the results of a sweep and writes fit.json, a figure and a section of the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax

from polar_jax.config import ConfigError
from polar_jax.report import plots, scaling_plots
from polar_jax.report.scaling import FIGURE
from polar_jax.runtime.paths import write_atomically
from polar_jax.scaling import advice, analysis, results
from polar_jax.scaling.fit import FitError
from polar_jax.stages.context import Context

FIT = 'fit.json'


def run(context: Context) -> dict[str, Any]:
  """Fit the results of `fit.input`.

  Returns:
    The section `scaling` of the report, which is also the content of `fit.json`.

  Raises:
    FitError: the file does not exist, or its rows do not determine a law.
    ConfigError: no file is named, or `fit.topology` is unknown.
  """
  given = context.config.fit.input
  path = pathlib.Path(given).expanduser() if given else context.workdir / results.TABLE
  if not given and not path.exists():
    raise ConfigError(
      f'fit.input: no file is named, and the sweep stage has not written {path}; '
      f'name a CSV file with the columns {", ".join(results.NEEDED)}, or run the sweep stage first'
    )
  rows = results.read(path)
  try:
    fits = analysis.analyze(rows, context.config.seed)
    advised = advice.advise(rows, fits, context.config.fit, context.config.seed) if context.config.fit.flops else None
  except FitError as error:
    raise FitError(f'{path}: {error}') from None
  if advised:
    fits['advice'] = dataclasses.asdict(advised)
  for line in analysis.describe(fits) + (advice.describe(advised) if advised else []):
    context.log(line)
  if jax.process_index() == 0:
    write_atomically(context.workdir / FIT, json.dumps(fits, indent=2, allow_nan=False) + '\n')
    plots.save(scaling_plots.laws(rows, fits), context.workdir / FIGURE)
  return {'scaling': fits}
