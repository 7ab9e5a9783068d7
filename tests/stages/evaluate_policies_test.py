"""The evaluate stage on benchmarks of policies: the whole command on tasks of its own, and what it refuses."""

from __future__ import annotations

import gzip
import json
import runpy

import jax
import pytest
from optional import is_installed

import polar_jax
from polar_jax import runner, sharding
from polar_jax.config import MeshConfig, ModelConfig, parse
from polar_jax.data.tokenizer import ByteTokenizer

SHAPE = ModelConfig(
  vocab_size=ByteTokenizer.vocab_size,
  num_layers=1,
  d_model=16,
  d_ff=16,
  num_heads=1,
  num_kv_heads=1,
  head_dim=16,
  init_std=0.3,
  max_position=64,
)
TASK = """\
task: {name}
tag: own
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 2.0}}
"""
CHOICE = 'doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
RESPONSE = """\
doc_to_target: result
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A folder with a language model, a reward model, and task files with their data."""
  folder, mesh = tmp_path_factory.mktemp('world'), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  for name, kind in (('lm', polar_jax.LanguageModel), ('reward', polar_jax.RewardModel)):
    kind.init(SHAPE, ByteTokenizer(), mesh=mesh).save(folder / name)
  documents = [
    {'question': f'{i} + {i}' + ' ' * (40 if i == 3 else 0) + ' =', 'choices': ['1', f'{2 * i}'], 'label': 1, 'result': f'#### {2 * i}'}
    for i in range(5)
  ]
  data = folder / 'documents.jsonl'
  data.write_text('\n'.join(map(json.dumps, documents)))
  (folder / 'tasks').mkdir()
  for name, kind, more in (('sums', 'multiple_choice', CHOICE), ('written_sums', 'generate_until', RESPONSE)):
    (folder / 'tasks' / f'{name}.yaml').write_text(TASK.format(name=name, kind=kind, data=data) + more)
  gone = TASK.format(name='gone', kind='generate_until', data=folder / 'no.jsonl') + RESPONSE
  (folder / 'tasks/gone.yaml').write_text(gone.replace('tag: own\n', ''))
  return folder


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda config: make(config, jax.devices()[:1]))


def run(tmp_path, request, world, **settings) -> int:
  """Run the config file and return the exit status."""
  config = runpy.run_path(str(request.config.rootpath / 'configs/benchmarks_20.py'))['get_config']()
  given = {'checkpoint': str(world / 'lm'), 'output': str(tmp_path / 'out'), 'evaluate.include_path': str(world / 'tasks'), **settings}
  given = {'evaluate.bootstrap': 100, 'evaluate.max_new': 8, **given}
  for name, value in given.items():
    section, _, option = name.rpartition('.')
    setattr(getattr(config, section) if section else config, option, value)
  return runner.run(parse(config), tmp_path / 'run')


@pytest.mark.needs('lm_eval')
def test_own_tasks_are_run_and_reported(tmp_path, request, world, capsys):
  assert run(tmp_path, request, world, **{'evaluate.tasks': 'sums,gone', 'evaluate.limit': 4}) == 0
  result = json.loads((tmp_path / 'out/policies.json').read_text())
  found = result['benchmarks']['sums']
  assert found['metric'] == 'acc,none' and 0 <= found['value'] <= 1 and found['stderr'] > 0
  assert {key: found[key] for key in ('n', 'shots', 'version', 'requests', 'truncated', 'task')} == {
    'n': 4,
    'shots': 0,
    'version': 2.0,
    'requests': 8,
    'truncated': 0,
    'task': 'sums',
  }
  assert list(result['not_run']) == ['gone'] and 'cannot be read' in result['not_run']['gone']
  assert result['options']['limit'] == 4 and result['options']['max_length'] == 64
  lines = [json.loads(line) for line in gzip.decompress((tmp_path / 'out/policies_samples.jsonl.gz').read_bytes()).splitlines()]
  assert [line['doc_id'] for line in lines] == [0, 1, 2, 3]
  assert sum(line['acc'] for line in lines) / 4 == found['value']
  report = (tmp_path / 'run/report.md').read_text()
  assert '| sums | acc,none |' in report and 'Only the first 4 documents' in report and '- gone: its data' in report
  assert 'sums: acc,none' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.needs('lm_eval')
def test_a_group_has_the_tasks_in_it_and_the_rule_judges_responses(tmp_path, request, world):
  settings = {'evaluate.tasks': 'own,written_sums', 'evaluate.max_length': 40, 'evaluate.answer_field': 'result', 'evaluate.shots': 1}
  assert run(tmp_path, request, world, **settings) == 0
  found = json.loads((tmp_path / 'out/policies.json').read_text())['benchmarks']
  assert set(found['own']['tasks']) == {'sums', 'written_sums'} and found['own']['n'] == 10
  assert found['own']['tasks']['sums']['n'] == 5
  assert found['written_sums']['truncated'] > 0
  assert found['written_sums']['metrics'].keys() >= {'exact_match,none', 'last_number,rule', 'last_number_stderr,rule'}
  assert found['written_sums']['shots'] == 1


@pytest.mark.needs('lm_eval')
@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'evaluate.tasks': 'gone'}, 'no benchmark could be run: gone: its data'),
    ({'evaluate.include_path': '/nowhere'}, 'evaluate.include_path /nowhere: no such folder'),
    ({'checkpoint': None}, 'checkpoint is not set'),
    ({'output': None}, 'output is not set'),
  ],
)
def test_what_cannot_be_run_is_explained_and_nothing_is_written(tmp_path, request, world, capsys, settings, message):
  assert run(tmp_path, request, world, **{'evaluate.tasks': 'sums', **settings}) == 1
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


@pytest.mark.needs('lm_eval')
def test_a_reward_model_is_no_policy(tmp_path, request, world, capsys):
  assert run(tmp_path, request, world, checkpoint=str(world / 'reward')) == 1
  assert 'has a reward head, but evaluate.tasks needs a language model' in capsys.readouterr().err


def test_settings_that_do_not_fit_together_are_refused(tmp_path, request, world, capsys):
  assert run(tmp_path, request, world, **{'evaluate.tasks': None}) == 1
  assert 'evaluate.include_path is set, but evaluate.tasks names no benchmark' in capsys.readouterr().err
  assert run(tmp_path, request, world, **{'evaluate.tasks': 'sums', 'input': 'pairs.jsonl'}) == 1
  assert 'evaluate.tasks is about a language model, and input about a reward model' in capsys.readouterr().err


@pytest.mark.skipif(is_installed('lm_eval'), reason='lm-eval is installed')
def test_without_lm_eval_the_command_that_installs_it_is_named(tmp_path, request, world, capsys):
  assert run(tmp_path, request, world) == 1
  assert "pip install 'polar_jax[lm_eval]'" in capsys.readouterr().err
