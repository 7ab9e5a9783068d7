"""What a command of several stages checks before its first one."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import types

import jax
import pytest

from polar_jax import runner, sharding
from polar_jax.checkpoints import space
from polar_jax.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, RewardConfig, RftConfig, TokenizerConfig, TrainConfig
from polar_jax.data.examples import NoSplitError
from polar_jax.report.report import JSON_NAME, ReportError
from polar_jax.stages import checks
from polar_jax.stages.context import Context
from polar_jax.train.metrics import FILE
from polar_jax.types import UserError

GOOD = {'prompt': 'p', 'reference': 'r 1', 'chosen': 'c', 'rejected': 'd'}
LONG = {**GOOD, 'chosen': 'c' * 200}


def write(folder: pathlib.Path, **splits: list[dict]) -> str:
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in splits.items():
    (folder / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  return str(folder)


@pytest.fixture
def make(tmp_path):
  """Return a function that makes a context, with changes to the options of Config by name."""

  def context(**changes) -> Context:
    good = write(tmp_path / 'good', train=[GOOD] * 4, validation=[GOOD])
    config = Config(
      tokenizer=TokenizerConfig(kind='byte'),
      data=DataConfig(triplets=good, preferences=good, prompts=good),
      model=ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8),
      pretrain=TrainConfig(steps=1, batch_size=2, start_from='scratch'),
      finetune=TrainConfig(steps=1, batch_size=2, start_from='pretrain'),
      ablations=False,
    )
    config = dataclasses.replace(config, **changes)
    return Context(config, tmp_path / 'run', sharding.make_mesh(MeshConfig(), jax.devices()[:1]), lambda _: None)

  return context


STAGES = ('pretrain', 'finetune', 'evaluate', 'rft')


def test_what_earlier_stages_will_write_is_not_missed(make):
  checks.check(make(rft=RftConfig(policy=str(pathlib.Path.cwd()), reward=RewardConfig(checkpoint='finetune'))), STAGES)
  unset = make(data=DataConfig(), tokenizer=TokenizerConfig(kind='trained'))
  checks.check(unset, ('synthesize', 'pretrain_lm', *STAGES))
  inside = str(unset.workdir / 'data' / 'triplets')
  checks.check(make(data=DataConfig(triplets=inside, preferences=inside, row_length=8)), ('synthesize', 'pretrain', 'finetune', 'evaluate'))


def test_examples_of_later_stages_are_read(make, tmp_path):
  long = write(tmp_path / 'long', train=[GOOD, LONG], validation=[GOOD])
  later = write(tmp_path / 'later', train=[GOOD], validation=[LONG])
  for preferences, split in ((long, 'training'), (later, 'validation')):
    data = dataclasses.replace(make().config.data, preferences=preferences, row_length=128)
    with pytest.raises(UserError, match=f'1 of . {split} examples have more tokens than data.row_length=128'):
      checks.check(make(data=data), ('pretrain', 'finetune'))
    checks.check(make(data=dataclasses.replace(data, row_length=None)), ('pretrain', 'finetune'))
  bad = write(tmp_path / 'bad', train=[GOOD], validation=[GOOD], test=[{**GOOD, 'category': '\ud83e'}])
  data = dataclasses.replace(make().config.data, preferences=bad)
  with pytest.raises(UserError, match=r'test\.jsonl, example 1: category contains half of a surrogate pair'):
    checks.check(make(data=data), ('pretrain', 'finetune', 'evaluate'))
  write(tmp_path / 'bad', test=[GOOD])
  checks.check(make(data=data), ('pretrain', 'finetune', 'evaluate'))
  with pytest.raises(NoSplitError, match='validation'):
    checks.check(make(data=dataclasses.replace(data, preferences=write(tmp_path / 'none', train=[GOOD]))), ('pretrain', 'finetune'))


def test_checkpoints_to_start_from(make, tmp_path):
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*pretrain: run the stage that writes it first'):
    checks.check(make(), ('pretrain_lm', 'finetune'))
  checks.check(make(), ('pretrain', 'finetune'))
  missing = TrainConfig(steps=1, start_from=str(tmp_path / 'nowhere'))
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*nowhere'):
    checks.check(make(finetune=missing), ('pretrain', 'finetune'))
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*pretrain_lm'):
    checks.check(make(ablations=True, pretrain=TrainConfig(steps=1)), ('pretrain', 'finetune'))
  checks.check(make(ablations=True), ('pretrain', 'finetune'))  # without pre-training, they start from what it starts from: scratch
  scratch = TrainConfig(steps=1, start_from='scratch')
  with pytest.raises(ConfigError, match=r'ablations: no checkpoint .*pretrain_lm: .*, or set ablations to False'):
    checks.check(make(ablations=True, finetune=scratch, pretrain=TrainConfig(steps=1)), ('finetune',))
  checks.check(make(ablations=False, finetune=scratch), ('finetune',))  # a remedy of the message
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*elsewhere'):
    checks.check(make(rft=RftConfig(policy='pretrain_lm', reward=RewardConfig(checkpoint='elsewhere'))), ('pretrain_lm', 'rft'))


@pytest.mark.parametrize('missing', ['policy', 'reward'])
def test_checkpoints_that_the_study_of_the_miniature_starts_from(make, missing):
  chosen = {'policy': 'pretrain_lm', 'reward': RewardConfig(checkpoint='pretrain')}
  changes = {'policy': 'elsewhere', 'reward': RewardConfig(checkpoint='elsewhere')}
  stages = ('synthesize', 'pretrain_lm', 'pretrain', 'rft')
  of = lambda options: make(data=DataConfig(), tokenizer=TokenizerConfig(kind='trained'), rft=RftConfig(**options))
  checks.check(of(chosen), stages)
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*elsewhere'):
    checks.check(of(chosen | {missing: changes[missing]}), stages)


def test_prompts_that_a_rule_cannot_judge(make, tmp_path):
  rft = RftConfig(policy='pretrain_lm', reward=RewardConfig(checkpoint='pretrain', rule='last_number'))
  prompts = write(tmp_path / 'prompts', train=[GOOD], validation=[GOOD, {**GOOD, 'reference': 'none'}])
  data = dataclasses.replace(make().config.data, prompts=prompts)
  with pytest.raises(UserError, match=r"held-out prompt 1 'p': .* no number .*\(1 of 2 such prompts\)"):
    checks.check(make(rft=rft, data=data), ('pretrain_lm', 'pretrain', 'rft'))
  write(tmp_path / 'prompts', validation=[GOOD, {**GOOD, 'reference': 'none', 'answer': '3'}])  # a remedy of the message
  checks.check(make(rft=rft, data=data), ('pretrain_lm', 'pretrain', 'rft'))


def test_disk_space_of_all_stages_together(make, monkeypatch):
  sizes = {'free': 0}
  monkeypatch.setattr(space.shutil, 'disk_usage', lambda _: types.SimpleNamespace(**sizes))
  with pytest.raises(ConfigError, match=r'pretrain, finetune: checkpoints will take up to \S+ KiB .*has 0 bytes free') as error:
    checks.check(make(), ('pretrain', 'finetune'))
  assert len(str(error.value)) <= 500
  sizes['free'] = 1 << 20
  checks.check(make(), ('pretrain', 'finetune'))


@pytest.mark.parametrize(
  ('name', 'content'), [(JSON_NAME, '{"pretrain": 3}'), (JSON_NAME, '{'), (f'other/{FILE}', '{"step": 1}\nnonsense\n{"step": 2}\n')]
)
def test_what_the_report_cannot_read_stops_the_command_at_once(make, capsys, name, content):
  made = make()
  (made.workdir / name).parent.mkdir(parents=True)
  (made.workdir / name).write_text(content)
  config = dataclasses.replace(made.config, stage='pretrain')
  assert runner.run(config, made.workdir) == 1
  printed = capsys.readouterr()
  assert name in printed.err and '== pretrain' not in printed.out
  assert issubclass(ReportError, UserError) and not (made.workdir / 'pretrain').exists()
