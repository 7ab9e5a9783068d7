from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest

from polar_jax import config as config_lib
from polar_jax.data import examples as sources
from polar_jax.evaluate import baselines
from polar_jax.ppo.rewards import rules
from polar_jax.synthesis import arithmetic
from polar_jax.types import Triplet

CONFIG = config_lib.SynthesizeConfig(
  world='arithmetic', train_examples=40, evaluation_examples=12, preference_examples=24, preference_evaluation_examples=8, two_steps=0.4
)


@pytest.fixture(scope='module')
def problems():
  """{split: 300 problems of larger numbers}."""
  return {s: [arithmetic.make_problem(5, 'prompts', s, i, 40, 0.4) for i in range(300)] for s in arithmetic.SPLITS}


@pytest.fixture(scope='module')
def preferences():
  return arithmetic.make_preferences(CONFIG, 5, 'train', 1_500)


def numbers(text):
  return [int(n) for n in re.findall(r'[0-9]+', text)]


def test_make_problem_equations_hold(problems):
  """Every equation is true, uses the question's numbers or earlier results, and the last one gives the answer."""
  for problem in problems['train']:
    known = set(problem.numbers)
    for equation in problem.equations:
      left, right = equation.split(' = ')
      assert eval(left.replace('/', '//')) == int(right) and (('/' not in left) or eval(left) == int(right)), equation
      assert set(numbers(left)) <= known, (problem.question, equation)
      known.add(int(right))
    assert int(right) == problem.result and rules.last_number(problem.reference) == problem.result
    assert max(known) <= 40 and min(known) >= 1
    assert problem.result not in problem.numbers  # copying a number from the question is never right


def test_make_problem_fills_every_template_and_uses_all_numbers(problems):
  seen = set()
  for rows in problems.values():
    for problem in rows:
      seen.add(problem.template)
      assert not set('{}_') & set(problem.question + problem.claim(1) + problem.reference)
      assert sorted(numbers(problem.question)) == sorted(problem.numbers)
      assert problem.question.endswith('?') and problem.question[0] == problem.question[0].upper()
  assert len(seen) == len(arithmetic.TEMPLATES) >= 40
  assert len({t.question for t in arithmetic.TEMPLATES}) == len(arithmetic.TEMPLATES)


def test_split_of_splits_share_no_problem(problems):
  pairs = {s: {(p.template, p.numbers) for p in rows} for s, rows in problems.items()}
  texts = {s: {p.question for p in rows} for s, rows in problems.items()}
  for one, other in (('train', 'validation'), ('train', 'test'), ('validation', 'test')):
    assert not pairs[one] & pairs[other] and not texts[one] & texts[other]
  others = {(p.template, p.numbers) for p in (arithmetic.make_problem(6, 'preferences', 'train', i, 40, 0.4) for i in range(300))}
  assert not others & pairs['test']  # including those that the reward model learns from, whatever the seed


def test_split_of_shares_of_every_template():
  pairs = [(a, b) for a in range(2, 60) for b in range(2, 60)]
  for template in range(len(arithmetic.TEMPLATES)):
    splits = [arithmetic.split_of(template, pair) for pair in pairs]
    shares = [splits.count(split) / len(pairs) for split in arithmetic.SPLITS]
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.04, template


def test_make_problem_is_a_function_of_seed_stream_split_and_index(problems):
  make = arithmetic.make_problem
  assert make(5, 'prompts', 'test', 7, 40, 0.4) == problems['test'][7]
  for other in (make(6, 'prompts', 'test', 7, 40, 0.4), make(5, 'preferences', 'test', 7, 40, 0.4), problems['train'][7]):
    assert other.question != problems['test'][7].question


def test_make_problem_difficulty(problems):
  share = np.mean([len(p.equations) == 2 for p in problems['train']])
  assert abs(share - 0.4) < 0.1
  assert {len(arithmetic.make_problem(0, 'x', 'train', i, 40, 0.0).equations) for i in range(40)} == {1}
  small = [arithmetic.make_problem(0, 'x', s, i, 6, 0.5) for s in arithmetic.SPLITS for i in range(20)]  # the minimum that a config allows
  assert max(max(*p.numbers, p.result) for p in small) <= 6 < max(p.result for p in problems['train'])


def test_make_preferences_chosen_is_right_and_rejected_wrong(preferences):
  for row in preferences:
    assert rules.same_last_number(row['chosen'], row['reference']), row
    assert not rules.same_last_number(row['rejected'], row['reference']), row
  kinds = [row['category'] for row in preferences]
  assert min(kinds.count(kind) for kind in set(kinds)) > 0.1 * len(kinds)


def test_make_preferences_length_and_wording_carry_no_information(preferences):
  lengths = np.array([(len(row['chosen']), len(row['rejected'])) for row in preferences], float)
  assert abs(np.mean(lengths[:, 0] > lengths[:, 1]) - np.mean(lengths[:, 0] < lengths[:, 1])) < 0.1
  shape = lambda text: re.sub('[0-9]+', '#', text.split('"')[0]).split()[:2]
  starts = {side: [' '.join(shape(row[side])) for row in preferences] for side in ('chosen', 'rejected')}
  for start in ('The answer', '# +', '# -'):
    ours, theirs = (sum(s == start for s in starts[side]) / len(preferences) for side in ('chosen', 'rejected'))
    assert abs(ours - theirs) < 0.06, start


def test_make_preferences_limits_heuristic_baselines(preferences):
  """Right answers share their number with the reference, so counting shared words beats chance, but only to this extent."""
  rows = [Triplet(**row) for row in preferences]
  accuracy = {name: float(correct.mean()) for name, correct in baselines.heuristic_correct(rows).items()}
  assert abs(accuracy['length'] - 0.5) < 0.06
  assert 0.6 < accuracy['words'] < 0.72 and accuracy['overlap_3'] < 0.82


def test_synthesize_files_are_readable_and_reused_for_the_same_settings(tmp_path):
  lines: list[str] = []
  first = arithmetic.synthesize(CONFIG, 3, tmp_path, lines.append)
  assert first['rows'] == {'prompts/train': 40, 'prompts/test': 12, 'preferences/train': 24, 'preferences/validation': 8}
  read = {name: (tmp_path / 'data' / f'{name}.jsonl').read_text() for name in first['rows']}
  prompts = sources.open_prompts(tmp_path / 'data' / 'prompts', 'test')
  assert [p.answer for p in prompts] == [str(rules.last_number(p.reference)) for p in prompts] and len(prompts) == 12
  assert {p.category for p in sources.open_prompts(tmp_path / 'data' / 'prompts', 'train')} == {'1 step', '2 step'}
  assert len(sources.open_triplets(tmp_path / 'data' / 'preferences', 'validation')) == 8

  assert arithmetic.synthesize(CONFIG, 3, tmp_path, lines.append) == first and 'reusing' in lines[-1]
  marker = tmp_path / 'data' / 'arithmetic.json'
  marker.unlink()  # as after a kill: the same files are written again
  arithmetic.synthesize(CONFIG, 3, tmp_path, lines.append)
  assert 'reusing' not in lines[-1] and json.loads(marker.read_text())['result']['rows'] == first['rows']
  assert {name: (tmp_path / 'data' / f'{name}.jsonl').read_text() for name in read} == read
  more = dataclasses.replace(CONFIG, evaluation_examples=15)
  assert arithmetic.synthesize(more, 3, tmp_path, lines.append)['rows']['prompts/test'] == 15
  assert (
    (tmp_path / 'data' / 'prompts' / 'test.jsonl').read_text().startswith(read['prompts/test'])
  )  # examples do not depend on their number


def test_synthesize_reuses_data_of_earlier_versions(tmp_path):
  """Their marker has the earlier names of the options."""
  first = arithmetic.synthesize(CONFIG, 3, tmp_path, lambda line: None)
  marker = tmp_path / 'data' / 'arithmetic.json'
  stored = json.loads(marker.read_text())
  for old, new in (('largest', 'max_number'), ('train_rows', 'train_examples'), ('preference_rows', 'preference_examples')):
    stored['settings'][old] = stored['settings'].pop(new)
  marker.write_text(json.dumps(stored))
  lines: list[str] = []
  assert arithmetic.synthesize(CONFIG, 3, tmp_path, lines.append) == first and 'reusing' in lines[0]
  lines.clear()
  arithmetic.synthesize(dataclasses.replace(CONFIG, max_number=13), 3, tmp_path, lines.append)
  assert 'reusing' not in lines[0]
