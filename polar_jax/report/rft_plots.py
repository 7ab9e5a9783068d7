"""Figures of reinforcement fine-tuning: the dashboard over steps, and policies beside each other."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from polar_jax.report import plots

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, in the order in which runs, series or policies take them.
_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_DASHES: tuple[Literal['-', '--', ':'], ...] = ('-', '--', ':')
_COLUMNS = 4
_FAINT = 0.22


class Panel(NamedTuple):
  """One figure of the dashboard, or a few of one unit."""

  title: str
  unit: str
  series: Mapping[str, str]  # key of a row -> its name in the legend
  zero: bool = False  # a line at 0, the value that means something
  unscaled: str = ''  # a key that may leave the panel, for it can be of any size


_PANELS = (
  Panel('reward that PPO optimises', '', {'reward': 'reward'}),
  Panel('score', '', {'raw': 'own reference', 'shuffled': 'shuffled', 'length_free': 'length-free'}, unscaled='length_free'),
  Panel('score: own minus shuffled', '', {'shuffled_gap': 'gap'}, zero=True),
  Panel('rule', 'share right', {'rule': 'rule'}),
  Panel('KL to the start', 'nats per token', {'kl': 'KL'}, zero=True),
  Panel('entropy', 'nats per token', {'entropy': 'entropy'}),
  Panel('length', 'tokens', {'length': 'length'}),
  Panel('cut or empty', 'share of answers', {'truncated': 'cut', 'empty': 'empty'}),
  Panel('overlap with the reference', 'share of words', {'overlap': 'overlap'}),
  Panel('distinct n-grams', 'share', {'distinct_2': 'bigrams', 'distinct_1': 'words'}),
  Panel('clip fraction', 'share of tokens', {'clip_fraction': 'policy', 'value_clip_fraction': 'value'}),
  Panel('explained variance', '', {'explained_variance': 'critic'}, zero=True),
)
_HELD_OUT = {'raw': 'evaluation_raw', 'rule': 'evaluation_rule', 'length': 'evaluation_length', 'overlap': 'evaluation_overlap'}

_COMPARED = {
  'reward': 'reward',
  'target_nll': 'NLL under the target,\nnats per token',
  'relative_nll': "NLL minus the pool's mean,\nnats per token",
}


def dashboard(runs: Mapping[str, Rows], path: str | pathlib.Path) -> None:
  """What a run of PPO looked like step by step, one panel a figure; panels that no run measured are left out.

  A run has one colour, a figure of a panel one kind of line; where there is one run, its figures are coloured apart. Steps are faint,
  their running mean bold; dots are measurements on held-out prompts.

  Args:
    runs: name of a run -> rows of its metrics.jsonl.
    path: of the PNG.
  """
  panels = panels_of(runs)
  if not panels:
    raise ValueError('dashboard: no run has a row of metrics')
  plt = plots._pyplot()
  columns = min(_COLUMNS, len(panels))
  lines = -(-len(panels) // columns)
  with plt.rc_context({**plots._STYLE, 'legend.fontsize': 8}):
    figure, axes = plt.subplots(lines, columns, figsize=(max(3.0 * columns, 4.8), 2.3 * lines + 0.35), squeeze=False, dpi=150)
    for ax in axes.flat[len(panels) :]:
      ax.set_axis_off()
    for i, panel in enumerate(panels):
      _draw_panel(axes.flat[i], panel, runs)
      if i // columns == lines - 1:
        axes.flat[i].set_xlabel('step')
    _legend_of_runs(figure, axes, runs)
    plots._save(plt, figure, path)


def panels_of(runs: Mapping[str, Rows]) -> list[Panel]:
  """The panels that some run has a finite value for."""
  return [p for p in _PANELS if any(finite_points(rows, key)[0].size for rows in runs.values() for key in p.series)]


def comparison(policies: Mapping[str, Mapping[str, Sequence[float]]], path: str | pathlib.Path) -> None:
  """Policies beside each other: a dot for every seed, a bar at their mean, and the likelihood against the way from the start.

  Args:
    policies: name as shown -> {reward, target_nll, relative_nll, kl}, each one number per seed; any may be missing.
    path: of the PNG.
  """
  keys = [key for key in _COMPARED if any(p.get(key) for p in policies.values())]
  if not keys:
    raise ValueError('comparison: no policy has a reward or a likelihood')
  height = next((key for key in ('relative_nll', 'target_nll') if key in keys), keys[0])
  scattered = {n: p for n, p in policies.items() if p.get('kl') and len(p['kl']) == len(p.get(height, ()))}
  panels = len(keys) + (len(scattered) > 1)
  colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(policies)}
  plt = plots._pyplot()
  with plt.rc_context(plots._STYLE):
    size = (1.2 + 2.9 * panels, 1.3 + 0.36 * max(len(policies), 4))
    figure, axes = plt.subplots(1, panels, figsize=size, squeeze=False, dpi=150)
    for i, (ax, key) in enumerate(zip(axes.flat, keys, strict=False)):
      _strip(ax, {name: p.get(key, ()) for name, p in policies.items()}, colours)
      ax.set_xlabel(_COMPARED[key])
      ax.set_yticks(range(len(policies)), list(policies) if i == 0 else [''] * len(policies))
    if len(scattered) > 1:
      _scatter(axes.flat[-1], scattered, height, colours)
    plots._save(plt, figure, path)


def _draw_panel(ax: Any, panel: Panel, runs: Mapping[str, Rows]) -> None:
  apart = len(runs) == 1
  shown = [key for key in panel.series if any(finite_points(rows, key)[0].size for rows in runs.values())]
  dots = False
  for r, rows in enumerate(runs.values()):
    for s, key in enumerate(shown):
      colour = _COLOURS[(s if apart else r) % len(_COLOURS)]
      steps, values = finite_points(rows, key)
      if len(shown) == 1 or (apart and s == 0):
        ax.plot(steps, values, color=colour, alpha=_FAINT, linewidth=0.8)
      ax.plot(steps, _smooth(values), color=colour, linestyle=_DASHES[s], linewidth=1.6, marker='.' if len(steps) == 1 else None)
      held_out, measured = finite_points(rows, _HELD_OUT.get(key, ''))
      if held_out.size:
        ax.plot(held_out, measured, 'o', color=colour, markersize=4.5, markeredgecolor='white', markeredgewidth=0.6)
        dots = True
  if panel.zero:
    ax.axhline(0, color='black', linestyle='--', linewidth=0.8)
  ax.set_title(panel.title)
  ax.set_ylabel(panel.unit)
  ax.margins(y=0.1)
  _scale(ax, [finite_points(rows, key)[1] for rows in runs.values() for key in shown if key != panel.unscaled])
  ax.grid(alpha=0.25)
  _legend_of_series(ax, [panel.series[key] for key in shown], dots, apart)


def _scale(ax: Any, series: Sequence[np.ndarray]) -> None:
  """Keeps the axis within a span of these series, above them and below."""
  values = np.concatenate([*series, np.zeros(0)])
  if values.size and np.ptp(values):
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, values.min() - np.ptp(values)), min(high, values.max() + np.ptp(values)))


def finite_points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of one figure, those that are finite."""
  steps, values = plots._series(rows, key)
  finite = np.isfinite(values)
  return steps[finite], values[finite]


def _smooth(values: np.ndarray) -> np.ndarray:
  """Centred mean over a fifteenth of the run: a step of PPO is noisier than one of training on rows."""
  width = 2 * (len(values) // 30) + 1
  kernel = np.ones(width)
  return np.convolve(values, kernel, mode='same') / np.convolve(np.ones(len(values)), kernel, mode='same')


def _legend_of_series(ax: Any, names: Sequence[str], dots: bool, apart: bool) -> None:
  from matplotlib.lines import Line2D

  handles = []
  if len(names) > 1:
    colours = [_COLOURS[i] if apart else '#555555' for i in range(len(names))]
    handles = [Line2D([], [], color=c, linestyle=_DASHES[i], linewidth=1.6, label=names[i]) for i, c in enumerate(colours)]
  if dots:
    handles.append(Line2D([], [], color='#555555', marker='o', linestyle='', markersize=4, label='held-out'))
  if handles:
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (high - low) * 0.14 * -(-len(handles) // 2))  # room above the curves
    ax.legend(handles=handles, loc='upper left', ncols=2, handlelength=1.6, columnspacing=1.0, borderaxespad=0.1, borderpad=0.2)


def _legend_of_runs(figure: Any, axes: Any, runs: Mapping[str, Rows]) -> None:
  from matplotlib.lines import Line2D

  if len(runs) > 1:
    handles = [Line2D([], [], color=_COLOURS[i % len(_COLOURS)], linewidth=2, label=name) for i, name in enumerate(runs)]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(runs), 6), fontsize=10)


def _strip(ax: Any, values: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> None:
  for y, (name, numbers) in enumerate(values.items()):
    if numbers:
      ax.plot(numbers, [y] * len(numbers), 'o', color=colours[name], markersize=5, alpha=0.6, markeredgewidth=0)
      ax.plot([np.mean(numbers)] * 2, [y - 0.28, y + 0.28], color=colours[name], linewidth=2.4)
    else:
      ax.text(0.02, y, 'not measured', transform=ax.get_yaxis_transform(), va='center', fontsize=8, color='#777777')
  ax.set_ylim(len(values) - 0.45, -0.55)
  ax.margins(x=0.12)
  ax.tick_params(axis='y', length=0)
  ax.grid(alpha=0.25)


def _scatter(ax: Any, policies: Mapping[str, Mapping[str, Sequence[float]]], key: str, colours: Mapping[str, str]) -> None:
  for name, policy in policies.items():
    ax.plot(policy['kl'], policy[key], 'o', color=colours[name], markersize=5, alpha=0.8, markeredgewidth=0)
    middle = (np.mean(policy['kl']), np.mean(policy[key]))
    ax.annotate(name, middle, xytext=(7, 5), textcoords='offset points', fontsize=9, color=colours[name])
  ax.set_xlabel('KL to the start,\nnats per token')
  ax.set_ylabel(_COMPARED[key])
  ax.margins(0.2)
  low, high = ax.get_xlim()
  ax.set_xlim(low, high + 0.25 * (high - low))  # room for the name of the policy that went farthest
  ax.grid(alpha=0.25)
