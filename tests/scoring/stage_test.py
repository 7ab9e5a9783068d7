from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax import runner, sharding
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, ScoreConfig, TemplateConfig, TokenizerConfig
from polar_jax.scoring import files
from polar_jax.stages import score as stage
from polar_jax.stages.context import Context
from polar_jax.types import Group, UserError

COUNT = 11


@pytest.fixture
def source(tmp_path) -> pathlib.Path:
  rng = np.random.default_rng(0)
  word = lambda: ''.join(rng.choice(list('abcdé '), int(rng.integers(0, 18))))
  examples = [{'prompt': word(), 'reference': word(), 'output': word(), 'id': i} for i in range(COUNT)]
  examples[3] |= {'prompt': [{'role': 'user', 'content': 'x'}, {'role': 'user', 'content': 'y'}], 'wrapper': 'pretrain'}
  path = tmp_path / 'examples.jsonl'
  path.write_text(''.join(json.dumps(example) + '\n' for example in examples))
  return path


@pytest.fixture
def make_config(source, reward_run):
  """Return a function that makes a config to score the source."""

  def make(output, window=4, **changes):
    settings = {
      'stage': 'score',
      'checkpoint': str(reward_run),
      'input': str(source),
      'output': str(output),
      'tokenizer': TokenizerConfig(kind='checkpoint'),
      'model': ModelConfig(attention='reference'),
      'score': ScoreConfig(window=window),
    }
    return Config(**settings | changes)

  return make


@pytest.fixture
def score(tmp_path, make_config):
  """Return a function that runs the stage on one device."""

  def run(output, log=None, **changes):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    context = Context(make_config(output, **changes), tmp_path / 'run', mesh, ([] if log is None else log).append)
    return stage.score(context)['score']

  return run


def rewards_in(path):
  return np.array([json.loads(line)['reward'] for line in path.read_text().splitlines()], np.float32)


class Stop(Exception):
  pass


@pytest.fixture
def stopped_after(monkeypatch):
  """Return a function that stops later runs before they write window number `windows`."""

  def stop(windows):
    write, seen = files.RewardFile.write, []

    def until(self, *args):
      if len(seen) == windows:
        raise Stop
      seen.append(1)
      write(self, *args)

    monkeypatch.setattr(files.RewardFile, 'write', until)
    return lambda: monkeypatch.setattr(files.RewardFile, 'write', write)

  return stop


def test_rewards_equal_those_of_the_scorer(score, source, tmp_path, make_exact):
  log: list[str] = []
  facts = score(tmp_path / 'out.jsonl', log)
  contents = [json.loads(line) for line in source.read_text().splitlines()]
  scorer = make_exact()
  groups = [Group(c['prompt'], c['reference'], [c['output']], c.get('wrapper', 'sft')) for c in contents]
  expected = scorer.score(groups)
  written = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert written == [{**c, 'reward': float(r)} for c, r in zip(contents, expected, strict=True)]
  assert len(np.unique(expected)) == COUNT
  assert {k: facts[k] for k in ('rows', 'skipped', 'resumed_rows')} == {'rows': COUNT, 'skipped': 0, 'resumed_rows': 0}
  assert facts['tokens'] == sum(map(len, scorer.encode(groups)))
  assert (facts['mean'], facts['std']) == (pytest.approx(expected.mean()), pytest.approx(expected.std()))
  assert facts['rows_per_second'] == pytest.approx(COUNT / facts['seconds'])
  assert log[0].startswith(f'score  example 4/{COUNT}  ')
  assert log[-1].startswith(f'score: {COUNT} examples in ')


def test_windows_and_formats_do_not_matter(score, tmp_path):
  score(tmp_path / 'out.jsonl')
  for window in (1, 100):
    score(tmp_path / 'other.jsonl.gz', window=window)
    assert gzip.decompress((tmp_path / 'other.jsonl.gz').read_bytes()) == (tmp_path / 'out.jsonl').read_bytes()


def test_a_stopped_run_continues(score, tmp_path, stopped_after):
  score(tmp_path / 'whole.jsonl')
  restore = stopped_after(2)
  with pytest.raises(Stop):
    score(tmp_path / 'out.jsonl')
  restore()
  assert not (tmp_path / 'out.jsonl').exists()
  log: list[str] = []
  facts = score(tmp_path / 'out.jsonl', log, window=5)
  assert (tmp_path / 'out.jsonl').read_bytes() == (tmp_path / 'whole.jsonl').read_bytes()
  assert (facts['rows'], facts['resumed_rows']) == (COUNT, 8)
  assert facts['mean'] == pytest.approx(rewards_in(tmp_path / 'whole.jsonl').mean())
  assert 'score: continuing after 8 examples of a stopped run' in log
  assert sorted(p.name for p in tmp_path.glob('out*')) == ['out.jsonl']


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model': ModelConfig(attention='reference', compute_dtype='bfloat16')}, 'model'),
    ({'template': TemplateConfig(max_response_length=7)}, 'template'),
    ({'tokenizer': TokenizerConfig(kind='byte')}, 'tokenizer'),
    ({}, 'input'),
  ],
)
def test_a_run_with_other_settings_starts_over(score, source, tmp_path, stopped_after, changes, named):
  restore = stopped_after(1)
  with pytest.raises(Stop):
    score(tmp_path / 'out.jsonl')
  restore()
  if named == 'input':
    source.write_text(source.read_text().replace('"id": 0', '"id": 9'))
  log: list[str] = []
  assert score(tmp_path / 'out.jsonl', log, **changes)['resumed_rows'] == 0
  assert f'score: discarding the partial output of a stopped run: changed since: {named}' in log


def test_bad_examples_raise_before_anything_is_scored_or_are_skipped(score, source, tmp_path):
  lines = source.read_text().splitlines()
  source.write_text('\n'.join([*lines[:6], '', '{"prompt": "p"}', *lines[6:]]))
  with pytest.raises(UserError, match=r"examples\.jsonl, example 8: field 'reference' is missing; fix it"):
    score(tmp_path / 'out.jsonl')
  assert not list(tmp_path.glob('out*'))
  log: list[str] = []
  facts = score(tmp_path / 'out.jsonl', log, data=DataConfig(on_bad_example='skip'))
  assert (facts['rows'], facts['skipped']) == (COUNT, 1)
  assert log[0] == f"{source}: skipped 1 bad examples of {COUNT + 1} (example 8: field 'reference' is missing)"
  assert [json.loads(line)['id'] for line in (tmp_path / 'out.jsonl').read_text().splitlines()] == list(range(COUNT))


def test_rewards_that_are_not_finite_name_the_line(score, source, tmp_path, make_params, reward_run, tmp_path_factory):
  lines = [json.loads(line) for line in source.read_text().splitlines()]
  lines[6]['output'] = '~'
  source.write_text('\n' + ''.join(json.dumps(line) + '\n' for line in lines))  # example 6 is on line 8
  params = make_params()
  params['decoder']['embedding'] = params['decoder']['embedding'].at[ord('~')].set(jnp.nan)
  broken = tmp_path_factory.mktemp('broken')
  checkpoint.save_params(broken, params, checkpoint.load_settings(reward_run))
  with pytest.raises(UserError, match=r'examples\.jsonl, example 8: its reward is nan'):
    score(tmp_path / 'out.jsonl', checkpoint=str(broken))


def test_no_reference_is_needed_if_the_template_reads_none(score, source, tmp_path):
  source.write_text('{"prompt": "p", "output": "o"}\n{"prompt": "p", "output": "o", "reference": "unread"}\n')
  score(tmp_path / 'out.jsonl', template=TemplateConfig(use_reference=False))
  first, second = rewards_in(tmp_path / 'out.jsonl')
  assert first == second


@pytest.mark.parametrize(('given', 'expected'), [(None, 5), (7, 7)])
def test_the_reward_token_is_the_checkpoints_unless_the_config_names_one(
  score, source, tmp_path, tmp_path_factory, make_exact, make_params, reward_run, given, expected
):
  folder = tmp_path_factory.mktemp('other_token')
  checkpoint.save_params(folder, make_params(), checkpoint.load_settings(reward_run) | {'template.reward_token_id': 5})
  score(tmp_path / 'out.jsonl', checkpoint=str(folder), template=TemplateConfig(reward_token_id=given))
  scorer = make_exact()
  contents = [json.loads(line) for line in source.read_text().splitlines()]
  sequences = scorer.encode([Group(c['prompt'], c['reference'], [c['output']], c.get('wrapper', 'sft')) for c in contents])
  rewards = scorer.score_sequences([[*sequence[:-1], expected] for sequence in sequences])
  np.testing.assert_array_equal(rewards_in(tmp_path / 'out.jsonl'), rewards)


@pytest.mark.parametrize('name', ['checkpoint', 'input', 'output'])
def test_missing_settings(score, tmp_path, name):
  with pytest.raises(ConfigError, match=rf'^{name} is not set: name .* with --config\.{name}=PATH$'):
    score(tmp_path / 'out.jsonl', **{name: None}) if name != 'output' else score('')


def test_a_language_model_is_refused(score, tmp_path, make_params, reward_run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('lm')
  params = {'decoder': make_params()['decoder'], 'lm_head': jnp.zeros((261, 32))}
  checkpoint.save_params(folder, params, checkpoint.load_settings(reward_run) | {'objective': 'next_token'})
  with pytest.raises(ConfigError, match='is a language model; the score stage needs a reward model'):
    score(tmp_path / 'out.jsonl', checkpoint=str(folder))


def test_a_workdir_that_only_scored_has_a_report(make_config, tmp_path, capsys):
  """Run by the runner on all devices, which may change the last bits."""
  config = make_config(tmp_path / 'out.jsonl', mesh=MeshConfig(data=-1, fsdp=1))
  assert runner.run(config, tmp_path / 'run') == 0
  report = json.loads((tmp_path / 'run' / 'report.json').read_text())
  assert report['score']['rows'] == COUNT
  assert set(report['score']) == {'rows', 'skipped', 'resumed_rows', 'tokens', 'seconds', 'rows_per_second', 'mean', 'std'}
  assert '| score |' in (tmp_path / 'run' / 'report.md').read_text()
  assert json.loads((tmp_path / 'run' / 'config.json').read_text())['stage'] == 'score'
  one = make_config(tmp_path / 'one.jsonl')
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  stage.score(Context(one, tmp_path / 'run', mesh, lambda message: None))
  np.testing.assert_allclose(rewards_in(tmp_path / 'out.jsonl'), rewards_in(tmp_path / 'one.jsonl'), atol=1e-5)
  broken = dataclasses.replace(config, input=str(tmp_path / 'absent.jsonl'))
  assert runner.run(broken, tmp_path / 'run') == 1
  assert capsys.readouterr().err == f'polar_jax: {tmp_path}/absent.jsonl: no such file\n'
