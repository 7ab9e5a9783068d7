"""Laws of learning rate and batch size, against the settings of the paper and sweeps whose optima are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from polar_jax.scaling import laws
from polar_jax.scaling.fit import FitError


@pytest.mark.parametrize(
  ('parameters', 'lm_tokens', 'rm_tokens', 'rate', 'batch'),
  [(1.8e9, 2.5e12, 0.94e12, 1.43e-5, 1939.7), (7e9, 4.0e12, 3.6e12, 1.674e-5, 4342.8)],
)
def test_paper_laws_give_the_settings_of_the_paper(parameters, lm_tokens, rm_tokens, rate, batch):
  assert laws.learning_rate(parameters, lm_tokens, rm_tokens) == pytest.approx(rate, rel=1e-3)
  assert laws.batch_size(parameters, rm_tokens) == pytest.approx(batch, abs=0.06)


def bowl(values: np.ndarray, best: float, curvature: float = 0.02) -> np.ndarray:
  return 0.5 + curvature * np.log(values / best) ** 2


@pytest.mark.parametrize('degree', [2, 4])
def test_optimum_of_a_parabola(degree):
  values = np.geomspace(5e-6, 1e-4, 7)
  found = laws.optimum(values, bowl(values, 2.3e-5), degree)
  assert (found.value, found.loss, found.at_edge) == (pytest.approx(2.3e-5, rel=1e-3), pytest.approx(0.5, abs=1e-6), False)


def test_optimum_is_the_lower_of_two_minima():
  values = np.geomspace(1, 100, 41)
  u = np.log(values) / np.log(100)
  loss = 20 * (u - 0.2) ** 2 * (u - 0.8) ** 2 - 0.05 * u + 1
  dense = np.linspace(0, 1, 100_001)
  deepest = dense[np.argmin(20 * (dense - 0.2) ** 2 * (dense - 0.8) ** 2 - 0.05 * dense)]
  assert laws.optimum(values, loss, 4).value == pytest.approx(100**deepest, rel=1e-3)


@pytest.mark.parametrize('best', [1e-7, 1e-2])
def test_optimum_at_the_edge_is_flagged(best):
  values = np.geomspace(5e-6, 1e-4, 7)
  found = laws.optimum(values, bowl(values, best), 2)
  assert found.at_edge and found.value == pytest.approx(5e-6 if best < 1e-5 else 1e-4)


def test_fit_product_law_recovers_the_laws_of_the_paper():
  settings = list(itertools.product([115.52e6, 389.87e6, 924.09e6], [131.84e9, 219.73e9], [23.9e9, 103.72e9]))
  rates, batches = np.geomspace(1e-6, 1e-3, 9), np.geomspace(16, 4096, 8)
  best_rates = [laws.optimum(rates, bowl(rates, laws.learning_rate(*s)), 4).value for s in settings]
  best_batches = [laws.optimum(batches, bowl(batches, laws.batch_size(s[0], s[2])), 2).value for s in settings]
  n, d_lm, d_rm = (np.array(column) for column in zip(*settings, strict=True))
  mebi, gibi = 2.0**20, 2.0**30
  found = laws.fit_product_law({'n': n / mebi, 'lm': d_lm / gibi, 'rm': d_rm / gibi}, best_rates)
  assert found.factor == pytest.approx(0.0002306, rel=1e-2)
  assert found.exponents == pytest.approx({'n': 0.01125, 'lm': -0.66587, 'rm': 0.33916}, abs=1e-3)
  found = laws.fit_product_law({'n': n / mebi, 'rm': d_rm / gibi}, best_batches)
  assert found.factor == pytest.approx(31.9032, rel=1e-2) and found.r2 > 0.9999
  assert found.exponents == pytest.approx({'n': 0.06944, 'rm': 0.52997}, abs=1e-3)
  assert found(n=1.8e9 / mebi, rm=0.94e12 / gibi) == pytest.approx(1939.7, rel=1e-2)


def test_intervals_cover_the_exponents():
  covered = 0
  for trial in range(100):
    rng = np.random.default_rng([2, trial])
    n, d = 10 ** rng.uniform(7, 9, 10), 10 ** rng.uniform(9, 11, 10)
    law = laws.fit_product_law({'n': n, 'd': d}, 3.0 * n**0.1 * d**-0.4 * np.exp(rng.normal(0, 0.1, 10)))
    covered += law.low['n'] <= 0.1 <= law.high['n']
  assert 90 <= covered <= 99


def test_undetermined_laws_are_refused():
  with pytest.raises(FitError, match='needs at least 5'):
    laws.optimum([1, 2, 3, 4], [1, 2, 3, 4], 4)
  with pytest.raises(FitError, match='positive'):
    laws.optimum([0.0, 2, 3], [1, 2, 3], 2)
  with pytest.raises(FitError, match='do not separate the effects of n, d'):
    laws.fit_product_law({'n': [1, 2, 3, 4], 'd': [1, 2, 3, 4]}, [1, 2, 3, 4])
  n = np.array([1.6e4, 2.7e4, 4.9e4])
  with pytest.raises(FitError, match='do not separate the effects of n, d'):  # one follows from the other, except for rounding
    laws.fit_product_law({'n': n, 'd': np.round(40 * np.sqrt(n))}, [1, 2, 3])
  with pytest.raises(FitError, match='do not separate the effects of n, d'):
    laws.fit_product_law({'n': n, 'd': [7, 7, 7]}, [1, 2, 3])
  with pytest.raises(FitError, match='needs one positive number for each of 3'):
    laws.fit_product_law({'n': [1, 2]}, [1, 2, 3])


@pytest.mark.parametrize('settings', [10, 400])
@pytest.mark.parametrize(('independent', 'separated'), [(0.01, False), (0.04, True)])
def test_quantities_must_vary_independently_by_a_share_that_does_not_depend_on_the_number_of_settings(settings, independent, separated):
  """The smallest singular value of two standardized columns is sqrt(n (1 - r)) for a correlation r."""
  x, z = np.cos(np.arange(settings) * 2 * np.pi / settings), np.sin(np.arange(settings) * 2 * np.pi / settings)
  r = 1 - independent**2
  logs = np.column_stack([3 + x, 5 + 2 * (r * x + np.sqrt(1 - r**2) * z)])
  assert laws._identifiable(logs) == separated
  if separated:
    found = laws.fit_product_law({'n': np.exp(logs[:, 0]), 'd': np.exp(logs[:, 1])}, 7 * np.exp(logs @ [0.5, -0.25]))
    assert found.exponents == pytest.approx({'n': 0.5, 'd': -0.25}, abs=1e-6)
    assert found.factor == pytest.approx(7) and found.r2 == pytest.approx(1) and found.n == settings


def test_a_law_without_degrees_of_freedom_has_no_interval():
  found = laws.fit_product_law({'n': [1.0, 10.0]}, [3.0, 30.0])
  assert (found.factor, found.exponents) == (pytest.approx(3), {'n': pytest.approx(1)})
  assert (found.low, found.high) == ({'n': -np.inf}, {'n': np.inf})
  three = laws.fit_product_law({'n': np.exp([0.0, 1.0, 2.0])}, np.exp([0.0, 2.0, 1.0]))
  # By hand: slope 1/2, residuals (-1/2, 1, -1/2), variance 3/2, Sxx 2, and Student's t of one degree of freedom.
  assert three.exponents['n'] == pytest.approx(0.5) and three.r2 == pytest.approx(1 - 1.5 / 2)
  assert three.high['n'] - three.exponents['n'] == pytest.approx(12.7062047 * np.sqrt(1.5 / 2)) == three.exponents['n'] - three.low['n']


@pytest.mark.parametrize(('spread', 'separated'), [(0.6e-6, False), (1.6e-6, True)])
def test_a_quantity_that_hardly_varies_is_taken_as_constant(spread, separated):
  x, z = np.array([-1.0, 1.0, -1.0, 1.0]), np.array([-1.0, -1.0, 1.0, 1.0])
  assert laws._identifiable(np.column_stack([3 + x, 5 + spread * z])) == separated


@pytest.mark.parametrize('unit', [0.0008, 0.0012, 0.4444, 0.9988, 0.9992])
def test_an_optimum_next_to_an_edge_is_inside(unit):
  values = np.geomspace(1, 100, 41)
  found = laws.optimum(values, bowl(values, 100**unit), 2)
  assert not found.at_edge and np.log(found.value) / np.log(100) == pytest.approx(unit, abs=1e-6)


@pytest.mark.parametrize('bad', [np.nan, np.inf, 0.0, -1.0])
def test_what_is_no_positive_number_is_refused(bad):
  good, one_bad = [1.0, 2.0, 4.0], [1.0, bad, 4.0]
  with pytest.raises(FitError, match='positive and finite'):
    laws.optimum(one_bad, good, 2)
  if not np.isfinite(bad):
    with pytest.raises(FitError, match='their losses finite'):
      laws.optimum(good, one_bad, 2)
  for quantities, y, name in (({'n': one_bad}, good, 'n'), ({'n': good}, one_bad, 'y')):
    with pytest.raises(FitError, match=f'^{name}: needs one positive number for each of 3'):
      laws.fit_product_law(quantities, y)


def test_the_share_that_a_product_law_explains():
  near = np.array([1.0, 1.1, 1.2])
  assert laws.fit_product_law({'n': near}, near**2).r2 == pytest.approx(1)  # of however small a variance
  assert laws.fit_product_law({'n': near}, np.ones(3)).r2 == 0.0  # there is none
