"""Power laws of loss: robust fits in logarithms, with intervals that hold for a handful of runs.

  pure        L = beta * X^alpha           (equations 9 and 10 of the paper; X is parameters or FLOPs)
  floored     L = E + beta * X^alpha
  joint       L = E + A * N^-a + B * D^-b

All are fitted with Huber's loss on residuals of log L, so that one bad run does not carry the line. The interval of an exponent is
what two hold together: Student's t about the least-squares line, exact for normal noise, and a studentised bootstrap of the robust
one. Percentiles of a bootstrap, the usual choice, hold the truth in 80 to 90 of 100 cases with five runs, not in 95
(`benchmarks/intervals.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from polar_jax.types import UserError

LEVEL = 0.95
_HUBER = 1.345  # standard deviations beyond which a residual counts linearly: 95% as efficient as least squares on normal residuals
_NOISE_FLOOR = 1e-12  # of log L: what rounding leaves of data without noise
_RESAMPLES = 2_000
_STARTS = 6


class FitError(UserError):
  """Rows through which no law can be drawn."""


@dataclasses.dataclass(frozen=True)
class PowerFit:
  """L = beta * X^alpha.

  Attributes:
    low, high: 95% interval of alpha.
    r2: of log L.
    noise: standard deviation of log L about the line.
    residuals: log L minus the line, a row each.
    log_x: the rows' log X.
  """

  alpha: float
  beta: float
  low: float
  high: float
  r2: float
  n: int
  noise: float
  residuals: tuple[float, ...]
  log_x: tuple[float, ...]

  def __call__(self, x: np.ndarray | float) -> np.ndarray:
    """The law's loss at `x`."""
    return np.exp(np.log(self.beta) + self.alpha * np.log(x))

  def predict(self, x: float) -> tuple[float, float, float]:
    """(loss, low, high) of one more run at `x`: its own noise and the line's uncertainty, by Student's t."""
    log_x = np.asarray(self.log_x)
    centre, spread = log_x.mean(), np.sum((log_x - log_x.mean()) ** 2)
    error = self.noise * np.sqrt(1 + 1 / self.n + (np.log(x) - centre) ** 2 / spread)
    reach = np.exp(stats.t.ppf((1 + LEVEL) / 2, self.n - 2) * error)
    loss = float(self(x))
    return loss, float(loss / reach), float(loss * reach)


@dataclasses.dataclass(frozen=True)
class FlooredFit:
  """L = irreducible + beta * X^alpha. It has one parameter more than `PowerFit`, and needs far more runs to be worth anything."""

  alpha: float
  beta: float
  irreducible: float
  r2: float
  n: int


@dataclasses.dataclass(frozen=True)
class JointFit:
  """L = irreducible + a * N^-alpha + b * D^-beta, N parameters and D tokens."""

  irreducible: float
  a: float
  alpha: float
  b: float
  beta: float
  r2: float
  n: int

  def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
    """The law's loss."""
    return self.irreducible + self.a * np.power(parameters, -self.alpha) + self.b * np.power(tokens, -self.beta)


def fit_power_law(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, seed: int = 0) -> PowerFit:
  """The pure law through (x, loss), with its interval.

  Args:
    x: positive, at least three different values.
    loss: positive, in nats.

  Raises:
    FitError: no law can be drawn through the rows, with the reason.
  """
  log_x, log_loss = _checked(x, loss, least=3)
  n = len(log_x)
  alpha, level, error, residuals = (a[0] for a in _lines(log_x, log_loss[None]))
  plain = stats.linregress(log_x, log_loss)
  reach = stats.t.ppf((1 + LEVEL) / 2, n - 2) * max(plain.stderr, _NOISE_FLOOR)
  low, high = _bootstrap_t(log_x, residuals, alpha, error, seed)
  return PowerFit(
    alpha=float(alpha),
    beta=float(np.exp(level - alpha * log_x.mean())),
    low=float(min(low, plain.slope - reach)),
    high=float(max(high, plain.slope + reach)),
    r2=_r2(log_loss, residuals),
    n=n,
    noise=float(error * np.sqrt(np.sum((log_x - log_x.mean()) ** 2))),
    residuals=tuple(residuals.tolist()),
    log_x=tuple(log_x.tolist()),
  )


def fit_floored(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray) -> FlooredFit:
  """The law with an irreducible loss.

  Raises:
    FitError: as `fit_power_law`, and below four different values of `x`.
  """
  log_x, log_loss = _checked(x, loss, least=4)
  centre = log_x.mean()
  p, residuals = _sum_of_powers((log_x - centre)[:, None], log_loss)
  return FlooredFit(
    alpha=float(-p[2]),
    beta=float(np.exp(p[1] + p[2] * centre)),
    irreducible=float(np.exp(p[0])),
    r2=_r2(log_loss, residuals),
    n=len(log_x),
  )


def fit_joint(
  parameters: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray
) -> JointFit:
  """The law in parameters and tokens (the form of Hoffmann et al. 2022, approach 3).

  Raises:
    FitError: as `fit_power_law`; fewer than three sizes or token counts, or fewer than six rows.
  """
  log_n, log_loss = _checked(parameters, loss, least=3, what='parameters')
  log_d, _ = _checked(tokens, loss, least=3, what='tokens')
  if len(log_loss) < 6:
    raise FitError(f'{len(log_loss)} rows: a law in parameters and tokens has five numbers, and needs at least six rows')
  p, residuals = _sum_of_powers(np.stack([log_n - log_n.mean(), log_d - log_d.mean()], axis=1), log_loss)
  floor, level_n, alpha, level_d, beta = p
  return JointFit(
    irreducible=float(np.exp(floor)),
    a=float(np.exp(level_n + alpha * log_n.mean())),
    alpha=float(alpha),
    b=float(np.exp(level_d + beta * log_d.mean())),
    beta=float(beta),
    r2=_r2(log_loss, residuals),
    n=len(log_loss),
  )


def _sum_of_powers(centred_nK: np.ndarray, log_loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """L = E + sum over k of A_k * X_k^-a_k: (log E, log A_0, a_0, log A_1, a_1, ...), and the residuals of log L.

  Once the exponents are chosen the law is linear in the rest. So the starts are the best of a grid of exponents, each with the best
  non-negative rest, and Huber's loss is minimised from there.

  Args:
    centred_nK: log X minus its mean, a column each.
  """
  n, powers = centred_nK.shape
  ones, scale = np.ones(n), np.exp(-log_loss)  # relative errors count

  def start(exponents: tuple[float, ...]) -> tuple[float, np.ndarray]:
    columns = np.column_stack([ones, np.exp(-centred_nK * exponents)])
    rest, error = optimize.nnls(columns * scale[:, None], ones)
    logs = np.log(np.maximum(rest, 1e-8 / scale.mean()))
    return error, np.concatenate([logs[:1], *([level, a] for level, a in zip(logs[1:], exponents, strict=True))])

  def parts(p: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(n, p[0]), p[1::2] - p[2::2] * centred_nK])

  def residuals(p: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(parts(p), axis=1) - log_loss

  def jacobian(p: np.ndarray) -> np.ndarray:
    each = parts(p)
    share = np.exp(each - np.logaddexp.reduce(each, axis=1, keepdims=True))
    by_power = np.stack([share[:, 1:], -share[:, 1:] * centred_nK], axis=2).reshape(n, 2 * powers)
    return np.column_stack([share[:, 0], by_power])

  grid = itertools.product(np.geomspace(0.01, 2.0, 30 if powers == 1 else 12), repeat=powers)
  starts = sorted((start(exponents) for exponents in grid), key=lambda s: s[0])[:_STARTS]
  spread = float(np.median(np.abs(residuals(starts[0][1]))))
  cut = max(_HUBER * spread / float(stats.norm.ppf(0.75)), 1e-9)
  found = [optimize.least_squares(residuals, p, jacobian, loss='huber', f_scale=cut, x_scale='jac', max_nfev=500) for _, p in starts]
  best = min(found, key=lambda f: float(f.cost)).x
  return best, -residuals(best)


def lower_envelope(curve: Sequence[float] | np.ndarray, x: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """Which rows no other curve undercuts at the same `x`: bool (rows,).

  A curve is the rows of one size. Between its rows it is a line in logarithms; after the last it keeps its loss, since whoever has
  more to spend can stop there; before the first it says nothing. A single row is no curve.
  """
  curve, log_x, log_loss = np.asarray(curve), np.log(np.asarray(x, np.float64)), np.log(np.asarray(loss, np.float64))
  keep = np.ones(len(curve), bool)
  for name in np.unique(curve):
    own, others = curve == name, curve != name
    order = np.argsort(log_x[own], kind='stable')
    at, height = log_x[own][order], log_loss[own][order]
    inside = others & (log_x >= at[0]) & (len(at) > 1)
    keep[inside] &= log_loss[inside] <= np.interp(log_x[inside], at, height)
  return keep


def _checked(
  x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, least: int, what: str = 'x'
) -> tuple[np.ndarray, np.ndarray]:
  """Logarithms of both, once they are known to have any."""
  x, loss = np.asarray(x, np.float64), np.asarray(loss, np.float64)
  if x.shape != loss.shape or x.ndim != 1:
    raise FitError(f'{what} {x.shape} and loss {loss.shape} must be two lists of one length')
  for name, values in ((what, x), ('loss', loss)):
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
      raise FitError(f'{name} must be positive and finite: row {bad[0]} has {values[bad[0]]} ({len(bad)} such rows)')
  distinct = len(np.unique(x))
  if distinct < least:
    raise FitError(f'{distinct} different values of {what}: this law needs at least {least}')
  return np.log(x), np.log(loss)


def _lines(log_x: np.ndarray, y_Bn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Huber's line through each row of `y_Bn`: (slope, height at the mean of log_x, standard error of the slope, residuals (B, n)).

  By reweighting, from the least-squares line; the scale that tells outliers from the rest is the median residual's, anew every time.
  """
  n, centred = len(log_x), log_x - log_x.mean()

  def solve(w_Bn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = w_Bn.sum(axis=1)
    mx, my = (w_Bn * centred).sum(axis=1) / total, (w_Bn * y_Bn).sum(axis=1) / total
    dx_Bn = centred - mx[:, None]
    slope = (w_Bn * dx_Bn * (y_Bn - my[:, None])).sum(axis=1) / (w_Bn * dx_Bn**2).sum(axis=1)
    return slope, my - slope * mx

  def residuals_of(slope: np.ndarray, level: np.ndarray) -> np.ndarray:
    return y_Bn - level[:, None] - slope[:, None] * centred

  slope, level = solve(np.ones(y_Bn.shape))
  r_Bn = residuals_of(slope, level)
  to_cut = _HUBER / stats.norm.ppf(0.75) * np.sqrt(n / (n - 2))
  for _ in range(20):
    cut = np.maximum(to_cut * np.median(np.abs(r_Bn), axis=1, keepdims=True), _NOISE_FLOOR)
    slope, level = solve(np.minimum(1.0, cut / np.maximum(np.abs(r_Bn), 1e-300)))
    r_Bn = residuals_of(slope, level)
  inside = np.maximum((np.abs(r_Bn) <= cut).sum(axis=1), 1)
  variance = (np.clip(r_Bn, -cut, cut) ** 2).sum(axis=1) * n**2 / (n - 2) / inside**2
  error = np.sqrt(np.maximum(variance, _NOISE_FLOOR**2) / (centred**2).sum())
  return slope, level, error, r_Bn


def _bootstrap_t(log_x: np.ndarray, residuals: np.ndarray, alpha: float, error: float, seed: int) -> tuple[float, float]:
  """Interval of the slope: lines through resampled residuals, each judged by its own standard error."""
  n, centred = len(log_x), log_x - log_x.mean()
  leverage = 1 / n + centred**2 / (centred**2).sum()
  whole = residuals / np.sqrt(np.maximum(1 - leverage, 0.05))  # a row with a lever hides part of its noise
  drawn_Bn = (whole - whole.mean())[np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))]
  slope, _, own, _ = _lines(log_x, alpha * centred + drawn_Bn)
  real = own > error * 1e-3  # the same residual n times is a line without error
  t = (slope[real] - alpha) / own[real]
  if len(t) < _RESAMPLES // 10:
    return alpha, alpha
  low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return alpha - high * error, alpha - low * error


def _r2(log_loss: np.ndarray, residuals: np.ndarray) -> float:
  total = float(np.sum((log_loss - log_loss.mean()) ** 2))
  return 1.0 - float(np.sum(residuals**2)) / total if total > 0 else 0.0
