"""Power laws: exact data, noise, outliers, coverage of the intervals, and runs that do not determine a law."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import optimize, stats

from polar_jax.scaling import fit
from polar_jax.scaling.fit import FitError

ALPHA, BETA = -0.0425, 0.9  # the paper's law in parameters


def runs(n: int, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  x = np.geomspace(5e7, 1e9, n)
  return x, BETA * x**ALPHA * np.exp(np.random.default_rng(seed).normal(0, noise, n))


@pytest.mark.parametrize('n', [3, 5, 12])
def test_power_law_is_exact_without_noise(n):
  found = fit.fit_power_law(*runs(n))
  assert found.alpha == pytest.approx(ALPHA, abs=1e-9)
  assert found.beta == pytest.approx(BETA, rel=1e-7)
  assert found.low <= ALPHA <= found.high and found.high - found.low < 1e-6
  assert found.r2 == pytest.approx(1) and found.n == n
  assert found(2e8) == pytest.approx(BETA * 2e8**ALPHA)


def test_power_law_is_close_to_least_squares_without_outliers():
  x, loss = runs(30, 0.01, seed=3)
  slope, level = np.polyfit(np.log(x), np.log(loss), 1)
  found = fit.fit_power_law(x, loss)
  assert found.alpha == pytest.approx(slope, abs=0.15 * (found.high - found.low))
  predicted = np.exp(level) * x**slope
  r2 = 1 - np.sum(np.log(loss / predicted) ** 2) / np.sum((np.log(loss) - np.log(loss).mean()) ** 2)
  assert found.r2 == pytest.approx(r2, abs=0.01)


def test_power_law_minimizes_hubers_loss():
  x, loss = runs(12, 0.01, seed=5)
  loss[3] *= 1.2
  found = fit.fit_power_law(x, loss)
  centered = np.log(x) - np.log(x).mean()
  cut = 1.345 * np.median(np.abs(found.residuals)) / 0.6744897501960817 * np.sqrt(12 / 10)

  def huber(slope: float, level: float) -> float:
    r = np.abs(np.log(loss) - level - slope * centered)
    return float(np.where(r <= cut, r**2 / 2, cut * (r - cut / 2)).sum())

  level = np.log(found.beta) + found.alpha * np.log(x).mean()
  minimum = huber(found.alpha, level)
  for a, b in ((1e-4, 0), (-1e-4, 0), (0, 1e-4), (0, -1e-4), (1e-4, 1e-4), (-1e-4, 1e-4)):
    assert minimum < huber(found.alpha + a, level + b)


def test_one_outlier_has_little_influence():
  x, loss = runs(10, 0.002, seed=1)
  loss[-1] *= 1.3
  plain = np.polyfit(np.log(x), np.log(loss), 1)[0]
  assert abs(fit.fit_power_law(x, loss).alpha - ALPHA) < 0.25 * abs(plain - ALPHA)


@pytest.mark.long
@pytest.mark.parametrize(('n', 'outliers'), [(5, False), (12, True)])
def test_interval_covers_the_exponent_in_95_of_100_trials(n, outliers):
  covered, widths = 0, []
  for trial in range(100):
    rng = np.random.default_rng([7, n, trial])
    x = np.geomspace(5e7, 1e9, n)
    noise = rng.normal(0, 0.005, n) * np.where(rng.random(n) < 0.1, 8, 1) if outliers else rng.normal(0, 0.005, n)
    found = fit.fit_power_law(x, BETA * x**ALPHA * np.exp(noise), seed=trial)
    covered += found.low <= ALPHA <= found.high
    widths.append(found.high - found.low)
  assert covered >= 95
  assert np.median(widths) < 0.02  # so wide an interval that it covers anything would be useless


MEDIAN_OF_NORMAL = stats.norm.ppf(0.75)  # of its absolute value


def robust_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float, np.ndarray]:
  """Return (slope, its standard error, residuals) of one line by Huber's loss: formulas of the docstrings, one line at a time."""
  n, centered, weight = len(x), x - x.mean(), np.ones(len(x))
  for _ in range(21):
    design = np.stack([centered, np.ones(n)], axis=1)
    slope, height = np.linalg.solve(design.T @ (weight[:, None] * design), design.T @ (weight * y))
    residuals = y - height - slope * centered
    if _ < 20:  # the variance uses the cut of the last weights
      cut = max(1.345 * np.median(np.abs(residuals)) / MEDIAN_OF_NORMAL * np.sqrt(n / (n - 2)), 1e-12)
      weight = np.minimum(1, cut / np.maximum(np.abs(residuals), 1e-300))
  inside = max(np.sum(np.abs(residuals) <= cut), 1)
  # Huber's variance: n^2 / (n - 2) sum psi^2 / (sum psi')^2 / Sxx.
  variance = n**2 / (n - 2) * np.sum(np.clip(residuals, -cut, cut) ** 2) / inside**2 / np.sum(centered**2)
  return slope, np.sqrt(variance), residuals


@pytest.mark.parametrize('n', [4, 5, 6, 8])
def test_robust_lines_take_the_steps_of_their_docstring(n):
  """With noise so heavy that twenty steps do not forget where they began."""
  rng = np.random.default_rng(n)
  x, noise_Bn = np.sort(rng.normal(size=n)), rng.standard_t(1, (40, n)) * 0.1
  y_Bn = 2 - 0.3 * x + noise_Bn
  slopes, _, errors, residuals_Bn = fit._robust_lines(x, y_Bn)
  for y, *found in zip(y_Bn, slopes, errors, residuals_Bn, strict=True):
    for got, expected in zip(found, robust_line(x, y), strict=True):
      np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def slow_bootstrap_t(x: np.ndarray, y: np.ndarray, seed: int, resamples: int) -> tuple[float, float]:
  """Return the studentized bootstrap interval of the slope, one resample at a time."""
  n, centered = len(x), x - x.mean()
  slope, error, residuals = robust_line(x, y)
  share = 1 - 1 / n - centered**2 / np.sum(centered**2)
  scaled = residuals / np.sqrt(np.where(share < 0.05, 0.05, share))  # residuals of high leverage are too small
  scaled -= scaled.mean()
  t = []
  for draw in np.random.default_rng(seed).integers(n, size=(resamples, n)):
    resampled, own_error, _ = robust_line(x, slope * centered + scaled[draw])
    if own_error > 1e-3 * error:
      t.append((resampled - slope) / own_error)
  low, high = np.quantile(t, [0.025, 0.975])
  return slope - high * error, slope - low * error


@pytest.mark.long
@pytest.mark.parametrize(('n', 'seed', 'wider'), [(4, 0, 'tt'), (5, 1, 'bt'), (6, 0, 'tb'), (6, 2, 'bb')])
def test_interval_is_the_union_of_students_t_and_a_studentized_bootstrap(n, seed, wider, monkeypatch):
  monkeypatch.setattr(fit, '_RESAMPLES', 500)  # the oracle takes one at a time
  x, loss = runs(n, 0.01, seed)
  loss[1] *= 1.03  # noise is skewed: the two sides of the interval differ
  found = fit.fit_power_law(x, loss, seed=seed)
  plain = stats.linregress(np.log(x), np.log(loss))
  margin = stats.t.ppf(0.975, n - 2) * plain.stderr
  by_t = plain.slope - margin, plain.slope + margin
  by_bootstrap = slow_bootstrap_t(np.log(x), np.log(loss), seed, 500)
  assert found.low == pytest.approx(min(by_t[0], by_bootstrap[0]), rel=1e-6)
  assert found.high == pytest.approx(max(by_t[1], by_bootstrap[1]), rel=1e-6)
  # The cases are such that each of the two methods determines each side at least once.
  assert ('t' if by_t[0] < by_bootstrap[0] else 'b') + ('t' if by_t[1] > by_bootstrap[1] else 'b') == wider


@pytest.mark.parametrize('outlier', [1.0, 1.4])
def test_prediction_interval_is_students_t_about_the_least_squares_line(outlier):
  x, loss = runs(7, 0.01, seed=2)
  loss[-1] *= outlier
  log_x, log_loss, at = np.log(x), np.log(loss), np.log(4e9)
  design = np.stack([np.ones(7), log_x], axis=1)
  coefficients, squares, *_ = np.linalg.lstsq(design, log_loss, rcond=None)
  row = np.array([1.0, at])
  reach = stats.t.ppf(0.975, 5) * np.sqrt(squares[0] / 5 * (1 + row @ np.linalg.inv(design.T @ design) @ row))
  found = fit.fit_power_law(x, loss)
  predicted, low, high = found.predict(4e9)
  assert predicted == pytest.approx(found(4e9))
  assert [low, high] == pytest.approx(np.exp(row @ coefficients + np.array([-reach, reach])).tolist(), rel=1e-6)
  assert low < predicted < high


def test_prediction_interval_holds_the_predicted_loss():
  """Also where an outlier of high leverage pulls the least-squares line away from the robust one."""
  x = np.append(np.geomspace(1e6, 2e6, 40), 1e12)
  loss = BETA * x**ALPHA * np.exp(np.random.default_rng(0).normal(0, 1e-4, 41))
  loss[-1] *= 3
  predicted, low, high = fit.fit_power_law(x, loss).predict(1e13)
  assert low <= predicted <= high


def coverage_of_predictions(n: int, trials: int, seed: int) -> float:
  """Return how often the interval of `predict` holds one more run, twice as far from the center as the last one, with normal noise."""
  log_x = np.linspace(np.log(5e7), np.log(1e9), n)
  at, noise = 1.5 * log_x[-1] - 0.5 * log_x[0], np.random.default_rng([seed, n]).normal(0, 0.005, (trials, n + 1))
  slope, height, _, residuals_Bn = fit._robust_lines(log_x, ALPHA * log_x + noise[:, :n])
  covered = 0
  for i in range(trials):
    beta = np.exp(height[i] - slope[i] * log_x.mean())
    law = fit.PowerFit(slope[i], beta, 0.0, 0.0, 0.0, n, 0.0, tuple(residuals_Bn[i]), tuple(log_x))
    _, low, high = law.predict(np.exp(at))
    covered += low <= np.exp(ALPHA * at + noise[i, n]) <= high
  return covered / trials


@pytest.mark.long
@pytest.mark.parametrize('n', [5, 8, 12])
def test_prediction_interval_covers_one_more_run_in_95_of_100_trials(n):
  """The robust fits of all trials are one call; their intervals of the exponent, which would take minutes, are left out."""
  assert 0.94 <= coverage_of_predictions(n, 6_000, seed=0) <= 0.96


def test_interval_depends_only_on_the_seed():
  x, loss = runs(6, 0.01)
  assert fit.fit_power_law(x, loss, seed=4) == fit.fit_power_law(x, loss, seed=4)


def test_floored_law_recovers_the_floor():
  x = np.geomspace(1e6, 1e12, 14)
  found = fit.fit_floored(x, 0.35 + 12.0 * x**-0.25)
  assert (found.irreducible, found.beta, found.alpha) == (
    pytest.approx(0.35, rel=1e-3),
    pytest.approx(12, rel=1e-2),
    pytest.approx(-0.25, rel=1e-3),
  )
  assert found.r2 > fit.fit_power_law(x, 0.35 + 12.0 * x**-0.25).r2


def test_floored_law_fits_a_pure_law():
  x, loss = runs(10)
  found = fit.fit_floored(x, loss)
  assert found.beta * x**found.alpha + found.irreducible == pytest.approx(loss, rel=1e-4)


def test_prediction_with_a_floor_is_that_of_regression_where_the_law_is_linear():
  """With the exponent known, E + beta z is linear; the interval of a steep law over a wide range comes near to that of log L."""
  x, rng = np.geomspace(1e3, 1e7, 12), np.random.default_rng(0)
  loss = (0.3 + 30 * x**-0.5) * np.exp(rng.normal(0, 0.01, 12))
  predicted, low, high = fit.predict_floored(x, loss, 1e9)  # there only the floor is left
  found = fit.fit_floored(x, loss)
  assert predicted == pytest.approx(found(1e9)) and low < predicted < high
  # Gauss-Newton about the least-squares fit, by numerical derivatives.
  p, _ = optimize.curve_fit(lambda x, e, b, a: np.log(e + b * x**a), x, np.log(loss), p0=(0.3, 30, -0.5))
  f = lambda p, x: np.log(p[0] + p[1] * np.asarray(x) ** p[2])
  columns = np.stack([(f(p + h, x) - f(p - h, x)) / (2 * h.sum()) for h in np.diag(1e-5 * np.abs(p))], axis=1)
  here = np.array([(f(p + h, 1e9) - f(p - h, 1e9)) / (2 * h.sum()) for h in np.diag(1e-5 * np.abs(p))])
  variance = np.sum((f(p, x) - np.log(loss)) ** 2) / 9
  reach = stats.t.ppf(0.975, 9) * np.sqrt(variance * (1 + here @ np.linalg.solve(columns.T @ columns, here)))
  assert np.log(high / low) == pytest.approx(2 * reach, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('floor', [0.0, 0.1])
def test_prediction_with_a_floor_holds_one_more_run(floor):
  x, inside = np.geomspace(1e4, 4e5, 9), 0
  for seed in range(60):
    loss = (floor + 5 * np.append(x, 1e6) ** -0.25) * np.exp(np.random.default_rng(seed).normal(0, 0.03, 10))
    _, low, high = fit.predict_floored(x, loss[:9], 1e6)
    inside += low <= loss[9] <= high
  assert inside >= 54  # 57 expected


def test_joint_law_is_recovered():
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(5e7, 2e9, 6), np.geomspace(1e9, 1e11, 6)))
  truth = fit.JointFit(irreducible=0.2, a=60.0, alpha=0.3, b=300.0, beta=0.33, r2=1.0, n=36)
  found = fit.fit_joint(n, d, truth(n, d))
  for name in ('irreducible', 'alpha', 'beta'):
    assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name
  noisy = truth(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.002, 36))
  assert fit.fit_joint(n, d, noisy)(3e9, 2e11) == pytest.approx(truth(3e9, 2e11), rel=0.02)


def slow_envelope(curve: np.ndarray, x: np.ndarray, loss: np.ndarray) -> list[bool]:
  """Return the envelope row by row and segment by segment."""
  out = []
  for i in range(len(x)):
    beaten = False
    for name in set(curve.tolist()) - {curve[i]}:
      rows = sorted((np.log(x[j]), np.log(loss[j])) for j in range(len(x)) if curve[j] == name)
      for (x0, y0), (x1, y1) in itertools.pairwise(rows):
        if x0 <= np.log(x[i]) <= x1:
          height = y0 + (y1 - y0) * (np.log(x[i]) - x0) / (x1 - x0)
          beaten |= bool(height < np.log(loss[i]) - 1e-12)
      if len(rows) > 1 and np.log(x[i]) > rows[-1][0]:
        beaten |= bool(rows[-1][1] < np.log(loss[i]) - 1e-12)
    out.append(not beaten)
  return out


def test_envelope_matches_a_slow_implementation():
  rng = np.random.default_rng(0)
  curve = np.repeat([1.0, 2.0, 4.0, 8.0], 7)
  x = np.concatenate([np.sort(c * 10 ** rng.uniform(0, 2, 7)) for c in (1, 2, 4, 8)])
  loss = np.exp(rng.normal(0, 0.2, 28)) * x**-0.2
  mixed = rng.permutation(28)
  kept = fit.lower_envelope(curve[mixed], x[mixed], loss[mixed])
  assert kept.tolist() == slow_envelope(curve[mixed], x[mixed], loss[mixed])
  assert 4 < kept.sum() < 28


def test_envelope_drops_runs_that_cost_more_and_learn_less():
  size, x, loss = np.array([1.0, 1, 2, 2]), np.array([1.0, 2, 4, 8]), np.array([0.6, 0.5, 0.52, 0.4])
  assert fit.lower_envelope(size, x, loss).tolist() == [True, True, False, True]
  assert fit.lower_envelope(np.arange(4), x, loss).all()  # sizes of one run each have no curve


def test_envelope_keeps_ties_and_compares_from_the_first_run_of_a_curve():
  size, x = np.array([1.0, 1, 2, 2]), np.array([1.0, 4, 1, 4])
  # Two sizes cost the same: the higher loss goes, an equal one stays.
  assert fit.lower_envelope(size, x, np.array([0.5, 0.4, 0.6, 0.4])).tolist() == [True, True, False, True]


def test_envelope_of_one_curve_is_the_curve():
  assert fit.lower_envelope(np.ones(4), np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])).all()


@pytest.mark.parametrize(
  ('x', 'loss', 'message'),
  [
    ([1e6, 1e6, 1e6], [0.6, 0.5, 0.4], 'needs at least 3 different values of x, got 1'),
    ([1e6, 2e6], [0.6, 0.5], 'needs at least 3 different values of x, got 2'),
    ([1e6, 2e6, 4e6], [0.6, float('nan'), 0.4], 'loss must be positive and finite: row 1 has nan'),
    ([1e6, 2e6, 4e6], [0.6, 0.5, -0.4], 'row 2 has -0.4'),
    ([0.0, 2e6, 4e6], [0.6, 0.5, 0.4], 'x must be positive and finite: row 0 has 0.0'),
    ([1e6, 2e6, 4e6], [0.6, 0.5], 'the same length'),
    ([[1e6, 2e6, 4e6]], [[0.6, 0.5, 0.4]], 'the same length'),
  ],
)
def test_runs_that_determine_no_law_are_refused(x, loss, message):
  with pytest.raises(FitError, match=message):
    fit.fit_power_law(x, loss)


def test_laws_with_more_parameters_need_more_runs():
  with pytest.raises(FitError, match='at least 4'):
    fit.fit_floored([1e6, 2e6, 4e6], [0.6, 0.5, 0.4])
  with pytest.raises(FitError, match='at least 6 runs'):
    fit.fit_joint([1e6, 2e6, 4e6, 1e6], [1e6, 2e6, 4e6, 2e6], [0.6, 0.5, 0.4, 0.5])
  with pytest.raises(FitError, match='tokens'):
    fit.fit_joint([1e6, 2e6, 4e6] * 2, [1e6] * 6, [0.6, 0.5, 0.4] * 2)


def test_power_fit_converts_to_a_dict():
  written = dataclasses.asdict(fit.fit_power_law(*runs(5, 0.01)))
  assert {'alpha', 'beta', 'low', 'high', 'r2', 'n'} <= written.keys()


def test_six_runs_of_three_sizes_determine_the_joint_law():
  n, d = np.array([1e7, 1e7, 1e8, 1e8, 1e9, 1e9]), np.array([1e9, 1e10, 1e10, 1e11, 1e9, 1e11])
  truth = fit.JointFit(irreducible=0.2, a=60.0, alpha=0.3, b=300.0, beta=0.33, r2=1.0, n=6)
  found = fit.fit_joint(n, d, truth(n, d))
  assert found.n == 6 and found.r2 == pytest.approx(1, abs=1e-6)
  np.testing.assert_allclose(found(n, d), truth(n, d), rtol=1e-3)


def test_r2_is_the_share_of_the_variance_of_the_logarithm():
  log_loss, residuals = np.array([1.0, 2.0, 4.0, 5.0]), np.array([0.5, -0.5, 0.5, -0.5])
  assert fit._r2(log_loss, residuals) == pytest.approx(1 - 1.0 / 10.0)
  assert fit._r2(np.ones(3), np.zeros(3)) == 0.0


def test_terms_that_vanish_start_the_search_at_a_level_that_is_finite():
  """A pure law has no irreducible loss, and the best non-negative one on the grid is exactly 0."""
  x, loss = runs(10)
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e8, 4), np.geomspace(1e7, 1e10, 4)))
  with np.errstate(divide='raise', invalid='raise'):
    assert fit.fit_floored(x, loss).n == 10
    assert fit.fit_joint(n, d, 40 * n**-0.3)(1e7, 1e9) == pytest.approx(40 * 1e7**-0.3, rel=1e-3)


@pytest.mark.parametrize('last', [2.0, 40.0])  # with a leverage of 0.6 and of 0.999, where its residual says nothing
def test_bootstrap_scales_residuals_by_their_leverage_within_limits(monkeypatch, last):
  monkeypatch.setattr(fit, '_RESAMPLES', 60)
  x = np.array([0.0, 0.3, 0.5, 0.8, 1.0, last])
  y = 2 - 0.3 * x + np.random.default_rng(4).normal(0, 0.1, 6)
  slope, _, error, residuals = (a[0] for a in fit._robust_lines(x, y[None]))
  assert fit._bootstrap_t(x, residuals, slope, error, 3) == pytest.approx(slow_bootstrap_t(x, y, 3, 60), rel=1e-6)


def test_four_runs_determine_a_floored_law():
  x = np.geomspace(1e6, 1e9, 4)
  assert fit.fit_floored(x, 0.3 + 10 * x**-0.2).irreducible == pytest.approx(0.3, rel=1e-2)


def test_an_interval_is_of_two_thousand_resamples(monkeypatch):
  sizes, robust_lines = [], fit._robust_lines
  monkeypatch.setattr(fit, '_robust_lines', lambda log_x, y_Bn: sizes.append(len(y_Bn)) or robust_lines(log_x, y_Bn))
  assert fit.fit_power_law(*runs(5, 0.01)) == fit.fit_power_law(*runs(5, 0.01), seed=0) != fit.fit_power_law(*runs(5, 0.01), seed=1)
  assert sizes == [1, 2_000] * 3


@pytest.mark.parametrize('outlier', [1.0, 1.3])
def test_noise_is_the_robust_standard_deviation_about_the_line(outlier):
  x, loss = runs(9, 0.01, seed=4)
  loss[4] *= outlier
  _, error, residuals = robust_line(np.log(x), np.log(loss))
  found = fit.fit_power_law(x, loss)
  assert found.noise == pytest.approx(error * np.sqrt(np.sum((np.log(x) - np.log(x).mean()) ** 2)), rel=1e-6)
  assert found.residuals == pytest.approx(residuals.tolist(), abs=1e-9)
  assert 0.3 < found.noise / 0.01 < 2


def test_one_outlier_has_little_influence_on_a_floored_law():
  x = np.geomspace(1e6, 1e12, 20)
  loss = (0.35 + 12.0 * x**-0.25) * np.exp(np.random.default_rng(0).normal(0, 1e-3, 20))
  clean = fit.fit_floored(x, loss)
  loss[10] *= 1.5
  assert fit.fit_floored(x, loss).irreducible == pytest.approx(clean.irreducible, rel=2e-3)
