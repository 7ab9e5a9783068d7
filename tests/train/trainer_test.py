from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax import api, api_training, sharding
from polar_jax.checkpoints.checkpointer import FOLDER, load_params
from polar_jax.config import CheckpointingConfig, ConfigError, ModelConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages.finetune import finetune
from polar_jax.stages.pretrain import pretrain
from polar_jax.stages.pretrain_lm import pretrain_lm
from polar_jax.train import trainer as loop
from polar_jax.train.metrics import Progress, read_metrics
from polar_jax.train.objectives import NEXT_TOKEN, RANKING

STEPS, BATCH = 12, 8  # of the contexts that make_context makes
TIMED = ('step_seconds', 'tokens_per_second', 'mfu', 'goodput')


@pytest.fixture(scope='module')
def finished(tmp_path_factory, make_context):
  """An uninterrupted run, its log and what it printed. Not to be changed: `resumable` is a copy."""
  workdir, log, out = tmp_path_factory.mktemp('finished'), [], io.StringIO()
  context = make_context(workdir, log)
  with contextlib.redirect_stdout(out):
    summary = pretrain(context)['pretrain']
  folder = workdir / 'pretrain'
  return types.SimpleNamespace(workdir=workdir, context=context, summary=summary, log=log, printed=out.getvalue(), folder=folder)


@pytest.fixture
def resumable(finished, tmp_path):
  shutil.copytree(finished.workdir, tmp_path / 'copy')
  return tmp_path / 'copy'


def checkpoints(folder):
  return sorted(int(path.name) for path in (folder / FOLDER).iterdir())


def parameters(folder, like):
  """What `folder` last saved, as numpy, laid out as the model of the context `like`."""
  model = like.model_config()
  functions = loop.step_lib.build(RANKING, model, loop.make_optimizer(like.config.pretrain, STEPS), like.mesh)
  return jax.device_get(load_params(folder, functions.abstract.params))


def assert_same_tree(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def forbid_training(monkeypatch):
  def fail(*_):
    raise AssertionError('a batch was sent to the device')

  monkeypatch.setattr(loop.sharding, 'put_local', fail)


def test_every_step_is_logged_once_with_every_field(finished):
  rows = [row for row in read_metrics(finished.folder) if 'loss' in row]
  assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
  fields = {'stage', 'step', 'loss', 'accuracy', 'margin', 'grad_norm', 'learning_rate', 'epoch', 'tokens', 'step_seconds'}
  for row in rows:
    assert fields | {'tokens_per_second', 'mfu', 'reward_histogram', 'chosen_reward', 'rejected_reward'} <= row.keys()
    assert row['stage'] == 'pretrain' and row['epoch'] == row['step'] * BATCH / 40
    assert sum(row['reward_histogram']['chosen']) == sum(row['reward_histogram']['rejected']) == BATCH
    assert row['margin'] == pytest.approx(row['chosen_reward'] - row['rejected_reward'], abs=1e-6)
    assert row['grad_norm'] > 0 and row['tokens_per_second'] > 0 and row['mfu'] > 0


def test_padding_is_what_the_tokens_leave_of_the_slots(finished):
  context = finished.context
  tokens = pipeline.TripletSegments(context.triplets('train'), context.template())
  plan = pipeline.BatchPlan(BATCH)
  pack = pipeline.plan_packing(tokens, plan, None, steps=STEPS, seed=context.config.seed)
  batches = pipeline.pair_batches(tokens, plan, pack, steps=STEPS, seed=context.config.seed)
  assert pack.max_pairs > 1
  expected = [1 - np.mean(batches[s].end_BT > batches[s].start_BT) for s in range(STEPS)]
  rows = [row for row in read_metrics(finished.folder) if 'loss' in row]
  assert [row['pad_fraction'] for row in rows] == pytest.approx(expected)
  assert finished.summary['pad_fraction'] == pytest.approx(np.mean(expected))


def test_steps_that_exceed_the_plan_are_trained_whole_and_said_once(tmp_path, finished, make_context, monkeypatch):
  plan_packing = pipeline.plan_packing

  def too_few(*args, **kwargs):
    pack = plan_packing(*args, **kwargs)
    needed.append(pack.rows)
    return pack._replace(rows=1)

  needed, log = [], []
  monkeypatch.setattr(pipeline, 'plan_packing', too_few)
  pretrain(make_context(tmp_path, log))
  assert needed[0] > 1 and log[0] == f'pretrain: step 1 needs {needed[0]} rows, planned 1: one more compilation'
  sizes = [re.search(r'step \d+ needs (\d+) rows, planned 1: one more compilation$', line)[1] for line in log]
  assert len(sizes) == len(set(sizes)) < STEPS
  rows, expected = (
    [{k: r[k] for k in ('loss', 'tokens', 'validation_loss') if k in r} for r in read_metrics(f)]
    for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert len(rows) == len(expected)
  for row, other in zip(rows, expected, strict=True):
    assert row == pytest.approx(other, rel=1e-4)


def test_tokens_are_those_of_the_rows_that_were_read(finished):
  context = finished.context
  tokens = pipeline.TripletSegments(context.triplets('train'), context.template())
  order = pipeline.global_order(len(tokens), context.config.seed)
  lengths = [len(tokens[order(position)[0]].tokens) for position in range(STEPS * BATCH)]
  rows = [row for row in read_metrics(finished.folder) if 'loss' in row]
  assert [row['tokens'] for row in rows] == np.cumsum(lengths)[BATCH - 1 :: BATCH].tolist()
  assert finished.summary['tokens'] == sum(lengths) and finished.summary['rows'] == STEPS * BATCH


def test_learning_rate_is_that_of_the_step(finished):
  def expected(update):  # of the update after `update` others: three warm-up steps of twelve, then a cosine to a tenth
    if update < 3:
      return 3e-3 * update / 3
    return 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (update - 3) / 9)) / 2)

  rows = [row for row in read_metrics(finished.folder) if 'loss' in row]
  assert [row['learning_rate'] for row in rows] == pytest.approx([expected(u) for u in range(STEPS)], rel=1e-5)


def test_learns_what_can_be_learned(finished):
  rows = [row for row in read_metrics(finished.folder) if 'loss' in row]
  assert rows[0]['loss'] == pytest.approx(math.log(2), abs=1e-6) and rows[0]['accuracy'] == 0.5  # the head starts at zero
  assert rows[-1]['loss'] < 0.5 and rows[-1]['accuracy'] == 1
  assert finished.summary['loss'] == rows[-1]['loss']  # the last twentieth of twelve steps is one


def test_validates_when_asked_and_at_the_end(finished):
  rows = [row for row in read_metrics(finished.folder) if 'validation_loss' in row]
  assert [row['step'] for row in rows] == [4, 8, 12]
  context = finished.context
  model = api.load(finished.folder, mesh=context.mesh)
  scorer = Scorer(model.params, model.config, model.template, context.mesh)
  scores = scorer.score_pairs(context.triplets('validation'))
  margin = (scores[:, 0] - scores[:, 1]).astype(np.float64)
  assert finished.summary['validation_loss'] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
  assert finished.summary['validation_accuracy'] == (margin > 0).mean()
  assert finished.summary['validation_margin'] == pytest.approx(margin.mean(), rel=1e-5)
  assert {k: v for k, v in rows[-1].items() if 'validation' in k} == {k: v for k, v in finished.summary.items() if 'validation' in k}


def test_tensorboard_and_plain_lines(finished):
  (event,) = (finished.folder / 'tensorboard').glob('events.out.tfevents.*')
  content = event.read_bytes()
  assert all(name in content for name in (b'loss', b'mfu', b'validation_accuracy', b'rewards/chosen'))
  lines = finished.printed.splitlines()
  assert [line.split()[2] for line in lines] == ['4/12', '5/12', '8/12', '10/12', '12/12', '12/12']  # log_every 5, validation at 4
  assert lines[1].startswith('pretrain  step 5/12  loss 0.') and lines[1].endswith('tokens/s')
  assert 'validation_accuracy' in lines[0] and '\r' not in finished.printed


def test_bar_in_a_terminal(monkeypatch, tmp_path, make_context, capsys):
  terminal = io.StringIO()
  terminal.isatty = lambda: True
  monkeypatch.setattr('sys.stderr', terminal)
  pretrain(make_context(tmp_path, steps=2, evaluate_every=None))
  assert '2/2' in terminal.getvalue() and 'validation_loss=' in terminal.getvalue()
  assert 'step ' not in capsys.readouterr().out


def test_finished_run_trains_nothing_and_returns_the_same(resumable, finished, make_context, monkeypatch):
  before, log = (resumable / 'pretrain/metrics.jsonl').read_bytes(), []
  forbid_training(monkeypatch)
  assert pretrain(make_context(resumable, log))['pretrain'] == finished.summary
  assert log == ['pretrain: resumed from step 12 of 12']
  assert (resumable / 'pretrain/metrics.jsonl').read_bytes() == before
  assert checkpoints(resumable / 'pretrain') == checkpoints(finished.folder)


def test_summary_lost_in_a_kill_is_written_again(resumable, finished, make_context, monkeypatch):
  (resumable / 'pretrain/summary.json').unlink()
  forbid_training(monkeypatch)
  again = pretrain(make_context(resumable))['pretrain']
  timed = ('seconds', 'seconds_by_part', 'goodput')
  assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in finished.summary.items() if k not in timed}
  assert json.loads((resumable / 'pretrain/summary.json').read_text()) == again


def test_changed_settings_are_refused_by_name(resumable, make_context, monkeypatch):
  with pytest.raises(ConfigError, match=r'learning_rate was 0.003, is 0.01.*another --workdir') as error:
    pretrain(make_context(resumable, learning_rate=0.01))
  assert '\n' not in str(error.value)
  with pytest.raises(ConfigError, match=r'model.d_model was 16, is 32'):
    pretrain(make_context(resumable, model=ModelConfig(num_layers=2, d_model=32, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)))
  with pytest.raises(ConfigError, match=r'seed was 0, is 1'):
    pretrain(make_context(resumable, seed=1))
  forbid_training(monkeypatch)  # what only watches the run may change
  pretrain(make_context(resumable, log_every=1, checkpointing=CheckpointingConfig(every_steps=7)))
  packing = dataclasses.replace(make_context(resumable).config.data, row_length=256)
  pretrain(make_context(resumable, data=packing))


def at_rest(make_context, *args, **changes):
  """A context whose run takes one step with a learning rate of zero: it saves the parameters that it started from."""
  return make_context(*args, steps=1, warmup_ratio=1.0, evaluate_every=None, **changes)


def test_starts_from_the_decoder_of_a_language_model(tmp_path, make_context):
  context = make_context(tmp_path, steps=2, evaluate_every=None)
  summary = pretrain_lm(context)['pretrain_lm']
  rows = [row for row in read_metrics(tmp_path / 'pretrain_lm') if 'loss' in row]
  assert [row['step'] for row in rows] == [1, 2] and 'reward_histogram' not in rows[0] and 'margin' not in rows[0]
  assert rows[0]['loss'] == pytest.approx(math.log(context.model_config().vocab_size), rel=0.05) and summary['validation_loss'] > 0
  log = []
  pretrain(at_rest(make_context, tmp_path, log, start_from='pretrain_lm'))
  assert log == [f'pretrain: starts from the parameters in {tmp_path / "pretrain_lm"}']
  model = loop.step_lib.build(NEXT_TOKEN, context.model_config(), loop.make_optimizer(context.config.pretrain_lm, 2), context.mesh)
  language_model = jax.device_get(load_params(tmp_path / 'pretrain_lm', model.abstract.params))
  started = parameters(tmp_path / 'pretrain', context)
  assert_same_tree(started['decoder'], language_model['decoder'])
  assert set(started) == {'decoder', 'v_head'} and not started['v_head'].any()


@pytest.mark.parametrize('by_path', [False, True])
def test_starts_from_the_whole_of_a_reward_model(resumable, finished, tmp_path, make_context, by_path):
  workdir, start = (tmp_path / 'new', str(finished.folder)) if by_path else (resumable, 'pretrain')
  finetune(at_rest(make_context, workdir, start_from=start))
  started, trained = parameters(workdir / 'finetune', finished.context), parameters(finished.folder, finished.context)
  assert trained['v_head'].any()
  assert_same_tree(started, trained)


def test_start_that_is_not_there_or_does_not_fit(resumable, tmp_path, make_context):
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*pretrain_lm') as missing:
    pretrain(make_context(tmp_path / 'new', start_from='pretrain_lm'))
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in nowhere'):
    pretrain(make_context(tmp_path / 'new2', start_from='nowhere'))
  wider = ModelConfig(num_layers=2, d_model=32, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
  with pytest.raises(ConfigError, match=r'pretrain cannot be started from: model\.d_model is 32, the checkpoint has 16') as wrong:
    finetune(make_context(resumable, start_from='pretrain', model=wider))
  assert '\n' not in f'{missing.value}{wrong.value}'


def poison(row, in_gradient=False):
  """The ranking objective, with a reward that is no number for one row of the data, or a gradient that is none at any."""

  def loss_sums(model, batch):
    loss, sums, rows = RANKING.loss_sums(model, batch)
    hit = batch.index_BP == row
    if in_gradient:  # the root of zero is zero; its slope is infinite
      return loss + jnp.any(hit) * jnp.sqrt(jnp.sum(jnp.square(model.v_head[...] * 0))), sums, rows
    bad = jnp.where(hit[..., None], jnp.nan, rows['rewards_BPC'])
    return loss + jnp.sum(jnp.where(hit, bad[..., 0], 0.0)), sums, rows | {'rewards_BPC': bad}

  return dataclasses.replace(RANKING, loss_sums=loss_sums)


def beside(row, context, multiple):
  """The rows of the data that share a row of the batch with `row`, and itself."""
  tokens, order = pipeline.TripletSegments(context.triplets('train'), context.template()), {'steps': STEPS, 'seed': context.config.seed}
  plan = pipeline.BatchPlan(BATCH, multiple)
  batches = pipeline.pair_batches(tokens, plan, pipeline.plan_packing(tokens, plan, None, **order), **order)
  index_BP = batches[where_is(row, context) - 1].index_BP
  return sorted(i for i in index_BP[(index_BP == row).any(axis=1)][0].tolist() if i >= 0)


def where_is(row, context):
  """The step that reads `row` first."""
  order = pipeline.global_order(40, context.config.seed)
  return next(position for position in range(40) if order(position)[0] == row) // BATCH + 1


def row_of_step(step, context):
  return next(row for row in range(40) if where_is(row, context) == step)


@pytest.mark.parametrize(('accumulation', 'devices'), [(1, 1), (4, 1), (2, 8)])
def test_non_finite_reward_stops_with_step_and_row(tmp_path, make_context, monkeypatch, accumulation, devices):
  context = make_context(
    tmp_path,
    devices=devices,
    gradient_accumulation_steps=accumulation,
    evaluate_every=None,
    checkpointing=CheckpointingConfig(every_steps=1),
  )
  row, plan_packing = row_of_step(4, context), pipeline.plan_packing

  def roomy(*args, **kwargs):  # every row has a padding pair, which must not be named
    pack = plan_packing(*args, **kwargs)
    return pack._replace(max_pairs=pack.max_pairs + 1)

  monkeypatch.setattr(pipeline, 'plan_packing', roomy)
  monkeypatch.setattr(api_training, 'RANKING', poison(row))
  named = beside(row, context, devices * accumulation)
  with pytest.raises(loop.NonFiniteError, match=rf'pretrain: step 4 has loss nan.*rows {re.escape(str(named))}$'):
    pretrain(context)
  assert row in named and len(named) < BATCH
  assert [r['step'] for r in read_metrics(tmp_path / 'pretrain')] == [1, 2, 3]
  assert checkpoints(tmp_path / 'pretrain') == [2, 3]  # the newest two, all of them sound
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(parameters(tmp_path / 'pretrain', context)))


def test_non_finite_gradient_names_the_rows_of_the_batch(tmp_path, make_context, monkeypatch):
  context = make_context(tmp_path, evaluate_every=None)
  monkeypatch.setattr(api_training, 'RANKING', poison(row_of_step(1, context), in_gradient=True))
  rows = sorted(row for row in range(40) if where_is(row, context) == 1)
  with pytest.raises(loop.NonFiniteError) as error:
    pretrain(context)
  assert 'step 1 has loss 0.69' in str(error.value) and 'gradient norm nan' in str(error.value)
  assert str(error.value).endswith(f'no single row; the batch held rows {rows}')
  assert checkpoints(tmp_path / 'pretrain') == []


def test_newest_and_best_checkpoints_stay(tmp_path, make_context, monkeypatch):
  accuracy = iter([0.6, 0.9, 0.5])
  monkeypatch.setattr(loop, 'evaluate', lambda *_: {'loss': 1.0, 'accuracy': next(accuracy)})
  settings = CheckpointingConfig(every_steps=1, keep=2, keep_best=1)
  pretrain(make_context(tmp_path, checkpointing=settings))
  assert checkpoints(tmp_path / 'pretrain') == [8, 11, 12]


class Interrupt:
  """Sends this process SIGTERM when a step is shown."""

  def __init__(self, monkeypatch, step):
    def update(progress, row):
      if row['step'] == step and 'loss' in row:
        os.kill(os.getpid(), signal.SIGTERM)
      shown(progress, row)

    shown = Progress.update
    monkeypatch.setattr(Progress, 'update', update)


def test_sigterm_saves_and_the_rerun_ends_the_same(tmp_path, make_context, finished, monkeypatch):
  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    Interrupt(patch, step=5)
    with pytest.raises(Preempted, match=r'stopped by SIGTERM, saved at step 6\. The same command resumes'):
      pretrain(make_context(tmp_path))
  assert signal.getsignal(signal.SIGTERM) == handler
  assert checkpoints(tmp_path / 'pretrain')[-1] == 6
  log = []
  summary = pretrain(make_context(tmp_path, log))['pretrain']
  assert log == ['pretrain: resumed from step 6 of 12']
  assert_same_tree(parameters(tmp_path / 'pretrain', finished.context), parameters(finished.folder, finished.context))
  rows, expected = (
    [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(f)] for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert rows == expected
  assert {k: summary[k] for k in ('loss', 'tokens', 'validation_loss')} == {
    k: finished.summary[k] for k in ('loss', 'tokens', 'validation_loss')
  }


def test_runs_in_other_threads_hear_sigterm_through_the_main_thread():
  def other() -> tuple[bool, int]:
    with SigtermFlag() as flag:
      return flag.is_set(), id(flag)

  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    with SigtermFlag() as flag:
      assert thread.submit(other).result() == (False, id(flag))
      os.kill(os.getpid(), signal.SIGTERM)
      assert flag.wait(10) and thread.submit(other).result() == (True, id(flag))
    assert thread.submit(other).result() != (True, id(flag))  # out of scope: a flag of its own


def test_sigterm_in_the_last_step_starts_no_other_stage(tmp_path, make_context, monkeypatch):
  with monkeypatch.context() as patch:
    Interrupt(patch, step=2)
    with pytest.raises(Preempted, match='saved at step 2'):
      pretrain(make_context(tmp_path, steps=2))
  forbid_training(monkeypatch)
  assert pretrain(make_context(tmp_path, steps=2))['pretrain']['steps'] == 2


def test_one_epoch_is_the_default(tmp_path, make_context):
  summary = pretrain(make_context(tmp_path, steps=None, evaluate_every=None))['pretrain']
  assert summary['steps'] == 40 // BATCH


@pytest.mark.parametrize(('steps', 'num_examples', 'expected'), [(None, 40, 5), (None, 47, 5), (None, 3, 1), (7, 40, 7)])
def test_steps_of_an_epoch_of_whole_batches(steps, num_examples, expected):
  assert loop.num_steps(TrainConfig(steps=steps, batch_size=BATCH), num_examples) == expected


@pytest.mark.parametrize('devices', [1, 4])
def test_batches_are_padded_for_devices_and_accumulation(tmp_path, make_context, devices):
  context = make_context(tmp_path, devices=devices, gradient_accumulation_steps=3)
  plan = loop.batch_plan(context.config.pretrain, context.mesh)
  assert plan == pipeline.BatchPlan(BATCH, 3 * devices, sharding.Share(0, devices, devices))


def test_parameters_of_a_finished_run_come_from_its_checkpoint(resumable, finished, make_context, monkeypatch):
  train, runs = loop.train, []
  monkeypatch.setattr(loop, 'train', lambda run: runs.append(train(run)) or runs[-1])
  forbid_training(monkeypatch)
  assert pretrain(make_context(resumable))['pretrain'] == runs[0].summary == finished.summary
  assert_same_tree(jax.device_get(runs[0].params), parameters(finished.folder, finished.context))


def test_trained_parameters_are_those_that_are_saved(tmp_path, make_context, monkeypatch):
  train, runs = loop.train, []
  monkeypatch.setattr(loop, 'train', lambda run: runs.append(train(run)) or runs[-1])
  context = make_context(tmp_path, steps=2, evaluate_every=None)
  assert pretrain(context)['pretrain'] == runs[0].summary
  assert_same_tree(jax.device_get(runs[0].params), parameters(tmp_path / 'pretrain', context))
