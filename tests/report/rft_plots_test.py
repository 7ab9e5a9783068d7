"""The content of the figures of reinforcement fine-tuning, read from their axes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polar_jax.report import rft_plots


def run(slope, steps=4, **more):
  return [{'step': s, 'reward': slope * s, **{key: value * s for key, value in more.items()}} for s in range(1, steps + 1)]


def panel(figure, title):
  return next(ax for ax in figure.axes if ax.get_title() == title)


def points(line):
  return np.asarray(line.get_xydata()).tolist()


def test_every_run_has_its_curve_in_its_color():
  figure = rft_plots.dashboard({'seed 0': run(1.0), 'seed 1': run(-2.0)})
  raw_0, smooth_0, raw_1, smooth_1 = panel(figure, 'reward that PPO optimizes').lines
  assert points(raw_0) == points(smooth_0) == [[s, s] for s in range(1, 5)]  # four steps are too few to smooth
  assert points(raw_1) == points(smooth_1) == [[s, -2 * s] for s in range(1, 5)]
  assert raw_0.get_color() == smooth_0.get_color() != raw_1.get_color() == smooth_1.get_color()
  legend = dict(zip((t.get_text() for t in figure.legends[0].get_texts()), figure.legends[0].get_lines(), strict=True))
  assert legend['seed 0'].get_color() == raw_0.get_color() and legend['seed 1'].get_color() == raw_1.get_color()


def test_metrics_of_one_run_differ_in_color_and_are_named():
  (ax,) = (a for a in rft_plots.dashboard({'rft': run(0.0, raw=1.0, shuffled=-1.0)}).axes if a.get_title() == 'score')
  own, shuffled = (line for line in ax.lines if line.get_alpha() is None)
  assert points(own)[-1] == [4, 4] and points(shuffled)[-1] == [4, -4]
  legend = dict(zip((t.get_text() for t in ax.get_legend().get_texts()), ax.get_legend().get_lines(), strict=True))
  assert legend['own reference'].get_color() == own.get_color() != shuffled.get_color() == legend['other reference'].get_color()
  assert legend['own reference'].get_linestyle() == own.get_linestyle() != shuffled.get_linestyle()


def test_the_gap_keeps_its_sign_and_zero_is_marked():
  ax = panel(rft_plots.dashboard({'rft': run(0.0, shuffled_gap=-0.5)}), 'score: own minus other')
  curve, zero = ax.lines[0], ax.lines[-1]
  assert points(curve) == [[s, -0.5 * s] for s in range(1, 5)] and set(zero.get_ydata()) == {0}


def test_measurements_on_held_out_prompts_are_dots():
  records = [{'step': 0, 'evaluation_raw': -1.0}, *run(0.0, raw=1.0), {'step': 4, 'evaluation_raw': 2.5}]
  ax = panel(rft_plots.dashboard({'rft': records}), 'score')
  (dots,) = (line for line in ax.lines if line.get_marker() == 'o')
  assert points(dots) == [[0, -1.0], [4, 2.5]]
  assert [text.get_text() for text in ax.get_legend().get_texts()] == ['held-out']


def test_long_runs_are_smoothed_over_a_fifteenth():
  noise = np.random.default_rng(0).normal(size=60)
  records = [{'step': s, 'entropy': float(v)} for s, v in enumerate(noise)]
  raw, smooth = panel(rft_plots.dashboard({'rft': records}), 'entropy').lines
  np.testing.assert_allclose(raw.get_ydata(), noise)
  wanted = [noise[max(0, i - 2) : i + 3].mean() for i in range(60)]
  np.testing.assert_allclose(smooth.get_ydata(), wanted)


def test_panels_name_metric_unit_and_steps():
  figure = rft_plots.dashboard({'rft': run(1.0, kl=0.1, length=3.0, truncated=0.01, empty=0.02)})
  labels = {ax.get_title(): ax.get_ylabel() for ax in figure.axes if ax.axison}
  assert labels == {
    'reward that PPO optimizes': '',
    'KL to the initial policy': 'nats per token',
    'length': 'tokens',
    'truncated or empty': 'share of responses',
  }
  assert all(ax.get_xlabel() == 'step' for ax in figure.axes if ax.axison)
  kl = panel(figure, 'KL to the initial policy').lines[0]
  assert points(kl)[-1] == [4, pytest.approx(0.4)]


def test_a_series_of_any_size_does_not_set_the_scale():
  records = [{'step': s, 'raw': 0.1 * s, 'length_free': -100.0 * s} for s in range(11)]
  low, high = rft_plots.dashboard({'rft': records}).axes[0].get_ylim()
  assert -1.0 <= low <= 0.0 and 1.0 <= high <= 3.0


def test_steps_that_are_not_finite_are_left_out():
  records = [{'step': 1, 'raw': 1.0}, {'step': 2, 'raw': math.nan}, {'step': 3, 'raw': 2.0}]
  assert points(rft_plots.dashboard({'rft': records}).axes[0].lines[0]) == [[1, 1], [3, 2]]
  assert rft_plots.panels_of({'rft': [{'step': 1, 'raw': math.inf}]}) == []


POLICIES = {
  'start': {'reward': [-1.0, -0.5], 'target_nll': [4.0, 4.5], 'relative_nll': [0.5, 0.7], 'kl': [0.0, 0.0]},
  'PPO': {'reward': [1.0, 2.0], 'target_nll': [3.0, 3.5], 'relative_nll': [0.1, 0.3], 'kl': [0.2, 0.4]},
  'target': {'reward': [3.0]},
}


def test_comparison_has_a_dot_per_seed_and_a_bar_at_the_mean():
  reward, nll, relative, _ = rft_plots.comparison(POLICIES).axes
  assert reward.get_xlabel() == 'reward' and nll.get_xlabel().startswith('NLL under the target')
  assert relative.get_xlabel().startswith('NLL minus the pool mean')
  assert [tick.get_text() for tick in reward.get_yticklabels()] == ['start', 'PPO', 'target']
  dots = [points(line) for line in reward.lines if line.get_marker() == 'o']
  assert dots == [[[-1.0, 0], [-0.5, 0]], [[1.0, 1], [2.0, 1]], [[3.0, 2]]]
  bars = [line.get_xdata() for line in reward.lines if line.get_marker() != 'o']
  assert [list(x) for x in bars] == [[-0.75] * 2, [1.5] * 2, [3.0] * 2]
  assert reward.get_ylim()[0] > reward.get_ylim()[1]  # the first policy is on top
  assert [(text.get_text(), text.get_position()[1]) for text in nll.texts] == [('not measured', 2)]


def test_scatter_has_kl_across_and_the_likelihood_up():
  ax = rft_plots.comparison(POLICIES).axes[-1]
  assert ax.get_xlabel().startswith('KL to the initial policy') and ax.get_ylabel().startswith('NLL minus the pool mean')
  assert [points(line) for line in ax.lines] == [[[0.0, 0.5], [0.0, 0.7]], [[0.2, 0.1], [0.4, 0.3]]]
  assert [(t.get_text(), tuple(map(float, t.xy))) for t in ax.texts] == [
    ('start', (0.0, pytest.approx(0.6))),
    ('PPO', (pytest.approx(0.3), pytest.approx(0.2))),
  ]
  assert ax.lines[1].get_color() == ax.texts[1].get_color() != ax.lines[0].get_color()
  without = {name: {k: v for k, v in p.items() if k != 'relative_nll'} for name, p in POLICIES.items()}
  ax = rft_plots.comparison(without).axes[-1]
  assert ax.get_ylabel().startswith('NLL under the target') and points(ax.lines[1]) == [[0.2, 3.0], [0.4, 3.5]]


def test_nothing_to_draw_is_an_error():
  with pytest.raises(ValueError, match='no run has a record'):
    rft_plots.dashboard({'rft': [{'step': 1}]})
  with pytest.raises(ValueError, match='no policy has'):
    rft_plots.comparison({'ppo': {'kl': [1.0]}})
