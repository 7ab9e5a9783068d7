"""The whole loop on a tiny world: learning, logs, interrupted runs, failing reward servers and functions, rewards that are not finite."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import fast_compilation
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from polar_jax import api, runner, sharding
from polar_jax.checkpoints import pretrained
from polar_jax.checkpoints.checkpointer import FOLDER
from polar_jax.config import (
  AlarmConfig,
  CheckpointingConfig,
  Config,
  ConfigError,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RewardConfig,
  RftConfig,
  RolloutConfig,
  StudyConfig,
  TemplateConfig,
  TokenizerConfig,
  TrainConfig,
)
from polar_jax.ppo import trainer as loop
from polar_jax.ppo.advantages import next_kl_coef
from polar_jax.ppo.rewards.http import RewardServerError
from polar_jax.ppo.rewards.python import RewardFunctionError
from polar_jax.ppo.rewards.sources import RewardError, RewardSum
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.runtime.preemption import Preempted
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import rft as stage
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain import pretrain
from polar_jax.stages.pretrain_lm import pretrain_lm
from polar_jax.train.metrics import StepProgress, read_metrics

STEPS = 6
TIMED = ('seconds_rollout', 'seconds_reward', 'seconds_logprobs', 'seconds_update', 'step_seconds', 'tokens_per_second', 'goodput')
MODEL = ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.2, v_head_init='normal')
FAST = OptimizerConfig(learning_rate=2e-2, warmup_ratio=0.0, final_lr_ratio=1.0)


def make_config(folder: pathlib.Path, **changes) -> Config:
  rft = RftConfig(
    steps=STEPS,
    prompts_per_step=4,
    num_generations=2,
    mini_batch_size=4,
    update_epochs=2,
    micro_batch_rows=2,
    kl_in='reward',
    kl_target=0.01,
    actor=FAST,
    critic=FAST,
    evaluate_every=3,
    evaluate_prompts=3,
    rollout=RolloutConfig(max_prompt=12, max_new=5, max_concurrent=8),
    reward=RewardConfig(checkpoint='pretrain', rule='last_number', normalize='running', clip=5.0, rows_per_batch=2),
  )
  return Config(
    stage='rft',
    tokenizer=TokenizerConfig(kind='byte'),
    model=MODEL,
    template=TemplateConfig(max_length=64),
    data=DataConfig(
      triplets=str(folder / 'examples.jsonl'),
      validation=str(folder / 'examples.jsonl'),
      text=str(folder / 'text.txt'),
      prompts=str(folder / 'prompts'),
    ),
    pretrain_lm=TrainConfig(steps=2, batch_size=4, start_from='scratch', sequence_length=16),
    pretrain=TrainConfig(steps=2, batch_size=4, start_from='scratch', evaluate_examples=4),
    rft=dataclasses.replace(rft, **changes),
    checkpointing=CheckpointingConfig(every_steps=1, keep=2),
  )


@pytest.fixture(scope='module')
def world(tmp_path_factory) -> pathlib.Path:
  """A folder with prompts, and a workdir `base` with a policy and a reward model."""
  folder, rng = tmp_path_factory.mktemp('rft'), np.random.default_rng(0)
  word = lambda: bytes(rng.integers(97, 123, int(rng.integers(2, 9))).tolist()).decode()
  examples = [{name: word() for name in ('prompt', 'reference', 'chosen', 'rejected')} for _ in range(20)]
  (folder / 'examples.jsonl').write_text('\n'.join(map(json.dumps, examples)))
  (folder / 'text.txt').write_text('hello world, this is a text. ' * 100)
  (folder / 'prompts').mkdir()
  prompts = [{'prompt': word(), 'reference': f'{word()} {i}'} for i in range(9)]
  for split in ('train', 'test'):
    (folder / 'prompts' / f'{split}.jsonl').write_text('\n'.join(map(json.dumps, prompts)))
  made = context(folder, 'base')
  pretrain_lm(made)
  pretrain(made)
  return folder


def context(folder: pathlib.Path, workdir: str, log=None, devices: int = 1, **changes) -> Context:
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
  config = make_config(folder, **changes)
  made = Context(config, folder / workdir, mesh, (lambda _: None) if log is None else log.append)
  for name in ('pretrain_lm', 'pretrain'):
    if workdir != 'base' and not (made.workdir / name).exists():
      made.workdir.mkdir(exist_ok=True)
      (made.workdir / name).symlink_to(folder / 'base' / name)
  return made


def tune(made: Context, reward: RewardSum | None = None, held_out=None):
  """Run the stage's own call of the API with another reward."""
  prompts, arguments = stage.read_prompts(made, 'train'), made.run_arguments('rft')
  reward = stage.open_reward(made, made.config.rft, prompts) if reward is None else reward
  policy = made.checkpoint('pretrain_lm')
  return api.train_policy(policy, prompts, reward, args=made.config.rft, held_out=held_out, model=made.config.model, **arguments)


@pytest.fixture(scope='module')
def finished(world):
  """A complete run: (its context, its summary)."""
  made = context(world, 'finished')
  return made, stage.rft(made)['rft']['runs']['rft']


def records_of(folder: pathlib.Path) -> list[dict]:
  return [{k: v for k, v in record.items() if k not in TIMED} for record in read_metrics(folder)]


def final_state(folder: pathlib.Path):
  newest = max((folder / FOLDER).glob('[0-9]*'), key=lambda p: int(p.name))
  with ocp.PyTreeCheckpointer() as checkpointer:
    item = checkpointer.metadata(newest / 'state').item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    return checkpointer.restore(newest / 'state', args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def assert_same(one: pathlib.Path, other: pathlib.Path) -> None:
  a, b = final_state(one), final_state(other)
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    assert x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
  assert records_of(one) == records_of(other)
  assert (one / loop.SAMPLES).read_text() == (other / loop.SAMPLES).read_text()


def test_a_run_logs_every_step_and_evaluates_held_out_prompts(finished):
  made, summary = finished
  records = records_of(made.workdir / 'rft')
  assert [r['step'] for r in records if 'reward' in r] == list(range(1, STEPS + 1))
  assert [r['step'] for r in records if 'evaluation_raw' in r] == [0, 3, 6]
  wanted = {
    'raw',
    'rule',
    'shuffled_gap',
    'kl',
    'entropy',
    'clip_fraction',
    'explained_variance',
    'truncated',
    'length_free',
    'rollout_mismatch',
  }
  assert wanted <= set(records[1]) and all(np.isfinite(v) for r in records for v in r.values() if isinstance(v, float))
  assert records[1]['kl'] == 0 and records[-2]['kl'] > 0  # the policy starts as the reference policy, and moves
  assert records[1]['rollout_mismatch'] < 1e-5
  coef = make_config(made.workdir).rft.kl_coef
  for record in (r for r in records if 'reward' in r):  # steered from step to step
    assert record['kl_coef'] == coef
    coef = next_kl_coef(coef, record['kl'], target=0.01, horizon=10_000, responses=8)
  assert coef != make_config(made.workdir).rft.kl_coef
  shuffled = [r for r in records if 'shuffled' in r]
  assert [r['shuffled_rise'] for r in shuffled] == [r['shuffled'] - shuffled[0]['shuffled'] for r in shuffled] and len(shuffled) > 2
  assert summary['steps'] == STEPS and summary['responses'] == 8 * STEPS and {'evaluation_before', 'evaluation_after'} <= set(summary)
  samples = [json.loads(line) for line in (made.workdir / 'rft' / loop.SAMPLES).read_text().splitlines()]
  assert {s['step'] for s in samples} == set(range(1, STEPS + 1))
  state = final_state(made.workdir / 'rft')
  assert state['critic']['params']['v_head'].any() and state['step'] == state['critic']['step'] == STEPS * 4


def test_a_tuned_policy_opens_like_any_other_model(finished):
  made, _ = finished
  opened = pretrained.open_pretrained(made.workdir / 'rft')
  assert opened.head == 'lm' and opened.tokenizer().vocab_size == 261
  params = opened.params(made.mesh, 'float32', head='lm')
  start = pretrained.open_pretrained(made.workdir / 'pretrain_lm').params(made.mesh, 'float32')
  assert jax.tree.structure(params) == jax.tree.structure(start)
  assert not np.array_equal(params['lm_head'], start['lm_head'])


def test_a_finished_run_is_not_repeated_and_refuses_other_settings(finished):
  made, summary = finished
  before = (made.workdir / 'rft' / 'metrics.jsonl').read_bytes()
  assert stage.rft(made)['rft']['runs']['rft'] == summary
  assert (made.workdir / 'rft' / 'metrics.jsonl').read_bytes() == before
  other = dataclasses.replace(made, config=make_config(made.workdir.parent, clip=0.3))
  with pytest.raises(ValueError, match=r'rft\.clip was 0\.2, is 0\.3'):
    stage.rft(other)


class Interrupted(Exception):
  pass


@pytest.mark.long
def test_a_run_stopped_within_a_step_resumes_bit_for_bit(world, finished, monkeypatch):
  """In one process, at points where a step is half done; for real kills see test_killed_by_a_signal."""
  for number, where in enumerate(('_score', '_one_update')):
    calls = []
    original = getattr(loop.Trainer, where)

    def fail(self, *args, original=original, calls=calls):
      calls.append(1)
      if len(calls) == 3:
        raise Interrupted
      return original(self, *args)

    made = context(world, f'half{number}')
    with monkeypatch.context() as patch:
      patch.setattr(loop.Trainer, where, fail)
      with pytest.raises(Interrupted):
        stage.rft(made)
    stage.rft(made)
    assert_same(made.workdir / 'rft', finished[0].workdir / 'rft')


@pytest.mark.slow  # the same within one process: see the tests before and after; of training: tests/resume_test.py
def test_killed_by_a_signal(world, finished):
  made = context(world, 'killed')
  config = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import dataclasses, pathlib, ml_collections
from polar_jax.config import default_config
from trainer_test import make_config

def fill(into, values):
  for name, value in values.items():
    if isinstance(value, dict):
      fill(into[name], value)
    else:
      into[name] = value

def get_config():
  config = default_config()
  fill(config, dataclasses.asdict(make_config(pathlib.Path({str(world)!r}))))
  return config
"""
  (world / 'rft.py').write_text(config)
  environment = fast_compilation.environment()

  def start(workdir: str) -> subprocess.Popen:
    line = [sys.executable, '-m', 'polar_jax.main', f'--config={world / "rft.py"}', f'--workdir={workdir}']
    return subprocess.Popen(line, cwd=world, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def newest(workdir: str) -> int:
    return max((int(p.name) for p in (world / workdir / 'rft' / FOLDER).glob('*') if p.name.isdigit()), default=0)

  def until(process: subprocess.Popen, step: int) -> None:
    deadline = time.monotonic() + 300
    while newest('killed') < step:
      assert process.poll() is None, process.stdout.read()
      assert time.monotonic() < deadline
      time.sleep(0.001)

  context(world, 'whole')
  whole = start('whole')
  output, _ = whole.communicate(timeout=300)
  assert whole.returncode == 0, output
  process = start('killed')
  until(process, 2)
  process.kill()
  process.communicate()
  assert newest('killed') < STEPS
  process = start('killed')
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and 'rft: resumed from step' in output, output
  assert_same(made.workdir / 'rft', world / 'whole' / 'rft')


@pytest.mark.long
def test_sigterm_saves_in_the_middle_of_a_run(world, finished, monkeypatch):
  made, update = context(world, 'terminated'), StepProgress.update

  def send(self, record):
    if record['step'] == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    update(self, record)

  with monkeypatch.context() as patch:
    patch.setattr(StepProgress, 'update', send)
    with pytest.raises(Preempted, match='stopped by SIGTERM, saved at step 3'):
      stage.rft(made)
  stage.rft(made)
  assert_same(made.workdir / 'rft', finished[0].workdir / 'rft')


@pytest.mark.long
@pytest.mark.parametrize(('owner', 'method', 'call', 'step'), [(RolloutEngine, 'generate', 3, 1), (Scorer, 'score', 4, 1)])
def test_sigterm_while_sampling_or_scoring_is_answered_before_the_step_ends(world, finished, monkeypatch, owner, method, call, step):
  made, original, calls, updates = context(world, f'stopped_{method}'), getattr(owner, method), [], []

  def send(self, *args, **kwargs):
    calls.append(len(updates))
    if len(calls) == call:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(owner, method, send)
    patch.setattr(loop.Trainer, '_check_alarms', lambda self: bool(updates.append(self.step)))
    with pytest.raises(Preempted, match=rf'stopped by SIGTERM, saved at step {step}\.'):
      stage.rft(made)
  assert len(updates) == step
  stage.rft(made)
  assert_same(made.workdir / 'rft', finished[0].workdir / 'rft')


@pytest.mark.slow  # what a step computes on several devices: tests/ppo/learner_test.py
def test_sharded_runs_learn_the_same(world, finished, monkeypatch):
  made, one_step = context(world, 'sharded', devices=4), loop.Trainer.one_step

  def first_step(self):
    if self.step == 1:
      raise Interrupted
    return one_step(self)

  monkeypatch.setattr(loop.Trainer, 'one_step', first_step)
  with pytest.raises(Interrupted):
    stage.rft(made)
  many, alone = records_of(made.workdir / 'rft')[1], records_of(finished[0].workdir / 'rft')[1]
  for name in ('reward', 'kl_answer', 'policy_loss', 'value_loss', 'entropy', 'grad_norm', 'critic_grad_norm'):
    np.testing.assert_allclose(many[name], alone[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.long
def test_a_reward_server_that_fails_costs_one_step(world, finished, monkeypatch):
  made, calls = context(world, 'server'), []
  original = RewardSum.components

  def fail(self, *args):
    calls.append(1)
    if len(calls) == 10:
      raise RewardServerError('the reward server at 127.0.0.1:1 is down')
    return original(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(RewardSum, 'components', fail)
    with pytest.raises(RewardServerError):
      stage.rft(made)
  stage.rft(made)
  assert_same(made.workdir / 'rft', finished[0].workdir / 'rft')


def test_rewards_that_are_not_finite_stop_the_run(world):
  made = context(world, 'nan')

  class Broken:
    def score(self, prompts, responses):
      return np.full(len(responses), np.nan, np.float32)

  with pytest.raises(RewardError, match='prompt 0'):
    tune(made, RewardSum({'model': (1.0, Broken())}, False))


class Vowels:
  """The share of the letter a: a reward that a policy can learn in a few steps."""

  def score(self, prompts, responses):
    return np.array([text.count('a') / 5 for text in responses], np.float32)


@pytest.mark.slow  # learning is also tested through the API, and a step against the oracle
@pytest.mark.parametrize('advantage', ['gae', 'rloo'])
def test_the_reward_rises(world, advantage):
  made = context(
    world,
    f'vowels_{advantage}',
    steps=25,
    prompts_per_step=8,
    num_generations=4,
    mini_batch_size=None,
    update_epochs=1,
    kl_in='none',
    advantage=advantage,
    micro_batch_rows=4,
    evaluate_every=None,
    shuffled_every=5,
  )
  result = tune(made, RewardSum({'model': (1.0, Vowels())}, False))
  rewards = [record['raw'] for record in result.metrics if 'raw' in record]
  assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.15, rewards


@pytest.mark.long
def test_references_are_imitated(world):
  made = context(
    world, 'sft', method='sft', steps=20, mini_batch_size=None, update_epochs=1, num_generations=1, kl_in='none', kl_target=None
  )
  records = [record for record in tune(made).metrics if 'approx_kl' in record]
  assert records[-1]['kl'] > records[0]['kl'] == 0  # moved away from the reference policy
  assert records[-1]['nll'] < records[0]['nll'] - 0.1  # towards the references
  assert not any('reward' in record for record in records)  # nothing was scored


REWARD_MODULE = """
calls = 0

def count(prompts, completions, reference, **columns):
  global calls
  calls += 1
  assert len(prompts) == len(completions) == len(reference) == len(columns['metadata'])
  return [text.count('a') / 5 + len(r) / 100 for text, r in zip(completions, reference)]

def other(completions):
  return [0.0] * len(completions)

def fails(**columns):
  rewards = count(**columns)
  return rewards if calls != 8 else rewards[:3]
"""


@pytest.fixture
def reward_module(world, monkeypatch):
  """The module `rewards_of_test` in the current directory."""
  (world / 'rewards_of_test.py').write_text(REWARD_MODULE)
  monkeypatch.chdir(world)
  monkeypatch.delitem(sys.modules, 'rewards_of_test', raising=False)


def python_reward(name: str) -> RewardConfig:
  return RewardConfig(source='python', function=name, model_weight=2.0, rule='last_number', rule_weight=0.5)


@pytest.mark.long
def test_a_python_function_is_the_reward(world, reward_module):
  made = context(world, 'python', reward=python_reward('rewards_of_test:count'))
  summary = stage.rft(made)['rft']['runs']['rft']
  records = [record for record in records_of(made.workdir / 'rft') if 'reward' in record]
  assert len(records) == summary['steps'] == STEPS
  for record in records:
    assert record['raw'] == pytest.approx(2 * record['python'] + 0.5 * record['rule'], abs=1e-6) and 'model' not in record
  assert all(record['python'] > 0 for record in records) and 'python' in summary['evaluation_after']
  other = dataclasses.replace(made, config=make_config(world, reward=python_reward('rewards_of_test:other')))
  with pytest.raises(
    ConfigError, match=r"rft\.reward\.function was 'rewards_of_test:count', is 'rewards_of_test:other'.*another --workdir"
  ):
    stage.rft(other)


@pytest.mark.long
def test_a_function_that_fails_costs_one_step(world, reward_module):
  """The last complete step is saved, and the repeated command ends where an undisturbed run ends."""
  made = context(world, 'python_fails', reward=python_reward('rewards_of_test:fails'), evaluate_every=None)
  made = dataclasses.replace(made, config=dataclasses.replace(made.config, checkpointing=CheckpointingConfig(every_steps=100)))
  with pytest.raises(RewardFunctionError, match=r'rewards_of_test:fails returned 3 rewards for 8 completions \(completion 3 has none\)'):
    stage.rft(made)
  saved = [int(path.name) for path in (made.workdir / 'rft' / FOLDER).glob('[0-9]*')]
  assert saved == [3]  # scored before: an evaluation, and two scorings in each of three steps
  log: list[str] = []
  stage.rft(dataclasses.replace(made, log=log.append))
  assert any('resumed from step 3' in line for line in log)
  whole = context(world, 'python_whole', reward=python_reward('rewards_of_test:fails'), evaluate_every=None)
  stage.rft(whole)
  assert_same(made.workdir / 'rft', whole.workdir / 'rft')


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    ('rewards_of_test:missing', "has no 'missing'; name a function that it defines"),
    ('nowhere:f', "there is no module 'nowhere' in .*PYTHONPATH"),
    ('rewards_of_test:calls', 'it is an int, not a function'),
    (None, "names no function; set it to 'module:name'"),
  ],
)
def test_a_function_that_cannot_be_used_stops_the_run_before_any_stage(world, reward_module, capsys, function, message):
  config = dataclasses.replace(make_config(world, reward=python_reward(function)), stage='pretrain_lm,rft')
  workdir = world / 'python_refused'
  assert runner.run(config, workdir) == 1
  assert re.search(f'polar_jax: .*rft.reward.function.*{message}', capsys.readouterr().err) and not workdir.exists()
  made = context(world, 'python_refused_alone', reward=python_reward(function))
  with pytest.raises(ConfigError, match=message):
    stage.rft(made)
  assert not (made.workdir / 'rft').exists()


@pytest.mark.long
def test_alarms_stop_a_run(world):
  log: list[str] = []
  alarms = AlarmConfig(action='stop', window=1, max_truncated=0.01)
  made = context(world, 'alarm', log, alarms=alarms)
  summary = stage.rft(made)['rft']['runs']['rft']
  assert summary['steps'] < STEPS and summary['alarms'] and any('step 1:' in line for line in log)


@pytest.mark.long
def test_arms_and_seeds_are_tuned_one_after_the_other(world):
  made = context(world, 'arms', steps=2)
  made = dataclasses.replace(made, config=dataclasses.replace(made.config, ablations=True, study=StudyConfig(seeds=2)))
  runs = stage.rft(made)['rft']['runs']
  assert list(runs) == ['supervised', 'model', 'rule', 'supervised_seed_1', 'model_seed_1', 'rule_seed_1']
  assert all('rule' in run['evaluation_after'] and 'model' in run['evaluation_after'] for name, run in runs.items() if 'rule' not in name)
  assert runs['supervised']['nll'] > 0 and runs['supervised']['responses'] == 8 and runs['model']['responses'] == 16
  first = [next(r for r in records_of(made.workdir / 'rft' / name) if 'nll' in r)['nll'] for name in ('supervised', 'supervised_seed_1')]
  assert first[0] != first[1]  # of the first prompts, whose order is that of the seed
