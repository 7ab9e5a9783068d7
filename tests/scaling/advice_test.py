"""Advice against searches by brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from polar_jax.config import ConfigError, FitConfig
from polar_jax.scaling import advice
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results
from polar_jax.stages import fit as stage

E, A, ALPHA, B, BETA = 0.3, 40.0, 0.35, 600.0, 0.4


def loss(n, d):
  return E + A * n**-ALPHA + B * d**-BETA


def rows(**more) -> Results:
  n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e6, 1e8, 6), np.geomspace(1e7, 1e10, 6)))
  return Results(n, d, 7.0 * n * d, loss(n, d), **more)


@pytest.fixture(scope='module')
def found():
  return stage.study(rows())


def test_the_division_is_the_best_of_all(found):
  budget = 3e17
  made = advice.advise(rows(), found, FitConfig(flops=budget))
  sizes = np.geomspace(1e6, 1e9, 200_001)
  best = sizes[np.argmin(loss(sizes, budget / (7 * sizes)))]
  assert made.split_by == 'the joint law' and made.parameters == pytest.approx(best, rel=0.02)
  assert made.parameters * made.tokens * 7 == pytest.approx(budget)
  assert made.decades == 0
  assert advice.advise(rows(), found, FitConfig(flops=7e20)).decades == pytest.approx(2)


def test_without_a_joint_law_the_envelope_divides(found):
  n = np.repeat(np.geomspace(1e6, 1e8, 5), 5)
  ratio = np.tile([5.0, 10, 20, 40, 80], 5)  # tokens a parameter, best at 20
  flops = 6 * n * n * ratio
  data = Results(n, n * ratio, flops, 3 * flops**-0.05 * np.exp(0.01 * np.log(ratio / 20) ** 2))
  studied = {k: v for k, v in stage.study(data).items() if k != 'joint'}
  made = advice.advise(data, studied, FitConfig(flops=1e15))
  assert made.split_by == 'the sizes on the lower envelope' and made.parameters == pytest.approx(np.sqrt(1e15 / 120), rel=0.25)
  assert made.low < made.loss < made.high and made.loss == pytest.approx(3 * 1e15**-0.05, rel=0.02)
  two = data.rows(np.flatnonzero(data.parameters < 5e6))
  with pytest.raises(FitError, match='to divide FLOPs'):
    advice._split(two, {}, 1e15)


def test_learning_rate_and_batch_follow_their_laws(found):
  law = {'law': {'factor': 2.0, 'exponents': {'parameters': -0.5, 'tokens': 0.25}}}
  config = FitConfig(flops=1e17)
  made = advice.advise(rows(), found | {'learning_rate': law}, config)
  assert made.learning_rate == pytest.approx(2 * made.parameters**-0.5 * made.tokens**0.25)
  assert made.batch is None and 'batch not known: sweep it' in ' '.join(advice.describe(made))
  assert made.paper_learning_rate is None
  with_lm = advice.advise(rows(), found, dataclasses.replace(config, lm_tokens=1e12))
  assert with_lm.paper_learning_rate > 0 and 'learning rate' in advice.describe(with_lm)[2].split(';')[1]


def test_chip_hours_are_flops_over_what_the_chips_do(found):
  made = advice.advise(rows(), found, FitConfig(flops=1e18, topology='v5p:4x4x4', mfu=0.5))
  assert made.chips == 64 and made.chip_hours == pytest.approx(1e18 / (459e12 * 0.5) / 3600) and made.hours == made.chip_hours / 64
  assert advice.advise(rows(), found, FitConfig(flops=1e18, topology='h100:8')).chips == 8


@pytest.mark.parametrize('topology', ['v5p', 'v9:4', 'h100:0', 'v5e:4xa', '', 'v5p:'])
def test_a_slice_that_is_none_is_refused(found, topology):
  with pytest.raises(ConfigError, match=r'fit\.topology'):
    advice.advise(rows(), found, FitConfig(flops=1e18, topology=topology))
