"""The section of the report on given sets."""

from __future__ import annotations

import pytest

from polar_jax.report import evaluation


def interval(value):
  return {'accuracy': value, 'low': value - 0.1, 'high': value + 0.1, 'n': 50, 'clusters': 25, 'clustered_by': 'prompt'}


def found(**fields):
  """Return an entry of evaluation.json."""
  bins = [{'confidence': 0.6, 'accuracy': 0.5, 'n': 25}, {'confidence': 0.9, 'accuracy': 0.8, 'n': 25}]
  margin = {'baseline': 'length', 'difference': 0.2, 'low': 0.1, 'high': 0.3, 'clusters': 25, 'clustered_by': 'prompt'}
  return {
    **interval(0.7),
    'items': 40,
    'ties': 3,
    'category_mean': 0.61,
    'calibration': {'ece': 0.05, 'bins': bins},
    'baselines': {'length': interval(0.5)},
    'margin_over_best_baseline': margin,
    'references': {'true': interval(0.7)},
    'by_category': {},
    'by_length': {},
    'reference': 'true',
    **fields,
  }


def text(**fields):
  return '\n'.join(evaluation.section({'sets': {'s': found(**fields)}, 'paired_tests': 3}, {}))


def test_what_is_measured_is_told():
  plain = text()
  assert '| s | 70.0 [60.0, 80.0] | 61.0 | 40 | 50 | 3 | 5.0 | length 50.0 [40.0, 60.0] |' in plain
  assert 'There are 3 paired tests in all' in plain and 'only a part' not in plain and '###' not in plain.replace('### s: by category', '')
  cut = text(truncated={'responses': 2, 'prompts': 0})
  assert 'On s, the model reads only a part of the responses of 2 of 40 items.' in cut and 'of the prompts of' not in cut
  other = {'difference': -0.05, 'low': -0.1, 'high': 0.01, 'mcnemar': {'p': 0.031}}
  sentence = "On s, the model is -5.0 points from b on the same comparisons (95% interval -10.0 to +1.0; McNemar's exact test: p = 0.031)."
  assert sentence in text(compare={'b': other})


def test_the_style_matrix_names_reference_and_answers():
  matrix = [[None, [10.0, 20.0]], [[30.0, 40.0], None]]
  matrix[0][0] = matrix[1][1] = [None, None]
  report = text(reference_styles={'styles': ['plain', 'long'], 'matrix': matrix, 'movement': 12.34})
  assert 'moves by 12.3 points' in report and '| plain | long | 10.0 | 20.0 |' in report and '| plain | plain | - | - |' in report
  assert '| long | plain | 30.0 | 40.0 |' in report and 'wrong: plain' in report


def test_figures_show_the_numbers():
  curve = {'n': [1, 2], 'reward': [0.5, 0.7], 'low': [0.4, 0.6], 'high': [0.6, 0.8]}
  names = ('degraded_75', 'empty', 'right', 'shuffled', 'true', 'wrong')
  best = {**curve, 'oracle': [0.5, 1.0], 'random': [0.5, 0.5], 'references': dict.fromkeys(names, curve)}
  degraded = [{'words_kept': kept, **interval(value)} for kept, value in ((100, 0.8), (50, 0.6), (0, 0.5))]
  figures = evaluation.draw({'sets': {'s': found(best_of_n=best, reference_curve=degraded)}})
  assert set(figures) == {'evaluation', 'calibration', 'best_of_n', 'reference_curve'}
  lines = {name: {one.get_label(): one for one in figure.axes[0].get_lines()} for name, figure in figures.items()}
  views = [f'model, reference: {name}' for name in ('true', 'right', 'wrong', 'shuffled')]
  assert list(lines['best_of_n']) == [*views, 'random', 'oracle']
  assert list(lines['best_of_n'][views[0]].get_ydata()) == pytest.approx([50, 70])
  assert list(lines['reference_curve']['model'].get_xdata()) == [100, 50, 0]
  assert list(lines['reference_curve']['model'].get_ydata()) == pytest.approx([80, 60, 50])
  assert list(lines['calibration']['s'].get_xdata()) == pytest.approx([60, 90])
  assert list(lines['calibration']['perfect'].get_ydata()) == [50, 100]
  assert set(evaluation.draw({'sets': {'s': found()}})) == {'evaluation', 'calibration'}


def test_many_sets_have_a_panel_of_calibration_each():
  figure = evaluation.draw({'sets': {f's{i}': found() for i in range(6)}})['calibration']
  assert [ax.get_title() for ax in figure.axes] == [f's{i}' for i in range(6)]
  assert all([line.get_label() for line in ax.get_lines()] == ['perfect', 'model'] for ax in figure.axes)
  (together,) = evaluation.draw({'sets': {f's{i}': found() for i in range(5)}})['calibration'].axes
  assert len(together.get_lines()) == 6
