"""Figures of the report: loss curves and bars of accuracy. Each function returns a matplotlib Figure, which `save` writes.

matplotlib is imported inside the functions, because only this package needs it. Colors are those of Okabe and Ito.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_jax.runtime import paths

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

LANGUAGE_MODEL_STAGES = ('pretrain_lm',)  # every other stage trains on pairs, where chance is a loss of ln 2
_MODEL, _HEURISTIC, _BAYES, _LINE = '#0072B2', '#A6A6A6', '#E69F00', '#D55E00'
_LINES = (_MODEL, _LINE, _BAYES, '#009E73', '#CC79A7', _HEURISTIC, 'black')
DPI = 150
_CHANCE = 0.5
_COLUMNS = 3
_STYLE: dict[Any, Any] = {
  'font.size': 10,
  'axes.titlesize': 11,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.axisbelow': True,
  'legend.edgecolor': 'none',
  'legend.framealpha': 0.85,
  'legend.fontsize': 9,
  'figure.constrained_layout.use': True,
}

Accuracy = Mapping[str, Any]  # {accuracy, low, high, ...}
Curves = Mapping[str, Mapping[str, Sequence[float]]]  # name of a line -> x, y and perhaps low and high
Records = Sequence[Mapping[str, Any]]  # of a metrics.jsonl


def style(**settings: Any) -> contextlib.AbstractContextManager[None]:
  """Return a context in which figures are drawn in the report's style, with further rc settings (`_` stands for a dot)."""
  import matplotlib

  further: dict[Any, Any] = {name.replace('_', '.', 1): value for name, value in settings.items()}
  return matplotlib.rc_context({**_STYLE, **further})


def new_figure(width: float, height: float) -> Figure:
  """Return an empty figure of a size in inches. It belongs to no window and needs no closing."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), dpi=DPI)


def save(figure: Figure, path: str | pathlib.Path) -> None:
  """Write a figure as PNG; the same figure gives the same bytes."""
  content = io.BytesIO()
  with style():
    figure.savefig(content, format='png', metadata={'Software': None})
  paths.write_atomically(pathlib.Path(path), content.getvalue())


def save_all(figures: Mapping[str, Figure], workdir: pathlib.Path) -> dict[str, str]:
  """Write figures to figures/NAME.png of a workdir; return name -> link relative to the workdir."""
  links = {name: f'figures/{name}.png' for name in figures}
  for name, figure in figures.items():
    save(figure, workdir / links[name])
  return links


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Return (steps, values) of one metric, ordered by step. If a resumed run wrote a step twice, the later record counts."""
  by_step = {record['step']: record[key] for record in records if record.get(key) is not None}
  steps = sorted(by_step)
  return np.array(steps), np.array([by_step[s] for s in steps], dtype=np.float64)


def running_mean(values: np.ndarray, share: int) -> np.ndarray:
  """Return the centered mean over 1/`share` of the values, over fewer at the ends; values that are not finite are left out."""
  width = 2 * (len(values) // (2 * share)) + 1
  finite = np.isfinite(values)
  kernel = np.ones(width)
  counts = np.convolve(finite, kernel, mode='same')
  with np.errstate(invalid='ignore'):
    return np.convolve(np.where(finite, values, 0.0), kernel, mode='same') / counts


def loss_curves(metrics: Mapping[str, Records]) -> Figure:
  """Draw training loss, and accuracy if there is one, of every stage: raw values faint, running mean bold, validation as dots.

  Args:
    metrics: stage -> records of its metrics.jsonl: `step` and any of `loss` (nats), `accuracy`, `validation_loss`,
      `validation_accuracy`.

  Raises:
    ValueError: if no stage has a record.
  """
  stages = [stage for stage, records in metrics.items() if records]
  if not stages:
    raise ValueError('loss_curves: no stage has a record of metrics')
  cells, columns = _layout(metrics, stages)
  lines = len(cells) // columns
  shown = set[tuple[str, ...]]()  # legends
  with style():
    figure = new_figure(max(3.2 * columns, 4.8), 2.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for ax, cell in zip(axes.flat, cells, strict=True):
      if cell is None:
        ax.set_axis_off()
        continue
      _curve(ax, cell[0], metrics[cell[0]], cell[1])
      labels = tuple(ax.get_legend_handles_labels()[1])
      if labels and labels not in shown:  # one of each kind, because it hides a part of the lines
        ax.legend()
        shown.add(labels)
  return figure


def accuracy_bars(by_split: Mapping[str, Accuracy], baselines: Mapping[str, Mapping[str, Accuracy]]) -> Figure:
  """Draw the accuracy of the model, the baselines and the Bayes-optimal discriminator with 95% intervals, one panel per split.

  Args:
    by_split: split -> {accuracy, low, high} of the model, as fractions.
    baselines: name -> split -> the same; the name `bayes` is the Bayes-optimal discriminator.

  Raises:
    ValueError: if there is no accuracy to draw.
  """
  splits = list(dict.fromkeys([*by_split, *(s for b in baselines.values() for s in b)]))
  panels = {}
  for split in splits:
    bars = [('model', by_split[split], _MODEL)] if split in by_split else []
    panels[split.replace('_', ' ')] = bars + _baseline_bars({name: b[split] for name, b in baselines.items() if split in b})
  return _bars(panels)


def arm_bars(arms: Mapping[str, Accuracy], baselines: Mapping[str, Accuracy]) -> Figure:
  """Draw the preference accuracy of every fine-tuning arm and of the baselines with 95% intervals.

  Args:
    arms: arm -> {accuracy, low, high}, as fractions.
    baselines: name -> the same.

  Raises:
    ValueError: if there is no accuracy to draw.
  """
  bars = [(name.replace('_', ' '), value, _MODEL) for name, value in arms.items()]
  return _bars({'preference accuracy by arm': bars + _baseline_bars(baselines)})


def curves(panels: Mapping[str, Curves], x_label: str, y_label: str) -> Figure:
  """Draw lines with their 95% bands where they have them, in percent, one panel for each set.

  Args:
    panels: title -> name of a line -> {x, y, and low and high if it has a band}, as fractions; lines are in the order of `_LINES`.
    x_label: of all panels.
    y_label: of the first panel of each line.

  Raises:
    ValueError: if there is no line.
  """
  if not any(panels.values()):
    raise ValueError('no line to draw')
  with style():
    figure, axes = _grid(len(panels), max(6.0 * min(len(panels), _COLUMNS), 6.4), 3.2)
    for i, (ax, (title, lines)) in enumerate(zip(axes, panels.items(), strict=True)):
      for color, (name, line) in zip(itertools.cycle(_LINES), lines.items(), strict=False):
        y = 100 * np.array(line['y'])
        ax.plot(line['x'], y, color=color, marker='o', markersize=3, linewidth=1.6, label=name)
        if 'low' in line:
          ax.fill_between(line['x'], 100 * np.array(line['low']), 100 * np.array(line['high']), color=color, alpha=0.15, linewidth=0)
      ax.set_title(title)
      ax.set_xlabel(x_label)
      ax.grid(alpha=0.25)
      ax.legend(loc='center left', bbox_to_anchor=(1.0, 0.5))  # bands may be anywhere in the panel
      if i % _COLUMNS == 0:
        ax.set_ylabel(y_label)
  return figure


def _grid(panels: int, width: float, line_height: float) -> tuple[Figure, list[Axes]]:
  """Return a figure, and the axes of so many panels in lines of at most `_COLUMNS`."""
  columns = min(panels, _COLUMNS)
  lines = -(-panels // columns)
  figure = new_figure(width, line_height * lines)
  axes = figure.subplots(lines, columns, squeeze=False)
  for ax in axes.flat[panels:]:
    ax.remove()
  return figure, list(axes.flat[:panels])


def _layout(metrics: Mapping[str, Records], stages: Sequence[str]) -> tuple[list[tuple[str, str] | None], int]:
  """Return (stage, 'loss' or 'accuracy') of every cell of the grid, None for an empty one, and the number of columns.

  Accuracy is placed below the loss of the same stage.
  """
  if len(stages) == 1:
    kinds = ['loss', 'accuracy'] if _has_accuracy(metrics[stages[0]]) else ['loss']
    return [(stages[0], kind) for kind in kinds], len(kinds)
  columns = min(_COLUMNS, len(stages))
  cells: list[tuple[str, str] | None] = []
  for start in range(0, len(stages), columns):
    line = stages[start : start + columns]
    empty = [None] * (columns - len(line))
    cells += [*((stage, 'loss') for stage in line), *empty]
    if any(_has_accuracy(metrics[stage]) for stage in line):
      cells += [*((stage, 'accuracy') if _has_accuracy(metrics[stage]) else None for stage in line), *empty]
  return cells, columns


def _has_accuracy(records: Records) -> bool:
  return any('accuracy' in record or 'validation_accuracy' in record for record in records)


def _curve(ax: Axes, stage: str, records: Records, kind: str) -> None:
  steps, values = series(records, kind)
  if steps.size:
    ax.plot(steps, values, color=_MODEL, alpha=0.25, linewidth=0.8)
    ax.plot(steps, running_mean(values, share=30), color=_MODEL, linewidth=1.8, label='training')
  validation_steps, validation = series(records, f'validation_{kind}')
  if validation_steps.size:
    ax.plot(validation_steps, validation, 'o', color=_LINE, markersize=4.5, label='validation')
  if stage not in LANGUAGE_MODEL_STAGES:
    level, name = (math.log(2), 'ln 2') if kind == 'loss' else (_CHANCE, 'chance')
    ax.axhline(level, color='black', linestyle='--', linewidth=1, label=name)
  ax.set_title(f'{stage.replace("_", " ")}: {kind}', fontsize='medium')
  ax.set_xlabel('step')
  if kind == 'loss':
    ax.set_ylabel('nats')
  ax.grid(alpha=0.25)


def _baseline_bars(baselines: Mapping[str, Accuracy]) -> list[tuple[str, Accuracy, str]]:
  """Return (name, accuracy, color): baselines by falling accuracy, then the Bayes-optimal discriminator."""
  heuristics = sorted((name for name in baselines if name != 'bayes'), key=lambda name: -baselines[name]['accuracy'])
  bars = [(name.replace('_', ' '), baselines[name], _HEURISTIC) for name in heuristics]
  return bars + ([('Bayes-optimal', baselines['bayes'], _BAYES)] if 'bayes' in baselines else [])


def _bars(panels: Mapping[str, Sequence[tuple[str, Accuracy, str]]]) -> Figure:
  """Draw horizontal bars from chance to the accuracy, so that their length is what was learned."""
  if not any(panels.values()):
    raise ValueError('no accuracy to draw')
  longest = max(map(len, panels.values()))
  values = [v for bars in panels.values() for _, v, _ in bars]
  left = min(0.45, *(v['low'] - 0.02 for v in values))
  right = max(v['high'] for v in values)
  with style():
    figure, axes = _grid(len(panels), 10 if len(panels) > 1 else 6.5, 1.1 + 0.36 * longest)
    for ax, (title, bars) in zip(axes, panels.items(), strict=True):
      for y, bar in enumerate(bars):
        _bar(ax, y, *bar)
      ax.axvline(_CHANCE, color='black', linewidth=1)
      ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
      ax.set_ylim(longest - 0.4, -0.6)
      _percent_axis(ax, left, right)
      ax.set_title(title)
  return figure


def _bar(ax: Axes, y: int, name: str, value: Accuracy, color: str) -> None:
  """Draw one bar with its interval and its number."""
  accuracy = value['accuracy']
  errors = [[max(accuracy - value['low'], 0.0)], [max(value['high'] - accuracy, 0.0)]]
  ax.barh(y, accuracy - _CHANCE, left=_CHANCE, color=color, height=0.68, label=name)
  ax.errorbar(accuracy, y, xerr=errors, color='black', linewidth=1.1, capsize=2.5)
  where = (max(value['high'], _CHANCE), y)
  ax.annotate(f'{100 * accuracy:.1f}', where, xytext=(5, 0), textcoords='offset points', va='center', fontsize=9)


def _percent_axis(ax: Axes, left: float, right: float) -> None:
  from matplotlib import ticker

  ax.set_xlim(left, right + 0.22 * (right - left))  # room for the numbers next to the bars
  ax.xaxis.set_major_locator(ticker.MultipleLocator(0.1))
  ax.set_xticks([tick for tick in ax.get_xticks() if left <= tick <= 1.0 + 1e-9])
  ax.xaxis.set_major_formatter(lambda x, _: f'{100 * x:.0f}')
  ax.set_xlabel('accuracy, % (95% interval)')
  ax.tick_params(axis='y', length=0)
  ax.grid(axis='x', alpha=0.25)
