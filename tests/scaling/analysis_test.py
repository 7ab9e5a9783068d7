"""The laws that the results of a sweep determine, and their description."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scaling_runs import SIZES, sweep

from polar_jax.scaling import analysis, fit, results
from polar_jax.scaling.analysis import analyze
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results


def test_the_largest_size_is_predicted_from_the_others():
  held_out = analyze(sweep())['N']['held_out']
  longest = sweep().longest()
  slope, intercept = np.polyfit(np.log(longest.parameters[:-1]), np.log(longest.loss[:-1]), 1)
  assert held_out['predicted'] == pytest.approx(np.exp(intercept) * longest.parameters[-1] ** slope, rel=1e-4)
  assert held_out['loss'] == longest.loss[-1]
  # A run that breaks the law is distinguished from one that follows it.
  rows = sweep(0.0005)
  assert analyze(rows)['N']['held_out']['within']
  rows.loss[rows.parameters == SIZES[-1]] *= 1.1
  assert not analyze(rows)['N']['held_out']['within']


def test_forms_are_compared_by_what_they_predict_of_further_sizes():
  rows = sweep()
  rows = dataclasses.replace(rows, loss=0.2 + 40 * rows.parameters**-0.3)  # a floor and nothing else
  found = analyze(rows)
  longest, forms = rows.longest(), found['forms']
  assert len(longest) == 5 and forms['power']['n'] == forms['floored']['n'] == 1
  slope, intercept = np.polyfit(np.log(longest.parameters[:4]), np.log(longest.loss[:4]), 1)
  power = np.exp(intercept) * longest.parameters[4] ** slope
  assert forms['power']['predicted'] == [pytest.approx(power, rel=1e-2)]
  assert forms['power']['error'] == pytest.approx(abs(np.log(forms['power']['predicted'][0] / longest.loss[4])))
  assert forms['floored']['predicted'] == [pytest.approx(longest.loss[4], rel=1e-3)]
  assert forms['floored']['error'] < 1e-3 < forms['power']['error']
  floored = found['floored']['N']['held_out']
  assert floored['predicted'] == pytest.approx(longest.loss[4], rel=1e-3) and floored['low'] < floored['loss'] < floored['high']
  assert any(line.startswith('fit: L(N) with a floor, fitted without the largest size, predicts') for line in analysis.describe(found))
  (line,) = [line for line in analysis.describe(found) if 'predicted from all that are smaller' in line]
  assert line.startswith('fit: the largest size, predicted') and 'law with a floor 0.' in line
  few = rows.rows(np.flatnonzero(rows.parameters < longest.parameters[4]))
  assert 'forms' not in analyze(few)


def test_describe_warns_of_few_sizes():
  few = sweep().rows(np.flatnonzero(sweep().parameters < SIZES[3]))
  found = analyze(few)
  assert found['N']['held_out'] is None and any('3 sizes prove nothing' in line for line in analysis.describe(found))
  assert not any('prove nothing' in line for line in analysis.describe(analyze(sweep())))


def test_describe_gives_the_reason_for_each_skipped_law():
  lines = analysis.describe(analyze(sweep().rows(np.flatnonzero(sweep().parameters < SIZES[3]))))
  assert 'fit: skipped L = E + beta N^alpha: needs at least 4 different values of x, got 3' in lines
  assert 'fit: skipped the optimal learning rate: the file has no column learning_rate' in lines


def test_runs_that_differ_in_learning_rate_count_once():
  rows = sweep()
  rates = np.geomspace(1e-5, 1e-3, 6)
  tuned = 1e-4 * (rows.parameters / 1e8) ** -0.2
  repeated = [np.repeat(getattr(rows, name), 6) for name in results.NEEDED]
  rate = np.tile(rates, len(rows))
  excess = 0.01 * np.log(rate / np.repeat(tuned, 6)) ** 2
  swept = Results(*repeated[:3], repeated[3] + excess, learning_rate=rate)
  assert len(swept.best()) == len(rows) and len(swept.longest()) == 5
  lowest = {
    (n, t): min(swept.loss[(swept.parameters == n) & (swept.tokens == t)]) for n, t in zip(rows.parameters, rows.tokens, strict=True)
  }
  best = swept.best()
  assert best.loss.tolist() == [lowest[key] for key in zip(best.parameters, best.tokens, strict=True)]
  found = analyze(swept)['learning_rate']
  assert found['law']['exponents']['parameters'] == pytest.approx(-0.2, abs=1e-3)
  assert 'batch' in analyze(swept)['left_out']


def test_batch_sizes_are_compared_at_the_same_learning_rate():
  """Only batch 32 was run with several rates: that it is lowest over all of them does not make it the best batch size."""
  rate, batch, loss = zip(
    *((1e-3, 16, 0.50), (1e-3, 32, 0.52), (1e-3, 64, 0.60), (5e-4, 32, 0.56), (2e-3, 32, 0.45), (4e-3, 32, 0.51), (8e-3, 32, 0.70)),
    strict=True,
  )
  column = lambda values: np.array(values, np.float64)
  rows = Results(*(np.full(7, value) for value in (1e4, 1e6, 1e12)), column(loss), column(rate), column(batch))
  batches, rates = (analysis._tuned(rows, name, degree)['optima'][0] for name, degree in (('batch', 2), ('learning_rate', 4)))
  assert (batches['swept'], batches['losses']) == ([16, 32, 64], [0.50, 0.52, 0.60]) and batches['value'] < 24
  assert rates['swept'] == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3] and rates['losses'] == [0.56, 0.52, 0.45, 0.51, 0.70]


def test_the_largest_size_is_held_out_only_if_three_others_are_left():
  for count, held_out in ((3, False), (4, True)):
    rows = sweep().rows(np.flatnonzero(sweep().parameters <= SIZES[count - 1] * 1.001))
    power = lambda x, loss, at: fit.fit_power_law(x, loss).predict(at)
    found = analysis._held_out(rows, 'N', power), analysis._held_out(rows, 'C', power)
    assert [one is not None for one in found] == [held_out, held_out]
  own, envelope = rows.longest(), rows.rows(np.flatnonzero(rows.parameters < SIZES[3] * 0.999)).envelope()
  assert (found[0]['x'], found[1]['x']) == (own.parameters[-1], own.flops[-1]) and found[0]['loss'] == found[1]['loss'] == own.loss[-1]
  slope, intercept = np.polyfit(np.log(envelope.flops), np.log(envelope.loss), 1)
  assert found[1]['predicted'] == pytest.approx(np.exp(intercept) * own.flops[-1] ** slope, rel=5e-3)
  assert all(one['low'] <= one['predicted'] <= one['high'] for one in found)


def test_a_tuned_setting_has_a_law_of_the_optima_inside_their_sweeps():
  """Four sizes with optima of 2 / size; of the smallest one the optimum is beyond the swept values."""
  values, rows = np.geomspace(0.02, 0.5, 7), []
  for size in (1.0, 5.0, 10.0, 20.0):
    rows += [(size, size**2, 1.0, 0.5 + np.log(v / (2 / size)) ** 2, v, 8.0) for v in values]
  results_ = Results(*np.array(rows).T)
  found = analysis._tuned(results_, 'learning_rate', 2)
  assert [o['at_edge'] for o in found['optima']] == [True, False, False, False]
  assert [o['value'] for o in found['optima'][1:]] == pytest.approx([0.4, 0.2, 0.1], rel=1e-3)
  assert found['no_law'].startswith('3 settings do not separate the effects of parameters, tokens')
  with pytest.raises(FitError, match='needs 8 values of learning_rate at one size'):
    analysis._tuned(results_, 'learning_rate', 7)
  assert len(analysis._tuned(results_, 'learning_rate', 6)['optima']) == 4
  three = [
    (n, d, 1.0, 0.5 + np.log(v * n / (2 * d)) ** 2, v, 8.0)
    for n, d in ((1.0, 1.0), (2.0, 1.0), (2.0, 4.0))
    for v in np.geomspace(0.1, 40, 9)
  ]
  law = analysis._tuned(Results(*np.array(three).T), 'learning_rate', 2)['law']
  assert law['exponents'] == pytest.approx({'parameters': -1, 'tokens': 1}, abs=1e-3) and law['factor'] == pytest.approx(2, rel=1e-3)
  assert 'low' not in law and 'high' not in law  # as many settings as unknowns


def test_of_two_sweeps_of_one_length_that_of_the_lower_loss_counts():
  batch, rate = np.tile([16.0, 32, 64], 2), np.repeat([1e-3, 2e-3], 3)
  for first, second in ((0.5, 0.4), (0.4, 0.5)):
    loss = np.array([first + 0.1, first, first + 0.1, second + 0.2, second + 0.1, second])
    rows = Results(*(np.full(6, value) for value in (1e4, 1e6, 1e12)), loss, rate, batch)
    (optimum,) = analysis._tuned(rows, 'batch', 2)['optima']
    assert min(optimum['losses']) == 0.4


def test_learning_rates_have_a_quartic_and_batches_a_parabola(monkeypatch):
  """As in the paper: the former needs five values, the latter three."""
  calls = []

  def tuned(rows, name, degree):
    calls.append((name, degree))
    raise FitError('no values')

  monkeypatch.setattr(analysis, '_tuned', tuned)
  monkeypatch.setattr(analysis, '_power_law', lambda *_: {})
  monkeypatch.setattr(analysis, '_held_out', lambda *_: None)
  monkeypatch.setattr(analysis, '_forms', lambda *_: {})
  for name in ('fit_floored', 'fit_joint'):
    monkeypatch.setattr(analysis.fit, name, lambda *_: tuned(None, 'law', 0))
  left_out = analyze(sweep())['left_out']
  assert calls[2:] == [('learning_rate', 4), ('batch', 2)] and left_out['batch'] == 'no values'
