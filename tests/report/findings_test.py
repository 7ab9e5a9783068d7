"""The first lines of the report: each answer for numbers that show it, deny it, and leave it open."""

from __future__ import annotations

import pytest

from polar_jax.report import findings, report


def interval(accuracy):
  return {'accuracy': accuracy, 'low': accuracy - 0.02, 'high': accuracy + 0.02, 'n': 500, 'clusters': 100, 'clustered_by': 'prompt'}


def finetune(low, high):
  arms = {'pretrained_finetuned': interval(0.8), 'finetuned_only': interval(0.7)}
  return {'arms': arms, 'margin_over_arms': {'finetuned_only': {'difference': (low + high) / 2, 'low': low, 'high': high}}}


def by_set(**margins):
  arms = {name: {'finetuned_only': {'main_minus': {'difference': sum(m) / 2, 'low': m[0], 'high': m[1]}}} for name, m in margins.items()}
  return {'evaluation': {'sets': {name: {'arms': found} for name, found in arms.items()}}}


HELD_OUT = {'predicted': 0.3, 'low': 0.29, 'high': 0.31, 'loss': 0.3}


def law(**changes):
  return {'alpha': -0.04, 'low': -0.05, 'high': -0.03, 'beta': 2.4, 'r2': 0.99, 'n': 12, 'held_out': HELD_OUT | {'within': True}, **changes}


@pytest.mark.parametrize(
  ('results', 'expected'),
  [
    ({'finetune': finetune(0.05, 0.15)}, 'Does pre-training help?** With equal fine-tuning data: yes. 80.0 [78.0, 82.0]% with it, 70.0'),
    ({'finetune': finetune(0.05, 0.15)}, '+10.0 points [+5.0, +15.0].'),
    ({'finetune': finetune(-0.05, 0.15)}, ': not shown, the interval of the difference has 0.'),
    ({'finetune': finetune(-0.15, -0.05)}, ': no, it does harm.'),
    (by_set(a=(0.1, 0.2), b=(-0.1, 0.2)), 'of 2 held-out sets the model with pre-training is better on 1 (`a` +15.0) and worse on 0, in'),
    (by_set(a=(-0.2, -0.1), b=(-0.1, 0.2), c=(-0.1, 0)), 'better on 0 and worse on 1 (`a` -15.0), in points with an interval'),
    (by_set(a=(-0.2, -0.1), b=(-0.1, 0.2), c=(-0.1, 0)), 'the other 2 leave it open.'),
    ({'rft': {'relative_nll_before': [3.0, 2.0], 'relative_nll_after': [1.0, 1.5]}}, 'policy?** Yes. The NLL'),
    ({'rft': {'relative_nll_before': [3.0, 2.0], 'relative_nll_after': [1.0, 1.5]}}, '-1.25 nats per token (in 2 seeds -2 to -0.5).'),
    ({'rft': {'relative_nll_before': [3.0, 2.0], 'relative_nll_after': [1.0, 2.5]}}, 'policy?** In 1 of 2 seeds. '),
    ({'rft': {'reward_before': 1.0, 'reward_after': 0.5}}, 'policy?** No. The reward: -0.5 (in the one run).'),
    ({'scaling': {'C': law()}}, 'compute?** Yes: L(C) = 2.4 C^-0.0400 [-0.0500, -0.0300], R2 0.990, 12 points. The largest size is within'),
    ({'scaling': {'C': law(held_out=HELD_OUT | {'within': False})}}, 'The largest size is NOT within'),
    (
      {'scaling': {'C': law(held_out=HELD_OUT | {'within': False}), 'floored': {'C': law()}}},
      'NOT within its prediction from the others. The largest size is within its prediction from the others with a floor.',
    ),
    ({'scaling': {'C': law(r2=0.8, held_out=None)}}, 'compute?** It falls, but not as a power law: '),
    ({'scaling': {'C': law(high=0.01)}}, 'compute?** Not shown, the interval of the exponent has 0: '),
  ],
)
def test_answers(results, expected):
  (finding,) = findings.find(results)
  assert expected in finding.text


@pytest.mark.parametrize(
  'results', [{}, {'finetune': {'arms': {'pretrained_finetuned': interval(0.8)}}}, {'rft': {'reward_before': [1.0]}}]
)
def test_no_answer_without_its_numbers(results):
  assert findings.find(results) == [] == findings.section([], {})


@pytest.mark.parametrize(
  ('ppo', 'expected'),
  [
    (0.3, 'It ends NOT nearer to the target than the start, and NOT nearer than supervised tuning: divergence of token frequencies 0.300'),
    (0.1, 'It ends nearer to the target than the start, and NOT nearer than supervised tuning'),
    (0.02, 'It ends nearer to the target than the start, and nearer than supervised tuning: divergence of token frequencies 0.020, 0.200'),
  ],
)
def test_a_policy_that_moves_may_not_end_nearer_to_the_target(ppo, expected):
  comparison = {'start': {'divergence': [0.1, 0.3]}, 'ppo': {'divergence': [ppo, ppo]}, 'sft': {'divergence': [0.05, 0.03]}}
  moved = {'relative_nll_before': [1.0, 1.0], 'relative_nll_after': [0.5, 0.2]}
  assert expected in findings.find({'rft': {**moved, 'comparison': comparison}})[0].text
  assert 'ends' not in findings.find({'rft': {**moved, 'comparison': {'ppo': {}}}})[0].text


@pytest.mark.parametrize('results', [by_set(a=(0.1, 0.2), b=(-0.1, 0.2)), {'finetune': finetune(0.05, 0.15)}])
def test_a_panel_for_each(results):
  found = findings.find(results)
  assert len(findings.figure(found).axes) == len(found) == 1


def test_they_are_in_the_first_ten_lines_with_one_figure(tmp_path):
  results = {'finetune': finetune(0.05, 0.15), 'rft': {'reward_before': [1.0, 2.0], 'reward_after': [2.0, 1.0]}, 'scaling': {'C': law()}}
  report.write_report(tmp_path, results)
  first = (tmp_path / 'report.md').read_text().splitlines()[:10]
  for question in ('Does pre-training help?', 'Does PPO move the policy?', 'Does loss follow compute?', '(figures/findings.png)'):
    assert sum(question in line for line in first) == 1
  assert (tmp_path / 'figures' / 'findings.png').stat().st_size > 5_000
