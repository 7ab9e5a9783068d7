"""The fit stage: laws of loss from the rows of a sweep, into fit.json, a figure and the report."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from polar_jax.config import ConfigError
from polar_jax.report import plots, scaling_plots
from polar_jax.report.scaling import FEW, FIGURE
from polar_jax.scaling import advice, fit, laws, results, sweep
from polar_jax.scaling.fit import FitError, PowerFit
from polar_jax.scaling.results import Results
from polar_jax.stages.context import Context

FIT = 'fit.json'


def run(context: Context) -> dict[str, Any]:
  """Fits what `fit.input` holds. Returns the section `scaling` of the report, which is also `fit.json`.

  Raises:
    UserError: no file, or rows through which no law can be drawn, with the reason.
  """
  given = context.config.fit.input
  path = pathlib.Path(given).expanduser() if given else context.workdir / sweep.RESULTS
  if not given and not path.exists():
    raise ConfigError(f'fit.input: name a CSV file with the columns {", ".join(results.NEEDED)}; the sweep stage would write {path}')
  rows = results.read(path)
  try:
    found = study(rows, context.config.seed)
    advised = advice.advise(rows, found, context.config.fit, context.config.seed) if context.config.fit.flops else None
  except FitError as error:
    raise FitError(f'{path}: {error}') from None
  if advised:
    found['advice'] = dataclasses.asdict(advised)
  for line in describe(found) + (advice.describe(advised) if advised else []):
    context.log(line)
  if jax.process_index() == 0:
    context.workdir.mkdir(parents=True, exist_ok=True)
    (context.workdir / FIT).write_text(json.dumps(found, indent=2, allow_nan=False) + '\n')
    plots.save(scaling_plots.laws(rows, found), context.workdir / FIGURE)
  return {'scaling': found}


def study(rows: Results, seed: int = 0) -> dict[str, Any]:
  """All laws that the rows allow, as plain numbers.

  `N` and `C` are there always: {alpha, beta, r2, low, high, n, noise, held_out}. `floored`, `joint`, `learning_rate` and `batch` where
  there are rows enough; `left_out` says why one is not there.
  """
  longest, envelope = rows.longest(), rows.envelope()
  by_size = _law(longest, longest.parameters, seed, 'parameters')
  by_flops = _law(envelope, envelope.flops, seed, 'flops')
  out: dict[str, Any] = {
    'N': by_size | {'held_out': _held_out(rows, 'N', seed)},
    'C': by_flops | {'held_out': _held_out(rows, 'C', seed)},
    'rows': len(rows),
    'sizes': len(longest),
  }
  best, left_out = rows.best(), {}
  optional = {
    'floored': lambda: {'N': _plain(fit.fit_floored(longest.parameters, longest.loss))},
    'joint': lambda: _plain(fit.fit_joint(best.parameters, best.tokens, best.loss)),
    'learning_rate': lambda: _tuned(rows, 'learning_rate', degree=4),
    'batch': lambda: _tuned(rows, 'batch', degree=2),
  }
  for name, make in optional.items():
    try:
      out[name] = make()
    except FitError as error:
      left_out[name] = str(error)
  return out | {'left_out': left_out}


def describe(found: dict[str, Any]) -> list[str]:
  """What was found, in sentences."""
  lines = []
  for name, meaning in (('N', 'parameters, longest run of each size'), ('C', 'FLOPs, lower envelope')):
    law = found[name]
    lines.append(
      f'fit: L({name}) = {law["beta"]:.4g} * {name}^{law["alpha"]:.5f}, 95% interval [{law["low"]:.5f}, {law["high"]:.5f}], '
      f'R2 {law["r2"]:.4f}, n = {law["n"]} ({meaning})'
    )
    held = law['held_out']
    if held:
      lines.append(
        f'fit: L({name}) without the largest size predicts {held["predicted"]:.4f} [{held["low"]:.4f}, {held["high"]:.4f}] '
        f'for it; it has {held["loss"]:.4f}, {"within" if held["within"] else "NOT within"}'
      )
  if found['sizes'] < FEW:
    lines.append(f'fit: {found["sizes"]} sizes prove nothing: this shows the machinery, not a law')
  lines += [f'fit: no law of {name}: {reason}' for name, reason in found['left_out'].items()]
  return lines


def _law(rows: Results, x: np.ndarray, seed: int, what: str) -> dict[str, Any]:
  try:
    found = fit.fit_power_law(x, rows.loss, seed)
  except FitError as error:
    raise FitError(f'{what}: {error}') from None
  return _plain(found) | {'x': x.tolist(), 'loss': rows.loss.tolist()}


def _held_out(rows: Results, law: str, seed: int) -> dict[str, Any] | None:
  """What the law of all other sizes says of the largest; None where they are too few for one."""
  largest = rows.parameters.max()
  others = rows.rows(np.flatnonzero(rows.parameters < largest))
  if len(others) == 0 or len(np.unique(others.parameters)) < 3:
    return None
  own = rows.rows(np.flatnonzero(rows.parameters == largest)).longest()
  source = others.longest() if law == 'N' else others.envelope()
  try:
    found: PowerFit = fit.fit_power_law(source.parameters if law == 'N' else source.flops, source.loss, seed)
  except FitError:
    return None
  at, loss = float(own.parameters[0] if law == 'N' else own.flops[0]), float(own.loss[0])
  predicted, low, high = found.predict(at)
  return {'x': at, 'loss': loss, 'predicted': predicted, 'low': low, 'high': high, 'within': bool(low <= loss <= high)}


def _swept(rows: Results, of: np.ndarray, name: str) -> tuple[list[float], list[float]]:
  """(values, lowest loss at each) of the longest sweep of `name` among the runs `of`, all else equal: of two the one that came lower."""
  values, other = getattr(rows, name), getattr(rows, {'learning_rate': 'batch', 'batch': 'learning_rate'}[name])
  found: list[tuple[list[float], list[float]]] = []
  for same in [of] if other is None else [of & (other == value) for value in np.unique(other[of])]:
    swept = sorted(set(values[same].tolist()))
    found.append((swept, [float(rows.loss[same & (values == value)].min()) for value in swept]))
  return max(found, key=lambda sweep: (len(sweep[0]), -min(sweep[1])))


def _tuned(rows: Results, name: str, degree: int) -> dict[str, Any]:
  """The optima of a swept setting at each size and number of tokens, and the law that they follow, if it can be told."""
  values = getattr(rows, name)
  if values is None:
    raise FitError(f'the file has no column {name}')
  optima = []
  for size, tokens in sorted(set(zip(rows.parameters.tolist(), rows.tokens.tolist(), strict=True))):
    swept, lowest = _swept(rows, (rows.parameters == size) & (rows.tokens == tokens), name)
    if len(swept) > degree:
      found = dataclasses.asdict(laws.optimum(swept, lowest, degree))
      optima.append({'parameters': size, 'tokens': tokens, **found, 'swept': swept, 'losses': lowest})
  if not optima:
    raise FitError(f'no size and number of tokens with at least {degree + 1} values of {name}')
  inside = [o for o in optima if not o['at_edge']]
  out: dict[str, Any] = {'optima': optima}
  try:
    quantities = {key: [o[key] for o in inside] for key in ('parameters', 'tokens')}
    law = dataclasses.asdict(laws.fit_product_law(quantities, [o['value'] for o in inside]))
    out['law'] = law if np.isfinite([*law['low'].values()]).all() else {k: v for k, v in law.items() if k not in ('low', 'high')}
  except FitError as error:
    out['no_law'] = str(error)
  return out


def _plain(found: Any) -> dict[str, Any]:
  return {name: value for name, value in dataclasses.asdict(found).items() if name not in ('log_x', 'residuals')} | (
    {'residuals': list(found.residuals)} if isinstance(found, PowerFit) else {}
  )
