"""Pre-training on more policies, triplets and layers: which runs are compared, and what the table says of them."""

from __future__ import annotations

import subprocess
import types

import pytest


@pytest.fixture
def pool_size(load_benchmark):
  return load_benchmark('pool_size')


def test_runs_differ_from_the_first_in_one_value(pool_size):
  runs = pool_size.runs_of(['4', '8', 'all'], [16, 12], [48, 24])
  assert [tuple(run) for run in runs] == [('all', 16, 48), ('8', 16, 48), ('4', 16, 48), ('all', 12, 48), ('all', 16, 24)]
  assert len({run.name for run in runs}) == 5


@pytest.mark.parametrize('key', ['policies_4_layers_16_steps_48/pretrain', 'pretrain'])  # a single other system has a short name
def test_a_row_has_the_difference_of_the_first_run(pool_size, key):
  first, other = pool_size.runs_of(['4', 'all'], [16], [48])
  compared = {'difference': 0.25, 'low': 0.1, 'high': 0.4, 'other': {'accuracy': 0.5, 'low': 0.4, 'high': 0.6}}
  sets = {'alpacaeval': {'accuracy': 0.75, 'low': 0.7, 'high': 0.8, 'compare': {key: compared}}}
  rows = [pool_size.row_of(run, first, {'tokens': 9}, sets, 8) for run in (first, other)]
  assert rows[0]['sets']['alpacaeval'] == {'accuracy': 0.75, 'low': 0.7, 'high': 0.8, 'first_minus': None}
  assert rows[1]['sets']['alpacaeval'] == {
    'accuracy': 0.5,
    'low': 0.4,
    'high': 0.6,
    'first_minus': {'difference': 0.25, 'low': 0.1, 'high': 0.4},
  }
  assert rows[1]['examples'] == 384 and rows[1]['policies'] == '4'


def test_settings_are_those_of_the_run(pool_size, tmp_path, monkeypatch):
  commands = []
  monkeypatch.setattr(subprocess, 'run', lambda command, **_: commands.append(command) or types.SimpleNamespace(returncode=0))
  (tmp_path / 'pretrain').mkdir()
  (tmp_path / 'pretrain' / 'summary.json').write_text('{"tokens": 5}')
  options = types.SimpleNamespace(files='a.jsonl.gz', negatives=3, rows=7, batch=8, start=None, seed=2)
  for policies in ('4', 'all'):
    assert pool_size.train(pool_size.Run(policies, 16, 48), tmp_path, options) == {'tokens': 5}
  some, everything = ({part for part in command if 'policies' in part} for command in commands)
  assert some == {'--config.synthesize.train_policies=4'} and not everything
  assert {'--config.pretrain.start_layers=16', '--config.model.frozen_layers=8', '--config.seed=2'} <= set(commands[0])


def test_a_failed_run_ends_with_its_message(pool_size, tmp_path):
  with pytest.raises(SystemExit, match='ended with status'):
    pool_size.run_config('real.py', tmp_path, {'no_such_option': 1})
