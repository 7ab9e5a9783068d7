"""Figures of reinforcement fine-tuning: the dashboard over steps, and a comparison of policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from polar_jax.report import plots
from polar_jax.report.plots import Records

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

# Colors of Okabe and Ito, in the order in which runs, series or policies take them.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
_DASHES: tuple[Literal['-', '--', ':'], ...] = ('-', '--', ':')
_GRAY = '#555555'
_COLUMNS = 4
_FAINT = 0.22
_SMOOTHED = 15  # a step of PPO is noisier than one of supervised training, so means are over a fifteenth of the run


class Panel(NamedTuple):
  """A panel of the dashboard: one metric, or a few with the same unit."""

  title: str
  unit: str
  series: Mapping[str, str]  # key of a record -> its name in the legend
  zero: bool = False  # whether 0 is a meaningful value, marked by a line
  unscaled: str = ''  # a key that does not set the scale of the panel, because its values can have any size


_PANELS = (
  Panel('reward that PPO optimizes', '', {'reward': 'reward'}),
  Panel('score', '', {'raw': 'own reference', 'shuffled': 'other reference', 'length_free': 'length-free'}, unscaled='length_free'),
  Panel('score: own minus other', '', {'shuffled_gap': 'gap'}, zero=True),
  Panel('rule', 'share correct', {'rule': 'rule'}),
  Panel('KL to the initial policy', 'nats per token', {'kl': 'KL'}, zero=True),
  Panel('entropy', 'nats per token', {'entropy': 'entropy'}),
  Panel('length', 'tokens', {'length': 'length'}),
  Panel('truncated or empty', 'share of responses', {'truncated': 'truncated', 'empty': 'empty'}),
  Panel('overlap with the reference', 'share of words', {'overlap': 'overlap'}),
  Panel('distinct n-grams', 'share', {'distinct_2': 'bigrams', 'distinct_1': 'words'}),
  Panel('clip fraction', 'share of tokens', {'clip_fraction': 'policy', 'value_clip_fraction': 'value'}),
  Panel('explained variance', '', {'explained_variance': 'critic'}, zero=True),
)
_HELD_OUT = {'raw': 'evaluation_raw', 'rule': 'evaluation_rule', 'length': 'evaluation_length', 'overlap': 'evaluation_overlap'}

_COMPARED = {
  'reward': 'reward',
  'target_nll': 'NLL under the target,\nnats per token',
  'relative_nll': 'NLL minus the pool mean,\nnats per token',
}


def dashboard(runs: Mapping[str, Records]) -> Figure:
  """Draw a run of PPO step by step, one panel per metric; panels without a measurement are left out.

  Each run has one color and each metric of a panel one line style; if there is a single run, its metrics differ in color. Steps are
  faint and their running mean bold; dots are measurements on held-out prompts.

  Args:
    runs: name of a run -> records of its metrics.jsonl.

  Raises:
    ValueError: if no run has a metric to draw.
  """
  panels = panels_of(runs)
  if not panels:
    raise ValueError('dashboard: no run has a record of metrics')
  columns = min(_COLUMNS, len(panels))
  lines = -(-len(panels) // columns)
  with plots.style(legend_fontsize=8):
    figure = plots.new_figure(max(3.0 * columns, 4.8), 2.3 * lines + 0.35)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
      ax.set_axis_off()
    for i, panel in enumerate(panels):
      _draw_panel(axes.flat[i], panel, runs)
      axes.flat[i].locator_params(axis='x', integer=True)
      if i // columns == lines - 1:
        axes.flat[i].set_xlabel('step')
    _legend_of_runs(figure, runs)
  return figure


def panels_of(runs: Mapping[str, Records]) -> list[Panel]:
  """Return the panels for which some run has a finite value."""
  return [p for p in _PANELS if any(finite_points(records, key)[0].size for records in runs.values() for key in p.series)]


def finite_points(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Return (steps, values) of one metric where it is finite."""
  steps, values = plots.series(records, key)
  finite = np.isfinite(values)
  return steps[finite], values[finite]


def comparison(policies: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
  """Draw policies next to each other, a dot per seed and a bar at the mean, and their likelihood against KL to the initial policy.

  Args:
    policies: name to show -> {reward, target_nll, relative_nll, kl}, each one number per seed; any may be missing.

  Raises:
    ValueError: if no policy has a reward or a likelihood.
  """
  keys = [key for key in _COMPARED if any(p.get(key) for p in policies.values())]
  if not keys:
    raise ValueError('comparison: no policy has a reward or a likelihood')
  height = next((key for key in ('relative_nll', 'target_nll') if key in keys), keys[0])
  scattered = {n: p for n, p in policies.items() if p.get('kl') and len(p['kl']) == len(p.get(height, ()))}
  panels = len(keys) + (len(scattered) > 1)
  colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(policies)}
  with plots.style():
    figure = plots.new_figure(1.2 + 2.9 * panels, 1.3 + 0.36 * max(len(policies), 4))
    axes = figure.subplots(1, panels, squeeze=False)
    for i, (ax, key) in enumerate(zip(axes.flat, keys, strict=False)):
      _strip(ax, {name: p.get(key, ()) for name, p in policies.items()}, colors)
      ax.set_xlabel(_COMPARED[key])
      ax.set_yticks(range(len(policies)), list(policies) if i == 0 else [''] * len(policies))
    if len(scattered) > 1:
      _scatter(axes.flat[-1], scattered, height, colors)
  return figure


def _draw_panel(ax: Axes, panel: Panel, runs: Mapping[str, Records]) -> None:
  single = len(runs) == 1
  shown = [key for key in panel.series if any(finite_points(records, key)[0].size for records in runs.values())]
  dots = False
  for r, records in enumerate(runs.values()):
    for s, key in enumerate(shown):
      color = _COLORS[(s if single else r) % len(_COLORS)]
      steps, values = finite_points(records, key)
      if len(shown) == 1 or (single and s == 0):
        ax.plot(steps, values, color=color, alpha=_FAINT, linewidth=0.8)
      marker = '.' if len(steps) == 1 else None
      ax.plot(steps, plots.running_mean(values, _SMOOTHED), color=color, linestyle=_DASHES[s], linewidth=1.6, marker=marker)
      held_out, measured = finite_points(records, _HELD_OUT.get(key, ''))
      if held_out.size:
        ax.plot(held_out, measured, 'o', color=color, markersize=4.5, markeredgecolor='white', markeredgewidth=0.6)
        dots = True
  if panel.zero:
    ax.axhline(0, color='black', linestyle='--', linewidth=0.8)
  ax.set_title(panel.title)
  ax.set_ylabel(panel.unit)
  ax.margins(y=0.1)
  _scale(ax, [finite_points(records, key)[1] for records in runs.values() for key in shown if key != panel.unscaled])
  ax.grid(alpha=0.25)
  _legend_of_series(ax, [panel.series[key] for key in shown], dots, single)


def _scale(ax: Axes, series: Sequence[np.ndarray]) -> None:
  """Limit the y axis to the range of these series, extended by that range on both sides."""
  values = np.concatenate([*series, np.zeros(0)])
  if values.size and np.ptp(values):
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, values.min() - np.ptp(values)), min(high, values.max() + np.ptp(values)))


def _legend_of_series(ax: Axes, names: Sequence[str], dots: bool, single: bool) -> None:
  from matplotlib.lines import Line2D

  handles = []
  if len(names) > 1:
    colors = [_COLORS[i] if single else _GRAY for i in range(len(names))]
    handles = [Line2D([], [], color=c, linestyle=_DASHES[i], linewidth=1.6, label=names[i]) for i, c in enumerate(colors)]
  if dots:
    handles.append(Line2D([], [], color=_GRAY, marker='o', linestyle='', markersize=4, label='held-out'))
  if handles:
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + (high - low) * 0.14 * -(-len(handles) // 2))  # room above the curves
    ax.legend(handles=handles, loc='upper left', ncols=2, handlelength=1.6, columnspacing=1.0, borderaxespad=0.1, borderpad=0.2)


def _legend_of_runs(figure: Figure, runs: Mapping[str, Records]) -> None:
  from matplotlib.lines import Line2D

  if len(runs) > 1:
    handles = [Line2D([], [], color=_COLORS[i % len(_COLORS)], linewidth=2, label=name) for i, name in enumerate(runs)]
    figure.legend(handles=handles, loc='outside upper center', ncols=min(len(runs), 6), fontsize=10)


def _strip(ax: Axes, values: Mapping[str, Sequence[float]], colors: Mapping[str, str]) -> None:
  for y, (name, numbers) in enumerate(values.items()):
    if numbers:
      ax.plot(numbers, [y] * len(numbers), 'o', color=colors[name], markersize=5, alpha=0.6, markeredgewidth=0)
      ax.plot([np.mean(numbers)] * 2, [y - 0.28, y + 0.28], color=colors[name], linewidth=2.4)
    else:
      ax.text(0.02, y, 'not measured', transform=ax.get_yaxis_transform(), va='center', fontsize=8, color='#777777')
  ax.set_ylim(len(values) - 0.45, -0.55)
  ax.margins(x=0.12)
  ax.tick_params(axis='y', length=0)
  ax.grid(alpha=0.25)


def _scatter(ax: Axes, policies: Mapping[str, Mapping[str, Sequence[float]]], key: str, colors: Mapping[str, str]) -> None:
  for name, policy in policies.items():
    ax.plot(policy['kl'], policy[key], 'o', color=colors[name], markersize=5, alpha=0.8, markeredgewidth=0)
    middle: Any = (np.mean(policy['kl']), np.mean(policy[key]))
    ax.annotate(name, middle, xytext=(7, 5), textcoords='offset points', fontsize=9, color=colors[name])
  ax.set_xlabel('KL to the initial policy,\nnats per token')
  ax.set_ylabel(_COMPARED[key])
  ax.margins(0.2)
  low, high = ax.get_xlim()
  ax.set_xlim(low, high + 0.25 * (high - low))  # room for the name of the policy farthest to the right
  ax.grid(alpha=0.25)
