"""Figures of scaling laws."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from polar_jax.report import plots
from polar_jax.scaling.results import Results

_CURVES = 'viridis'
_LINE, _HELD_OUT, _FAINT = '#D55E00', '#009E73', 0.2


def laws(rows: Results, found: Mapping[str, Any], path: str | pathlib.Path) -> None:
  """L(N) and L(C) in logarithms: every run, the runs that are fitted, the line with its 95% band, and the largest size as predicted.

  Args:
    rows: of results.csv.
    found: what `polar_jax.stages.fit.study` made of them.
    path: of the PNG.
  """
  plt = plots._pyplot()
  with plt.rc_context(plots._STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(10.6, 4.0), dpi=150)
    sizes = np.unique(rows.parameters)
    colours = plt.get_cmap(_CURVES)(np.linspace(0.05, 0.9, len(sizes)))
    curves = []
    for colour, size in zip(colours, sizes, strict=True):
      curve = rows.rows(np.flatnonzero(rows.parameters == size)).best()
      axes[0].plot(curve.parameters, curve.loss, '.', color=colour, alpha=0.5)
      curves += axes[1].plot(curve.flops, curve.loss, '.-', color=colour, alpha=0.6, linewidth=1)
    for ax, name, meaning in ((axes[0], 'N', 'parameters N'), (axes[1], 'C', 'training FLOPs C')):
      _law(ax, found[name], name)
      ax.set(xscale='log', yscale='log', xlabel=meaning, ylabel='validation loss, nats')
      _plain_ticks(ax)
      _limits(ax, rows, found[name])
      ax.legend(loc='lower left')
    figure.legend(curves, [f'{size:,.0f}' for size in sizes], title='parameters', loc='outside right center')
    plots._save(plt, figure, path)


def _law(ax: Any, law: Mapping[str, Any], name: str) -> None:
  x, held = np.asarray(law['x']), law.get('held_out')
  ends = np.geomspace(x.min(), max(x.max(), held['x'] if held else 0), 100)
  centre = np.exp(np.log(x).mean())
  at_centre = law['beta'] * centre ** law['alpha']
  ax.plot(
    ends, law['beta'] * ends ** law['alpha'], color=_LINE, label=f'{law["beta"]:.3g} {name}$^{{{law["alpha"]:.4f}}}$, R² {law["r2"]:.3f}'
  )
  edges = [at_centre * (ends / centre) ** law[side] for side in ('low', 'high')]
  ax.fill_between(ends, np.minimum(*edges), np.maximum(*edges), color=_LINE, alpha=_FAINT, linewidth=0)
  ax.plot(x, law['loss'], 'o', color=_LINE, markersize=4)
  if held:
    reach = [[held['predicted'] - held['low']], [held['high'] - held['predicted']]]
    ax.errorbar([held['x']], [held['predicted']], reach, color=_HELD_OUT, fmt='_', capsize=4, label='largest size, from the others')


def _plain_ticks(ax: Any) -> None:
  """A few round losses: logarithmic axes over less than a decade have hardly any ticks of their own."""
  from matplotlib import ticker

  ax.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
  ax.yaxis.set_major_formatter(ticker.FormatStrFormatter('%.3g'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def _limits(ax: Any, rows: Results, law: Mapping[str, Any]) -> None:
  """Room for every run, for the line and for the largest size's interval; a band that opens wide may leave the figure."""
  shown = np.concatenate([rows.loss, law['beta'] * np.asarray(law['x']) ** law['alpha']])
  if held := law.get('held_out'):
    shown = np.append(shown, [held['low'], held['high']])
  ax.set_ylim(float(shown.min()) * 0.97, float(shown.max()) * 1.03)
