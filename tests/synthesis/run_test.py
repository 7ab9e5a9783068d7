"""Synthesis from the file of a pool to the data card, with a server of the test's own."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import importlib.util
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import fast_compilation
import pytest
from synthesis.server_stand_in import Server, reply_to, send

from polar_jax.config import ConfigError, PoolConfig, parse
from polar_jax.data import tfds
from polar_jax.synthesis import run
from polar_jax.types import Triplet, UserError

NAMES = [f'p{i}' for i in range(6)]


def answer(body):
  """Return an answer that shows the policy, the prompt and the seed."""
  prompt = body['prompt'] if 'prompt' in body else body['messages'][-1]['content']
  return reply_to(body, f'{body["model"]} says {body["seed"]} to {prompt}.')


def faulty(name, fault):
  """Return an act: the fault for one policy, the usual answer for the others."""
  usual = send(answer)
  return lambda handler, body: (fault if body['model'] == name else usual)(handler, body)


def write_pool(folder, url, **changes):
  """Write a pool of six policies, of which two are held out, and prompts for it. Return the settings."""
  folder.mkdir(parents=True, exist_ok=True)
  policies = [
    {'name': name, 'kind': 'openai', 'base_url': url, 'model': name, 'held_out': name in NAMES[4:], 'family': f'f{number % 3}'}
    for number, name in enumerate(NAMES)
  ]
  (folder / 'pool.json').write_text(json.dumps({'policies': policies}))
  (folder / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': f'Question {i}?', 'id': f'q{i}'}) + '\n' for i in range(40)))
  settings = {'policies_per_prompt': 3, 'unit_prompts': 8, 'unseen_share': 0.3, 'validation_share': 0.1, 'patience': 0.0}
  return PoolConfig(pool=str(folder / 'pool.json'), prompts=str(folder / 'prompts.jsonl'), **settings | changes)


def synthesize(config, workdir, log=None, seed=0):
  return run.synthesize(config, seed, workdir, log or (lambda line: None))


def read(workdir):
  """Return (card, triplets by split)."""
  card = json.loads((workdir / 'data' / 'card.json').read_text())
  return card, {split: list(source) for split, source in tfds.open_triplets(workdir / 'data' / 'triplets').items()}


def test_triplets_of_a_server(tmp_path):
  with Server(act=send(answer)) as server:
    section = synthesize(write_pool(tmp_path, server.url), tmp_path / 'run')
  card, triplets = read(tmp_path / 'run')
  assert card['complete'] is True and card['rows'] == {split: len(rows) for split, rows in triplets.items()}
  assert set(card['rows']) == {'train', 'validation', 'unseen_prompts', 'unseen_policies'}
  assert section['rows'] == {f'triplets/{split}': count for split, count in card['rows'].items()}
  assert card['requests'] == len(server.requests) and card['policies']['p0']['kind'] == 'openai'
  prompts, seen = {}, set()
  for split, rows in triplets.items():
    for row in rows:
      facts = row.metadata
      number = int(row.prompt.removeprefix('Question ').removesuffix('?'))
      assert facts['prompt_id'] == f'q{number}' and row.wrapper == 'sft'
      assert facts['reference_policy'] == facts['chosen_policy'] != facts['rejected_policy']
      for role in ('reference', 'chosen', 'rejected'):
        policy = facts[f'{role}_policy']
        assert getattr(row, role).startswith(f'{policy} says ') and getattr(row, role).endswith(f'to {row.prompt}.')
        assert (policy in NAMES[4:]) == (split == 'unseen_policies')
        assert facts[f'{role}_sample'] in (0, 1)
      assert facts['reference_sample'] != facts['chosen_sample']
      assert (row.reference, row.chosen, row.rejected) not in seen
      seen.add((row.reference, row.chosen, row.rejected))
      prompts.setdefault(split, set()).add(number)
  assert prompts['unseen_policies'] <= prompts['unseen_prompts']
  assert not prompts['train'] & prompts['unseen_prompts'] and not prompts['train'] & prompts['validation']
  asked = collections.Counter((body['model'], body['messages'][0]['content']) for body in server.bodies())
  assert set(asked.values()) == {2}  # two samples of every policy that answers
  assert len({(body['model'], body['seed']) for body in server.bodies()}) == len(server.requests)
  assert card['fingerprints'] == {split: tfds.fingerprint(rows) for split, rows in triplets.items()}
  assert tfds.verify(tmp_path / 'run' / 'data' / 'triplets') == card['checksums']
  text = (tmp_path / 'run' / 'data' / 'card.md').read_text()
  assert 'p5' in text and 'The data are complete.' in text and len(list((tmp_path / 'run' / 'data' / 'figures').iterdir())) == 2


@pytest.mark.long
def test_the_same_command_gives_the_same_triplets_without_new_requests(tmp_path):
  with Server(act=send(answer)) as server:
    config = write_pool(tmp_path, server.url)
    first = synthesize(config, tmp_path / 'a')
    count = len(server.requests)
    again = synthesize(config, tmp_path / 'a')
    assert len(server.requests) == count and again['fingerprints'] == first['fingerprints']
    assert synthesize(config, tmp_path / 'b')['fingerprints'] == first['fingerprints']  # whatever the order of the answers
    other = synthesize(config, tmp_path / 'c', seed=1)
    assert other['fingerprints'] != first['fingerprints']
    seeds = [{(body['model'], body['seed']) for body in part} for part in (server.bodies()[:count], server.bodies()[count : 2 * count])]
    assert seeds[0] == seeds[1] and len(server.requests) == 3 * count
    with pytest.raises(UserError, match=r'samples of a run with another seed \(0, now 1\)'):
      synthesize(config, tmp_path / 'a', seed=1)


FAULTS = {
  'busy': (send(status=429), 'status 429'),
  'broken': (send(status=500), 'status 500'),
  'closed': (send(status=401), 'status 401'),
  'cut': (send(raw=b'{"choices": [{"te'), 'not JSON'),
  'silent': (send(raw=b''), 'no answer after'),
  'other': (send({'answer': 42}), 'no answer after'),
  'stuck': (send(lambda body: reply_to(body, 'always the same')), 'gives the same answer to every seed'),
  'empty': (send(lambda body: reply_to(body, '')), 'answers are empty'),
}


@pytest.mark.long
def test_servers_that_fail_are_named_and_cost_the_others_nothing(tmp_path):
  lines, usual = [], send(answer)
  with Server(act=lambda handler, body: FAULTS.get(body['model'], (usual,))[0](handler, body)) as server:
    config = write_pool(tmp_path, server.url, policies_per_prompt=12)
    pool = json.loads(pathlib.Path(config.pool).read_text())
    pool['policies'] += [{'name': name, 'kind': 'openai', 'base_url': server.url, 'model': name} for name in FAULTS]
    pathlib.Path(config.pool).write_text(json.dumps(pool))
    synthesize(config, tmp_path / 'run', lines.append)
    card, triplets = read(tmp_path / 'run')
    assert card['complete'] is False
    for name, (_, reason) in FAULTS.items():
      assert reason in card['policies'][name]['quarantined'] and card['policies'][name]['samples'] == 0
      assert any(f'{name}: given up' in line for line in lines)
    assert any('NOT COMPLETE: ' in line for line in lines)
    assert all(card['policies'][name]['quarantined'] is None and card['policies'][name]['samples'] for name in NAMES)
    assert '## Quarantined policies' in (tmp_path / 'run' / 'data' / 'card.md').read_text()
    assert {row.metadata['rejected_policy'] for rows in triplets.values() for row in rows} == set(NAMES)
    server.act = usual  # they work again
    before = len(server.requests)
    repaired = synthesize(config, tmp_path / 'run')
    assert {body['model'] for body in server.bodies()[before:]} == set(FAULTS)  # the others are not asked again
    assert repaired['fingerprints'] == synthesize(config, tmp_path / 'whole')['fingerprints']
  assert read(tmp_path / 'run')[0]['complete'] is True


def test_a_server_without_a_chat_endpoint_gets_plain_text(tmp_path):
  usual, missing = send(answer), send(status=404)
  with Server(act=lambda handler, body: (missing if 'messages' in body else usual)(handler, body)) as server:
    synthesize(write_pool(tmp_path, server.url), tmp_path / 'run')
  assert read(tmp_path / 'run')[0]['complete'] is True
  paths = collections.Counter(path for path, _, _ in server.requests)
  assert paths['/v1/chat/completions'] == len(NAMES) and paths['/v1/completions'] > 100  # each policy finds out once


@pytest.mark.long
def test_killed_at_any_point_no_answer_is_lost_or_asked_for_twice(tmp_path):
  command = [sys.executable, '-m', 'polar_jax.main', '--config=configs/synthesize.py', f'--workdir={tmp_path / "run"}']
  with Server(act=send(answer, seconds=0.02)) as server:
    config = write_pool(tmp_path, server.url, unit_prompts=4, max_in_flight=8)
    command += [
      f'--config.synthesize.{name}={getattr(config, name)}' for name in ('pool', 'prompts', 'policies_per_prompt', 'unit_prompts')
    ]
    command += [f'--config.synthesize.{name}={getattr(config, name)}' for name in ('unseen_share', 'validation_share', 'max_in_flight')]
    statuses = []
    for number, sent in enumerate((signal.SIGKILL, signal.SIGTERM)):
      before = len(server.requests)
      process = subprocess.Popen(command, cwd=fast_compilation.ROOT, env=fast_compilation.environment(), stdout=subprocess.PIPE, text=True)
      while len(server.requests) < before + 40 + 30 * number and process.poll() is None:
        time.sleep(0.01)
      process.send_signal(sent)
      output = process.communicate(timeout=60)[0]
      statuses.append(process.returncode)
    assert statuses == [-signal.SIGKILL, 0] and 'stopped by SIGTERM, the units that were finished are kept' in output
    stored = run.Store(tmp_path / 'run' / 'data' / 'samples.sqlite', {})
    finished = sum(stored.sample_counts().values())
    stored.close()
    before = len(server.requests)
    section = synthesize(PoolConfig(**{**vars(config), 'near_duplicates': 0.8, 'patience': 120.0}), tmp_path / 'run')
    after = len(server.requests) - before
    whole = synthesize(PoolConfig(**{**vars(config), 'near_duplicates': 0.8}), tmp_path / 'whole')
    everything = len(server.requests) - before - after
  assert section['fingerprints'] == whole['fingerprints']
  assert finished > 0 and after == everything - finished


def record(folder, rows, name='answers.jsonl.gz'):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_bytes(gzip.compress(''.join(json.dumps(row) + '\n' for row in rows).encode()))


def recorded_pool(folder, entries, rows):
  record(folder, rows)
  pool = [entry if 'kind' in entry else {'kind': 'recorded', 'path': 'answers.jsonl.gz', **entry} for entry in entries]
  (folder / 'pool.json').write_text(json.dumps(pool))
  return PoolConfig(pool=str(folder / 'pool.json'), validation_share=0.0, unseen_share=0.0)


SERVER = {'kind': 'openai', 'base_url': 'http://127.0.0.1:9', 'model': 'm'}


def answers(policies, runs=2, prompts=5):
  return [
    {'prompt_id': number, 'prompt': f'Q{number}', 'policy': policy, 'run': i, 'response': f'{policy} answers {number} in run {i}.'}
    for number in range(prompts)
    for policy in policies
    for i in range(runs)
  ]


def test_recorded_answers(tmp_path):
  rows = [*answers(['a', 'b', 'c']), {'prompt': 'Q0', 'policy': 'd', 'response': 'd knows one thing.'}]
  synthesize(recorded_pool(tmp_path, [{'name': 'all'}], rows), tmp_path / 'run')
  card, triplets = read(tmp_path / 'run')
  assert set(card['policies']) == {'a', 'b', 'c', 'd'} and card['policies']['a']['samples'] == 10 and card['requests'] == 0
  assert set(triplets) == {'train'} and len(triplets['train']) == 4 * 5
  used = {row.metadata['reference_policy'] for row in triplets['train']}
  assert used == {'a', 'b', 'c'}  # d has one sample, which can only be rejected
  for row in triplets['train']:
    assert row.reference.split(' in ')[0] == row.chosen.split(' in ')[0] != row.rejected.split(' in ')[0]


def mixed_pool(folder, **changes):
  """Write recorded answers of eight policies, some of them loops, empty or equal, and return settings that use every split."""
  rows = answers('abcdefgh', prompts=40)
  for number, row in enumerate(rows):
    row['response'] = {3: ' ', 5: 'I know. ' * 9, 7: 'The same.', 11: '我不知道。' * 5}.get(number % 17, row['response'])
  entries = [
    {'name': 'all', 'near_to': ['b']},
    *({'name': name, 'held_out': True, 'family': 'x'} for name in 'gh'),
    {'name': 'b', 'size': 7},
  ]
  config = recorded_pool(folder, entries, rows)
  return dataclasses.replace(config, **{'validation_share': 0.2, 'unseen_share': 0.3, 'near_share': 0.5, 'pairs_per_prompt': 9} | changes)


def test_the_same_samples_give_the_same_triplets_in_every_version(tmp_path):
  section = synthesize(mixed_pool(tmp_path), tmp_path / 'run', seed=3)
  policies = read(tmp_path / 'run')[0]['policies'].values()
  assert sum(facts['samples'] + facts['dropped'] for facts in policies) == 8 * 40 * 2  # each sample counts once
  assert {split.removeprefix('triplets/'): value[:16] for split, value in section['fingerprints'].items()} == {
    'train': '668f656c3ad09fed',
    'validation': '0e04b87fb694c7bb',
    'unseen_prompts': 'c00b6308d0c13f0b',
    'unseen_policies': '28c698daed72f794',
  }


@pytest.mark.long
def test_what_is_complete_is_not_written_again(tmp_path, monkeypatch):
  lines, config, folder = [], mixed_pool(tmp_path), tmp_path / 'run'
  kept = lambda: (path for path in (folder / 'data').rglob('*') if path.is_file() and path.suffix != '.sqlite')
  files = lambda: {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in kept()}
  first = synthesize(config, folder)
  written = files()
  again = synthesize(config, folder, lines.append)
  assert files() == written and again['rows'] == first['rows'] and again['fingerprints'] == first['fingerprints']
  assert 'they were there, of the same samples and settings' in lines[-1] and 'train ' in lines[-1]

  more = dataclasses.replace(config, pairs_per_prompt=10)
  with monkeypatch.context() as patch:
    patch.setattr(tfds, '_write_info', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      synthesize(more, folder)
  assert files() == written and not list((folder / 'data').glob('incomplete*'))
  assert sum(synthesize(more, folder)['rows'].values()) > sum(first['rows'].values())
  assert {split: len(rows) for split, rows in read(folder)[1].items()} == read(folder)[0]['rows'] and files().keys() == written.keys()
  assert synthesize(config, folder)['fingerprints'] == first['fingerprints']
  assert {path: content for path, (_, content) in files().items()} == {path: content for path, (_, content) in written.items()}

  (shard,) = (folder / 'data' / 'triplets').rglob('*train*')
  shard.write_bytes(b'x' + shard.read_bytes()[1:])
  (folder / 'data' / 'incomplete.triplets').mkdir()  # of a run that was killed
  assert synthesize(config, folder, lines.append)['fingerprints'] == first['fingerprints']
  assert any('are written again: ' in line and 'are not those that were written' in line for line in lines)
  assert shard.read_bytes() == written[shard][1] and files().keys() == written.keys()
  (folder / 'data' / 'card.json').unlink()
  synthesize(config, folder)
  assert files().keys() == written.keys()
  shutil.rmtree(folder / 'data' / 'triplets')
  tfds.write(folder / 'data' / 'triplets', 'triplets', {'train': [Triplet('p', 'r', 'c', 'j')]}, '', {})  # whole, but of another run
  synthesize(config, folder)
  assert shard.read_bytes() == written[shard][1]


def test_new_samples_and_other_facts_give_new_triplets(tmp_path):
  config, folder = mixed_pool(tmp_path), tmp_path / 'run'
  first = synthesize(config, folder)
  pool = json.loads(pathlib.Path(config.pool).read_text())
  pool[0]['weight'] = 5.0
  pathlib.Path(config.pool).write_text(json.dumps(pool))
  assert synthesize(config, folder)['fingerprints'] != first['fingerprints']
  pool[0]['weight'] = 1.0
  record(tmp_path, answers('yz', prompts=40), 'more.jsonl.gz')
  pool.append({'name': 'more', 'kind': 'recorded', 'path': 'more.jsonl.gz'})
  pathlib.Path(config.pool).write_text(json.dumps(pool))
  synthesize(config, folder)
  card, triplets = read(folder)
  assert card['policies']['y']['triplets'] and {split: tfds.fingerprint(rows) for split, rows in triplets.items()} == card['fingerprints']


def test_entries_divide_the_policies_of_a_file(tmp_path):
  rows = answers(['gpt-a', 'gpt-b', 'llama@x', 'llama@y', 'yi', 'claude', 'qwen'], runs=1)
  rows += answers(['gpt-a', 'gpt-b', 'yi', 'qwen'], runs=1)
  entries = [
    {'name': 'rest'},
    {'name': 'gpt', 'policy': 'gpt-*', 'family': 'gpt'},
    {'name': 'llama', 'policy': ['llama@*'], 'merge': True},
    {'name': 'yi', 'weight': 2},
  ]
  synthesize(recorded_pool(tmp_path, entries, rows), tmp_path / 'run')
  card, triplets = read(tmp_path / 'run')
  assert set(card['policies']) == {'gpt-a', 'gpt-b', 'llama', 'yi', 'claude', 'qwen'}
  assert card['policies']['gpt-a']['family'] == 'gpt' and card['policies']['llama']['samples'] == 10
  merged = [row for row in triplets['train'] if row.metadata['reference_policy'] == 'llama']
  assert merged and all({row.reference[:7], row.chosen[:7]} == {'llama@x', 'llama@y'} for row in merged)


@pytest.mark.parametrize(
  ('entries', 'rows', 'message'),
  [
    ([{'name': 'all'}], answers(['a', 'b'], runs=1), 'no prompt of the pool has two samples of one policy'),
    ([{'name': 'all'}], answers(['a']), 'the pool has 1 policies that are not held out; a triplet needs two'),
    ([{'name': 'all'}, {'name': 'x', 'policy': 'y*'}], answers(['a', 'b']), "policy 'x': .* has no answer of y.*it has: a, b"),
    ([{'name': 'all'}, {'name': 'b', 'held_out': True}], answers(['a', 'b', 'c']), '1 policies that are held out; a triplet needs two'),
    ([{'name': 'all'}], [], "policy 'all': .* has no answer of all .it has: no rows"),
    ([{'name': 'all', 'path': 'none.jsonl'}], [], 'none.jsonl: no such file'),
    ([{'name': 'all'}, {**SERVER, 'name': 'n', 'prompts': 'prefix'}], answers(['a', 'b']), "policy 'n' has no prompts: it answers"),
    ([{'name': 'all'}, {**SERVER, 'name': 'a'}], answers(['a', 'b']), "two policies have the name 'a'"),
    ([{'name': 'all'}, {'name': 'n', 'kind': 'ngram', 'path': 'x'}], answers(['a', 'b']), "policy 'n': no file at .*x"),
    (
      [{'name': 'all'}, {'name': 'n', 'kind': 'ngram', 'path': 'pool.json', 'temperature': 0.05}],
      answers(['a', 'b']),
      'n-grams need at least',
    ),
    ([{'name': 'all'}, {'name': 'n', 'kind': 'checkpoint', 'path': 'x'}], answers(['a', 'b']), "policy 'n': checkpoint .*no such file"),
  ],
)
def test_pools_without_triplets(tmp_path, entries, rows, message):
  with pytest.raises(UserError, match=message):
    synthesize(recorded_pool(tmp_path, entries, rows), tmp_path / 'run')


def test_a_pool_of_servers_needs_prompts(tmp_path):
  config = write_pool(tmp_path, 'http://127.0.0.1:9')
  with pytest.raises(ConfigError, match=r"policy 'p0' has no prompts: set synthesize\.prompts"):
    synthesize(PoolConfig(pool=config.pool), tmp_path / 'run')


def test_answers_that_changed_are_refused(tmp_path):
  config = recorded_pool(tmp_path, [{'name': 'all'}], answers(['a', 'b']))
  synthesize(config, tmp_path / 'run')
  recorded_pool(tmp_path, [{'name': 'all'}], answers(['a', 'b', 'c']))
  with pytest.raises(UserError, match=r'answers\.jsonl\.gz: has changed since its answers were read into .*samples\.sqlite'):
    synthesize(config, tmp_path / 'run')


def test_files_of_one_name_in_two_folders(tmp_path):
  for number, policies in enumerate(['ab', 'cd']):
    record(tmp_path / f'{number}', answers(policies))
  pool = [{'name': 'all', 'kind': 'recorded', 'path': ['0/answers.jsonl.gz', '1/answers.jsonl.gz']}]
  (tmp_path / 'pool.json').write_text(json.dumps(pool))
  synthesize(PoolConfig(pool=str(tmp_path / 'pool.json')), tmp_path / 'run')
  card, _ = read(tmp_path / 'run')
  assert {name: values['samples'] for name, values in card['policies'].items()} == dict.fromkeys('abcd', 10)


def test_without_datasketch_the_remedy_works(tmp_path, monkeypatch):
  found = importlib.util.find_spec
  monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name == 'datasketch' else found(name, *rest))
  config = recorded_pool(tmp_path, [{'name': 'all'}], answers(['a', 'b']))
  with pytest.raises(UserError, match=r'synthesize\.near_duplicates \(0: only equal ones\) needs datasketch; install it with'):
    synthesize(config, tmp_path / 'run')
  # As on the command line, where the value must be a number.
  synthesize(parse({'synthesize': {**vars(config), 'world': 'pool', 'near_duplicates': 0}}).synthesize, tmp_path / 'other')
  assert read(tmp_path / 'other')[0]['rows'] == {'train': 20}


@pytest.mark.long
def test_prompts_are_left_out_and_listed(tmp_path):
  pytest.importorskip('datasketch')
  long = 'Anna buys {} apples at the market on a sunny day and gives three of them to her friend Ben who eats one. How many are left?'
  words = ' '.join(f'word{i}' for i in range(20))
  prompts = [long.format('seven'), long.format('eight'), f'Say: {words}', 'Short?', 'Other?']
  rows = [
    {'prompt': prompt, 'policy': policy, 'response': f'{policy} {i} {prompt[:9]}.'} for prompt in prompts for policy in 'ab' for i in (0, 1)
  ]
  config = recorded_pool(tmp_path, [{'name': 'all'}], rows)
  bench = [{'prompt': f'Please repeat {words}', 'chosen': 'x'}, {'prompt': 'short'}]
  (tmp_path / 'bench.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in bench))
  synthesize(PoolConfig(**{**vars(config), 'near_duplicates': 0.6, 'exclude': str(tmp_path / 'bench.jsonl')}), tmp_path / 'run')
  card, triplets = read(tmp_path / 'run')
  assert {row.prompt for row in triplets['train']} == {prompts[0], 'Other?'}
  assert card['prompts_left_out']['near duplicate'] == 1 and card['prompts_left_out']['contamination'] == 2
  assert [(entry['found_in'].split(',')[0]) for entry in card['contaminated']] == ['bench.jsonl'] * 2
  synthesize(PoolConfig(**{**vars(config), 'near_duplicates': 0.6}), tmp_path / 'run')  # without the evaluation file
  card, triplets = read(tmp_path / 'run')
  assert {row.prompt for row in triplets['train']} == {*prompts} - {prompts[1]} and card['contaminated'] == []
  near = prompts[0].replace('market', 'shop').replace('Ben', 'Tom')  # shares no 13 words in a row
  (tmp_path / 'bench.jsonl').write_text(json.dumps({'prompt': near}))
  for exclude_near, count in ((None, 4), (0.9, 4), (0.25, 3)):
    settings = {'near_duplicates': 0.6, 'exclude': str(tmp_path / 'bench.jsonl'), 'exclude_near': exclude_near}
    synthesize(PoolConfig(**{**vars(config), **settings}), tmp_path / 'run')
    assert len({row.prompt for row in read(tmp_path / 'run')[1]['train']}) == count
  with pytest.raises(UserError, match=r'a run with another near_duplicates \(0\.6, now 0\.0\); continue with the old setting'):
    synthesize(PoolConfig(**{**vars(config), 'near_duplicates': 0.0}), tmp_path / 'run')


def test_check_shows_answers_and_names_who_does_not_answer(tmp_path):
  lines = []
  with Server(act=faulty('p1', send(status=401))) as server:
    config = PoolConfig(**{**vars(write_pool(tmp_path, server.url)), 'check': True})
    with pytest.raises(UserError, match='1 of the policies do not answer: p1; see the lines above'):
      synthesize(config, tmp_path / 'run', lines.append)
    assert len(server.requests) == 3 * 5 + len([body for body in server.bodies() if body['model'] == 'p1'])
    server.act = send(answer)
    assert synthesize(config, tmp_path / 'run', lines.append) == {}
  assert any(line.startswith("check: p0: 'Question 0?' -> 'p0 says ") for line in lines)
  assert any(line.startswith('check: p1: FAILED: ') and 'status 401' in line for line in lines)
  assert not (tmp_path / 'run' / 'data' / 'card.json').exists()


def test_keys_are_sent_and_appear_nowhere(tmp_path, monkeypatch):
  monkeypatch.setenv('POOL_KEY', 'sk-secret-1234')
  lines = []
  with Server(act=faulty('p1', send(status=403))) as server:
    config = write_pool(tmp_path, server.url)
    pool = json.loads(pathlib.Path(config.pool).read_text())
    for policy in pool['policies']:
      policy['api_key_env'] = 'POOL_KEY'
    pathlib.Path(config.pool).write_text(json.dumps(pool))
    synthesize(config, tmp_path / 'run', lines.append)
    assert {headers['Authorization'] for _, headers, _ in server.requests} == {'Bearer sk-secret-1234'}
  for path in (tmp_path / 'run').rglob('*'):
    assert path.is_dir() or b'secret' not in path.read_bytes()
  assert 'secret' not in ''.join(lines) and any('POOL_KEY' in line for line in lines)
  monkeypatch.delenv('POOL_KEY')
  with pytest.raises(ConfigError, match='POOL_KEY'):
    synthesize(config, tmp_path / 'other')


def test_no_triplets_is_an_error_that_says_why(tmp_path):
  with (
    Server(act=send(status=500)) as server,
    pytest.raises(UserError, match=r'no triplet could be made: 6 policies did not answer; p\d: http'),
  ):
    synthesize(write_pool(tmp_path, server.url), tmp_path / 'run')
