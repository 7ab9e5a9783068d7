"""Power laws of the loss: robust fits in log space, with intervals that are valid for a handful of runs.

  pure        L = beta * X^alpha           (equations 9 and 10 of the paper; X is parameters or FLOPs)
  floored     L = E + beta * X^alpha
  joint       L = E + A * N^-a + B * D^-b

All are fitted with Huber's loss on residuals of log L, so that a single bad run has little influence. The interval of an exponent is
the union of two: Student's t about the least-squares line, exact for normal noise, and a studentized bootstrap of the robust line.
The usual percentile bootstrap covers the true value in 80 to 90% of cases with five runs, not in 95% (`benchmarks/intervals.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from polar_jax.types import UserError

LEVEL = 0.95
_HUBER = 1.345  # standard deviations beyond which the loss is linear: 95% as efficient as least squares on normal residuals
_NOISE_FLOOR = 1e-12  # of log L: rounding error of data without noise
_RESAMPLES = 2_000
_STARTS = 6
_SEARCH_ERROR = 1e-6  # of log L, where the search for the law with a floor ends
_FARTHEST = 5.0  # of log L: an interval beyond is as good as none


class FitError(UserError):
  """The runs do not determine the requested law."""


@dataclasses.dataclass(frozen=True)
class PowerFit:
  """L = beta * X^alpha.

  Attributes:
    alpha, beta: of the formula.
    low, high: 95% interval of alpha.
    r2: coefficient of determination of log L.
    n: number of runs.
    noise: standard deviation of log L about the line.
    residuals: log L minus the line, for each run.
    log_x: log X of each run.

  The line is the robust one. The least-squares line follows from it and its residuals, because least squares are linear in log L.
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
    """Return the loss at `x`."""
    return np.exp(np.log(self.beta) + self.alpha * np.log(x))

  def predict(self, x: float) -> tuple[float, float, float]:
    """Return (loss, low, high) of one more run at `x`.

    The loss is that of the robust line. The interval is Student's t about the least-squares line, exact for normal noise, and holds the
    line's uncertainty and the noise of the run. The robust line has no such interval: the scale of its residuals is estimated with fewer
    degrees of freedom than n - 2, and intervals with n - 2 hold 91% at five runs.
    """
    centered, residuals = np.asarray(self.log_x) - np.mean(self.log_x), np.asarray(self.residuals)
    spread, distance = np.sum(centered**2), np.log(x) - np.mean(self.log_x)
    slope = np.sum(centered * residuals) / spread  # of the least-squares line, relative to the robust one
    shift = residuals.mean() + slope * distance
    scale = np.sqrt(np.sum((residuals - residuals.mean() - slope * centered) ** 2) / (self.n - 2))
    error = max(scale, _NOISE_FLOOR) * np.sqrt(1 + 1 / self.n + distance**2 / spread)
    reach = stats.t.ppf((1 + LEVEL) / 2, self.n - 2) * error
    loss = float(self(x))
    # With outliers the two lines may differ by more than that.
    return loss, loss * float(np.exp(min(shift - reach, 0.0))), loss * float(np.exp(max(shift + reach, 0.0)))


@dataclasses.dataclass(frozen=True)
class FlooredFit:
  """L = irreducible + beta * X^alpha. It has one parameter more than `PowerFit` and needs far more runs to be meaningful."""

  alpha: float
  beta: float
  irreducible: float
  r2: float
  n: int

  def __call__(self, x: np.ndarray | float) -> np.ndarray:
    """Return the loss at `x`."""
    return self.irreducible + self.beta * np.power(x, self.alpha)


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
    """Return the loss of a model with so many parameters after so many tokens."""
    return self.irreducible + self.a * np.power(parameters, -self.alpha) + self.b * np.power(tokens, -self.beta)


def fit_power_law(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, seed: int = 0) -> PowerFit:
  """Fit the pure law, with an interval of its exponent.

  Args:
    x: positive, at least three different values.
    loss: positive, in nats.
    seed: of the bootstrap.

  Raises:
    FitError: the runs do not determine the law.
  """
  log_x, log_loss = _log_columns(x, loss, min_distinct=3)
  n = len(log_x)
  alpha, height, error, residuals = (a[0] for a in _robust_lines(log_x, log_loss[None]))
  plain = stats.linregress(log_x, log_loss)
  margin = stats.t.ppf((1 + LEVEL) / 2, n - 2) * max(plain.stderr, _NOISE_FLOOR)
  low, high = _bootstrap_t(log_x, residuals, alpha, error, seed)
  return PowerFit(
    alpha=float(alpha),
    beta=float(np.exp(height - alpha * log_x.mean())),
    low=float(min(low, plain.slope - margin)),
    high=float(max(high, plain.slope + margin)),
    r2=_r2(log_loss, residuals),
    n=n,
    noise=float(error * np.sqrt(np.sum((log_x - log_x.mean()) ** 2))),
    residuals=tuple(residuals.tolist()),
    log_x=tuple(log_x.tolist()),
  )


def fit_floored(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray) -> FlooredFit:
  """Fit the law with an irreducible loss.

  Raises:
    FitError: as `fit_power_law`, and with fewer than four different values of `x`.
  """
  log_x, log_loss = _log_columns(x, loss, min_distinct=4)
  center = log_x.mean()
  p, residuals = _fit_sum_of_powers((log_x - center)[:, None], log_loss)
  return FlooredFit(
    alpha=float(-p[2]),
    beta=float(np.exp(p[1] + p[2] * center)),
    irreducible=float(np.exp(p[0])),
    r2=_r2(log_loss, residuals),
    n=len(log_x),
  )


def predict_floored(x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, at: float) -> tuple[float, float, float]:
  """Return (loss, low, high) of one more run at `at`, by the law with an irreducible loss that is fitted to the runs.

  The loss is that of the robust fit. The interval is by likelihood: it holds every loss that, as one more run, would raise the least sum
  of squared errors of log L by no more than t^2 s^2 (Student's t with n - 3 degrees of freedom, s^2 the mean square of the errors). For a
  law that is linear in its parameters this is the prediction interval of regression. Here it also holds the laws without a floor, and is
  wide above if the runs are compatible with a floor that they have not come near to.

  Args:
    x, loss: as for `fit_floored`, of at least four runs.
    at: where to predict.

  Raises:
    FitError: as `fit_floored`.
  """
  log_x, log_loss = _log_columns(x, loss, min_distinct=4)
  center, free = log_x.mean(), len(log_x) - 3
  more_x = np.append(log_x, np.log(at)) - center

  def squares(centered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    p, residuals = _fit_sum_of_powers(centered[:, None], values, robust=False)
    return p, float(np.sum(residuals**2))

  p, alone = squares(log_x - center, log_loss)
  allowed = stats.t.ppf((1 + LEVEL) / 2, free) ** 2 * max(alone / free, _SEARCH_ERROR**2)
  excess = lambda log_y: squares(more_x, np.append(log_loss, log_y))[1] - alone - allowed
  middle = float(np.logaddexp(p[0], p[1] - p[2] * more_x[-1]))  # of the least squares: one more run there would not raise their sum
  ends = []
  for sign in (-1.0, 1.0):
    reach = 0.02
    while excess(middle + sign * reach) < 0 and reach < _FARTHEST:
      reach *= 2
    ends.append(middle + sign * reach if reach >= _FARTHEST else optimize.brentq(excess, middle, middle + sign * reach, xtol=1e-5))
  loss_there = float(fit_floored(x, loss)(at))
  return loss_there, min(loss_there, float(np.exp(ends[0]))), max(loss_there, float(np.exp(ends[1])))


def fit_joint(
  parameters: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray
) -> JointFit:
  """Fit the law in parameters and tokens (the form of Hoffmann et al. 2022, approach 3).

  Raises:
    FitError: as `fit_power_law`, and with fewer than three sizes, three numbers of tokens or six runs.
  """
  log_n, log_loss = _log_columns(parameters, loss, min_distinct=3, name='parameters')
  log_d, _ = _log_columns(tokens, loss, min_distinct=3, name='tokens')
  if len(log_loss) < 6:
    raise FitError(f'needs at least 6 runs for its five parameters, got {len(log_loss)}')
  p, residuals = _fit_sum_of_powers(np.stack([log_n - log_n.mean(), log_d - log_d.mean()], axis=1), log_loss)
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


def _fit_sum_of_powers(centered_nK: np.ndarray, log_loss: np.ndarray, robust: bool = True) -> tuple[np.ndarray, np.ndarray]:
  """Fit L = E + sum over k of A_k * X_k^-a_k.

  Given the exponents the law is linear in E and A. The loss is therefore minimized from the best points of a grid of exponents,
  each with its best non-negative E and A.

  Args:
    centered_nK: log X minus its mean, one column for each k.
    log_loss: (n,).
    robust: minimize Huber's loss; False: the squared errors of log L.

  Returns:
    ((log E, log A_0, a_0, log A_1, a_1, ...), residuals of log L).
  """
  n, powers = centered_nK.shape
  ones, scale = np.ones(n), np.exp(-log_loss)  # errors are relative

  def start(exponents: tuple[float, ...]) -> tuple[float, np.ndarray]:
    columns = np.column_stack([ones, np.exp(-centered_nK * exponents)])
    coefficients, error = optimize.nnls(columns * scale[:, None], ones)
    logs = np.log(np.maximum(coefficients, 1e-8 / scale.mean()))
    return error, np.concatenate([logs[:1], *([log_a, a] for log_a, a in zip(logs[1:], exponents, strict=True))])

  def log_terms(p: np.ndarray) -> np.ndarray:
    return np.column_stack([np.full(n, p[0]), p[1::2] - p[2::2] * centered_nK])

  def residuals(p: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(log_terms(p), axis=1) - log_loss

  def jacobian(p: np.ndarray) -> np.ndarray:
    terms = log_terms(p)
    share = np.exp(terms - np.logaddexp.reduce(terms, axis=1, keepdims=True))
    by_power = np.stack([share[:, 1:], -share[:, 1:] * centered_nK], axis=2).reshape(n, 2 * powers)
    return np.column_stack([share[:, 0], by_power])

  grid = itertools.product(np.geomspace(0.01, 2.0, 30 if powers == 1 else 12), repeat=powers)
  starts = sorted((start(exponents) for exponents in grid), key=lambda s: s[0])[: _STARTS if robust else 2]
  spread = float(np.median(np.abs(residuals(starts[0][1]))))
  cut = max(_HUBER * spread / float(stats.norm.ppf(0.75)), 1e-9)
  kind = 'huber' if robust else 'linear'
  fits = [optimize.least_squares(residuals, p, jacobian, loss=kind, f_scale=cut, x_scale='jac', max_nfev=500) for _, p in starts]
  best = min(fits, key=lambda f: float(f.cost)).x
  return best, -residuals(best)


def lower_envelope(curve: Sequence[float] | np.ndarray, x: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """Return which rows no other curve undercuts at the same `x`: bool (rows,).

  A curve has the rows of one size. It is piecewise linear in log space between its rows, constant after the last one (a larger budget
  can be left unspent) and undefined before the first one. A size with a single row has no curve.

  Args:
    curve: the size of each row.
    x: FLOPs of each row.
    loss: of each row.
  """
  curve, log_x, log_loss = np.asarray(curve), np.log(np.asarray(x, np.float64)), np.log(np.asarray(loss, np.float64))
  keep = np.ones(len(curve), bool)
  for name in np.unique(curve):
    own, others = curve == name, curve != name
    order = np.argsort(log_x[own], kind='stable')
    curve_x, curve_loss = log_x[own][order], log_loss[own][order]
    covered = others & (log_x >= curve_x[0]) & (len(curve_x) > 1)
    keep[covered] &= log_loss[covered] <= np.interp(log_x[covered], curve_x, curve_loss)
  return keep


def _log_columns(
  x: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, min_distinct: int, name: str = 'x'
) -> tuple[np.ndarray, np.ndarray]:
  """Return the logarithms of two columns after checking them.

  Args:
    x: positive.
    loss: positive.
    min_distinct: how many different values `x` must have.
    name: of `x`, for messages.
  """
  x, loss = np.asarray(x, np.float64), np.asarray(loss, np.float64)
  if x.shape != loss.shape or x.ndim != 1:
    raise FitError(f'{name} {x.shape} and loss {loss.shape} must be lists of the same length')
  for column, values in ((name, x), ('loss', loss)):
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
      raise FitError(f'{column} must be positive and finite: row {bad[0]} has {values[bad[0]]} ({len(bad)} such rows)')
  distinct = len(np.unique(x))
  if distinct < min_distinct:
    raise FitError(f'needs at least {min_distinct} different values of {name}, got {distinct}')
  return np.log(x), np.log(loss)


def _robust_lines(log_x: np.ndarray, y_Bn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Fit a line to each row of `y_Bn` with Huber's loss.

  Iteratively reweighted least squares, starting from the least-squares line. The scale beyond which a residual counts as an outlier is
  that of the median residual, updated in every iteration.

  Returns:
    (slope (B,), height at the mean of log_x (B,), standard error of the slope (B,), residuals (B, n)).
  """
  n, centered = len(log_x), log_x - log_x.mean()

  def solve(w_Bn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = w_Bn.sum(axis=1)
    mx, my = (w_Bn * centered).sum(axis=1) / total, (w_Bn * y_Bn).sum(axis=1) / total
    dx_Bn = centered - mx[:, None]
    slope = (w_Bn * dx_Bn * (y_Bn - my[:, None])).sum(axis=1) / (w_Bn * dx_Bn**2).sum(axis=1)
    return slope, my - slope * mx

  def residuals_of(slope: np.ndarray, height: np.ndarray) -> np.ndarray:
    return y_Bn - height[:, None] - slope[:, None] * centered

  slope, height = solve(np.ones(y_Bn.shape))
  r_Bn = residuals_of(slope, height)
  to_cut = _HUBER / stats.norm.ppf(0.75) * np.sqrt(n / (n - 2))
  for _ in range(20):
    cut = np.maximum(to_cut * np.median(np.abs(r_Bn), axis=1, keepdims=True), _NOISE_FLOOR)
    slope, height = solve(np.minimum(1.0, cut / np.maximum(np.abs(r_Bn), 1e-300)))
    r_Bn = residuals_of(slope, height)
  inside = np.maximum((np.abs(r_Bn) <= cut).sum(axis=1), 1)
  variance = (np.clip(r_Bn, -cut, cut) ** 2).sum(axis=1) * n**2 / (n - 2) / inside**2
  error = np.sqrt(np.maximum(variance, _NOISE_FLOOR**2) / (centered**2).sum())
  return slope, height, error, r_Bn


def _bootstrap_t(log_x: np.ndarray, residuals: np.ndarray, alpha: float, error: float, seed: int) -> tuple[float, float]:
  """Return the studentized bootstrap interval of the slope.

  Args:
    log_x: (n,).
    residuals: of the fitted line, (n,).
    alpha: slope of the fitted line.
    error: standard error of `alpha`.
    seed: of the resampling.
  """
  n, centered = len(log_x), log_x - log_x.mean()
  leverage = 1 / n + centered**2 / (centered**2).sum()
  scaled = residuals / np.sqrt(np.maximum(1 - leverage, 0.05))  # residuals of high-leverage points are too small
  noise_Bn = (scaled - scaled.mean())[np.random.default_rng(seed).integers(n, size=(_RESAMPLES, n))]
  slope, _, errors, _ = _robust_lines(log_x, alpha * centered + noise_Bn)
  valid = errors > error * 1e-3  # n copies of one residual give a line without error
  t = (slope[valid] - alpha) / errors[valid]
  if len(t) < _RESAMPLES // 10:
    return alpha, alpha
  low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return alpha - high * error, alpha - low * error


def _r2(log_loss: np.ndarray, residuals: np.ndarray) -> float:
  total = float(np.sum((log_loss - log_loss.mean()) ** 2))
  return 1.0 - float(np.sum(residuals**2)) / total if total > 0 else 0.0
