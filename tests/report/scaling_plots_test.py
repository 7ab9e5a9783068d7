"""The content of the figure of scaling laws, read from its axes."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from polar_jax.report import scaling_plots
from polar_jax.scaling import analysis, results

SHIPPED = pathlib.Path(__file__).parents[2] / 'notebooks/results.csv'


@pytest.fixture(scope='module')
def drawn():
  runs = results.read(SHIPPED)
  fitted = analysis.analyze(runs)
  figure = scaling_plots.laws(runs, fitted)
  return runs, fitted, dict(zip('NC', figure.axes, strict=True)), figure


def line_of(ax):
  return next(line for line in ax.lines if '$^{' in str(line.get_label()))


@pytest.mark.parametrize('name', 'NC')
def test_runs_and_the_interval_of_the_largest_size_are_inside(drawn, name):
  runs, fitted, axes, _ = drawn
  low, high = axes[name].get_ylim()
  held_out = fitted[name]['held_out']
  assert held_out['low'] < runs.loss.min()  # otherwise the runs alone would make room for it
  assert low < held_out['low'] < held_out['high'] < high and low < runs.loss.min() and runs.loss.max() < high


@pytest.mark.parametrize('name', 'NC')
def test_the_line_is_the_fitted_law(drawn, name):
  _, fitted, axes, _ = drawn
  law = fitted[name]
  x, loss = line_of(axes[name]).get_xydata().T
  np.testing.assert_allclose(loss, law['beta'] * x ** law['alpha'])
  assert x[0] == pytest.approx(min(law['x'])) and x[-1] == pytest.approx(max([*law['x'], law['held_out']['x']]))
  (fitted_runs,) = (line for line in axes[name].lines if line.get_marker() == 'o')
  np.testing.assert_allclose(fitted_runs.get_xydata(), np.stack([law['x'], law['loss']], axis=1))


@pytest.mark.parametrize('name', 'NC')
def test_the_band_is_as_wide_as_the_interval_of_the_exponent(drawn, name):
  _, fitted, axes, _ = drawn
  law = fitted[name]
  band = next(c for c in axes[name].collections if c.get_paths()[0].vertices.shape[0] > 100)
  vertices = band.get_paths()[0].vertices
  line_x, line_loss = line_of(axes[name]).get_xydata().T
  center = np.exp(np.log(law['x']).mean())
  for x, loss in ((line_x[0], line_loss[0]), (line_x[-1], line_loss[-1])):
    edges = np.unique(vertices[np.isclose(vertices[:, 0], x, rtol=1e-9)][:, 1])
    wanted = sorted(law['beta'] * center ** law['alpha'] * (x / center) ** law[side] for side in ('low', 'high'))
    np.testing.assert_allclose((edges.min(), edges.max()), wanted)
    assert edges.min() < loss < edges.max()


@pytest.mark.parametrize('name', 'NC')
def test_the_error_bar_is_the_prediction_for_the_largest_size(drawn, name):
  _, fitted, axes, _ = drawn
  held_out = fitted[name]['held_out']
  (container,) = axes[name].containers
  marker, _, (bars,) = container.lines
  assert marker.get_xydata().tolist() == [[held_out['x'], held_out['predicted']]]
  np.testing.assert_allclose(bars.get_segments()[0], [(held_out['x'], held_out['low']), (held_out['x'], held_out['high'])])


def test_axes_are_logarithmic_and_every_size_has_its_curve(drawn):
  runs, _, axes, figure = drawn
  assert [axes[name].get_xlabel() for name in 'NC'] == ['parameters N', 'training FLOPs C']
  assert all((ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ('log', 'log', 'validation loss, nats') for ax in axes.values())
  sizes = np.unique(runs.parameters)
  assert [text.get_text() for text in figure.legends[0].get_texts()] == [f'{size:,.0f}' for size in sizes]
  for line, size in zip(axes['C'].lines, sizes, strict=False):
    best = runs.rows(np.flatnonzero(runs.parameters == size)).best()
    np.testing.assert_allclose(line.get_xydata(), np.stack([best.flops, best.loss], axis=1))
