"""Parts of the evaluate stage on given data: references of each set, items apart from leaked ones, files of rewards."""

from __future__ import annotations

import gzip
import json
import types

import numpy as np
import pytest

from polar_jax.evaluate import sets as evaluation_sets
from polar_jax.stages import evaluate_arms
from polar_jax.stages import evaluate_sets as stage


@pytest.mark.parametrize(
  ('given', 'asked', 'used'),
  [
    (['r', 's'], 'true,empty', ['true', 'empty']),
    (['r', None], 'true,empty,shuffled,twin', ['empty', 'twin']),  # one without a reference is enough
    ([None, None], 'true', ['empty']),
    ([None, None], 'none , none', ['none']),
  ],
)
def test_variants_that_need_references_are_left_out_where_an_item_has_none(given, asked, used):
  lines = []
  config = types.SimpleNamespace(evaluate=types.SimpleNamespace(references=asked), seed=0)
  items = [
    evaluation_sets.Item(str(i), f'p{i}', ('a', 'b'), evaluation_sets.pair(), reference=reference) for i, reference in enumerate(given)
  ]
  context = types.SimpleNamespace(config=config, log=lines.append)
  found = stage._views(context, evaluation_sets.EvaluationSet('own', items), {})
  assert list(found) == used
  expected = {'empty': ['', ''], 'none': ['', ''], 'true': given, 'twin': ['a', 'a']}
  assert {name: view.references for name, view in found.items()} == {name: expected[name] for name in used}
  left_out = [variant for variant in asked.split(',') if variant in ('true', 'shuffled') and None in given]
  told = [f'own: is not scored with the references {variant!r}: needs references, which the set does not have' for variant in left_out]
  told += ['own: is scored with empty references'] if left_out == asked.split(',') else []
  assert len(lines) == len(told) and all(line.startswith(start) for line, start in zip(lines, told, strict=True))


def test_items_without_prompts_in_the_training_files_are_measured_apart():
  items = [evaluation_sets.Item(str(i), f'p{i}', ('a', 'b'), evaluation_sets.pair()) for i in range(4)]
  rewards = [np.array(r, float) for r in ([1, 0], [0, 1], [1, 0], [0, 0])]
  context = types.SimpleNamespace(config=types.SimpleNamespace(evaluate=types.SimpleNamespace(bootstrap=20)))
  part = stage.Scored(evaluation_sets.EvaluationSet('own', items), {'true': rewards, 'twin': rewards[::-1]}, {})
  found = stage._without(context, part, {'1': 'f, row 3', 'elsewhere': 'f, row 4'})
  assert found['items'] == 1 and found['places'] == {'1': 'f, row 3'}
  assert (found['without']['accuracy'], found['without']['n']) == (pytest.approx(2.5 / 3), 3)
  assert stage._without(context, part, {str(i): 'f' for i in range(4)}) == {
    'items': 4, 'places': {str(i): 'f' for i in range(4)}, 'without': None,
  }  # fmt: skip


def test_each_variant_of_the_references_has_a_file_of_rewards(tmp_path):
  made = lambda name: evaluation_sets.EvaluationSet(name, [evaluation_sets.Item('1', 'p', ('a', 'b'), evaluation_sets.pair())])
  part = lambda name, *views: stage.Scored(made(name), {view: [np.array([1.0, 2.0])] for view in views}, {})
  stage._write(tmp_path / 'out', {'sets': {'a': {'n': 1}}}, [part('a', 'empty', 'twin'), part('b', 'twin', 'empty')], [], [])
  read = lambda file: [json.loads(line)['set'] for line in gzip.decompress((tmp_path / 'out' / file).read_bytes()).decode().splitlines()]
  assert sorted(file.name for file in (tmp_path / 'out').iterdir()) == [
    'evaluation.json', 'scores.jsonl.gz', 'scores_empty.jsonl.gz', 'scores_twin.jsonl.gz',
  ]  # fmt: skip
  assert read('scores.jsonl.gz') == ['a', 'b'] and read('scores_twin.jsonl.gz') == ['a'] and read('scores_empty.jsonl.gz') == ['b']
  assert (tmp_path / 'out/evaluation.json').read_text() == '{\n  "sets": {\n    "a": {\n      "n": 1\n    }\n  }\n}\n'
  assert (tmp_path / 'out/scores.jsonl.gz').read_bytes()[4:8] == bytes(4)  # no time, so that equal rewards are equal files
  with pytest.raises(ValueError, match='JSON'):
    stage._write(tmp_path, {}, [part('a', 'empty')._replace(rewards={'empty': [np.array([np.nan, 0.0])]})], [], [])


def test_the_rewards_of_every_run_of_the_arms_are_written(tmp_path):
  items = [evaluation_sets.Item(str(i), 'p', ('a', 'b'), evaluation_sets.pair(), category='c') for i in range(2)]
  one = evaluation_sets.EvaluationSet('own', items)
  part = stage.Scored(one, {'empty': [np.array([0.0, 0.0])] * 2}, {})
  of_runs = [[np.array([1.0, 2.0])], [np.array([3.0, 4.0])]]
  arm = evaluate_arms.ArmRewards('finetuned', ['finetune', 'finetune_seed_1'], {'own': of_runs})
  task = evaluate_arms.Task(evaluation_sets.EvaluationSet('own', items[1:]), 'empty', [''], [])  # some of the items
  stage._write(tmp_path, {}, [part], [task], [arm])
  for run, rewards in (('finetune', [1.0, 2.0]), ('finetune_seed_1', [3.0, 4.0])):
    (line,) = [json.loads(line) for line in gzip.decompress((tmp_path / f'scores_{run}.jsonl.gz').read_bytes()).decode().splitlines()]
    assert line == {'set': 'own', 'id': '1', 'category': 'c', 'reference': 'empty', 'rewards': rewards}


@pytest.mark.parametrize(('count', 'ending'), [(5, ''), (6, '; ...')])
def test_up_to_five_rows_and_items_are_named(tmp_path, count, ending):
  lines = []
  settings = types.SimpleNamespace(training=str(tmp_path / 'train.txt'), near_duplicates=None)
  context = types.SimpleNamespace(log=lines.append, config=types.SimpleNamespace(evaluate=settings))
  items = [evaluation_sets.Item(str(i), 'asked', ('a', 'b'), evaluation_sets.pair()) for i in range(count + 1)]
  one = evaluation_sets.EvaluationSet('own', items, skipped=tuple((f'row {i}', 'bad') for i in range(count)))
  stage._announce(context, one, count + 1)
  assert lines.pop() == f'own: left out {count} bad rows ({"; ".join(f"row {i}: bad" for i in range(5))}{ending})'
  assert len(stage._duplicates(context, [one])['own']) == count
  assert lines.pop().endswith(f' of an earlier one ({"; ".join(f"{i} is own, 0" for i in range(1, 6))})')
  (tmp_path / 'train.txt').write_text('asked')
  assert len(stage._leaked(context, [one])['own']) == count + 1
  assert lines.pop().endswith(f' are in the training files ({"; ".join(f"{i}: train.txt, row 1" for i in range(5))})')


def test_nothing_is_told_of_what_does_not_occur():
  lines, one = [], evaluation_sets.EvaluationSet('own', [evaluation_sets.Item('1', 'p', ('a', 'b'), evaluation_sets.pair())])
  context = types.SimpleNamespace(log=lines.append)
  stage._announce(context, one, 1)
  assert stage._duplicates(context, [one]) == {'own': {}} and lines == ['own: 1 items']


@pytest.mark.parametrize('given', [('r', 's'), ('r', None), (None, None)])
@pytest.mark.parametrize('by_model', [{}, {'by lm': lambda items: [np.array([0.0, 1.0]) for item in items if item.reference]}])
def test_baselines_of_a_model_need_references_of_all_items(given, by_model):
  lines = []
  config = types.SimpleNamespace(evaluate=types.SimpleNamespace(bootstrap=10), seed=0)
  items = [evaluation_sets.Item(str(i), f'p{i}', ('a', 'bb'), evaluation_sets.pair(), reference=r) for i, r in enumerate(given)]
  part = stage.Scored(evaluation_sets.EvaluationSet('own', items), {'empty': [np.array([1.0, 0.0])] * 2}, {})
  found = stage._baselines(types.SimpleNamespace(config=config, log=lines.append), part, by_model)['baselines']
  assert ('by lm' in found) == (bool(by_model) and None not in given) and ('bm25' in found) == (None not in given)
  assert lines == (['own: has no references, so that it is left out of by lm'] if by_model and None in given else [])
