"""Figures of the report. matplotlib is imported inside the functions and draws off screen; colours are Okabe and Ito's."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LANGUAGE_MODEL_STAGES = ('pretrain_lm',)  # every other stage trains on pairs and starts at ln 2
_MODEL, _RULE, _CEILING, _LINE = '#0072B2', '#A6A6A6', '#E69F00', '#D55E00'
_CHANCE = 0.5
_COLUMNS = 3
_STYLE = {
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

Accuracy = Mapping[str, Any]  # {accuracy, low, high, n}


def loss_curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]], path: str | pathlib.Path) -> None:
  """Training loss, and accuracy where there is one, of every stage: raw faint, running mean bold, validation as dots.

  Args:
    metrics: stage -> rows of its metrics.jsonl: `step` and any of `loss` (nats), `accuracy`, `validation_loss`,
      `validation_accuracy`. Where a resumed run wrote a step twice the later row counts.
    path: of the PNG.
  """
  plt = _pyplot()
  stages = [stage for stage, rows in metrics.items() if rows]
  if not stages:
    raise ValueError('loss_curves: no stage has a row of metrics')
  cells, columns = _layout(metrics, stages)
  lines = len(cells) // columns
  with plt.rc_context(_STYLE):
    figure, axes = plt.subplots(lines, columns, figsize=(max(3.2 * columns, 4.8), 2.6 * lines), squeeze=False, dpi=150)
    for ax, cell in zip(axes.flat, cells, strict=True):
      if cell is None:
        ax.set_axis_off()
      else:
        _curve(ax, cell[0], metrics[cell[0]], cell[1])
    _save(plt, figure, path)


def accuracy_bars(by_split: Mapping[str, Accuracy], baselines: Mapping[str, Mapping[str, Accuracy]], path: str | pathlib.Path) -> None:
  """Accuracy of the model, every rule and the Bayes ceiling, one panel a split, with 95% intervals.

  Args:
    by_split: split -> {accuracy, low, high, n} of the model, as fractions.
    baselines: name -> split -> the same; the name `bayes` is the ceiling.
    path: of the PNG.
  """
  splits = list(dict.fromkeys([*by_split, *(s for b in baselines.values() for s in b)]))
  panels = {}
  for split in splits:
    bars = [('model', by_split[split], _MODEL)] if split in by_split else []
    panels[split.replace('_', ' ')] = bars + _baseline_bars({name: b[split] for name, b in baselines.items() if split in b})
  _bars(panels, path)


def arm_bars(arms: Mapping[str, Accuracy], baselines: Mapping[str, Accuracy], path: str | pathlib.Path) -> None:
  """Preference accuracy of every fine-tuning arm beside the rules, with 95% intervals.

  Args:
    arms: arm -> {accuracy, low, high, n}, as fractions.
    baselines: name -> the same.
    path: of the PNG.
  """
  bars = [(name.replace('_', ' '), value, _MODEL) for name, value in arms.items()]
  _bars({'preference accuracy by arm': bars + _baseline_bars(baselines)}, path)


def _pyplot() -> Any:
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  return plt


def _every_tenth() -> Any:
  from matplotlib import ticker

  return ticker.MultipleLocator(0.1)


def _save(plt: Any, figure: Any, path: str | pathlib.Path) -> None:
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, metadata={'Software': None})
  plt.close(figure)


def _layout(metrics: Mapping[str, Sequence[Mapping[str, Any]]], stages: Sequence[str]) -> tuple[list[tuple[str, str] | None], int]:
  """(stage, 'loss' or 'accuracy') of every cell of the grid, None for an empty one, and the columns; accuracy stands below loss."""
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


def _has_accuracy(rows: Sequence[Mapping[str, Any]]) -> bool:
  return any('accuracy' in row or 'validation_accuracy' in row for row in rows)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, values) of one key, ordered by step."""
  by_step = {row['step']: row[key] for row in rows if row.get(key) is not None}
  steps = sorted(by_step)
  return np.array(steps), np.array([by_step[s] for s in steps], dtype=np.float64)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over a thirtieth of the run; a value that is not finite is left out of the means around it."""
  width = 2 * (len(values) // 60) + 1
  finite = np.isfinite(values)
  kernel = np.ones(width)
  counts = np.convolve(finite, kernel, mode='same')
  with np.errstate(invalid='ignore'):
    return np.convolve(np.where(finite, values, 0.0), kernel, mode='same') / counts


def _curve(ax: Any, stage: str, rows: Sequence[Mapping[str, Any]], kind: str) -> None:
  steps, values = _series(rows, kind)
  if steps.size:
    ax.plot(steps, values, color=_MODEL, alpha=0.25, linewidth=0.8)
    ax.plot(steps, _running_mean(values), color=_MODEL, linewidth=1.8, label='training')
  validation_steps, validation = _series(rows, f'validation_{kind}')
  if validation_steps.size:
    ax.plot(validation_steps, validation, 'o', color=_LINE, markersize=4.5, label='validation')
  if stage not in LANGUAGE_MODEL_STAGES:
    level, name = (math.log(2), 'ln 2') if kind == 'loss' else (_CHANCE, 'chance')
    ax.axhline(level, color='black', linestyle='--', linewidth=1, label=name)
  ax.set_title(f'{stage.replace("_", " ")}: {kind}')
  ax.set_xlabel('step')
  if kind == 'loss':
    ax.set_ylabel('nats')
  ax.grid(alpha=0.25)
  ax.legend()


def _baseline_bars(baselines: Mapping[str, Accuracy]) -> list[tuple[str, Accuracy, str]]:
  """Rules from the most accurate down, then the ceiling."""
  rules = sorted((name for name in baselines if name != 'bayes'), key=lambda name: -baselines[name]['accuracy'])
  bars = [(name.replace('_', ' '), baselines[name], _RULE) for name in rules]
  return bars + ([('Bayes ceiling', baselines['bayes'], _CEILING)] if 'bayes' in baselines else [])


def _bars(panels: Mapping[str, Sequence[tuple[str, Accuracy, str]]], path: str | pathlib.Path) -> None:
  """Horizontal bars from chance to the accuracy, so that their length is what was learned."""
  if not any(panels.values()):
    raise ValueError('no accuracy to draw')
  plt = _pyplot()
  longest = max(map(len, panels.values()))
  values = [v for bars in panels.values() for _, v, _ in bars]
  left = min(0.45, *(v['low'] - 0.02 for v in values))
  right = max(v['high'] for v in values)
  with plt.rc_context(_STYLE):
    width = 10 if len(panels) > 1 else 6.5
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 1.1 + 0.36 * longest), squeeze=False, dpi=150)
    for ax, (title, bars) in zip(axes.flat, panels.items(), strict=True):
      for y, (_, value, colour) in enumerate(bars):
        accuracy = value['accuracy']
        errors = [[max(accuracy - value['low'], 0.0)], [max(value['high'] - accuracy, 0.0)]]
        ax.barh(y, accuracy - _CHANCE, left=_CHANCE, color=colour, height=0.68)
        ax.errorbar(accuracy, y, xerr=errors, color='black', linewidth=1.1, capsize=2.5)
        ax.annotate(
          f'{100 * accuracy:.1f}', (max(value['high'], _CHANCE), y), xytext=(5, 0), textcoords='offset points', va='center', fontsize=9
        )
      ax.axvline(_CHANCE, color='black', linewidth=1)
      ax.set_yticks(range(len(bars)), [name for name, _, _ in bars])
      ax.set_ylim(longest - 0.4, -0.6)
      ax.set_xlim(left, right + 0.22 * (right - left))
      ax.xaxis.set_major_locator(_every_tenth())
      ax.set_xticks([tick for tick in ax.get_xticks() if left <= tick <= 1.0 + 1e-9])
      ax.xaxis.set_major_formatter(lambda x, _: f'{100 * x:.0f}')
      ax.set_xlabel('accuracy, % (95% interval)')
      ax.set_title(title)
      ax.tick_params(axis='y', length=0)
      ax.grid(axis='x', alpha=0.25)
    _save(plt, figure, path)
