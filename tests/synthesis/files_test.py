"""Data of real language models in files: forms of rows, splits by prompt and policy, and what is written."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import itertools
import json
import pathlib

import numpy as np
import pytest

from polar_jax.config import ConfigError, SynthesizeConfig
from polar_jax.data.examples import open_triplets
from polar_jax.evaluate import own_files
from polar_jax.synthesis import files as files_lib
from polar_jax.synthesis import split as stage
from polar_jax.types import RankedList, Triplet, UserError

SEVERAL, ONCE = [f'several{i}' for i in range(6)], [f'once{i}' for i in range(10)]
PROMPTS = [f'Write a word problem number {i} about trains, and solve it' for i in range(120)]


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(gzip.compress(''.join(json.dumps(row) + '\n' for row in rows).encode(), mtime=0))
  return path


@pytest.fixture(scope='module')
def given(tmp_path_factory):
  """A file of each form: the same prompts, once in capital letters."""
  folder, rng = tmp_path_factory.mktemp('given'), np.random.default_rng(0)
  triplets, answers, ranked = [], [], []
  for i, prompt in enumerate(PROMPTS):
    for _ in range(3):
      a, b = rng.choice(SEVERAL), rng.choice(ONCE)
      runs = [f'{a} answers {i} in run {rng.integers(4)}' for _ in range(2)]
      row = {'prompt': prompt, 'policy_a': a, 'a1': runs[0], 'a2': runs[1], 'policy_b': b, 'b1': f'{b} answers {i}'}
      triplets.append(row | {'grade': 'AB'[i % 2], 'neg': 'random', 'category': 'math'})
    policies = {'chosen_policy': str(rng.choice(ONCE)), 'rejected_policy': str(rng.choice(ONCE))}
    texts = {'reference': f'It is {i}', 'chosen': f'So {i}', 'rejected': f'So {i + 1}'}
    ranked.append({'prompt': prompt.upper(), **texts, 'category': 'easy', **policies})
    for policy in ONCE[:4]:
      right = bool(rng.integers(2)) if policy != 'once0' else True
      answers.append({'prompt': prompt, 'policy': policy, 'response': f'{policy}: {i if right else -i - 1}', 'correct': right})
  return [write(folder / f'{name}.jsonl.gz', rows) for name, rows in (('triplets', triplets), ('pool', answers), ('ranked', ranked))]


CONFIG = SynthesizeConfig(world='files', validation_share=0.1, unseen_share=0.3, held_out_policies=0.34, pairs_per_prompt=6)


@pytest.fixture(scope='module')
def made(given, tmp_path_factory):
  workdir, lines = tmp_path_factory.mktemp('run'), []
  config = SynthesizeConfig(**{**CONFIG.__dict__, 'files': ','.join(map(str, given))})
  section = stage.synthesize(config, 3, workdir, lines.append)
  return workdir, config, section, lines


def splits_of(given):
  rows = files_lib.read(given)
  return rows, files_lib.Splits(CONFIG, 3, rows)


def held_out_sets(workdir):
  return {
    one.name: one for path in sorted((workdir / 'data' / 'held_out').iterdir()) for one in own_files.read(path, path.name.split('.')[0])
  }


def test_a_prompt_has_one_split_in_all_files_whatever_its_case_and_punctuation(given):
  rows, splits = splits_of(given)
  assert [len(part) for part in (rows.triplets, rows.answers, rows.preferences)] == [360, 480, 120]
  by_number = collections.defaultdict(set)
  for row in rows.all():
    by_number[row.prompt.split()[5]].add(splits.of(row.prompt))
  assert all(len(found) == 1 for found in by_number.values())
  assert {split for found in by_number.values() for split in found} == {'train', 'validation', 'unseen_prompts'}
  assert files_lib.key('Add  2, and 3!') == files_lib.key('add 2 and 3') != files_lib.key('add 2 and 4')
  assert files_lib.key('?!') != files_lib.key('??')


def test_no_training_example_has_a_held_out_prompt_or_policy(given, made):
  workdir, *_ = made
  rows, splits = splits_of(given)
  assert len(splits.held_out & set(SEVERAL)) == 2 and len(splits.held_out & set(ONCE)) in (3, 4)  # a third, of each file
  for split in ('train', 'validation'):
    triplets = open_triplets(workdir / 'data' / 'triplets', split)
    assert len(triplets) > 30
    for t in triplets:
      assert splits.of(t.prompt) == split and t.category in ('triplets', 'pool')
      assert not {t.metadata['reference_policy'], t.metadata['rejected_policy']} & splits.held_out
      assert t.metadata['reference_policy'] == t.metadata['chosen_policy'] != t.metadata['rejected_policy']
      # A text says by whom it is.
      for text, policy in ((t.reference, 'reference_policy'), (t.chosen, 'chosen_policy'), (t.rejected, 'rejected_policy')):
        assert text.replace(':', ' ').split()[0] == t.metadata[policy]
      assert t.reference != t.chosen
    ranked = list(open_triplets(workdir / 'data' / 'preferences', split))
    assert all(splits.of(t.prompt) == split for t in ranked)
    assert not {text.split(': ')[0] for t in ranked if t.category == 'pool' for text in (t.chosen, t.rejected)} & splits.held_out
    by_prompt = {row.prompt: row.values for row in rows.preferences}
    named = {by_prompt[t.prompt][name] for t in ranked if t.category != 'pool' for name in ('chosen_policy', 'rejected_policy')}
    assert named and not named & splits.held_out
  unseen = open_triplets(workdir / 'data' / 'triplets', 'unseen_policies')
  assert all({t.metadata['reference_policy'], t.metadata['rejected_policy']} <= splits.held_out for t in unseen)


def test_a_policy_with_several_runs_is_also_rejected(made):
  triplets = open_triplets(made[0] / 'data' / 'triplets', 'train')
  rejected = collections.Counter(t.metadata['rejected_policy'][:4] for t in triplets)
  assert rejected['seve'] > len(triplets) / 5 and rejected['once'] > len(triplets) / 5


def test_held_out_rows_are_those_of_the_files(given, made):
  workdir, _, section, _ = made
  rows, splits = splits_of(given)
  sets = held_out_sets(workdir)
  assert set(sets) == {'triplets', 'triplets_unseen_policies', 'ranked', 'pool'} and set(section['held_out']) == set(sets)
  unseen = [row for row in rows.triplets if splits.of(row.prompt) == 'unseen_prompts' and row.values['a1'] != row.values['a2']]
  known = [row for row in unseen if not {row.values['policy_a'], row.values['policy_b']} & splits.held_out]
  assert {item.id for item in sets['triplets'].items} == {str(row.number) for row in known}
  by_id = {str(row.number): row.values for row in unseen}
  for item in sets['triplets'].items:
    values = by_id[item.id]
    assert (item.reference, *item.candidates) == (values['a1'], values['a2'], values['b1'])
    assert item.category == f'grade {values["grade"]}, random'
  for item in sets['triplets_unseen_policies'].items:
    held = [name for name in ('policy_a', 'policy_b') if by_id[item.id][name] in splits.held_out]
    assert item.category == {'policy_a': 'reference', 'policy_b': 'rejected', 'policy_apolicy_b': 'both'}[''.join(held)]
  assert len(sets['triplets'].items) + len(sets['triplets_unseen_policies'].items) == len(unseen)
  assert {splits.of(item.prompt) for item in sets['ranked'].items} == {'unseen_prompts'}
  for item in sets['pool'].items:  # best of n: with the reference of the preference, which is in capital letters
    number = item.reference.removeprefix('It is ')
    assert [candidate.split(': ')[1] == number for candidate in item.candidates] == list(item.correct)


def test_marked_answers_are_ranked_by_their_marks(made):
  rows = [t for t in open_triplets(made[0] / 'data' / 'preferences', 'train') if t.category == 'pool']
  assert len(rows) > 50
  for row in rows:
    number = row.reference.removeprefix('It is ')
    assert row.chosen.split(': ')[1] == number != row.rejected.split(': ')[1]


def test_marked_answers_give_as_many_preferences_as_are_asked_for(given):
  files = files_lib.read(given)
  for most in (0, 2):
    config = dataclasses.replace(CONFIG, correctness_pairs=most)
    found = files_lib.preferences(files, files_lib.Splits(config, 0, files), config, 0)
    by_prompt = collections.Counter(t.prompt for t in itertools.chain(*found.values()) if t.category == 'pool')
    assert max(by_prompt.values(), default=0) == most
    assert any(t.category != 'pool' for t in found['train'])


def test_what_is_left_out_is_counted(tmp_path):
  prompts = [f'prompt {i}' for i in range(40)]
  triplets = [
    {'prompt': p, 'policy_a': a, 'a1': f'{a} 1', 'a2': f'{a} {1 + (i % 4 > 0)}', 'policy_b': 'c', 'b1': 'c'}
    for i, p in enumerate(prompts)
    for a in 'ab'
  ]
  ranked = [{'prompt': p, 'reference': 'r', 'chosen': 'r' if i % 3 == 0 else 'c', 'rejected': 'd'} for i, p in enumerate(prompts)]
  answers = [{'prompt': f'other {p}', 'policy': 'a', 'response': 'x', 'correct': True} for p in prompts]
  paths = [write(tmp_path / f'{name}.jsonl.gz', of) for name, of in (('t', triplets), ('r', ranked), ('a', answers))]
  config = SynthesizeConfig(world='files', files=','.join(map(str, paths)), unseen_share=0.4, held_out_policies=0.0)
  lines = []
  stage.synthesize(config, 0, tmp_path / 'run', lines.append)
  unseen = lambda p: files_lib.Splits(config, 0, files_lib.read(paths)).of(p) == 'unseen_prompts'
  assert json.loads((tmp_path / 'run' / 'data' / 'files.json').read_text())['left_out'] == {
    'held-out answers without a reference': sum(unseen(f'other {p}') for p in prompts),
    'held-out triplets with equal texts': 2 * sum(unseen(p) for p in prompts[::4]),
    'preferences with equal texts': 14,
  }
  assert 'synthesize: left out: 14 preferences with equal texts' in lines
  # No reference is a candidate.
  assert all(item.reference not in item.candidates for one in held_out_sets(tmp_path / 'run').values() for item in one.items)


def test_complete_data_are_left_as_they_are_and_damaged_ones_made_again(made):
  workdir, config, section, lines = made
  path = workdir / 'data' / 'held_out' / 'ranked.jsonl.gz'
  before = path.stat().st_mtime_ns
  assert stage.synthesize(config, 3, workdir, lines.append) == section and 'reusing' in lines[-1]
  content = path.read_bytes()
  path.unlink()
  again = stage.synthesize(config, 3, workdir, lines.append)
  assert {**again, 'seconds': 0} == {**section, 'seconds': 0} and path.read_bytes() == content and path.stat().st_mtime_ns > before
  moved = [write(workdir / 'elsewhere' / given.parent.name / given.name, []) for given in map(pathlib.Path, config.files.split(','))]
  for old, new in zip(config.files.split(','), moved, strict=True):
    new.write_bytes(pathlib.Path(old).read_bytes())
  stage.synthesize(SynthesizeConfig(**{**config.__dict__, 'files': ','.join(map(str, moved))}), 3, workdir, lines.append)
  assert 'reusing' in lines[-1]  # of files that were moved
  assert stage.synthesize(config, 4, workdir, lines.append)['rows'] != section['rows']  # another seed holds out other policies


def test_prompts_of_evaluation_files_and_near_duplicates_are_left_out(given, tmp_path):
  pytest.importorskip('datasketch')
  _, splits = splits_of(given)
  train = [prompt for prompt in PROMPTS if splits.of(prompt) == 'train']
  evaluation = tmp_path / 'benchmark.jsonl'
  evaluation.write_text(json.dumps({'question': train[0]}) + '\n')
  config = SynthesizeConfig(**{**CONFIG.__dict__, 'files': ','.join(map(str, given)), 'exclude': str(evaluation)})
  stage.synthesize(config, 3, tmp_path / 'run', print)
  card = json.loads((tmp_path / 'run' / 'data' / 'files.json').read_text())
  assert card['contaminated'] == [{'prompt': files_lib.key(train[0]), 'found_in': 'benchmark.jsonl, row 1'}]
  assert train[0] not in {t.prompt for t in open_triplets(tmp_path / 'run' / 'data' / 'triplets', 'train')}


def test_near_duplicates_of_held_out_prompts_are_left_out(tmp_path):
  pytest.importorskip('datasketch')
  words = np.random.default_rng(0).permutation([f'word{i}' for i in range(900)]).reshape(-1, 30)
  prompts = [' '.join(of) for of in words] + [' '.join([*of[:-1], 'other']) for of in words]  # each has a near duplicate
  rows = [{'prompt': prompt, 'reference': 'r', 'chosen': 'c', 'rejected': 'd'} for prompt in prompts]
  path = write(tmp_path / 'rows.jsonl.gz', rows)
  config = SynthesizeConfig(world='files', files=str(path), unseen_share=0.4, exclude_near=0.7)
  stage.synthesize(config, 3, tmp_path / 'run', print)
  training = [t.prompt for t in open_triplets(tmp_path / 'run' / 'data' / 'preferences', 'train')]
  held_out = {item.prompt.split()[0] for item in held_out_sets(tmp_path / 'run')['rows'].items}
  assert training and held_out and not {prompt.split()[0] for prompt in training} & held_out


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'prompt': 'p', 'a1': 'x'}, r'row 1: is neither triplet \(prompt, policy_a, .*found: prompt, a1'),
    ({'prompt': 'p', 'policy': 3, 'response': 'r'}, 'row 1: policy is 3; it must be a name'),
    ({'prompt': 'p', 'policy': 'a\nb', 'response': 'r'}, 'row 1: policy is'),
    ({'prompt': 'p', 'policy': 'a', 'response': 4}, 'row 1: field response'),
    ({'prompt': 'p', 'policy': 'a', 'response': 'r', 'correct': 1}, 'row 1: correct is 1; it must be true or false'),
    ({'prompt': ' ', 'policy': 'a', 'response': 'r'}, 'row 1: field prompt is empty'),
    ({'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd', 'category': 3}, 'row 1: category is 3'),
    ([1], 'row 1: must be a JSON object'),
  ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text(json.dumps(row) + '\n')
  with pytest.raises(UserError, match=f'rows.jsonl, {message}'):
    files_lib.read([path])


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
  row = {'prompt': 'p', 'policy': 'a', 'response': 'r'}
  paths = [write(tmp_path / name / 'gsm8k.jsonl.gz', [row]) for name in ('pool', 'more')] + [write(tmp_path / 'other.jsonl.gz', [row])]
  assert [row.of for row in files_lib.read(paths).answers] == ['pool_gsm8k', 'more_gsm8k', 'other']
  with pytest.raises(ConfigError, match=r"two files would be the set 'test.*other'; rename one"):
    files_lib.read([paths[2], paths[2]])


def test_settings_of_files_belong_to_their_world(tmp_path):
  from polar_jax.config import default_config, parse

  config = default_config()
  config.synthesize.files = 'a.jsonl'
  with pytest.raises(ConfigError, match=r"synthesize\.files is set, but synthesize\.world is 'ngram'; set it to 'files'"):
    parse(config)
  config.synthesize.world = 'files'
  config.synthesize.pairs_per_prompt = 7
  assert parse(config).synthesize.pairs_per_prompt == 7
  config.synthesize.max_prompts = 3
  with pytest.raises(ConfigError, match=r"synthesize\.max_prompts is set, but synthesize\.world is 'files'"):
    parse(config)
  with pytest.raises(ConfigError, match=r'synthesize\.files is not set'):
    stage.synthesize(SynthesizeConfig(world='files'), 0, tmp_path, print)
  with pytest.raises(UserError, match=r'none\.jsonl: no such file'):
    stage.synthesize(SynthesizeConfig(world='files', files=f'{tmp_path}/none.jsonl'), 0, tmp_path, print)


def test_negatives_make_ranked_lists_for_training_and_triplets_elsewhere(given, tmp_path):
  config = SynthesizeConfig(**{**CONFIG.__dict__, 'files': ','.join(map(str, given)), 'negatives': 3})
  stage.synthesize(config, 3, tmp_path, lambda line: None)
  held_out = set(json.loads((tmp_path / 'data' / 'files.json').read_text())['policies']['held_out'])
  train = list(open_triplets(tmp_path / 'data' / 'triplets', 'train'))
  lists = [example for example in train if isinstance(example, RankedList)]
  assert len(lists) > 100 and max(len(example.candidates) for example in lists) == 4
  for example in lists:
    policies = [example.metadata['chosen_policy'], *example.metadata['rejected_policies']]
    texts = [example.reference, *example.candidates]
    assert len(set(policies)) == len(policies) == len(example.ranks) and not held_out & set(policies)
    assert len(set(texts)) == len(texts) and list(example.ranks) == [0] + [1] * (len(policies) - 1)
    assert [text.split(' answers')[0].split(':')[0] for text in texts] == [policies[0], *policies]
  for split in ('validation', 'unseen_prompts'):
    assert {type(example) for example in open_triplets(tmp_path / 'data' / 'triplets', split)} == {Triplet}


def test_answers_are_cut_to_their_first_words_before_triplets_for_training_are_drawn(tmp_path):
  rows = [
    {'prompt': f'prompt {i}', 'policy': policy, 'response': f'{policy} {run} of  run {i} and {run} words that are cut off'}
    for i in range(60)
    for policy, run in (('a', 1), ('a', 2), ('b', 1), ('b', 1), ('c', 3), ('c', 4))
  ]
  config = dataclasses.replace(CONFIG, triplet_words=4, held_out_policies=0.0)
  files = files_lib.read([write(tmp_path / 'answers.jsonl.gz', rows)])
  made = files_lib.triplets(files, files_lib.Splits(config, 3, files), config, 3)
  texts = {split: {text for e in examples for text in (e.reference, e.chosen, e.rejected)} for split, examples in made.items()}
  assert texts['train'] == {f'{name} of  run' for name in ('a 1', 'a 2', 'b 1', 'c 3', 'c 4')}
  assert not any(e.reference.startswith('b') for e in made['train'])  # its answers are one answer
  assert all(text.endswith('cut off') for text in texts['validation'])


def test_training_triplets_have_as_many_policies_as_are_asked_for_and_other_splits_all(given, tmp_path):
  read = {}
  for count in (2, 3, 7, None):
    config = dataclasses.replace(CONFIG, files=','.join(map(str, given)), train_policies=count)
    stage.synthesize(config, 3, tmp_path / str(count), lambda line: None)
    triplets = list(open_triplets(tmp_path / str(count) / 'data' / 'triplets', 'train'))
    names = {(t.category, t.metadata[name]) for t in triplets for name in ('reference_policy', 'rejected_policy')}
    read[count] = {policy for of, policy in names if of == 'triplets'}
  _, splits = splits_of(given)
  assert [len(read[count]) for count in (2, 3, 7)] == [2, 3, 7] and not read[None] & splits.held_out
  assert read[2] < read[3] < read[7] < read[None]
  assert read[3] < set(SEVERAL) and set(SEVERAL) - splits.held_out < read[7]  # those with several answers first
  held_out = [[path.read_bytes() for path in sorted((tmp_path / str(count) / 'data' / 'held_out').iterdir())] for count in (2, 7, None)]
  assert held_out[0] == held_out[1] == held_out[2]
  texts = [[t.chosen for t in open_triplets(tmp_path / str(count) / 'data' / 'triplets', 'validation')] for count in (2, None)]
  assert texts[0] == texts[1]


def test_beginnings_keep_white_space_and_drop_what_has_no_word():
  assert files_lib._beginnings([' a  b\n\nc d', ' a  b\n\nc', '  ', 'x'], 3) == [' a  b\n\nc', 'x']
