from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from polar_jax.report import markdown, plots, report, rft_plots, rft_study
from polar_jax.report import rft as rft_report
from polar_jax.train.metrics import StepProgress
from polar_jax.types import UserError

METRICS = ('reward', 'target_nll', 'relative_nll', 'length', 'distinct_2')
START = {
  'reward': [-1.0, -0.8],
  'target_nll': [4.5, 4.3],
  'relative_nll': [0.5, 0.3],
  'kl': [0.0, 0.0],
  'length': [30, 32],
  'distinct_2': [0.8, 0.8],
}
PPO = {
  'reward': [0.5, 0.2],
  'target_nll': [4.0, 4.1],
  'relative_nll': [0.2, 0.1],
  'kl': [0.3, 0.2],
  'length': [40, 41],
  'distinct_2': [0.6, 0.62],
}
OTHERS = {
  'best_of_n': {'reward': [0.1, 0.1], 'target_nll': [4.2, 4.2], 'relative_nll': [0.3, 0.05]},
  'sft': {'reward': [0.0, 0.1], 'target_nll': [3.9, 4.0], 'relative_nll': [0.1, 0.0], 'kl': [0.4, 0.5]},
  'target': {'reward': [1.0, 1.0], 'target_nll': [3.0, 3.1], 'relative_nll': [-0.5, -0.7]},
}


def study():
  pairs = {f'{f}_{when}': policy[f] for f in METRICS for when, policy in (('before', START), ('after', PPO))}
  return {'seeds': 2, 'kl': PPO['kl'], 'best_of': 8, 'comparison': {'start': START, 'ppo': PPO, **OTHERS}, **pairs}


def arms():
  run = {'steps': 40, 'responses': 2_560, 'seconds': 61.5, 'raw': 0.25, 'alarms': []}
  before = {'raw': -0.5, 'model': -0.5, 'rule': 0.1}
  return {
    'model': {
      **run,
      'alarms': ['step 7: kl 0.9 > 0.5 nats per token'],
      'evaluation_before': before,
      'evaluation_after': {'raw': 0.5, 'model': 0.5, 'rule': 0.08},
    },
    'rule': {**run, 'evaluation_before': before, 'evaluation_after': {'raw': 0.6, 'model': -0.7, 'rule': 0.35}},
  }


def metric_records(steps, gap=1.0):
  records = [{'step': 0, 'evaluation_raw': -1.0, 'evaluation_rule': 0.1}]
  for s in range(1, steps + 1):
    t = s / steps
    record = {
      'step': s,
      'reward': t,
      'raw': t,
      'length_free': 0.5 * t,
      'kl': 0.3 * t,
      'entropy': 3 - t,
      'length': 30 + 10 * t,
      'truncated': 0.1,
    }
    record |= {'empty': 0.0, 'overlap': 0.3, 'distinct_1': 0.4, 'distinct_2': 0.7, 'clip_fraction': 0.05, 'explained_variance': t - 0.5}
    records.append({**record, **({'shuffled': t - gap, 'shuffled_gap': gap} if s % 2 == 0 else {})})
  return [*records, {'step': steps, 'alarms': ['x']}, {'step': steps, 'evaluation_raw': 0.9, 'evaluation_rule': 0.4}]


def samples_of(step, n=4):
  sample = {'prompt': 'p', 'reference': 'r', 'output': 'o', 'score': 1.25, 'shuffled': 0.5, 'length': 3}
  return [{'step': step, 'pick': 'random', **sample, 'output': f'o{step}.{i}'} for i in range(n)]


def write(folder, records, samples=()):
  folder.mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  (folder / 'samples.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in samples))


def written(workdir, results):
  report.write_report(workdir, results)
  return (workdir / 'report.md').read_text()


@pytest.fixture
def unsaved(monkeypatch):
  """Build figures without rendering them, which takes most of the time."""
  monkeypatch.setattr(plots, 'save', lambda figure, path: (path.parent.mkdir(exist_ok=True), path.write_bytes(b'')))


@pytest.fixture
def undrawn(monkeypatch):
  """Leave figures out, for tests of the text."""
  monkeypatch.setattr(rft_report, 'draw', lambda workdir, results, runs: {})


def test_study_has_tables_figures_and_samples_of_every_seed(tmp_path):
  for seed in range(2):
    write(tmp_path / 'rft' / f'seed_{seed}', metric_records(20), [*samples_of(5), *samples_of(20, 6)])
    write(tmp_path / 'rft' / f'seed_{seed}' / 'start', [{'step': 1, 'loss': 3.0}])
  text = written(tmp_path, {'rft': study()})
  assert '| reward | -0.900 [-1.000, -0.800] | 0.350 [0.200, 0.500] | +1.250 [+1.000, +1.500] |' in text
  assert '| KL to the initial policy, nats per token | - | 0.250 [0.200, 0.300] | - |' in text
  assert '| best of 8 | 0.100 [0.100, 0.100] | 4.200 [4.200, 4.200] | 0.175 [0.050, 0.300] | - |' in text
  names = [text.index(f'| {name} |') for name in ('start', 'PPO', 'best of 8', 'supervised', 'target')]
  assert names == sorted(names)
  assert '| score | 0.075 → 0.975 | 0.075 → 0.975 |' in text  # first and last two of twenty steps
  assert re.findall(r'!\[[^]]*\]\(([^)]*)\)', text) == ['figures/findings.png', 'figures/rft_comparison.png', 'figures/rft.png']
  for name in ('rft', 'rft_comparison'):
    assert (tmp_path / 'figures' / f'{name}.png').read_bytes().startswith(b'\x89PNG')
  assert not (tmp_path / 'figures' / 'loss.png').exists()
  assert 'seed 0, step 20:' in text and 'seed 1, step 20:' in text and text.count('| o20.') == 8 and 'o5.' not in text
  assert '| random | p | r | o20.3 | 1.250 | 0.500 | 3 |' in text
  assert 'Missing' not in text and 'Accuracy is' not in text and '## Caveats' not in text
  assert report.load_results(tmp_path) == {'rft': study()}


def test_sentences_state_exactly_what_moved_and_which_policy_is_closer(tmp_path, undrawn):
  text = written(tmp_path, {'rft': study()})
  assert '- The reward rose for each of 2 seeds (by seed +1 to +1.5, mean +1.25).' in text
  assert '- The NLL under the target fell for each of 2 seeds (by seed -0.5 to -0.2, mean -0.35 nats per token).' in text
  assert '- The relative NLL of PPO is below that of `start` for each of 2 seeds' in text
  assert '- The relative NLL of PPO is below that of `best of 8` for only 1 of 2 seeds' in text
  assert '- The relative NLL of PPO is NOT below that of `supervised` for any of 2 seeds' in text
  # (0.5 - 0.2) / (0.5 + 0.5) = 30%, (0.3 - 0.1) / (0.3 + 0.7) = 20%
  assert 'PPO covered 25% of the distance from the initial policy to samples of the target itself (by seed 20% to 30%).' in text
  assert 'Distinct bigrams fell from 0.800 to 0.610: ' in text
  assert 'likelier under the whole pool' not in text


def test_a_fall_under_the_whole_pool_is_stated(tmp_path, undrawn):
  text = written(tmp_path, {'rft': {**study(), 'relative_nll_after': [0.6, 0.1]}})
  assert '- The NLL relative to the pool mean fell for only 1 of 2 seeds' in text
  assert 'likelier under the whole pool, not closer to the target.' in text


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ([0.2, 0.1, 0.3], 'X did NOT fall for any of 3 seeds (by seed +0.1 to +0.3, mean +0.2 [-0.0484, +0.448]).'),
    ([0.0, 0.0], 'X did NOT fall for any of 2 seeds (by seed +0 to +0, mean +0).'),
    ([-0.2, 0.1, -0.3], 'X fell for only 2 of 3 seeds (by seed -0.3 to +0.1, mean -0.133 [-0.65, +0.384]).'),
    ([-0.2], 'X fell in the one run (-0.2); nothing is known of other seeds.'),
    ([0.2], 'X did NOT fall (+0.2).'),
  ],
)
def test_verdicts_claim_no_more_than_their_numbers(changes, words):
  assert rft_study.moved('X', '', changes, -1) == words


def test_runs_show_held_out_prompts_alarms_and_hacking(tmp_path, undrawn):
  for name in arms():
    write(tmp_path / 'rft' / name, metric_records(10), samples_of(10))
  text = written(tmp_path, {'rft': {'runs': arms()}, 'timing': {'rft': 9.0}})
  assert '| responses | 2,560 | 2,560 |' in text and '| rule | rule | 0.100 | 0.350 | +0.250 |' in text
  assert '- model: the share of responses that the rule marks correct did NOT rise: 10.0% to 8.0% (-2.0 points).' in text
  assert '- model: the score of the reward model rose but the rule did NOT: a sign of reward hacking.' in text
  assert '- rule: the share of responses that the rule marks correct rose: 10.0% to 35.0% (+25.0 points).' in text
  assert 'rule: the score of the reward model' not in text
  assert '- model: ALARM, step 7: kl 0.9 > 0.5 nats per token' in text and '- rule: none of the configured alarms was raised.' in text
  assert '| rft | 9.0 |' in text
  level = {'model': {'evaluation_before': {'model': 0.0, 'rule': 0.1}, 'evaluation_after': {'model': 1.0, 'rule': 0.1}}}
  text = written(tmp_path, {'rft': {'runs': level}})
  assert 'did NOT rise: 10.0% to 10.0% (+0.0 points).' in text and 'but the rule did NOT: a sign of reward hacking.' in text


def test_arms_with_seeds_are_compared_on_held_out_prompts(tmp_path, undrawn):
  run = lambda before, after: {'evaluation_before': {'rule': before, 'model': -1.0}, 'evaluation_after': {'rule': after, 'model': 0.0}}
  after = {'model': (0.4, 0.5, 0.3), 'rule': (0.3, 0.2, 0.3), 'supervised': (0.1, 0.6, 0.2)}
  runs = {f'{arm}_seed_{i}' if i else arm: run((0.1, 0.2, 0.3)[i], value) for arm, of in after.items() for i, value in enumerate(of)}
  text = written(tmp_path, {'rft': {'runs': runs}})
  assert '| model | share that the rule marks correct | 0.200 [0.100, 0.300] | 0.400 [0.300, 0.500] | +0.200 [+0.000, +0.300] |' in text
  assert '- model: the share that the rule marks correct rose for only 2 of 3 seeds' in text
  assert '- By the rule, model ends above rule in 2 of 3 seeds: +0.133 [' in text
  assert '- By the rule, model ends above supervised in 2 of 3 seeds: +0.1 [' in text
  assert 'Held-out prompts, by arm' not in written(tmp_path / 'one', {'rft': {'runs': arms()}})


def test_seeds_without_arms_are_one_line(tmp_path, undrawn):
  run = {'evaluation_before': {'rule': 0.1}, 'evaluation_after': {'rule': 0.2}}
  text = written(tmp_path, {'rft': {'runs': {'seed_0': run, 'seed_1': run}}})
  assert '| all | share that the rule marks correct | 0.100 [0.100, 0.100] | 0.200 [0.200, 0.200] | +0.100 [+0.100, +0.100] |' in text


def test_gap_and_gains_are_read_from_the_metrics(tmp_path, undrawn):
  write(tmp_path / 'a' / 'rft', metric_records(20, gap=1.5))
  text = written(tmp_path / 'a', {})
  assert '## Reinforcement fine-tuning' in text and 'responses score 1.5 higher with their own reference' in text
  assert '- rft: the score rose by 0.9; adjusted to the length of the first step by a regression, by 0.45.' in text
  # Every second step: the first is step 2, the last step 20.
  assert 'The score rose by 0.9; under the references of other prompts, by 0.9: most of the rise does not come from the reference' in text
  assert 'EMPTY' not in text
  write(tmp_path / 'b' / 'rft', metric_records(20, gap=-0.1))
  assert 'do NOT score higher with their own reference than with that of another prompt: rft.' in written(tmp_path / 'b', {})


def test_collapse_is_stated(tmp_path, undrawn):
  records = [
    {'step': s, 'raw': s, 'shuffled': 0.4 * s, 'length_free': -9.0 * s, 'length': 40.0 / s, 'empty': 0.08 * s} for s in range(1, 11)
  ]
  write(tmp_path / 'rft', records)
  text = written(tmp_path, {})
  assert '- The score rose by 9; under the references of other prompts, by 3.6.\n' in text
  assert '- rft: length went from 40 to 4 tokens, too far for a regression' in text and 'adjusted' not in text
  assert '- rft: at the end, 80% of the responses are EMPTY.' in text


def test_policies_that_go_past_the_target_and_their_divergence_are_stated(tmp_path, undrawn):
  values = study()['comparison']
  past = {**values, 'ppo': {**PPO, 'target_nll': [0.1, 99.0], 'divergence': [0.3, 0.2]}, 'sft': {**values['sft'], 'divergence': [0.1, 0.1]}}
  text = written(tmp_path, {'rft': {**study(), 'comparison': past}})
  assert '- PPO is likelier under the target than its own samples are for 1 of 2 seeds: it keeps to' in text
  assert "The divergence of PPO's token frequencies from the target's is NOT below that of `supervised` for any of 2 seeds" in text


def test_means_of_three_seeds_and_more_have_an_interval():
  values = [-0.5, -0.1, -0.9, -0.4]
  half = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
  assert f'mean -0.475 [{half[0]:+.3g}, {half[1]:+.3g}]).' in rft_study.below('It', 'sft', values)
  assert f'mean -0.475 [{half[0]:+.3g}, {half[1]:+.3g}] nats).' in rft_study.moved('It', ' nats', values, -1)
  assert rft_study.below('It', 'sft', values[:2]).endswith('mean -0.3).')


def test_the_other_references_of_the_study_are_those_of_other_policies(tmp_path, undrawn):
  for seed in range(2):
    write(tmp_path / 'rft' / f'seed_{seed}', metric_records(20, gap=-0.1))
  targets = [{'name': 'p7', 'corpus': 'source', 'temperature': 0.71}, {'name': 'p9', 'corpus': 'comments', 'temperature': 0.8}]
  text = written(tmp_path, {'rft': {**study(), 'targets': targets}})
  assert 'Every run is tuned towards another policy of the pool: p7 (source, temperature 0.71), p9 (comments, temperature 0.80).' in text
  assert 'do NOT score higher with their own reference than with that of another policy: seed 0, seed 1.' in text
  assert 'The score rose on average by 0.9; under the references of other policies, by 0.9: most of the rise does not come from' in text


def test_a_reward_above_that_of_the_target_is_stated(tmp_path, undrawn):
  assert 'above that of samples of the target itself' not in written(tmp_path, {'rft': study()})
  above = {**study()['comparison'], 'ppo': {**PPO, 'reward': [1.5, 0.9]}}
  text = written(tmp_path, {'rft': {**study(), 'comparison': above}})
  assert '- The reward of PPO is above that of samples of the target itself for 1 of 2 seeds; ' in text


@pytest.mark.parametrize('kept', [*itertools.combinations(study(), 1), *itertools.combinations(study(), len(study()) - 1)], ids='-'.join)
def test_any_part_of_a_study_is_a_report(tmp_path, unsaved, kept):
  text = written(tmp_path, {'rft': {key: study()[key] for key in kept}})
  assert ('## Reinforcement fine-tuning' in text) == (not set(kept) <= {'seeds', 'best_of'})
  assert '0 seeds' not in text and 'nan' not in text


def test_any_part_of_a_comparison_of_a_run_and_of_the_metrics_is_a_report(tmp_path, unsaved):
  full = study()['comparison']
  for name, figures in full.items():
    written(tmp_path / name, {'rft': {'comparison': {name: figures}}})
    written(tmp_path / f'no_{name}', {'rft': {'comparison': {other: full[other] for other in full if other != name}}})
  for figure in START:
    assert 'PPO' in written(tmp_path / figure, {'rft': {'comparison': {'ppo': {figure: PPO[figure]}}}})
  for key in arms()['model']:
    assert '### Runs' in written(tmp_path / f'run_{key}', {'rft': {'runs': {'model': {key: arms()['model'][key]}}}})
  for key in metric_records(2)[2]:
    write(tmp_path / f'metric_{key}' / 'rft', [{'step': s, key: 0.5} for s in (1, 2)])
    assert ('![The runs' in written(tmp_path / f'metric_{key}', {})) == (key != 'step')
  for key in samples_of(1)[0]:
    write(tmp_path / f'sample_{key}' / 'rft', [], [{'step': 1, key: samples_of(1)[0][key]}])
    assert '### Samples' in written(tmp_path / f'sample_{key}', {})


def test_no_results_give_no_section(tmp_path):
  assert rft_report.section({}, {}, {}) == [] and rft_report.read_runs(tmp_path) == rft_report.read_samples(tmp_path) == {}
  assert 'Reinforcement' not in written(tmp_path, {'pretrain': {'loss': 0.5}})


@pytest.mark.parametrize('bad', [math.nan, math.inf, np.float32('nan')])
def test_non_finite_results_are_rejected_and_the_old_report_stays(tmp_path, undrawn, bad):
  before = written(tmp_path, {'rft': study()})
  with pytest.raises(report.ReportError, match=r'rft\.relative_nll_after\[1\] is (nan|inf)'):
    report.write_report(tmp_path, {'rft': {**study(), 'relative_nll_after': [0.1, bad]}})
  assert (tmp_path / 'report.md').read_text() == before


def test_steps_that_are_not_finite_are_left_out_of_figures_and_means(tmp_path):
  write(tmp_path / 'rft', [{'step': 1, 'raw': 1.0}, {'step': 2, 'raw': math.nan}, {'step': 3, 'raw': 2.0}])
  assert '| score | 1.000 → 2.000 |' in written(tmp_path, {})
  assert rft_plots.panels_of({'rft': [{'step': 1, 'raw': math.inf}]}) == []


@pytest.mark.parametrize('file', ['metrics.jsonl', 'samples.jsonl'])
def test_broken_line_is_named_and_a_torn_one_dropped(tmp_path, undrawn, file):
  write(tmp_path / 'rft' / 'a', metric_records(4), samples_of(4))
  with (tmp_path / 'rft' / 'a' / file).open('a') as out:
    out.write('{"step": 5, "ra')
  assert 'a, step 4:' in written(tmp_path, {})
  with (tmp_path / 'rft' / 'a' / file).open('a') as out:
    out.write('\n')
  with pytest.raises(UserError, match=rf'{file}:\d+: not JSON'):
    report.write_report(tmp_path, {})


def test_text_of_a_sample_cannot_break_its_table():
  hostile = 'a | b\n\n# `c` <img src=x> ![d](e) *f* \x1b[0m $x$'
  (line,) = [part for part in rft_report.section({}, {}, {'rft': [{'step': 1, 'output': hostile, 'score': 1.0}]}) if part.startswith('| ')]
  assert len(line.splitlines()) == 3
  shown = line.splitlines()[2]
  assert r'a \| b ⏎  ⏎ \# \`c\` &lt;img src=x&gt; \!\[d\](e) \*f\*' in shown and '\x1b' not in shown
  assert len(re.findall(r'(?<!\\)\|', shown)) == 8
  assert '| *empty* |' in shown  # its prompt and reference


def test_long_texts_are_shortened_in_the_middle():
  text = 'start ' + 'x' * 1_000 + ' end'
  shown = markdown.shorten(text, 100)
  assert shown.startswith('start x') and shown.endswith('x end') and r'\[... 910 characters ...\]' in shown and len(shown) < 140
  assert markdown.shorten('y' * 100, 100) == 'y' * 100


def test_progress_shows_the_metrics_of_ppo(capsys):
  progress = StepProgress('rft', total=10, initial=0, every=5)
  progress.update({'step': 5, 'reward': -0.5, 'kl': 0.0125, 'length': 47.25, 'entropy': 3.0, 'tokens_per_second': 999.6})
  progress.update({'step': 10, 'reward': 0.5, 'length': 50.0})
  lines = capsys.readouterr().out.splitlines()
  assert lines == ['rft  step 5/10  reward -0.5000  kl 0.0125  length 47.2  1,000 tokens/s', 'rft  step 10/10  reward 0.5000  length 50.0']
