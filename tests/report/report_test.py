from __future__ import annotations

import json
import math
import os
import pathlib
import re

import numpy as np
import pytest

from polar_jax.report import report, sections


def value(accuracy, n=2_000, clusters=208, by='policy'):
  return {'accuracy': accuracy, 'low': accuracy - 0.02, 'high': accuracy + 0.02, 'n': n, 'clusters': clusters, 'clustered_by': by}


def without_clusters(results):
  """Return results as they were written before intervals stated what they resample."""
  if isinstance(results, dict):
    return {key: without_clusters(v) for key, v in results.items() if key not in ('clusters', 'clustered_by')}
  return results


def full_results():
  return {
    'evaluate': {
      'by_split': {'unseen_policies': value(0.61), 'validation': value(0.75), 'unseen_prompts': value(0.655)},
      'baselines': {
        name: {split: value(a) for split in sections.SPLITS}
        for name, a in {'length': 0.52, 'overlap_2': 0.65, 'random': 0.5, 'bayes': 0.93}.items()
      },
      'margin_over_best_baseline': {
        'validation': {'baseline': 'overlap_2', 'difference': 0.1, 'low': 0.08, 'high': 0.12},
        'unseen_prompts': {'baseline': 'overlap_2', 'difference': 0.005, 'low': -0.01, 'high': 0.02},
        'unseen_policies': {'baseline': 'overlap_2', 'difference': -0.04, 'low': -0.06, 'high': -0.02},
      },
    },
    'finetune': {
      'arms': {arm: value(0.8 - 0.1 * i) for i, arm in enumerate(sections.ARMS)},
      'by_category': {'easy': value(0.9, 1_900), 'hard': value(0.55, 100)},
      'baselines': {'words': value(0.85), 'random': value(0.5)},
    },
    'pretrain': {'loss': 0.55, 'steps': 900, 'tokens': 4_000_000, 'accuracy': 0.74},
    'pretrain_lm': {'loss': 4.1, 'steps': 400, 'tokens': 1_000_000},
    'timing': {'pretrain': 12.5, 'evaluate': 3.0, 'total': 15.5},
    'environment': {'python': '3.11', 'devices': '1 x cpu', 'cpu_count': 2},
  }


def write_metrics(workdir, stage, records):
  (workdir / stage).mkdir(parents=True)
  (workdir / stage / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))


def training_records(steps, accuracy=True):
  records = [{'step': s, 'loss': 0.7 - 0.2 * s / steps, **({'accuracy': 0.5 + 0.2 * s / steps} if accuracy else {})} for s in range(steps)]
  return [*records, {'step': steps, 'validation_loss': 0.5, 'validation_accuracy': 0.7}]


def test_full_report_has_every_table_and_figure(tmp_path):
  write_metrics(tmp_path, 'pretrain_lm', training_records(20, accuracy=False))
  write_metrics(tmp_path, 'pretrain', training_records(30))
  report.write_report(tmp_path, full_results())
  assert json.loads((tmp_path / 'report.json').read_text()) == full_results()
  text = (tmp_path / 'report.md').read_text()
  assert '| **pre-trained model** | 75.0 [73.0, 77.0] | 65.5 [63.5, 67.5] | 61.0 [59.0, 63.0] |' in text
  assert '| Bayes-optimal | 93.0 [91.0, 95.0] |' in text
  assert '| **finetuned_only** |' in text and '| hard | 55.0 [53.0, 57.0] | 100 | 208 policies |' in text
  assert 'too few for conclusions about one category: hard.' in text
  assert '| total | 15.5 |' in text and '| cpu_count | 2 |' in text and '4,000,000' in text
  assert 'Missing' not in text
  links = re.findall(r'!\[[^]]*\]\(([^)]*)\)', text)
  assert sorted(links) == ['figures/accuracy.png', 'figures/arms.png', 'figures/loss.png']
  for link in links:
    assert (tmp_path / link).read_bytes().startswith(b'\x89PNG') and (tmp_path / link).stat().st_size > 5_000
  assert sorted(os.listdir(tmp_path)) == ['figures', 'pretrain', 'pretrain_lm', 'report.html', 'report.json', 'report.md']
  assert str(tmp_path) not in text
  assert '- Each accuracy of a model is a mean over 2,000 examples.' in text


def test_sentences_state_exactly_who_wins(tmp_path):
  report.write_report(tmp_path, full_results())
  text = (tmp_path / 'report.md').read_text()
  assert '- validation: the model beats the best baseline (`overlap_2`) by 10.0 points (95% interval +8.0 to +12.0).' in text
  assert '- unseen_prompts: the model is not shown to beat the best baseline (`overlap_2`): it is 0.5 points ahead' in text
  assert '- unseen_policies: the model does NOT beat the best baseline (`overlap_2`): it is 4.0 points behind' in text
  assert 'On preferences, the fine-tuned model (80.0%) does NOT beat the best baseline (`words`, 85.0%).' in text


def test_preference_verdict_without_a_paired_interval_claims_no_win(tmp_path):
  results = full_results()
  results['finetune']['baselines'] = {'words': value(0.7), 'bayes': value(0.99)}
  report.write_report(tmp_path, results)
  text = (tmp_path / 'report.md').read_text()
  assert 'is 10.0 points above the best baseline (`words`, 70.0%); no paired interval of this difference was recorded.' in text
  results['finetune']['margin_over_best_baseline'] = {'baseline': 'words', 'difference': 0.1, 'low': 0.05, 'high': 0.15}
  report.write_report(tmp_path, results)
  assert 'On preferences, the fine-tuned model beats the best baseline (`words`) by 10.0 points' in (tmp_path / 'report.md').read_text()


def test_partial_report_names_missing_parts(tmp_path):
  report.write_report(tmp_path, {'pretrain': {'loss': 0.6, 'steps': 3}, 'evaluate': {'by_split': {'validation': value(0.7)}}})
  text = (tmp_path / 'report.md').read_text()
  missing = next(line for line in text.splitlines() if line.startswith('Missing'))
  for name in ('language-model pre-training', 'baselines on the same triplets', 'fine-tuning on preferences', 'timing', 'environment'):
    assert name in missing
  assert 'contrastive' not in missing
  assert '- validation: no paired comparison with the baselines was recorded.' in text
  assert '## Preferences' not in text and '## Time' not in text and 'loss.png' not in text
  assert 'unseen_policies' not in text


def test_a_workdir_that_only_scored_or_converted_has_no_limitations(tmp_path):
  report.write_report(
    tmp_path, {'score': {'rows': 12, 'mean': -1.25}, 'convert': {'exact': True}, 'timing': {'score': 2.0, 'convert': 1.0}}
  )
  text = (tmp_path / 'report.md').read_text()
  assert '## Stage score' in text and '| rows | 12 |' in text and '## Stage convert' in text and '| score | 2.0 |' in text
  assert 'Missing' not in text and '## Limitations' not in text and 'Accuracy' not in text
  report.write_report(tmp_path, {'score': {'rows': 12}, 'pretrain': {'loss': 0.6}})
  text = (tmp_path / 'report.md').read_text()
  assert '## Stage score' in text and 'Missing' in text and '## Limitations' in text


def test_empty_and_single_sections_are_reports_too(tmp_path):
  report.write_report(tmp_path / 'empty', {})
  assert 'Results: none.' in (tmp_path / 'empty' / 'report.md').read_text()
  for section, values in full_results().items():
    report.write_report(tmp_path / section, {section: values})
    assert (tmp_path / section / 'report.md').stat().st_size > 300
  for key, values in full_results()['evaluate'].items():
    report.write_report(tmp_path / key, {'evaluate': {key: values}})
  for key, values in full_results()['finetune'].items():
    report.write_report(tmp_path / key, {'finetune': {key: values}})


@pytest.mark.parametrize('bad', [math.nan, math.inf, np.float32('nan')])
def test_non_finite_numbers_are_rejected_and_the_old_report_stays(tmp_path, bad):
  report.write_report(tmp_path, full_results())
  before = [(tmp_path / f'report.{kind}').read_text() for kind in ('json', 'md', 'html')]
  results = full_results()
  results['finetune']['arms']['finetuned_only']['low'] = bad
  with pytest.raises(report.ReportError, match=r'finetune\.arms\.finetuned_only\.low is (nan|inf)'):
    report.write_report(tmp_path, results)
  assert before == [(tmp_path / f'report.{kind}').read_text() for kind in ('json', 'md', 'html')]
  assert sorted(os.listdir(tmp_path)) == ['figures', 'report.html', 'report.json', 'report.md']


def test_values_that_json_lacks_are_rejected(tmp_path):
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


def test_sets_of_examples_and_their_clusters_are_stated(tmp_path):
  results = full_results()
  by_split = results['evaluate']['by_split']
  by_split |= {'unseen_policies': value(0.61, clusters=12), 'unseen_prompts': value(0.655, clusters=700, by='prompt')}
  results['finetune']['by_category']['hard'] = value(0.55, 100, clusters=1)
  report.write_report(tmp_path, results)
  text = (tmp_path / 'report.md').read_text()
  head = '| validation (n = 2,000; 208 policies) | unseen_prompts (n = 2,000; 700 prompts) | unseen_policies (n = 2,000; 12 policies) |'
  assert head in text
  assert 'Intervals resample policies (208 on validation, 12 on unseen_policies): examples that share the policy of their reference' in text
  assert 'Intervals resample prompts (700 on unseen_prompts): examples that share a prompt are not independent' in text
  assert 'Intervals resample policies (208 on preferences)' in text
  assert '**Warning: fewer than 20 clusters** (unseen_policies: 12). These intervals are likely too narrow.' in text
  assert '| hard | 55.0 [53.0, 57.0] | 100 | 1 policy |' in text and '**Warning: fewer than 20 clusters** (hard: 1).' in text
  assert text.count('Warning') == 2


def test_independent_examples_are_stated(tmp_path):
  report.write_report(tmp_path, {'evaluate': {'by_split': {'validation': value(0.7, clusters=2_000, by='example')}}})
  text = (tmp_path / 'report.md').read_text()
  assert '| validation (n = 2,000) |' in text and 'Intervals resample single examples (2,000 on validation)' in text


def test_results_without_clusters_are_reported_as_such(tmp_path):
  report.write_report(tmp_path, without_clusters(full_results()))
  text = (tmp_path / 'report.md').read_text()
  assert text.count('It was not recorded whether intervals resample clusters') == 2 and 'Warning' not in text
  assert '| hard | 55.0 [53.0, 57.0] | 100 | - |' in text and '| validation (n = 2,000) |' in text


def test_arms_are_compared_by_paired_differences(tmp_path):
  results = full_results()
  margin = {'difference': 0.1, 'low': 0.08, 'high': 0.125, 'n': 2_000, 'clusters': 48, 'clustered_by': 'policy'}
  results['finetune']['margin_over_arms'] = {'pretrained_only': margin}
  report.write_report(tmp_path, results)
  lines = [line for line in (tmp_path / 'report.md').read_text().splitlines() if line.startswith('| **')]
  wanted = {'pretrained_finetuned': '-', 'finetuned_only': '-', 'pretrained_only': '+10.0 [+8.0, +12.5]'}
  for arm, cell in wanted.items():
    assert next(line for line in lines if f'**{arm}**' in line).split(' | ')[3] == cell
  assert 'positive if the arm of the line is less accurate' in (tmp_path / 'report.md').read_text()


def test_names_of_users_are_not_read_as_markdown(tmp_path):
  results = full_results()
  results['finetune']['by_category'] = {'![x](http://evil/x.png) <b>': value(0.5), 'snake_case_name': value(0.5), '_a_': value(0.5)}
  results['convert'] = {'source': '<script>alert(1)</script> [a](b)'}
  report.write_report(tmp_path, results)
  text = (tmp_path / 'report.md').read_text()
  assert r'| \!\[x\](http://evil/x.png) &lt;b&gt; |' in text and r'&lt;script&gt;alert(1)&lt;/script&gt; \[a\](b)' in text
  assert '| snake_case_name |' in text and r'| \_a\_ |' in text


def test_lower_packages_do_not_import_the_report():
  package = pathlib.Path(report.__file__).parents[1]
  files = [path for folder in ('evaluate', 'scaling') for path in (package / folder).rglob('*.py')]
  assert len(files) > 5
  assert not [path.name for path in files if 'polar_jax.report' in path.read_text()]
