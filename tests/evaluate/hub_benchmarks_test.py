"""Benchmarks that are published on the hub as tables: made files of their columns, and official rules against loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from polar_jax.evaluate import benchmarks, sets
from polar_jax.evaluate.benchmarks import ppe_correctness, rewardbench, rewardbench_2
from polar_jax.evaluate.sets import Item
from polar_jax.types import UserError

RNG = np.random.default_rng(0)


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def pair_row(i, subset, **changes):
  row = {'id': i, 'prompt': f'p{i}', 'chosen': f'c{i}', 'chosen_model': 'm', 'rejected': f'r{i}', 'rejected_model': 'n', 'subset': subset}
  return row | changes


def test_rewardbench(tmp_path):
  subsets = ['alpacaeval-easy', 'mt-bench-med', 'llmbar-natural', 'donotanswer', 'math-prm', 'hep-go']
  rows = [pair_row(i, subsets[i % 6]) for i in range(60)]
  write(tmp_path / 'rewardbench/data/filtered-00000-of-00001.parquet', rows)
  write(tmp_path / 'rewardbench/data/raw-00000-of-00001.parquet', rows * 2)
  (one,) = benchmarks.read('rewardbench', tmp_path)
  assert len(one.items) == 60 and one.missing == rewardbench.PRIOR_SETS
  rewards = [RNG.integers(0, 3, 2).astype(float) for _ in one.items]
  share = {s: 100 * np.mean([a > b for (a, b), r in zip(rewards, rows, strict=True) if r['subset'] == s]) for s in subsets}
  found = one.official(one.items, rewards)
  assert found['by_subset'] == pytest.approx(share)
  assert found['chat'] == pytest.approx((100 * share['alpacaeval-easy'] + 40 * share['mt-bench-med']) / 140)
  assert found['reasoning'] == pytest.approx((984 * share['math-prm'] + 164 * share['hep-go']) / (984 + 164))
  means = [found[section] for section in ('chat', 'chat_hard', 'safety', 'reasoning')]
  assert found['all'] == pytest.approx(np.mean(means)) and 'prior_sets' not in found
  for name in rewardbench.PRIOR_SETS:
    prompt = [{'role': 'user', 'content': 'a'}] if name == 'anthropic_hhh' else 'p'
    write(tmp_path / f'rewardbench/prior/{name}-00000-of-00001.parquet', [{'prompt': prompt, 'chosen': 'c', 'rejected': 'r'}] * 2)
  (one,) = benchmarks.read('rewardbench', tmp_path)
  assert len(one.items) == 68 and not one.missing
  right = {'shp/1': 1.0, 'shp/2': 1.0, 'summarize/1': 1.0}
  found = one.official(one.items, [*rewards, *(np.array([right.get(item.id, 0.0), 0.0]) for item in one.items[60:])])
  assert found['prior_sets'] == pytest.approx((0 + 0 + 100 + 50) / 4)
  assert found['all_with_prior_sets'] == pytest.approx((2 * sum(means) + found['prior_sets']) / 9)


def test_counts_of_rewardbench():
  assert [sum(subsets.values()) for subsets in rewardbench.SECTIONS.values()] == [358, 456, 740, 1_968]


def choice_row(i, subset, right=1, wrong=3, **changes):
  chosen, rejected = [f'c{k}' for k in range(right)], [f'r{k}' for k in range(wrong)]
  return {'id': str(i), 'prompt': f'p{i}', 'chosen': chosen, 'rejected': rejected, 'subset': subset} | changes


def test_rewardbench_2_outside_ties(tmp_path):
  write(tmp_path / 'rewardbench_2/data/test-00000-of-00001.parquet', [choice_row(i, ('Math', 'Focus')[i % 2]) for i in range(8)])
  (one,) = benchmarks.read('rewardbench_2', tmp_path)
  assert one.missing == ('Factuality', 'Precise IF', 'Safety', 'Ties') and one.items[0].correct == (True, False, False, False)
  scores = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [2, 1, 0, 0], [0, 0, 1, 1], [3, 3, 3, 3]]
  found = one.official(one.items, [np.array(s, float) for s in scores])
  assert found == pytest.approx(
    {'Math': 100 * (1 + 0 + 1 / 3 + 0) / 4, 'Focus': 100 * (1 / 2 + 1 / 4 + 1 + 1 / 4) / 4, 'all': (100 / 3 + 50) / 2}
  )


def slow_ties(rows):
  """The published formula, prompt by prompt. `rows`: (kind, number, rewards of right answers, rewards of wrong answers)."""
  gap = {(kind, number): min(right) - max(wrong) for kind, number, right, wrong in rows}
  spread = {number: max(right) - min(right) for kind, number, right, _ in rows if kind == 'tied'}
  share = lambda kind: np.mean([value > 0 for (k, _), value in gap.items() if k == kind])
  first = second = third = 0.0
  both = [number for kind, number, _, _ in rows if kind == 'tied' and ('ref', number) in gap]
  for number in both:
    smaller, s = min(gap['ref', number], gap['tied', number]), spread[number]
    first += gap['tied', number] > s
    second += smaller > s
    third += (math.tanh(smaller / s - 1)) if s else (0 if smaller == 0 else math.copysign(1, smaller))
  n = len(both)
  return 0.3 * share('tied') + 0.3 * share('ref') + 0.2 * first / n + 0.2 * second / n + 0.01 * third / n


def test_ties_of_rewardbench_2(tmp_path):
  rows, scores, listed = [], [], []
  for number, kind in itertools.product(range(12), ('ref', 'tied')):
    if (number, kind) == (3, 'ref'):
      continue  # counts for the accuracy alone
    right, wrong = (1 if kind == 'ref' else 2 + number % 3), 2 + number % 2
    rows.append(choice_row(f'{kind}:{number}', 'Ties', right, wrong))
    values = RNG.normal(size=right + wrong) + np.r_[np.full(right, number % 4), np.zeros(wrong)]
    if number in (5, 6):  # no spread: a gap of zero, and one above
      values = np.r_[np.full(right, 1.0), np.full(wrong, 1.0 if number == 5 else 0.0)]
    scores.append(values)
    listed.append((kind, number, values[:right].tolist(), values[right:].tolist()))
  write(tmp_path / 'rewardbench_2/test.parquet', rows)
  (one,) = benchmarks.read('rewardbench_2', tmp_path)
  assert one.official(one.items, scores)['Ties'] == pytest.approx(100 * slow_ties(listed))
  perfect = [np.r_[np.ones(sum(item.correct)), np.zeros(len(item.candidates) - sum(item.correct))] for item in one.items]
  assert rewardbench_2.ties_score(list(zip(one.items, perfect, strict=True))) == pytest.approx(1.01)


def answers_row(i, **changes):
  correct = [(i + k) % 3 == 0 for k in range(32)]
  right, wrong = ([k for k in range(32) if correct[k] is side] for side in (True, False))
  pairs = [[right[0], wrong[0]], [wrong[1], right[1]], [right[2], wrong[2]]]
  row = {'question_id': i, 'prompt': f'p{i}', 'model_name': 'm', 'scores': correct, 'sampled_conflict_pairs': pairs}
  return row | {f'response_{k + 1}': f'a{k}' for k in range(32)} | changes


def test_ppe_correctness(tmp_path):
  rows = [answers_row(i) for i in range(4)]
  write(tmp_path / 'ppe_correctness/PPE-MATH-Best-of-K/data/train-00000-of-00001.parquet', rows)
  write(tmp_path / 'ppe_correctness/PPE-GPQA-Best-of-K/data/train-00000-of-00001.parquet', rows[:1])
  (one,) = benchmarks.read('ppe_correctness', tmp_path)
  assert one.missing == ('MMLU-Pro', 'IFEval', 'MBPP-Plus') and one.items[0].id == 'GPQA/0' and len(one.items) == 5
  rewards = [RNG.integers(0, 9, 32).astype(float) for _ in one.items]
  found = one.official(one.items, rewards)
  for source, kept in (('GPQA', [0]), ('MATH', [1, 2, 3, 4])):
    hits, areas, ends = [], [], []
    for i in kept:
      row, scores = rows[i - 1 if source == 'MATH' else 0], rewards[i]
      for a, b in row['sampled_conflict_pairs']:
        hits.append(scores[a] > scores[b] if row['scores'][a] else scores[b] > scores[a])
      right, wrong = ([scores[k] for k in range(32) if row['scores'][k] is side] for side in (True, False))
      areas.append(np.mean([(r > w) + (r == w) / 2 for r in right for w in wrong]))
      ends.append(np.mean([row['scores'][k] for k in range(32) if scores[k] == scores.max()]))
    expected = {'accuracy': np.mean(hits), 'auc': np.mean(areas), 'best_of_k_end': np.mean(ends)}
    assert {key: found['by_source'][source][key] for key in expected} == pytest.approx({k: 100 * v for k, v in expected.items()})
    assert found['by_source'][source]['best_of_k_max'] >= found['by_source'][source]['best_of_k_end']
  assert found['auc'] == pytest.approx(np.mean([of['auc'] for of in found['by_source'].values()]))


@pytest.mark.parametrize(
  ('name', 'file', 'row', 'message'),
  [
    ('rewardbench', 'filtered.parquet', pair_row(0, 'other'), "subset is 'other'; the benchmark has: alpacaeval-easy"),
    ('rewardbench', 'filtered.parquet', pair_row(0, 'hep-go', chosen=''), 'chosen must be a text that is not empty'),
    ('rewardbench_2', 'test.parquet', choice_row('7', 'Ties', 2), "id of a prompt of Ties must be ref:N or tied:N, not '7'"),
    ('rewardbench_2', 'test.parquet', choice_row('7', 'Math', 2), 'chosen has 2 answers; only prompts of Ties'),
    ('rewardbench_2', 'test.parquet', choice_row('7', 'Math') | {'rejected': []}, 'rejected must be a list of texts that is not empty'),
    ('ppe_correctness', 'math.parquet', answers_row(0, scores=[True] * 3), 'scores must be a list of 32'),
    ('ppe_correctness', 'math.parquet', answers_row(0, sampled_conflict_pairs=[[0, 3]]), 'are not a right and a wrong answer'),
    ('ppe_correctness', 'math.parquet', answers_row(0, sampled_conflict_pairs=[[0, 99]]), 'must be pairs of numbers from 0 to 31'),
    ('ppe_correctness', 'math.parquet', answers_row(0, sampled_conflict_pairs=[]), 'sampled_conflict_pairs is empty'),
    ('ppe_correctness', 'math.parquet', answers_row(0, response_5=None), 'response_1 to response_32 must be texts'),
  ],
)
def test_bad_rows_are_named_and_can_be_left_out(tmp_path, name, file, row, message):
  good = {'rewardbench': pair_row(1, 'hep-go'), 'rewardbench_2': choice_row('1', 'Math'), 'ppe_correctness': answers_row(1)}[name]
  write(tmp_path / name / file, [good, row])
  with pytest.raises(UserError, match=rf'{file}, example 2: .*{message}'):
    benchmarks.read(name, tmp_path)
  (one,) = benchmarks.read(name, tmp_path, 'skip')
  assert len(one.items) == 1 and len(one.skipped) == 1


@pytest.mark.parametrize('name', ['rewardbench', 'rewardbench_2', 'ppe_correctness'])
def test_a_folder_without_its_files_is_named(tmp_path, name):
  write(tmp_path / name / 'other.parquet', [{'a': 1}])
  with pytest.raises(UserError, match=f'{name}: has no'):
    benchmarks.read(name, tmp_path)


def test_prompts_with_one_right_answer_count_for_the_area_and_those_without_a_contrast_do_not():
  made = lambda name, correct: Item(name, 'p', ('a', 'b', 'c'), sets.pair(), 'MATH', correct=correct)
  items = [made('one', (False, True, False)), made('two', (True, True, False)), made('all', (True, True, True)), made('none', (False,) * 3)]
  rewards = [np.array(values) for values in ([1.0, 2.0, 3.0], [1.0, 1.0, 0.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0])]
  found = ppe_correctness.official(items, rewards)
  assert found['auc'] == pytest.approx(100 * (1 / 2 + 1) / 2)  # the one right answer is above one of two wrong ones
  assert found['accuracy'] == 0.0 and found['by_source']['MATH'].keys() == found.keys() - {'by_source'}
  assert ppe_correctness.official(items[2:], rewards[2:])['auc'] == 0.0 and ppe_correctness.official([], []) == {'by_source': {}}


@pytest.mark.parametrize(
  ('name', 'file', 'row', 'twice'),
  [
    ('rewardbench', 'filtered.parquet', pair_row(3, 'hep-go'), '3'),
    ('rewardbench_2', 'test.parquet', choice_row('3', 'Math'), '3'),
    ('ppe_correctness', 'math.parquet', answers_row(3), 'MATH/3'),
  ],
)
def test_ids_that_occur_twice_are_refused(tmp_path, name, file, row, twice):
  write(tmp_path / name / file, [row, row])
  with pytest.raises(UserError, match=f"{name}: the id '{twice}' occurs twice"):
    benchmarks.read(name, tmp_path)
