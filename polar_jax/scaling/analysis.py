"""All scaling laws that the results of a sweep determine, as the plain numbers of `fit.json` and of the report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polar_jax.scaling import fit, laws
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results

_FOR_A_FLOOR = 4  # sizes that determine a law with a floor
_FORMS = {'power': 'pure law', 'floored': 'law with a floor', 'joint': 'joint law of parameters and tokens'}
FEW_SIZES = 5  # with fewer sizes a fit demonstrates the method, not a law


def analyze(rows: Results, seed: int = 0) -> dict[str, Any]:
  """Fit all laws that the runs determine.

  Args:
    rows: the runs.
    seed: of the bootstrap.

  Returns:
    Always `N` and `C`: {alpha, beta, r2, low, high, n, noise, held_out, ...}. With enough runs also `floored` (N and, with enough of
    them, C: {alpha, beta, irreducible, r2, n, held_out}), `joint`, `forms` (how well each form predicts further sizes), `learning_rate`
    and `batch`; `left_out` has the reason for each one that is missing. `held_out` compares the largest size with its prediction from
    all others.

  Raises:
    FitError: the runs do not determine L(N) and L(C).
  """
  longest, envelope = rows.longest(), rows.envelope()
  by_size = _power_law(longest, longest.parameters, seed, 'parameters')
  by_flops = _power_law(envelope, envelope.flops, seed, 'flops')
  power = lambda x, loss, at: fit.fit_power_law(x, loss, seed).predict(at)
  out: dict[str, Any] = {
    'N': by_size | {'held_out': _held_out(rows, 'N', power)},
    'C': by_flops | {'held_out': _held_out(rows, 'C', power)},
    'rows': len(rows),
    'sizes': len(longest),
  }
  if forms := _forms(rows):
    out['forms'] = forms
  best, left_out = rows.best(), {}
  optional = {
    'floored': lambda: _floored(rows),
    'joint': lambda: dataclasses.asdict(fit.fit_joint(best.parameters, best.tokens, best.loss)),
    'learning_rate': lambda: _tuned(rows, 'learning_rate', degree=4),
    'batch': lambda: _tuned(rows, 'batch', degree=2),
  }
  for name, make in optional.items():
    try:
      out[name] = make()
    except FitError as error:
      left_out[name] = str(error)
  return out | {'left_out': left_out}


# Titles of the optional fits in `describe`.
_TITLES = {
  'floored': 'L = E + beta N^alpha',
  'joint': 'L = E + A/N^a + B/D^b',
  'learning_rate': 'the optimal learning rate',
  'batch': 'the optimal batch size',
}


def describe(analysis: dict[str, Any]) -> list[str]:
  """Return the result of `analyze` as lines of text."""
  lines = []
  for name, meaning in (('N', 'parameters, longest run of each size'), ('C', 'FLOPs, lower envelope')):
    law = analysis[name]
    lines.append(
      f'fit: L({name}) = {law["beta"]:.4g} * {name}^{law["alpha"]:.5f}, 95% interval [{law["low"]:.5f}, {law["high"]:.5f}], '
      f'R2 {law["r2"]:.4f}, n = {law["n"]} ({meaning})'
    )
    lines += _describe_held_out(f'L({name})', law)
  for name, law in analysis.get('floored', {}).items():
    lines.append(
      f'fit: with a floor, L({name}) = {law["irreducible"]:.4g} + {law["beta"]:.4g} * {name}^{law["alpha"]:.5f}, R2 {law["r2"]:.4f}, '
      f'n = {law["n"]}'
    )
    lines += _describe_held_out(f'L({name}) with a floor', law)
  if forms := analysis.get('forms'):
    lines.append(f'fit: {compare_forms(forms)}')
  if analysis['sizes'] < FEW_SIZES:
    lines.append(f'fit: {analysis["sizes"]} sizes prove nothing: this demonstrates the method, not a law')
  lines += [f'fit: skipped {_TITLES[name]}: {reason}' for name, reason in analysis['left_out'].items()]
  return lines


def _describe_held_out(name: str, law: dict[str, Any]) -> list[str]:
  held_out = law['held_out']
  if not held_out:
    return []
  return [
    f'fit: {name}, fitted without the largest size, predicts {held_out["predicted"]:.4f} [{held_out["low"]:.4f}, {held_out["high"]:.4f}] '
    f'for it; measured {held_out["loss"]:.4f}, {"within" if held_out["within"] else "NOT within"} the interval'
  ]


def compare_forms(forms: dict[str, Any]) -> str:
  """Return a sentence on `forms` of `analyze`."""
  errors = ', '.join(f'{_FORMS[name]} {100 * form["error"]:.1f}%' for name, form in forms.items())
  n = next(iter(forms.values()))['n']
  which = 'the largest size' if n == 1 else f'each of the {n} largest sizes'
  return f'{which}, predicted from all that are smaller: mean error of the loss {errors}'


def _forms(rows: Results) -> dict[str, Any]:
  """Return how well each form of the law predicts a size from the smaller ones, which is not a question of how well it fits.

  Returns:
    Form -> {error: mean of |log(predicted / measured)|, n, predicted: one for each size, measured}, for sizes that have at least four
    smaller ones. Forms that some of the fits do not determine are left out.
  """
  longest = rows.longest()
  found: dict[str, list[float]] = {name: [] for name in _FORMS}
  targets = range(_FOR_A_FLOOR, len(longest))
  for k in targets:
    smaller = rows.rows(np.flatnonzero(rows.parameters < longest.parameters[k]))
    for name, predicted in found.items():
      with contextlib.suppress(FitError):
        predicted.append(_predict(name, smaller, float(longest.parameters[k]), float(longest.tokens[k])))
  measured = longest.loss[_FOR_A_FLOOR:]
  return {
    name: {'error': float(np.abs(np.log(values / measured)).mean()), 'n': len(values), 'predicted': values, 'measured': measured.tolist()}
    for name, values in found.items()
    if values and len(values) == len(targets)
  }


def _predict(form: str, rows: Results, parameters: float, tokens: float) -> float:
  longest, best = rows.longest(), rows.best()
  match form:
    case 'power':
      return fit.fit_power_law(longest.parameters, longest.loss).predict(parameters)[0]
    case 'floored':
      return float(fit.fit_floored(longest.parameters, longest.loss)(parameters))
    case _:
      return float(fit.fit_joint(best.parameters, best.tokens, best.loss)(parameters, tokens))


def _power_law(rows: Results, x: np.ndarray, seed: int, name: str) -> dict[str, Any]:
  try:
    law = fit.fit_power_law(x, rows.loss, seed)
  except FitError as error:
    raise FitError(f'{name}: {error}') from None
  numbers = {key: value for key, value in dataclasses.asdict(law).items() if key not in ('log_x', 'residuals')}
  return numbers | {'residuals': list(law.residuals), 'x': x.tolist(), 'loss': rows.loss.tolist()}


def _floored(rows: Results) -> dict[str, Any]:
  """Return the laws with a floor: that of parameters, and that of FLOPs if the envelope determines one."""
  longest, envelope = rows.longest(), rows.envelope()
  law = lambda x, loss, name: dataclasses.asdict(fit.fit_floored(x, loss)) | {'held_out': _held_out(rows, name, fit.predict_floored)}
  out = {'N': law(longest.parameters, longest.loss, 'N')}
  with contextlib.suppress(FitError):
    out['C'] = law(envelope.flops, envelope.loss, 'C')
  return out


def _held_out(
  rows: Results,
  law: str,
  predict: Callable[[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray, float], tuple[float, float, float]],
) -> dict[str, Any] | None:
  """Compare the largest size with its prediction from all others; None if they are too few.

  Args:
    rows: the runs.
    law: 'N' or 'C'.
    predict: (X, losses, X of the largest) -> (loss, low, high).
  """
  largest = rows.parameters.max()
  others = rows.rows(np.flatnonzero(rows.parameters < largest))
  if len(np.unique(others.parameters)) < 3:
    return None
  own = rows.rows(np.flatnonzero(rows.parameters == largest)).longest()
  source = others.longest() if law == 'N' else others.envelope()
  column = lambda table: table.parameters if law == 'N' else table.flops
  x, loss = float(column(own)[0]), float(own.loss[0])
  try:
    predicted, low, high = predict(column(source), source.loss, x)
  except FitError:
    return None
  return {'x': x, 'loss': loss, 'predicted': predicted, 'low': low, 'high': high, 'within': bool(low <= loss <= high)}


def _longest_sweep(rows: Results, selected: np.ndarray, name: str) -> tuple[list[float], list[float]]:
  """Return the values of `name`, and the lowest loss at each, in the longest sweep of it with all else equal.

  Args:
    rows: all runs.
    selected: bool (rows,), the runs of one size and number of tokens.
    name: 'learning_rate' or 'batch'. Of two sweeps of one length the one with the lower loss counts.
  """
  values, other = getattr(rows, name), getattr(rows, {'learning_rate': 'batch', 'batch': 'learning_rate'}[name])
  sweeps: list[tuple[list[float], list[float]]] = []
  for same in [selected] if other is None else [selected & (other == value) for value in np.unique(other[selected])]:
    swept = sorted(set(values[same].tolist()))
    sweeps.append((swept, [float(rows.loss[same & (values == value)].min()) for value in swept]))
  return max(sweeps, key=lambda sweep: (len(sweep[0]), -min(sweep[1])))


def _tuned(rows: Results, name: str, degree: int) -> dict[str, Any]:
  """Return the optima of a swept setting at each size and number of tokens, and the law that they follow if they determine one."""
  values = getattr(rows, name)
  if values is None:
    raise FitError(f'the file has no column {name}')
  optima = []
  for size, tokens in sorted(set(zip(rows.parameters.tolist(), rows.tokens.tolist(), strict=True))):
    swept, lowest = _longest_sweep(rows, (rows.parameters == size) & (rows.tokens == tokens), name)
    if len(swept) > degree:
      best = dataclasses.asdict(laws.optimum(swept, lowest, degree))
      optima.append({'parameters': size, 'tokens': tokens, **best, 'swept': swept, 'losses': lowest})
  if not optima:
    raise FitError(f'needs {degree + 1} values of {name} at one size and number of tokens')
  inside = [o for o in optima if not o['at_edge']]
  out: dict[str, Any] = {'optima': optima}
  try:
    quantities = {key: [o[key] for o in inside] for key in ('parameters', 'tokens')}
    law = dataclasses.asdict(laws.fit_product_law(quantities, [o['value'] for o in inside]))
    out['law'] = law if np.isfinite([*law['low'].values()]).all() else {k: v for k, v in law.items() if k not in ('low', 'high')}
  except FitError as error:
    out['no_law'] = str(error)
  return out
