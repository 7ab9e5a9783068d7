from __future__ import annotations

import json
import math
import os
import pathlib
import re

import numpy as np
import pytest

from polar_jax.report import plots, report


def value(accuracy, n=2_000):
  return {'accuracy': accuracy, 'low': accuracy - 0.02, 'high': accuracy + 0.02, 'n': n}


def full_results():
  return {
    'evaluate': {
      'by_split': {'unseen_policies': value(0.61), 'validation': value(0.75), 'unseen_prompts': value(0.655)},
      'baselines': {
        name: {split: value(a) for split in report.SPLITS}
        for name, a in {'length': 0.52, 'overlap_2': 0.65, 'random': 0.5, 'bayes': 0.93}.items()
      },
      'margin_over_best_baseline': {
        'validation': {'baseline': 'overlap_2', 'difference': 0.1, 'low': 0.08, 'high': 0.12},
        'unseen_prompts': {'baseline': 'overlap_2', 'difference': 0.005, 'low': -0.01, 'high': 0.02},
        'unseen_policies': {'baseline': 'overlap_2', 'difference': -0.04, 'low': -0.06, 'high': -0.02},
      },
    },
    'finetune': {
      'arms': {arm: value(0.8 - 0.1 * i) for i, arm in enumerate(report.ARMS)},
      'by_category': {'easy': value(0.9, 1_900), 'hard': value(0.55, 100)},
      'baselines': {'words': value(0.85), 'random': value(0.5)},
    },
    'pretrain': {'loss': 0.55, 'steps': 900, 'tokens': 4_000_000, 'accuracy': 0.74},
    'pretrain_lm': {'loss': 4.1, 'steps': 400, 'tokens': 1_000_000},
    'timing': {'pretrain': 12.5, 'evaluate': 3.0, 'total': 15.5},
    'environment': {'python': '3.11', 'devices': '1 x cpu', 'cpu_count': 2},
  }


def write_metrics(workdir, stage, rows):
  (workdir / stage).mkdir(parents=True)
  (workdir / stage / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def training_rows(steps, accuracy=True):
  rows = [{'step': s, 'loss': 0.7 - 0.2 * s / steps, **({'accuracy': 0.5 + 0.2 * s / steps} if accuracy else {})} for s in range(steps)]
  return [*rows, {'step': steps, 'validation_loss': 0.5, 'validation_accuracy': 0.7}]


def test_full_report_has_every_table_and_figure(tmp_path):
  write_metrics(tmp_path, 'pretrain_lm', training_rows(20, accuracy=False))
  write_metrics(tmp_path, 'pretrain', training_rows(30))
  report.write_report(tmp_path, full_results())
  assert json.loads((tmp_path / 'report.json').read_text()) == full_results()
  text = (tmp_path / 'report.md').read_text()
  assert '| **pre-trained model** | 75.0 [73.0, 77.0] | 65.5 [63.5, 67.5] | 61.0 [59.0, 63.0] |' in text
  assert '| Bayes ceiling | 93.0 [91.0, 95.0] |' in text
  assert '| **finetuned_only** |' in text and '| hard | 55.0 [53.0, 57.0] | 100 |' in text
  assert 'so little can be said of one category alone: hard.' in text
  assert '| total | 15.5 |' in text and '| cpu_count | 2 |' in text and '4,000,000' in text
  assert 'Missing' not in text
  links = re.findall(r'!\[[^]]*\]\(([^)]*)\)', text)
  assert sorted(links) == ['figures/accuracy.png', 'figures/arms.png', 'figures/loss.png']
  for link in links:
    assert (tmp_path / link).read_bytes().startswith(b'\x89PNG') and (tmp_path / link).stat().st_size > 5_000
  assert str(tmp_path) not in text
  assert '- Each accuracy of a model rests on 2000 rows.' in text


def test_words_say_exactly_who_wins(tmp_path):
  report.write_report(tmp_path, full_results())
  text = (tmp_path / 'report.md').read_text()
  assert '- validation: the model beats the best rule (`overlap_2`) by 10.0 points (95% interval +8.0 to +12.0).' in text
  assert '- unseen_prompts: the model is not shown to beat the best rule (`overlap_2`): it is 0.5 points ahead' in text
  assert '- unseen_policies: the model does NOT beat the best rule (`overlap_2`): it is 4.0 points behind' in text
  assert 'On preferences, the fine-tuned model (80.0%) does NOT beat the best rule (`words`, 85.0%).' in text


def test_preference_verdict_without_a_paired_interval_claims_no_win(tmp_path):
  results = full_results()
  results['finetune']['baselines'] = {'words': value(0.7), 'bayes': value(0.99)}
  report.write_report(tmp_path, results)
  text = (tmp_path / 'report.md').read_text()
  assert 'is 10.0 points above the best rule (`words`, 70.0%); no paired interval of this difference was recorded.' in text
  results['finetune']['margin_over_best_baseline'] = {'baseline': 'words', 'difference': 0.1, 'low': 0.05, 'high': 0.15}
  report.write_report(tmp_path, results)
  assert 'On preferences, the fine-tuned model beats the best rule (`words`) by 10.0 points' in (tmp_path / 'report.md').read_text()


def test_partial_report_names_what_is_missing(tmp_path):
  report.write_report(tmp_path, {'pretrain': {'loss': 0.6, 'steps': 3}, 'evaluate': {'by_split': {'validation': value(0.7)}}})
  text = (tmp_path / 'report.md').read_text()
  missing = next(line for line in text.splitlines() if line.startswith('Missing'))
  for name in ('language-model pre-training', 'rules and ceiling', 'fine-tuning on preferences', 'times', 'environment'):
    assert name in missing
  assert 'contrastive' not in missing
  assert '- validation: no paired comparison with the rules was recorded.' in text
  assert '## Preferences' not in text and '## Time' not in text and 'loss.png' not in text
  assert 'unseen_policies' not in text


def test_a_workdir_that_only_scored_or_converted_warns_of_nothing(tmp_path):
  report.write_report(
    tmp_path, {'score': {'rows': 12, 'mean': -1.25}, 'convert': {'exact': True}, 'timing': {'score': 2.0, 'convert': 1.0}}
  )
  text = (tmp_path / 'report.md').read_text()
  assert '## Stage score' in text and '| rows | 12 |' in text and '## Stage convert' in text and '| score | 2.0 |' in text
  assert 'Missing' not in text and '## Caveats' not in text and 'Accuracy' not in text
  report.write_report(tmp_path, {'score': {'rows': 12}, 'pretrain': {'loss': 0.6}})
  text = (tmp_path / 'report.md').read_text()
  assert '## Stage score' in text and 'Missing' in text and '## Caveats' in text


def test_empty_and_single_sections_are_reports_too(tmp_path):
  report.write_report(tmp_path / 'empty', {})
  assert 'Results here: none.' in (tmp_path / 'empty' / 'report.md').read_text()
  for section, values in full_results().items():
    report.write_report(tmp_path / section, {section: values})
    assert (tmp_path / section / 'report.md').stat().st_size > 300
  for key, values in full_results()['evaluate'].items():
    report.write_report(tmp_path / key, {'evaluate': {key: values}})
  for key, values in full_results()['finetune'].items():
    report.write_report(tmp_path / key, {'finetune': {key: values}})


@pytest.mark.parametrize('bad', [math.nan, math.inf, np.float32('nan')])
def test_non_finite_numbers_are_refused_and_the_old_report_stays(tmp_path, bad):
  report.write_report(tmp_path, full_results())
  before = (tmp_path / 'report.json').read_text(), (tmp_path / 'report.md').read_text()
  results = full_results()
  results['finetune']['arms']['finetuned_only']['low'] = bad
  with pytest.raises(report.ReportError, match=r'finetune\.arms\.finetuned_only\.low is (nan|inf)'):
    report.write_report(tmp_path, results)
  assert before == ((tmp_path / 'report.json').read_text(), (tmp_path / 'report.md').read_text())
  assert sorted(os.listdir(tmp_path)) == ['figures', 'report.json', 'report.md']


def test_other_values_that_json_lacks_are_refused(tmp_path):
  with pytest.raises(report.ReportError, match=r'pretrain\.losses\[1\] is a ndarray'):
    report.write_report(tmp_path, {'pretrain': {'losses': [1.0, np.ones(2)]}})
  with pytest.raises(report.ReportError, match='has the key 3'):
    report.write_report(tmp_path, {'pretrain': {3: 1.0}})


def test_json_is_sorted_and_floats_stay_floats(tmp_path):
  report.write_report(tmp_path, {'pretrain': {'steps': np.int64(3), 'loss': np.float32(1.0), 'a': 2.0}})
  text = (tmp_path / 'report.json').read_text()
  assert [text.index(f'"{k}"') for k in ('a', 'loss', 'steps')] == sorted(text.index(f'"{k}"') for k in ('a', 'loss', 'steps'))
  assert '"loss": 1.0' in text and '"a": 2.0' in text and '"steps": 3\n' in text


def test_stages_add_up(tmp_path):
  assert report.load_results(tmp_path) == {}
  report.update_results(tmp_path, 'timing', {'pretrain': 2.0})
  report.update_results(tmp_path, 'finetune', {'loss': 0.4, 'arms': {'finetuned_only': value(0.7)}})
  report.update_results(tmp_path, 'timing', {'evaluate': 3.0})
  got = report.update_results(tmp_path, 'finetune', {'arms': {'pretrained_only': value(0.5)}})
  assert got == report.load_results(tmp_path)
  assert got['timing'] == {'pretrain': 2.0, 'evaluate': 3.0, 'total': 5.0}
  assert got['finetune'] == {'loss': 0.4, 'arms': {'pretrained_only': value(0.5)}}
  assert report.update_results(tmp_path, 'timing', {'total': 9.0})['timing']['total'] == 9.0


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
  report.update_results(tmp_path, 'pretrain', {'loss': 0.5})

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    report.update_results(tmp_path, 'pretrain', {'loss': 0.1})
  assert report.load_results(tmp_path) == {'pretrain': {'loss': 0.5}}
  assert os.listdir(tmp_path) == ['report.json']


@pytest.mark.parametrize('text', ['{"a": ', '[1]'])
def test_broken_report_is_named(tmp_path, text):
  (tmp_path / 'report.json').write_text(text)
  with pytest.raises(report.ReportError, match=r'report\.json: .*run'):
    report.load_results(tmp_path)


def test_metrics_come_in_the_order_of_stages(tmp_path):
  for stage in ('finetune', 'arm', 'pretrain', 'pretrain_lm'):
    write_metrics(tmp_path, stage, [{'step': 0, 'loss': 1.0}])
  assert list(report._metrics_by_stage(tmp_path)) == ['pretrain_lm', 'pretrain', 'finetune', 'arm']


def test_environment_names_versions_but_no_place_or_person():
  got = report.environment()
  assert {'python', 'jax', 'flax', 'devices', 'platform', 'cpu_count'} <= set(got)
  text = json.dumps(got)
  assert str(pathlib.Path.home()) + '/' not in text
  assert not any(isinstance(v, str) and v.startswith('/') for v in got.values())


def test_running_mean_matches_a_slow_one_and_skips_nan():
  values = np.random.default_rng(0).normal(size=150)
  values[40] = np.nan
  got = plots._running_mean(values)
  for i in range(150):
    window = values[max(0, i - 2) : i + 3]
    assert got[i] == pytest.approx(np.mean(window[np.isfinite(window)]))


def test_a_step_written_twice_counts_once_and_late():
  steps, values = plots._series([{'step': 2, 'loss': 1.0}, {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 5.0}, {'step': 3}], 'loss')
  assert steps.tolist() == [1, 2] and values.tolist() == [3.0, 5.0]


@pytest.mark.parametrize('stages', [1, 2, 5])
def test_every_curve_has_one_panel_and_accuracy_stands_below_its_loss(stages):
  metrics = {f's{i}': [{'step': 0, 'loss': 1.0, **({} if i == 0 else {'accuracy': 0.5})}] for i in range(stages)}
  cells, columns = plots._layout(metrics, list(metrics))
  wanted = [(s, 'loss') for s in metrics] + [(s, 'accuracy') for s in metrics if s != 's0']
  assert sorted(c for c in cells if c) == sorted(wanted) and len(cells) % columns == 0
  for i, cell in enumerate(cells):
    if cell and cell[1] == 'accuracy':
      assert cells[i - columns] == (cell[0], 'loss')


def test_nothing_to_draw_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='no stage'):
    plots.loss_curves({'pretrain': []}, tmp_path / 'x.png')
  with pytest.raises(ValueError, match='no accuracy'):
    plots.arm_bars({}, {}, tmp_path / 'x.png')
