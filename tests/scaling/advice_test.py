"""Advice, against brute-force search."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
import pytest

from polar_jax.config import ConfigError, FitConfig
from polar_jax.scaling import advice, analysis, fit, laws
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results

E, A, ALPHA, B, BETA = 0.3, 40.0, 0.35, 600.0, 0.4


def loss(n, d):
  return E + A * n**-ALPHA + B * d**-BETA


def rows(**more) -> Results:
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e7, 1e10, 6)))
  return Results(n, d, 7.0 * n * d, loss(n, d), **more)


@pytest.fixture(scope='module')
def analyzed():
  return analysis.analyze(rows())


def test_joint_law_divides_the_budget_optimally(analyzed):
  budget = 3e17
  advised = advice.advise(rows(), analyzed, FitConfig(flops=budget))
  sizes = np.geomspace(1e6, 1e9, 200_001)
  best = sizes[np.argmin(loss(sizes, budget / (7 * sizes)))]
  assert advised.split_by == 'the joint law' and advised.parameters == pytest.approx(best, rel=0.02)
  assert advised.parameters * advised.tokens * 7 == pytest.approx(budget)
  assert advised.decades == 0
  assert advice.advise(rows(), analyzed, FitConfig(flops=7e20)).decades == pytest.approx(2)


def test_envelope_divides_the_budget_without_a_joint_law(analyzed):
  n = np.repeat(np.geomspace(1e6, 1e8, 5), 5)
  ratio = np.tile([5.0, 10, 20, 40, 80], 5)  # tokens per parameter, best at 20
  flops = 6 * n * n * ratio
  data = Results(n, n * ratio, flops, 3 * flops**-0.05 * np.exp(0.01 * np.log(ratio / 20) ** 2))
  studied = {k: v for k, v in analysis.analyze(data).items() if k != 'joint'}
  advised = advice.advise(data, studied, FitConfig(flops=1e15))
  assert advised.split_by == 'the sizes on the lower envelope' and advised.parameters == pytest.approx(np.sqrt(1e15 / 120), rel=0.25)
  assert advised.low < advised.loss < advised.high and advised.loss == pytest.approx(3 * 1e15**-0.05, rel=0.02)
  two = data.rows(np.flatnonzero(data.parameters < 5e6))
  with pytest.raises(FitError, match='to divide FLOPs'):
    advice._split(two, {}, 1e15)


def test_learning_rate_and_batch_follow_their_laws(analyzed):
  law = {'law': {'factor': 2.0, 'exponents': {'parameters': -0.5, 'tokens': 0.25}}}
  config = FitConfig(flops=1e17)
  advised = advice.advise(rows(), analyzed | {'learning_rate': law}, config)
  assert advised.learning_rate == pytest.approx(2 * advised.parameters**-0.5 * advised.tokens**0.25)
  assert advised.batch is None and 'batch unknown: sweep it' in ' '.join(advice.describe(advised))
  assert advised.paper_learning_rate is None
  with_lm = advice.advise(rows(), analyzed, dataclasses.replace(config, lm_tokens=1e12))
  n, d = with_lm.parameters, with_lm.tokens
  assert (with_lm.paper_learning_rate, with_lm.paper_batch) == (laws.learning_rate(n, 1e12, d), laws.batch_size(n, d))
  assert 'learning rate' in advice.describe(with_lm)[2].split(';')[1]


def test_chip_hours_follow_from_peak_and_mfu(analyzed):
  advised = advice.advise(rows(), analyzed, FitConfig(flops=1e18, topology='v5p:4x4x4', mfu=0.5))
  assert advised.chips == 64 and advised.hours == advised.chip_hours / 64
  assert advised.chip_hours == pytest.approx(1e18 / (459e12 * 0.5) / 3600)
  assert advice.advise(rows(), analyzed, FitConfig(flops=1e18, topology='h100:8')).chips == 8


@pytest.mark.parametrize('topology', ['v5p', 'v9:4', 'h100:0', 'v5e:4xa', '', 'v5p:'])
def test_unknown_topologies_are_refused(analyzed, topology):
  with pytest.raises(ConfigError, match=r'fit\.topology'):
    advice.advise(rows(), analyzed, FitConfig(flops=1e18, topology=topology))


def test_advice_says_how_far_outside_the_swept_range_it_is_and_for_what(analyzed):
  swept = rows()
  for budget, decades in (
    (swept.flops.min() / 100, 2.0),
    (swept.flops.min(), 0.0),
    (swept.flops.max(), 0.0),
    (swept.flops.max() * 10, 1.0),
  ):
    advised = advice.advise(swept, analyzed, FitConfig(flops=float(budget)))
    assert advised.decades == pytest.approx(decades, abs=1e-9)
    assert (f'; {decades:.1f} decades outside the swept range' in advice.describe(advised)[1]) == (decades > 0)
  lines = advice.describe(
    advice.Advice(1e18, 2e8, 3e9, 0.51234, 0.5, 0.52, 0.0, 'some law', 1e-4, 63.6, 2e-5, 99.6, 'h100:8', 0.4, 8, 16.0, 2.0)
  )
  assert lines == [
    'advice: 1e+18 FLOPs: 2e+08 parameters, 3e+09 tokens (by some law)',
    'advice: expected loss 0.5123, 95% interval for one run [0.5000, 0.5200]',
    "advice: learning rate 0.0001, batch 64 triplets; by the paper's laws (of models from 50M parameters): batch 100, learning rate 2e-05",
    'advice: 16 chip-hours, 2 hours on h100:8 (8 chips) at 40% MFU',
  ]


def test_a_joint_law_that_grows_with_size_divides_nothing(analyzed):
  assert advice._split(rows(), analyzed, 3e17)[1] == 'the joint law'
  for name in ('a', 'b', 'alpha', 'beta'):
    for value in (0.0, -0.1):
      bad = {'joint': analyzed['joint'] | {name: value}}
      assert advice._split(rows(), bad, 3e17)[1] == 'the sizes on the lower envelope'


def test_flops_per_parameter_and_token_are_the_median_of_the_largest_size():
  n, d = np.array([1e6, 2e6, 2e6, 2e6]), np.array([1e7, 1e7, 2e7, 4e7])
  data = Results(n, d, np.array([9.0, 6.5, 6.0, 8.0]) * n * d, np.ones(4))
  assert advice.flops_per_parameter_and_token(data) == pytest.approx(6.5)


def test_three_sizes_on_the_envelope_divide_a_budget():
  n = np.array([1e6, 1e6, 1e7, 1e7, 1e8, 1e8])
  flops = 120 * n**2 * np.tile([1.0, 2.0], 3)
  three = Results(n, flops / (6 * n), flops, 3 * flops**-0.05)
  assert len(np.unique(three.envelope().parameters)) == 3
  assert advice._split(three, {}, 1.2e18)[0] == pytest.approx(1e8, rel=0.5)


@pytest.mark.parametrize('function', [advice.advise, analysis.analyze, fit.fit_power_law])
def test_the_bootstrap_has_seed_zero_by_default(function):
  assert inspect.signature(function).parameters['seed'].default == 0
