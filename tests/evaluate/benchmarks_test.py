"""Public benchmarks: reading their published files, and their official rules on made and on published scores."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from polar_jax.evaluate import benchmarks
from polar_jax.evaluate.benchmarks import published
from polar_jax.evaluate.recorded import Recorded
from polar_jax.types import UserError

RNG = np.random.default_rng(0)


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)) if path.suffix == '.jsonl' else json.dumps(rows))


def judge_row(i, **changes):
  row = {'pair_id': f'id{i}', 'original_id': i, 'source': ('mmlu-pro-law', 'livebench-math', 'livecodebench')[i % 3], 'question': f'q{i}'}
  row |= {'response_model': 'gpt-4o-2024-05-13', 'response_A': f'a{i}', 'response_B': f'b{i}', 'label': ('A>B', 'B>A')[i % 2]}
  return row | changes


def style_row(i, **changes):
  return {'id': i, 'prompt': f'p{i}', 'chosen': [f'c{i}{s}' for s in range(3)], 'rejected': [f'r{i}{s}' for s in range(3)]} | changes


def answer(text, model='m'):
  return {'llm_name': model, 'answer': text}


def pair_row(uid, better, worse, prompt='p'):
  conversation = [{'role': 'user', 'content': prompt, 'language': 'English'}]
  return {'pair_uid': uid, 'conversation_input': conversation, 'chosen': answer(better, better), 'reject': answer(worse, worse)}


def list_row(uid, best, losers, prompt='p'):
  conversation = [{'role': 'user', 'content': prompt, 'language': 'English'}]
  return {'bon_uid': uid, 'conversation_input': conversation, 'bon_best': answer(best), 'loser_list': [answer(text) for text in losers]}


def test_judgebench(tmp_path):
  write(tmp_path / 'judgebench/data/b.jsonl', [judge_row(i) for i in range(6)])
  write(tmp_path / 'judgebench/data/a.jsonl', [judge_row(i, pair_id=f'other{i}', response_model='claude') for i in range(3)])
  one, other = benchmarks.read('judgebench', tmp_path)
  assert [one.name, other.name] == ['judgebench', 'judgebench_claude'] and len(other.items) == 3
  rewards = [np.array([1.0, 0.0])] * 4 + [np.array([0.0, 0.0])] * 2  # right for A>B, wrong for B>A, and ties, which are wrong
  assert one.official(one.items, rewards) == pytest.approx({'knowledge': 50, 'math': 0, 'coding': 50, 'all': 100 / 3})


def test_judgebench_counts_bad_rows_where_they_belong(tmp_path):
  bad = {'label': 'A=B'}
  write(tmp_path / 'judgebench/data/a.jsonl', [judge_row(0, response_model='claude'), judge_row(1, response_model='claude', **bad), 1])
  rows = [judge_row(0), judge_row(1, response_model='', **bad), judge_row(2, response_model='c', **bad)]
  write(tmp_path / 'judgebench/data/b.jsonl', rows)
  found = {one.name: [where for where, _ in one.skipped] for one in benchmarks.read('judgebench', tmp_path, 'skip')}
  # The set of c has no good row: it is left out, and its rows are counted under the first set.
  assert found == {'judgebench': ['b.jsonl, row 2', 'b.jsonl, row 3'], 'judgebench_claude': ['a.jsonl, row 2', 'a.jsonl, row 3']}


PUBLISHED = {
  'Skywork_Skywork-Reward-Llama-3.1-8B': (59.09, 64.29, 76.79, 50.00, 62.29),
  'Skywork_Skywork-Reward-Gemma-2-27B': (59.74, 66.33, 83.93, 50.00, 64.29),
  'Ray2333_GRM-Gemma-2B-rewardmodel-ft': (62.99, 53.06, 64.29, 54.76, 59.43),
}


@pytest.mark.data
@pytest.mark.parametrize('model', PUBLISHED)
def test_published_scores_give_the_published_accuracies(data_folder, model):
  (one, _) = benchmarks.read('judgebench', data_folder / 'benchmarks')
  (file,) = (data_folder / 'benchmarks/judgebench/outputs').glob(f'*judge_model={model}.jsonl')
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  scores = {line['pair_id']: np.array(line['judgments'][0]['judgment']['scores'], float) for line in lines}
  found = one.official(one.items, [scores[item.id] for item in one.items])
  assert tuple(round(found[name], 2) for name in ('knowledge', 'reasoning', 'math', 'coding', 'all')) == PUBLISHED[model]


def test_rm_bench(tmp_path):
  write(tmp_path / 'rm_bench/chat_filtered.json', [style_row(i) for i in range(5)])
  write(tmp_path / 'rm_bench/safety-refuse_filtered.json', [style_row(i) for i in range(2)])
  write(tmp_path / 'rm_bench/safety-response_filtered.json', [style_row(i) for i in range(4)])
  (one,) = benchmarks.read('rm_bench', tmp_path)
  assert one.missing == ('code_filtered.json', 'math_filtered.json') and len(one.items) == 11
  assert one.items[5].id == 'safety-refuse/0' and one.items[5].candidates == ('c00', 'c01', 'c02', 'r00', 'r01', 'r02')
  rewards = [RNG.integers(0, 4, 6).astype(float) for _ in one.items]
  found = one.official(one.items, rewards)
  domains = {}
  for domain, low, high in (('chat', 0, 5), ('safety', 5, 11)):
    cells = {(i, j): np.mean([r[i] > r[3 + j] for r in rewards[low:high]]) for i, j in itertools.product(range(3), range(3))}
    hard, normal, easy = (np.mean([v for (i, j), v in cells.items() if keep(i, j)]) for keep in (int.__lt__, int.__eq__, int.__gt__))
    domains[domain] = 100 * np.array([easy, normal, hard])
    assert found['matrix'][domain][0][1] == pytest.approx(100 * cells[0, 1])
    assert found[domain] == pytest.approx(domains[domain].mean())
  assert [found[level] for level in ('easy', 'normal', 'hard')] == pytest.approx(np.mean([*domains.values()], axis=0))
  assert found['all'] == pytest.approx((found['chat'] + found['safety']) / 2)
  assert {c.better + c.worse for c in one.items[0].comparisons} == set(itertools.product(range(3), range(3, 6)))


def test_rm_bench_in_one_file(tmp_path):
  write(tmp_path / 'rm_bench/total_dataset.json', [style_row(0, domain='math'), style_row(1, domain='safety-response')])
  (one,) = benchmarks.read('rm_bench', tmp_path)
  assert [item.category for item in one.items] == ['math', 'safety'] and not one.missing
  write(tmp_path / 'rm_bench/total_dataset.json', [style_row(0, domain='maths')])
  with pytest.raises(UserError, match="domain is 'maths'; the benchmark has: chat, code"):
    benchmarks.read('rm_bench', tmp_path)


def test_rmb(tmp_path):
  write(tmp_path / 'rmb/Pairwise_set/Helpfulness/Code/A.json', [pair_row('1', 'x', 'y'), pair_row('2', 'y', 'z')])
  write(tmp_path / 'rmb/BoN_set/Helpfulness/Code/A.json', [list_row('1', 'x', ['y', 'z', 'w'])])
  write(tmp_path / 'rmb/Pairwise_set/Harmlessness/S1.json', [pair_row('3', 'x', 'y')])
  (one,) = benchmarks.read('rmb', tmp_path)
  assert [item.id for item in one.items] == ['pairwise/1', 'pairwise/2', 'pairwise/3', 'bon/1']
  assert 'BoN_set/Harmlessness' in one.missing and 'Pairwise_set/Harmlessness/S11.json' in one.missing
  assert one.items[0].prompt == [{'role': 'user', 'content': 'p'}]
  rewards = [np.array(r, float) for r in ([1, 0], [0, 0], [2, 1], [1, 0, 1, -1])]  # right, tie, right, tie with the second loser
  found = one.official(one.items, rewards)
  groups = ('Rewrite', 'Chat', 'Translation', 'Code', 'Reasoning')
  items = [dataclasses.replace(one.items[0], category=group) for group in groups]
  assert list(one.official(items, [np.array([1.0, 0.0])] * 5)['by_group']) == sorted(groups)
  assert found.pop('by_group') == {'Code': {'pairwise': 50.0, 'bon': 0.0}, 'Harmlessness': {'pairwise': 100.0}}
  assert found == {
    'helpfulness_pairwise': 50, 'helpfulness_bon': 0, 'helpfulness': 25, 'harmlessness_pairwise': 100, 'harmlessness': 100,
  }  # fmt: skip


def test_rankings_of_three_from_pairs(tmp_path):
  edges = ['ab', 'bc', 'cd', 'ac', 'xy', 'yx', 'ax', 'mn']
  write(tmp_path / 'rmb/Pairwise_set/Helpfulness/Chat/A.json', [pair_row(str(i), *edge) for i, edge in enumerate(edges)])
  (one,) = benchmarks.read('polar_rmb', tmp_path)
  # a is above b, and b above c. c is above d, but only the answer at the top is a reference: a also beats c. x and y contradict.
  assert {(item.reference, *item.candidates) for item in one.items} == {('a', 'b', 'c'), ('a', 'c', 'd')}
  assert one.items[0].facts['reference_model'] == 'a'
  found = one.official(one.items, [np.array([1.0, 0.0]), np.array([0.0, 0.0])])
  assert found == {'Chat': 75.0, 'all': 75.0, 'group_mean': 75.0}
  groups = ('Rewrite', 'Chat', 'Translation', 'Code', 'Reasoning')
  items = [dataclasses.replace(one.items[0], category=group) for group in groups]
  assert list(one.official(items, [np.array([1.0, 0.0])] * 5)) == [*sorted(groups), 'all', 'group_mean']


@pytest.mark.parametrize(
  ('edges', 'references'),
  [(['zb', 'ab', 'bc'], {'bc': 'z'}), (['zb', 'ab', 'bc', 'ac'], {'bc': 'a'}), (['ta', 'ax', 'xy', 'yx'], {'ax': 't'})],
)
def test_of_several_answers_at_the_top_one_that_also_beats_the_third_is_the_reference(tmp_path, edges, references):
  write(tmp_path / 'rmb/Pairwise_set/Helpfulness/Chat/A.json', [pair_row(edge, *edge) for edge in edges])
  (one,) = benchmarks.read('polar_rmb', tmp_path)
  assert {''.join(item.candidates): item.reference for item in one.items} == references


@pytest.mark.data
def test_a_published_group_is_read_whole(data_folder, tmp_path):
  parts = [f'{kind}/Helpfulness/Translation' for kind in ('Pairwise_set', 'BoN_set')]
  rows = 0
  for part in parts:
    place = tmp_path / 'rmb' / part
    place.parent.mkdir(parents=True)
    place.symlink_to(data_folder.absolute() / 'benchmarks/rmb' / part)
    rows += sum(len(json.loads(file.read_text())) for file in place.glob('*.json'))
  assert len(benchmarks.read('rmb', tmp_path)[0].items) == rows > 100
  assert collections.Counter(item.category for item in benchmarks.read('rm_bench', data_folder / 'benchmarks')[0].items) == {
    'chat': 129,
    'code': 228,
  }


@pytest.mark.slow
@pytest.mark.data
def test_counts_of_the_published_files(data_folder):
  """Against counts by other code: see the data's own description."""
  folder = data_folder / 'benchmarks'
  rmb = benchmarks.read('rmb', folder)[0].items
  assert collections.Counter(item.facts['kind'] for item in rmb) == {'pairwise': 6_858, 'bon': 1_681}
  polar = benchmarks.read('polar_rmb', folder)[0].items
  assert len({json.dumps(item.prompt) for item in polar}) == 742
  assert all(item.reference not in item.candidates for item in polar)  # a reference never competes


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'label': 'A=B'}, r"b.jsonl, example 1: label is 'A=B'; the benchmark has: A>B, B>A"),
    ({'source': 'other'}, r"source is 'other'; the benchmark has: mmlu-pro\*"),
    ({'response_A': ''}, 'response_A must be a text that is not empty, not empty'),
    ({'question': None}, 'question must be a text that is not empty, not NoneType'),
    ({'question': 'a\ud800'}, 'question contains half of a surrogate pair'),
  ],
)
def test_bad_rows_are_named_or_counted(tmp_path, changes, message):
  write(tmp_path / 'judgebench/data/b.jsonl', [judge_row(0, **changes), judge_row(1)])
  with pytest.raises(UserError, match=message):
    benchmarks.read('judgebench', tmp_path)
  (one,) = benchmarks.read('judgebench', tmp_path, 'skip')
  assert [item.id for item in one.items] == ['id1'] and len(one.skipped) == 1 and one.skipped[0][0] == 'b.jsonl, row 1'


def test_a_benchmark_of_bad_rows_alone_is_refused_and_the_advice_helps(tmp_path):
  write(tmp_path / 'judgebench/data/b.jsonl', [judge_row(0, label='A=B')])
  with pytest.raises(UserError, match=r'judgebench: has no row that can be used; set data\.on_bad_example=raise'):
    benchmarks.read('judgebench', tmp_path, 'skip')
  with pytest.raises(UserError, match='label'):
    benchmarks.read('judgebench', tmp_path, 'raise')


def test_bad_files_are_named(tmp_path):
  with pytest.raises(UserError, match="'nothing' is not known; known are: judgebench"):
    benchmarks.read('nothing', tmp_path)
  with pytest.raises(UserError, match='judgebench: no such folder'):
    benchmarks.read('judgebench', tmp_path)
  for name in ('judgebench', 'rm_bench', 'rmb'):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f'{name}.*: has no'):
      benchmarks.read(name, tmp_path)
  row = judge_row(0)
  del row['label']
  write(tmp_path / 'judgebench/data/b.jsonl', [row])
  with pytest.raises(UserError, match="example 1: field 'label' is missing"):
    benchmarks.read('judgebench', tmp_path)
  write(tmp_path / 'judgebench/data/b.jsonl', [judge_row(0), judge_row(0)])
  with pytest.raises(UserError, match="the id 'id0' occurs twice"):
    benchmarks.read('judgebench', tmp_path)
  (tmp_path / 'judgebench/data/b.jsonl').write_bytes(b'{"pair_id": "\xff"}')
  with pytest.raises(UserError, match='not UTF-8'):
    benchmarks.read('judgebench', tmp_path)
  for content in ('{}', '[1]', '[{"id"'):
    (tmp_path / 'rm_bench/chat_filtered.json').write_text(content)
    with pytest.raises(UserError, match=r'chat_filtered\.json'):
      benchmarks.read('rm_bench', tmp_path)
  write(tmp_path / 'rm_bench/chat_filtered.json', [style_row(0, chosen=['a', 'b'])])
  with pytest.raises(UserError, match='chosen must be a list of 3 texts'):
    benchmarks.read('rm_bench', tmp_path)
  for losers in ([], 'x', ['x']):
    write(tmp_path / 'rmb/BoN_set/Helpfulness/Code/A.json', [list_row('1', 'x', []) | {'loser_list': losers}])
    with pytest.raises(UserError, match=r'A.json, example 1: (loser_list|an answer) must be'):
      benchmarks.read('rmb', tmp_path)


@pytest.fixture
def two_sets(tmp_path):
  write(tmp_path / 'judgebench/data/b.jsonl', [judge_row(i) for i in range(3)])
  write(tmp_path / 'rm_bench/chat_filtered.json', [style_row(i) for i in range(2)])
  write(tmp_path / 'rm_bench/code_filtered.json', [style_row(1)])
  return [*benchmarks.read('judgebench', tmp_path), *benchmarks.read('rm_bench', tmp_path)]


def recorded(tmp_path, rewards):
  write(tmp_path / 'scores.jsonl', [{'id': name, 'rewards': values} for name, values in rewards])
  return Recorded(tmp_path / 'scores.jsonl')


JUDGED = [(f'id{i}', [float(i), 1]) for i in range(3)]


def test_recorded_rewards_find_their_items(tmp_path, two_sets):
  styles = [(0, list(range(6))), ('chat/1', [1] * 6), ('code/1', [2] * 6)]
  held = recorded(tmp_path, [*JUDGED[::-1], *styles]).of(two_sets)
  assert list(held) == ['judgebench', 'rm_bench']
  np.testing.assert_array_equal(held['judgebench'][1], [[0, 1], [1, 1], [2, 1]])
  assert [rewards[0] for rewards in held['rm_bench'][1]] == [0, 1, 2]
  assert list(recorded(tmp_path, JUDGED).of(two_sets)) == ['judgebench']  # another set is left out


@pytest.mark.parametrize(
  ('rewards', 'message'),
  [
    (JUDGED[:2], r"has no rewards for 1 of 3 items of judgebench \('id2'\); add them"),
    ([*JUDGED, ('other', [1, 2])], r"1 of 4 ids are of no item of judgebench, rm_bench \('other'\)"),
    ([*JUDGED, (0, [1] * 6), (1, [1] * 6), ('code/1', [1] * 6)], 'has no rewards for 1 of 3 items of rm_bench'),
    ([('id0', [1, 2, 3]), *JUDGED[1:]], "line 1: item 'id0' has 2 candidates, but 3 rewards"),
    ([('id0', [1, float('nan')]), *JUDGED[1:]], 'line 1: .*finite'),
    ([('id0', [1, '2']), *JUDGED[1:]], 'line 1: rewards must be a list of numbers'),
    ([('id0', [1, True]), *JUDGED[1:]], 'line 1: rewards must be a list of numbers'),
    ([('id0', 3), *JUDGED[1:]], 'line 1: rewards must be a list of numbers'),
    ([*JUDGED, JUDGED[0]], "line 4: the id 'id0' is also on line 1"),
    ([*JUDGED, (None, [1, 2])], 'line 4: must be an object with `id`'),
    ([], 'no valid examples|has no rewards|empty'),
  ],
)
def test_recorded_rewards_must_fit(tmp_path, two_sets, rewards, message):
  with pytest.raises(UserError, match=message):
    recorded(tmp_path, rewards).of(two_sets)


def test_an_ambiguous_id_is_refused_and_the_advice_helps(tmp_path, two_sets):
  with pytest.raises(UserError, match=r"the id '1' is of several items; write chat/1 or code/1"):
    recorded(tmp_path, [*JUDGED, (1, [1] * 6)]).of(two_sets)
  assert len(recorded(tmp_path, [('chat/0', [1] * 6), ('chat/1', [1] * 6), ('code/1', [1] * 6)]).of(two_sets)) == 1


def test_a_line_that_names_its_set_is_of_no_other(tmp_path, two_sets):
  lines = [{'set': 'judgebench', 'id': name, 'rewards': values} for name, values in JUDGED]
  write(tmp_path / 'scores.jsonl', lines)
  assert list(Recorded(tmp_path / 'scores.jsonl').of(two_sets)) == ['judgebench']
  write(tmp_path / 'scores.jsonl', [line | {'set': 'rm_bench'} for line in lines])
  with pytest.raises(UserError, match='3 of 3 ids are of no item'):
    Recorded(tmp_path / 'scores.jsonl').of(two_sets)
  write(tmp_path / 'scores.jsonl', [*lines, lines[0] | {'set': 'other'}])  # the same id in another set is another line
  with pytest.raises(UserError, match='1 of 4 ids are of no item'):
    Recorded(tmp_path / 'scores.jsonl').of(two_sets)


def test_items_without_rewards_can_be_left_out(tmp_path, two_sets):
  (one, rewards) = recorded(tmp_path, [*JUDGED[:2], ('other', [1, 2])]).of(two_sets, 'skip')['judgebench']
  assert len(one.items) == len(rewards) == 2 and one.skipped == (('id2', 'scores.jsonl has no rewards for it'),)


@pytest.mark.parametrize('conversation', [[], 'p', ['p'], [{'role': 'user', 'content': 'p'}, 'p'], None])
def test_conversations_of_another_form_are_refused(tmp_path, conversation):
  write(tmp_path / 'rmb/Pairwise_set/Helpfulness/Code/A.json', [pair_row('1', 'x', 'y') | {'conversation_input': conversation}])
  with pytest.raises(UserError, match=r'A\.json, example 1: conversation_input must be a list of messages'):
    benchmarks.read('rmb', tmp_path)


def test_files_are_read_in_the_order_of_their_paths(tmp_path):
  names = [f'{folder}/{name}.jsonl' for folder in ('b', 'a') for name in 'fbdaceg']
  for name in (*names, 'a/.hidden.jsonl', 'a/other.txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  ordered = [tmp_path / name for name in sorted(names)]
  assert published.files_below(tmp_path, ('.jsonl',)) == published.tables([tmp_path / 'b', tmp_path / 'a']) == ordered


def test_ids_that_occur_twice_are_refused(tmp_path):
  write(tmp_path / 'rm_bench/chat_filtered.json', [style_row(0), style_row(0)])
  write(tmp_path / 'rmb/Pairwise_set/Helpfulness/Code/A.json', [pair_row('1', 'x', 'y'), pair_row('1', 'y', 'z')])
  for name, twice in (('rm_bench', 'chat/0'), ('rmb', 'pairwise/1')):
    with pytest.raises(UserError, match=f"{name}: the id '{twice}' occurs twice"):
      benchmarks.read(name, tmp_path)
