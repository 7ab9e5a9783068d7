"""Figures of scaling laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_jax.report import plots
from polar_jax.scaling.results import Results

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_CURVES = 'viridis'
_LINE, _HELD_OUT, _FAINT = '#D55E00', '#009E73', 0.2


def laws(runs: Results, fitted: Mapping[str, Any]) -> Figure:
  """Draw L(N) and L(C) on logarithmic axes: all runs, the fitted runs, the line with its 95% band, the largest size as predicted.

  Args:
    runs: of results.csv.
    fitted: the section `scaling` of report.json.
  """
  from matplotlib import colormaps

  with plots.style():
    figure = plots.new_figure(10.6, 4.0)
    axes = figure.subplots(1, 2)
    sizes = np.unique(runs.parameters)
    colors = colormaps[_CURVES](np.linspace(0.05, 0.9, len(sizes)))
    curves = []
    for color, size in zip(colors, sizes, strict=True):
      curve = runs.rows(np.flatnonzero(runs.parameters == size)).best()
      axes[0].plot(curve.parameters, curve.loss, '.', color=color, alpha=0.5)
      curves += axes[1].plot(curve.flops, curve.loss, '.-', color=color, alpha=0.6, linewidth=1)
    for ax, name, meaning in ((axes[0], 'N', 'parameters N'), (axes[1], 'C', 'training FLOPs C')):
      _law(ax, fitted[name], name)
      ax.set(xscale='log', yscale='log', xlabel=meaning, ylabel='validation loss, nats')
      _plain_ticks(ax)
      _limits(ax, runs, fitted[name])
      ax.legend(loc='lower left')
    figure.legend(curves, [f'{size:,.0f}' for size in sizes], title='parameters', loc='outside right center')
  return figure


def _law(ax: Axes, law: Mapping[str, Any], name: str) -> None:
  """Draw the line with its 95% band, the fitted runs and the prediction for the largest size."""
  x, held_out = np.asarray(law['x']), law.get('held_out')
  ends = np.geomspace(x.min(), max(x.max(), held_out['x'] if held_out else 0), 100)
  center = np.exp(np.log(x).mean())
  at_center = law['beta'] * center ** law['alpha']
  label = f'{law["beta"]:.3g} {name}$^{{{law["alpha"]:.4f}}}$, R² {law["r2"]:.3f}'
  ax.plot(ends, law['beta'] * ends ** law['alpha'], color=_LINE, label=label)
  edges = [at_center * (ends / center) ** law[side] for side in ('low', 'high')]
  ax.fill_between(ends, np.minimum(*edges), np.maximum(*edges), color=_LINE, alpha=_FAINT, linewidth=0)
  ax.plot(x, law['loss'], 'o', color=_LINE, markersize=4)
  if held_out:
    reach = [[held_out['predicted'] - held_out['low']], [held_out['high'] - held_out['predicted']]]
    label = 'largest size, predicted from the others'
    ax.errorbar([held_out['x']], [held_out['predicted']], reach, color=_HELD_OUT, fmt='_', capsize=4, label=label)


def _plain_ticks(ax: Axes) -> None:
  """Label a few round losses; a logarithmic axis over less than a decade has hardly any ticks of its own."""
  from matplotlib import ticker

  ax.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
  ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%.3g'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def _limits(ax: Axes, runs: Results, law: Mapping[str, Any]) -> None:
  """Make room for every run, the line and the interval of the largest size; a wide band may leave the axes."""
  shown = np.concatenate([runs.loss, law['beta'] * np.asarray(law['x']) ** law['alpha']])
  if held_out := law.get('held_out'):
    shown = np.append(shown, [held_out['low'], held_out['high']])
  ax.set_ylim(float(shown.min()) * 0.97, float(shown.max()) * 1.03)
