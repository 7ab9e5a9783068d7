"""The content of the figures of training and accuracy, read from their axes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polar_jax.report import plots


def accuracy(value, low, high):
  return {'accuracy': value, 'low': low, 'high': high}


def bars_of(ax):
  """Return label of the tick -> (left end, right end) of the bar at that height."""
  spans = {round(p.get_y() + p.get_height() / 2): (p.get_x(), p.get_x() + p.get_width()) for p in ax.patches}
  return {tick.get_text(): spans[int(y)] for y, tick in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}


def error_bars_of(ax):
  """Return label of the tick -> (low, high) of the error bar at that height."""
  segments = [segment for collection in ax.collections for segment in collection.get_segments()]
  spans = {round(float(s[0, 1])): (float(s[:, 0].min()), float(s[:, 0].max())) for s in segments}
  return {tick.get_text(): spans[int(y)] for y, tick in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}


def test_bars_reach_from_chance_to_the_accuracy_on_its_side():
  figure = plots.arm_bars(
    {'pretrained_only': accuracy(0.8, 0.75, 0.83), 'finetuned_only': accuracy(0.42, 0.4, 0.47)},
    {'length': accuracy(0.55, 0.5, 0.6), 'words': accuracy(0.6, 0.59, 0.62), 'bayes': accuracy(0.99, 0.98, 1.0)},
  )
  (ax,) = figure.axes
  bars = bars_of(ax)
  assert list(bars) == ['pretrained only', 'finetuned only', 'words', 'length', 'Bayes-optimal']  # baselines by falling accuracy
  assert bars['pretrained only'] == pytest.approx((0.5, 0.8)) and bars['length'] == pytest.approx((0.5, 0.55))
  start, end = bars['finetuned only']
  assert start == pytest.approx(0.5) and end == pytest.approx(0.42)  # below chance: to the left
  low, high = ax.get_xlim()
  assert low < 0.4 and high > 1.0
  below = ax.get_ylim()
  assert below[0] > below[1]  # the first bar is on top


def test_error_bars_are_the_intervals():
  values = {'a': accuracy(0.7, 0.6, 0.72), 'b': accuracy(0.4, 0.35, 0.49)}
  errors = error_bars_of(plots.arm_bars(values, {}).axes[0])
  assert {name: pytest.approx(span) for name, span in errors.items()} == {n: (v['low'], v['high']) for n, v in values.items()}


def test_every_split_has_a_panel_with_its_own_numbers():
  by_split = {'validation': accuracy(0.7, 0.65, 0.75), 'unseen_policies': accuracy(0.6, 0.55, 0.65)}
  baselines = {'words': {'validation': accuracy(0.55, 0.5, 0.6)}, 'bayes': {'unseen_policies': accuracy(0.9, 0.88, 0.92)}}
  figure = plots.accuracy_bars(by_split, baselines)
  first, second = figure.axes
  assert (first.get_title(), second.get_title()) == ('validation', 'unseen policies')
  assert bars_of(first) == {'model': pytest.approx((0.5, 0.7)), 'words': pytest.approx((0.5, 0.55))}
  assert bars_of(second) == {'model': pytest.approx((0.5, 0.6)), 'Bayes-optimal': pytest.approx((0.5, 0.9))}
  assert [text.get_text() for text in second.texts] == ['60.0', '90.0']
  assert all(ax.get_xlabel() == 'accuracy, % (95% interval)' for ax in figure.axes)
  model, words = (first.patches[i].get_facecolor() for i in (0, 1))
  assert model == second.patches[0].get_facecolor() != words  # the model has one color in all panels


def columns_of(figure):
  return len({round(ax.get_position().x0, 3) for ax in figure.axes})


def test_many_panels_are_several_lines():
  names = [f'set_{i}' for i in range(7)]
  figure = plots.accuracy_bars({name: accuracy(0.6, 0.55, 0.65) for name in names}, {})
  assert [ax.get_title() for ax in figure.axes] == [name.replace('_', ' ') for name in names] and columns_of(figure) == 3
  assert figure.get_size_inches()[1] > 2.5 * plots.accuracy_bars({'a': accuracy(0.6, 0.55, 0.65)}, {}).get_size_inches()[1]
  line = {'x': [1, 2], 'y': [0.2, 0.4]}
  figure = plots.curves({name: {'model': line} for name in names[:5]}, 'n', 'right, %')
  assert [ax.get_ylabel() for ax in figure.axes] == ['right, %', '', '', 'right, %', ''] and columns_of(figure) == 3


def test_a_legend_is_shown_once():
  metrics = {f's{i}': [{'step': 0, 'loss': 1.0, 'accuracy': 0.5}, {'step': 1, 'loss': 1.0, 'accuracy': 0.5}] for i in range(4)}
  figure = plots.loss_curves(metrics)
  shown = [ax.get_title() for ax in figure.axes if ax.get_legend()]
  assert shown == ['s0: loss', 's0: accuracy']


def test_chance_is_marked_and_ticks_are_percent():
  (ax,) = plots.arm_bars({'a': accuracy(0.7, 0.6, 0.8)}, {}).axes
  vertical = [line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1] == 0.5]
  assert len(vertical) == 1
  format_tick = ax.xaxis.get_major_formatter()
  ticks = ax.get_xticks()
  assert ticks[0] == pytest.approx(0.5) and [format_tick(x) for x in ticks] == [str(50 + 10 * i) for i in range(len(ticks))]


def curve(steps, start, slope, **more):
  return [{'step': s, 'loss': start + slope * s, **more} for s in range(steps)]


def test_curves_show_each_stage_raw_smoothed_and_on_validation():
  metrics = {
    'pretrain_lm': [*curve(120, 4.0, -0.01), {'step': 119, 'validation_loss': 2.5}],
    'pretrain': [*curve(60, 0.7, -0.001, accuracy=0.6), {'step': 30, 'validation_accuracy': 0.65, 'validation_loss': 0.66}],
  }
  figure = plots.loss_curves(metrics)
  axes = {ax.get_title(): ax for ax in figure.axes if ax.axison}
  assert list(axes) == ['pretrain lm: loss', 'pretrain: loss', 'pretrain: accuracy']
  raw, smooth, validation = axes['pretrain lm: loss'].lines
  np.testing.assert_allclose(raw.get_xydata(), [(s, 4.0 - 0.01 * s) for s in range(120)])
  np.testing.assert_allclose(smooth.get_ydata()[5:-5], raw.get_ydata()[5:-5])  # the mean of a line is the line
  assert smooth.get_ydata()[0] < raw.get_ydata()[0] and smooth.get_ydata()[-1] > raw.get_ydata()[-1]
  assert raw.get_alpha() < 0.5 and smooth.get_alpha() is None and smooth.get_label() == 'training'
  assert validation.get_xydata().tolist() == [[119, 2.5]] and validation.get_label() == 'validation'
  *_, validation, chance = axes['pretrain: loss'].lines
  assert validation.get_xydata().tolist() == [[30, 0.66]]
  assert chance.get_label() == 'ln 2' and set(chance.get_ydata()) == {math.log(2)}
  *_, validation, chance = axes['pretrain: accuracy'].lines
  assert validation.get_xydata().tolist() == [[30, 0.65]]
  assert chance.get_label() == 'chance' and set(chance.get_ydata()) == {0.5}
  assert all(ax.get_xlabel() == 'step' for ax in axes.values())
  assert [ax.get_ylabel() for ax in axes.values()] == ['nats', 'nats', '']


def test_a_language_model_has_no_line_at_chance():
  (ax,) = plots.loss_curves({'pretrain_lm': curve(3, 4.0, -0.1)}).axes
  assert [line.get_label() for line in ax.lines][1:] == ['training']


@pytest.mark.parametrize('share', [15, 30])
def test_running_mean_matches_a_slow_one_and_skips_nan(share):
  values = np.random.default_rng(0).normal(size=150)
  values[40] = np.nan
  got = plots.running_mean(values, share)
  half = 150 // (2 * share)
  for i in range(150):
    window = values[max(0, i - half) : i + half + 1]
    assert got[i] == pytest.approx(np.mean(window[np.isfinite(window)]))


def test_a_step_written_twice_counts_once_with_the_later_value():
  steps, values = plots.series([{'step': 2, 'loss': 1.0}, {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 5.0}, {'step': 3}], 'loss')
  assert steps.tolist() == [1, 2] and values.tolist() == [3.0, 5.0]


@pytest.mark.parametrize('stages', [1, 2, 5])
def test_every_curve_has_one_panel_and_accuracy_is_below_its_loss(stages):
  metrics = {f's{i}': [{'step': 0, 'loss': 1.0, **({} if i == 0 else {'accuracy': 0.5})}] for i in range(stages)}
  cells, columns = plots._layout(metrics, list(metrics))
  wanted = [(s, 'loss') for s in metrics] + [(s, 'accuracy') for s in metrics if s != 's0']
  assert sorted(c for c in cells if c) == sorted(wanted) and len(cells) % columns == 0
  for i, cell in enumerate(cells):
    if cell and cell[1] == 'accuracy':
      assert cells[i - columns] == (cell[0], 'loss')


def test_lines_and_bands_are_the_numbers_in_percent():
  line = {'x': [1, 2, 3], 'y': [0.2, 0.4, 0.3], 'low': [0.1, 0.3, 0.2], 'high': [0.3, 0.6, 0.7]}
  figure = plots.curves({'a': {'model': line, 'oracle': {'x': [1, 2], 'y': [0.5, 1.0]}}, 'b': {'model': line}}, 'n', 'right, %')
  first, second = figure.axes
  assert (first.get_title(), second.get_title(), first.get_xlabel(), first.get_ylabel()) == ('a', 'b', 'n', 'right, %')
  drawn = {one.get_label(): (list(one.get_xdata()), list(one.get_ydata())) for one in first.get_lines()}
  assert drawn == {'model': ([1, 2, 3], pytest.approx([20, 40, 30])), 'oracle': ([1, 2], [50, 100])}
  (band,) = first.collections
  corners = {(round(x), round(y)) for x, y in band.get_paths()[0].vertices}
  assert corners == {(1, 10), (2, 30), (3, 20), (1, 30), (2, 60), (3, 70)}
  assert len({one.get_color() for one in first.get_lines()}) == 2


def test_nothing_to_draw_is_an_error():
  with pytest.raises(ValueError, match='no line to draw'):
    plots.curves({}, 'x', 'y')
  with pytest.raises(ValueError, match='no stage'):
    plots.loss_curves({'pretrain': []})
  with pytest.raises(ValueError, match='no accuracy'):
    plots.arm_bars({}, {})


def test_saved_figures_are_reproducible_pngs(tmp_path):
  for name in ('a', 'b'):
    plots.save(plots.arm_bars({'a': accuracy(0.7, 0.6, 0.8)}, {}), tmp_path / name / 'x.png')
  first, second = ((tmp_path / name / 'x.png').read_bytes() for name in ('a', 'b'))
  assert first.startswith(b'\x89PNG') and first == second
