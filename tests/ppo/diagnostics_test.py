from __future__ import annotations

import json
import math

import numpy as np
import pytest

from polar_jax.config import AlarmConfig
from polar_jax.data.template import join_messages
from polar_jax.ppo import diagnostics
from polar_jax.ppo.diagnostics import Alarms
from polar_jax.types import Prompt


def slow_overlap(output, reference):
  left, shared = reference.split(), 0
  for word in output.split():
    if word in left:
      left.remove(word)
      shared += 1
  return shared / len(output.split()) if output else 0.0


def test_overlap_takes_each_word_of_the_reference_once():
  rng = np.random.default_rng(0)
  texts = [[' '.join(rng.choice(list('abcd'), rng.integers(0, 9))) for _ in range(2)] for _ in range(60)]
  outputs, references = zip(*texts, strict=True)
  got = diagnostics.overlap(outputs, references)
  assert got.dtype == np.float64 and got.tolist() == [slow_overlap(o, r) for o, r in texts]
  assert 0 < got.mean() < 1


def test_overlap_of_words_not_of_punctuation_or_case():
  messages = [{'role': 'assistant', 'content': 'The Cat'}, {'role': 'assistant', 'content': 'sat.'}]
  got = diagnostics.overlap(['the cat, the cat!', '', '...', '我喜欢猫'], [messages, 'a', '...', '猫喜欢我们'])
  assert got.tolist() == [0.5, 0.0, 0.0, 1.0]
  with pytest.raises(ValueError, match='zip'):
    diagnostics.overlap(['a'], [])


@pytest.mark.parametrize('n', [1, 2, 3])
def test_distinct_counts_over_all_outputs(n):
  rng = np.random.default_rng(n)
  outputs = [' '.join(rng.choice(list('abc'), size)) for size in (0, 1, 4, 9, 9)]
  grams = [tuple(o.split()[i : i + n]) for o in outputs for i in range(len(o.split()) - n + 1)]
  assert diagnostics.distinct(outputs, n) == len(set(grams)) / len(grams)


def test_distinct_of_nothing_and_of_repetition():
  assert diagnostics.distinct([], 1) == diagnostics.distinct(['', 'a'], 2) == 0.0
  assert diagnostics.distinct(['so good so good so good'], 2) == 2 / 5
  with pytest.raises(ValueError, match='n is 0'):
    diagnostics.distinct(['a'], 0)


def test_length_regression_is_the_least_squares_line():
  rng = np.random.default_rng(0)
  length = rng.integers(5, 60, 40)
  score = (0.03 * length + rng.normal(size=40)).astype(np.float32)
  slope, adjusted = diagnostics.length_regression(score, length, 20.0)
  design = np.stack([length, np.ones(40)], axis=1)
  (wanted, intercept), *_ = np.linalg.lstsq(design, score.astype(np.float64), rcond=None)
  assert slope == pytest.approx(wanted, rel=1e-9) and adjusted == pytest.approx(wanted * 20.0 + intercept, rel=1e-9)


def test_reward_that_is_length_alone_is_flat_once_freed_of_it():
  free = [diagnostics.length_regression(0.5 * length, length, 10.0)[1] for length in (np.array([8.0, 12.0]), np.array([50.0, 90.0]))]
  assert free == pytest.approx([5.0, 5.0])
  assert diagnostics.length_regression(np.array([1.0, 2.0, 6.0]), np.array([7, 7, 7]), 100.0) == (0.0, 3.0)


@pytest.mark.parametrize(('score', 'length'), [([], []), ([1.0], [1, 2]), ([[1.0]], [[1]])])
def test_length_regression_refuses_what_is_not_one_number_an_answer(score, length):
  with pytest.raises(ValueError, match='one number per answer'):
    diagnostics.length_regression(np.array(score), np.array(length), 1.0)


def test_explained_variance_sees_valid_tokens_only():
  rng = np.random.default_rng(0)
  returns, values = rng.normal(size=(2, 6, 9)).astype(np.float32)
  values = values + 0.7 * returns + 3  # a constant that is off costs nothing
  mask = rng.random((6, 9)) < 0.6
  valid = [(float(r), float(v)) for r, v, m in zip(returns.flat, values.flat, mask.flat, strict=True) if m]
  mean_r, mean_e = (sum(xs) / len(valid) for xs in ([r for r, _ in valid], [r - v for r, v in valid]))
  wanted = 1 - sum((r - v - mean_e) ** 2 for r, v in valid) / sum((r - mean_r) ** 2 for r, _ in valid)
  returns[~mask], values[~mask] = np.nan, np.inf
  assert diagnostics.explained_variance(returns, values, mask.astype(np.float32)) == pytest.approx(wanted, rel=1e-6)


def test_explained_variance_at_its_marks():
  returns, mask = np.arange(6.0).reshape(2, 3), np.ones((2, 3))
  assert diagnostics.explained_variance(returns, returns, mask) == 1.0
  assert diagnostics.explained_variance(returns, np.zeros((2, 3)), mask) == 0.0
  assert diagnostics.explained_variance(returns, -returns, mask) == pytest.approx(-3.0)
  assert diagnostics.explained_variance(np.full((2, 3), 0.1), returns, mask) == 0.0
  assert diagnostics.explained_variance(returns, returns, 0 * mask) == 0.0


def rows_of(counts, references=1):
  """A batch with `counts[i]` rollouts of prompt i, whose rows cycle through so many references of its own."""
  return [Prompt(f'p{i}', f'r{i}.{j % references}', f'a{i}.{j % references}', category='c') for i, n in enumerate(counts) for j in range(n)]


@pytest.mark.parametrize('counts', [(1, 1), (1, 9), (3, 1, 2), (4,) * 8, tuple(range(1, 7))])
@pytest.mark.parametrize('references', [1, 3])
@pytest.mark.parametrize('seed', range(4))
def test_no_rollout_gets_a_reference_of_its_own_prompt(counts, references, seed):
  prompts = rows_of(counts, references)
  order = np.random.default_rng(seed).permutation(len(prompts))
  prompts = [prompts[i] for i in order]
  got = diagnostics.shuffled_references(prompts, (seed, 7))
  assert [(p.prompt, p.category) for p in got] == [(p.prompt, p.category) for p in prompts]
  given = {(p.reference, p.answer) for p in prompts}
  for p in got:
    assert (p.reference, p.answer) in given and not p.reference.startswith(f'r{p.prompt[1:]}.')
  groups = {}
  for before, after in zip(prompts, got, strict=True):
    groups.setdefault((before.prompt, before.reference), set()).add((after.reference, after.answer))
  assert all(len(new) == 1 for new in groups.values())  # rows that were alike stay alike
  assert got == diagnostics.shuffled_references(prompts, (seed, 7))


def test_shuffles_differ_between_seeds_and_use_every_reference():
  prompts = rows_of((2,) * 20)
  shuffles = [tuple(p.reference for p in diagnostics.shuffled_references(prompts, (0, step))) for step in range(5)]
  assert len(set(shuffles)) == 5 and all(len(set(s)) == 20 for s in shuffles)


def test_one_prompt_has_no_other_reference():
  assert diagnostics.shuffled_references(rows_of((5,), references=5), 0) is None
  assert diagnostics.shuffled_references([], 0) is None


def test_references_that_are_messages_are_shuffled_whole():
  messages = [[{'role': 'assistant', 'content': f'r{i}'}] for i in range(2)]
  got = diagnostics.shuffled_references([Prompt([{'role': 'user', 'content': f'p{i}'}], messages[i]) for i in range(2)], 0)
  assert [join_messages(p.prompt, '') for p in got] == ['p0', 'p1'] and [p.reference for p in got] == messages[::-1]


def steps(key, values, first=1):
  return [{'step': first + i, **({} if v is None else {key: v})} for i, v in enumerate(values)]


@pytest.mark.parametrize(
  ('option', 'key', 'limit', 'good', 'bad'),
  [
    ('max_kl', 'kl', 0.5, 0.1, 0.9),
    ('min_entropy', 'entropy', 1.0, 2.0, 0.1),
    ('max_truncated', 'truncated', 0.5, 0.0, 1.0),
    ('max_empty', 'empty', 0.1, 0.05, 0.8),
    ('min_shuffled_gap', 'shuffled_gap', 0.0, 1.0, -1.0),
    ('max_overlap', 'overlap', 0.5, 0.2, 0.9),
  ],
)
def test_alarm_is_raised_once_until_it_has_cleared(option, key, limit, good, bad):
  alarms = Alarms(AlarmConfig(window=2, **{option: limit}))
  rows = steps(key, [good, good, bad, bad, bad, good, good, bad, bad])
  raised = {n: alarms.check(rows[:n]) for n in range(len(rows) + 1)}
  mean = np.mean([bad, good])
  beyond = mean > limit if option.startswith('max') else mean < limit  # whether one bad step of two is enough
  assert [n for n, lines in raised.items() if lines] == ([3, 8] if beyond else [4, 9])
  (line,) = raised[3 if beyond else 4]
  assert line.startswith(f'step {3 if beyond else 4}: {key} {mean if beyond else bad:.4g} ') and f'rft.alarms.{option}' in line
  assert f'{limit:.4g} ' in line and 'it may mean that' in line and '\n' not in line
  assert alarms.history(rows) == [line for lines in raised.values() for line in lines]
  assert Alarms(AlarmConfig(window=2)).history(rows) == []


def test_exactly_at_its_limit_is_no_alarm():
  assert Alarms(AlarmConfig(window=1, max_kl=0.5, min_entropy=0.5)).history([{'step': 1, 'kl': 0.5, 'entropy': 0.5}]) == []


def test_resumed_run_raises_the_same_alarms():
  rng = np.random.default_rng(0)
  rows = [{'step': s, 'kl': float(k), 'entropy': float(e)} for s, (k, e) in enumerate(rng.random((60, 2)), 1)]
  config = AlarmConfig(window=3, max_kl=0.5, min_entropy=0.5)
  whole = [Alarms(config).check(rows[:n]) for n in range(1, 61)]
  assert 5 < sum(map(len, whole)) < 60
  for cut in (1, 7, 30):
    restored = [json.loads(json.dumps(row)) for row in rows[:cut]]
    resumed = Alarms(config)
    for n in range(cut + 1, 61):
      assert resumed.check([*restored, *rows[cut:n]]) == whole[n - 1]
  assert [Alarms(config).check(rows[max(0, n - 4) : n]) for n in range(1, 61)] == whole  # window + 1 rows suffice


def test_window_counts_the_steps_that_measured_and_an_early_one_is_silent():
  alarms = Alarms(AlarmConfig(window=2, min_shuffled_gap=0.0))
  rows = steps('shuffled_gap', [-1.0, None, None, -1.0, None, None, -1.0])
  assert [n for n in range(8) if alarms.check(rows[:n])] == [4]
  assert Alarms(AlarmConfig(window=5, min_shuffled_gap=0.0)).history(rows) == []


def test_figure_that_is_not_finite_is_beyond_its_limit():
  (line,) = Alarms(AlarmConfig(window=2, max_kl=0.5)).history(steps('kl', [0.1, 0.1, math.nan]))
  assert line.startswith('step 3: kl nan > 0.5')


def sample(n, **changes):
  prompts = [Prompt(f'p{i}', [{'role': 'assistant', 'content': f'r{i}'}]) for i in range(n)]
  scores = np.random.default_rng(1).normal(size=n).astype(np.float32)
  given = {'shuffled': scores - 1, 'lengths': np.arange(n, dtype=np.int32), 'seed': (0, 3), **changes}
  return scores, diagnostics.sample_rows(3, prompts, [f'o{i}' for i in range(n)], scores, **given)


def test_sample_shows_the_extremes_and_some_between():
  scores, rows = sample(30)
  assert [row['pick'] for row in rows] == ['highest', 'random', 'random', 'lowest']
  assert [row['score'] for row in rows] == sorted((row['score'] for row in rows), reverse=True)
  assert rows[0]['score'] == scores.max() and rows[-1]['score'] == scores.min()
  for row in rows:
    i = int(row['output'][1:])
    wanted = {'step': 3, 'prompt': f'p{i}', 'reference': f'r{i}', 'score': float(scores[i]), 'shuffled': float(scores[i] - 1), 'length': i}
    assert row == {'pick': row['pick'], 'output': f'o{i}', **wanted} and json.loads(json.dumps(row)) == row
  assert rows == sample(30)[1] != sample(30, seed=(0, 4))[1]
  assert 'shuffled' not in sample(30, shuffled=None)[1][0]


@pytest.mark.parametrize(('n', 'most', 'count'), [(0, 4, 0), (1, 4, 1), (2, 4, 2), (3, 4, 3), (9, 0, 0), (9, 1, 1), (9, 2, 2), (9, 9, 9)])
def test_sample_of_few_answers_shows_each_once(n, most, count):
  _, rows = sample(n, most=most)
  assert len({row['output'] for row in rows}) == len(rows) == count
