"""Training runs: logs, validation, checkpoints, resuming and stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import types

import jax
import numpy as np
import pytest
from training_runs import BATCH, EXAMPLES, STEPS, checkpoints, parameters

from polar_jax import api, sharding
from polar_jax.checkpoints.checkpointer import load_params
from polar_jax.config import CheckpointingConfig, ConfigError, ModelConfig, ProfileConfig, TemplateConfig, TrainConfig
from polar_jax.data import identity, pipeline
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model import flops
from polar_jax.report import report
from polar_jax.runtime import compiled, memory
from polar_jax.runtime.preemption import Preempted
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import evaluate as evaluate_stage
from polar_jax.stages.finetune import finetune
from polar_jax.stages.pretrain import pretrain
from polar_jax.stages.pretrain_lm import pretrain_lm
from polar_jax.train import trainer as loop
from polar_jax.train.metrics import StepProgress, read_metrics
from polar_jax.train.objectives import NEXT_TOKEN
from polar_jax.types import UserError

TIMED = ('step_seconds', 'tokens_per_second', 'mfu', 'goodput')


@pytest.fixture(scope='module')
def finished(tmp_path_factory, make_context):
  """An uninterrupted run, its log and its printed lines. Read only: `resumable` is a copy."""
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


def step_records(folder):
  """Records of training steps, without those of validation."""
  return [record for record in read_metrics(folder) if 'loss' in record]


def batches_of(context):
  """The training batches of a context, and their pack plan."""
  tokens = pipeline.TripletSegments(context.triplets('train'), context.template())
  plan = pipeline.BatchPlan(BATCH)
  pack = pipeline.plan_packing(tokens, plan, None, steps=STEPS, seed=context.config.seed)
  return pipeline.pair_batches(tokens, plan, pack, steps=STEPS, seed=context.config.seed), pack


def assert_same_tree(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def told(log):
  """The lines of a log without those on memory, whose numbers depend on the machine."""
  return [line for line in log if 'of memory besides' not in line]


def forbid_training(monkeypatch):
  def fail(*_):
    raise AssertionError('a batch was sent to the device')

  monkeypatch.setattr(loop.sharding, 'put_local', fail)


def test_every_step_is_logged_once_with_all_fields(finished):
  records = step_records(finished.folder)
  assert [record['step'] for record in records] == list(range(1, STEPS + 1))
  fields = {'stage', 'step', 'loss', 'accuracy', 'margin', 'grad_norm', 'learning_rate', 'epoch', 'tokens', 'step_seconds'}
  for record in records:
    assert fields | {'tokens_per_second', 'mfu', 'reward_histogram', 'chosen_reward', 'rejected_reward'} <= record.keys()
    assert record['stage'] == 'pretrain' and record['epoch'] == record['step'] * BATCH / EXAMPLES
    assert sum(record['reward_histogram']['chosen']) == sum(record['reward_histogram']['rejected']) == BATCH
    assert record['margin'] == pytest.approx(record['chosen_reward'] - record['rejected_reward'], abs=1e-6)
    assert record['grad_norm'] > 0 and record['tokens_per_second'] > 0 and record['mfu'] > 0


def test_padding_is_all_positions_without_tokens(finished):
  batches, pack = batches_of(finished.context)
  assert pack.max_pairs > 1
  expected = [1 - np.mean(batches[s].end_BT > batches[s].start_BT) for s in range(STEPS)]
  assert [record['pad_fraction'] for record in step_records(finished.folder)] == pytest.approx(expected)
  assert finished.summary['pad_fraction'] == pytest.approx(np.mean(expected))


def test_flops_are_three_forward_passes_and_mfu_is_over_all_devices(finished):
  batches, _ = batches_of(finished.context)
  model = finished.context.model_config()
  step_flops = [3 * flops.reward_model_flops(model, batches[s]) for s in range(STEPS)]
  records = step_records(finished.folder)
  assert [record['flops'] for record in records] == pytest.approx(np.cumsum(step_flops), rel=1e-12)
  assert finished.summary['flops'] == records[-1]['flops']
  peak = flops.peak_flops(jax.devices()[0])[0] * jax.device_count()
  assert jax.device_count() > 1
  assert [record['mfu'] * record['step_seconds'] * peak for record in records] == pytest.approx(step_flops, rel=1e-9)


def test_a_given_peak_replaces_that_of_the_data_sheet(tmp_path, make_context, monkeypatch):
  """The remedy for an unknown TPU, which is refused without it."""

  def refuse(device):
    raise UserError('unknown')

  monkeypatch.setattr(flops, 'peak_flops', refuse)
  with pytest.raises(UserError, match='unknown'):
    pretrain(make_context(tmp_path / 'refused', steps=2, evaluate_every=None))
  summary = pretrain(make_context(tmp_path, steps=2, evaluate_every=None, profile=ProfileConfig(peak_flops=5e12)))['pretrain']
  assert summary['peak_flops'] == 5e12 and summary['peak_source'] == 'profile.peak_flops'


def test_steps_that_exceed_the_plan_are_trained_whole_and_logged_once(tmp_path, finished, make_context, monkeypatch):
  plan_packing = pipeline.plan_packing

  def too_few(*args, **kwargs):
    pack = plan_packing(*args, **kwargs)
    needed.append(pack.rows)
    return pack._replace(rows=1)

  needed, log = [], []
  monkeypatch.setattr(pipeline, 'plan_packing', too_few)
  pretrain(make_context(tmp_path, log))
  log = told(log)
  assert needed[0] > 1 and log[0] == f'pretrain: step 1 needs {needed[0]} rows, planned 1: one more compilation'
  sizes = [re.search(r'step \d+ needs (\d+) rows, planned 1: one more compilation$', line)[1] for line in log]
  assert len(sizes) == len(set(sizes)) < STEPS
  records, expected = (
    [{k: r[k] for k in ('loss', 'tokens', 'validation_loss') if k in r} for r in read_metrics(f)]
    for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert len(records) == len(expected)
  for record, other in zip(records, expected, strict=True):
    assert record == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize('cost', [50.0, 2.0])
def test_the_cost_of_a_compilation_is_that_of_the_config(tmp_path, make_context, monkeypatch, cost):
  class Planned(Exception):
    pass

  def plan_packing(*_, compilation_steps, **__):
    raise Planned(compilation_steps)

  monkeypatch.setattr(pipeline, 'plan_packing', plan_packing)
  context = make_context(tmp_path)
  data = dataclasses.replace(context.config.data, compilation_steps=cost)
  with pytest.raises(Planned, match=f'^{cost}$'):
    pretrain(dataclasses.replace(context, config=dataclasses.replace(context.config, data=data)))


def test_tokens_are_those_of_the_examples_read(finished):
  context = finished.context
  tokens = pipeline.TripletSegments(context.triplets('train'), context.template())
  order = pipeline.global_order(len(tokens), context.config.seed)
  lengths = [len(tokens[order(position)[0]].tokens) for position in range(STEPS * BATCH)]
  assert [record['tokens'] for record in step_records(finished.folder)] == np.cumsum(lengths)[BATCH - 1 :: BATCH].tolist()
  assert finished.summary['tokens'] == sum(lengths) and finished.summary['rows'] == STEPS * BATCH


def test_learning_rate_is_that_of_the_step(finished):
  def expected(update):  # three warm-up steps of twelve, then a cosine to a tenth
    if update < 3:
      return 3e-3 * update / 3
    return 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (update - 3) / 9)) / 2)

  records = step_records(finished.folder)
  assert [record['learning_rate'] for record in records] == pytest.approx([expected(u) for u in range(STEPS)], rel=1e-5)


def test_learns_an_easy_task(finished):
  records = step_records(finished.folder)
  assert records[0]['loss'] == pytest.approx(math.log(2), abs=1e-6) and records[0]['accuracy'] == 0.5  # the head starts at zero
  assert records[-1]['loss'] < 0.5 and records[-1]['accuracy'] == 1
  assert finished.summary['loss'] == records[-1]['loss']  # the last twentieth of twelve steps is one


def test_validates_when_due_and_at_the_end(finished):
  records = [record for record in read_metrics(finished.folder) if 'validation_loss' in record]
  assert [record['step'] for record in records] == [4, 8, 12]
  context = finished.context
  model = api.load(finished.folder, mesh=context.mesh)
  scorer = Scorer(model.params, model.config, model.template, context.mesh)
  scores = scorer.score_pairs(context.triplets('validation'))
  margin = (scores[:, 0] - scores[:, 1]).astype(np.float64)
  assert finished.summary['validation_loss'] == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-5)
  assert finished.summary['validation_accuracy'] == (margin > 0).mean()
  assert finished.summary['validation_margin'] == pytest.approx(margin.mean(), rel=1e-5)
  assert {k: v for k, v in records[-1].items() if 'validation' in k} == {k: v for k, v in finished.summary.items() if 'validation' in k}


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


def test_a_finished_run_trains_nothing_and_returns_the_same_summary(resumable, finished, make_context, monkeypatch):
  before, log = (resumable / 'pretrain/metrics.jsonl').read_bytes(), []
  forbid_training(monkeypatch)
  assert pretrain(make_context(resumable, log))['pretrain'] == finished.summary
  assert log == ['pretrain: resumed from step 12 of 12']
  assert (resumable / 'pretrain/metrics.jsonl').read_bytes() == before
  assert checkpoints(resumable / 'pretrain') == checkpoints(finished.folder)


def test_a_lost_summary_is_written_again(resumable, finished, make_context, monkeypatch):
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
  forbid_training(monkeypatch)  # settings that do not change the results may change
  pretrain(make_context(resumable, log_every=1, checkpointing=CheckpointingConfig(every_steps=7)))
  packing = dataclasses.replace(make_context(resumable).config.data, row_length=256)
  pretrain(make_context(resumable, data=packing))


def test_changed_data_are_refused(resumable, world, tmp_path, make_context):
  rows = [json.loads(line) for line in (world / 'examples.jsonl').read_text().splitlines()]

  def resumed(changed, **setting):
    path = tmp_path / 'changed.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in changed))
    data = make_context(resumable).config.data
    return pretrain(make_context(resumable, data=dataclasses.replace(data, **dict.fromkeys(setting, str(path)))))

  for change in ({'chosen': 'other'}, {'wrapper': 'pretrain'}, {'category': 'other'}):
    with pytest.raises(ConfigError, match=r'the training data \(`rows`\) was .* use another --workdir'):
      resumed([rows[0], {**rows[1], **change}, *rows[2:]], triplets=True)
  with pytest.raises(ConfigError, match=r'the held-out data \(`validation_rows`\) was'):
    resumed([*rows[:-2], {**rows[-2], 'category': 'other'}, rows[-1]], validation=True)
  assert resumed([{**row, 'comment': 'no one reads this'} for row in rows], triplets=True)['pretrain']['steps'] == STEPS


def test_a_run_of_an_earlier_version_resumes(tmp_path, make_context, monkeypatch):
  earlier = lambda digest: lambda *args, **kwargs: digest(*args, **kwargs).rsplit(':', 1)[0]
  with monkeypatch.context() as patch:
    patch.setattr(identity, 'triplets_digest', earlier(identity.triplets_digest))
    pretrain(at_rest(make_context, tmp_path))
  log: list[str] = []
  pretrain(at_rest(make_context, tmp_path, log))
  assert log == ['pretrain: resumed from step 1 of 1']


@pytest.mark.long
def test_changed_text_is_refused(tmp_path, world, make_context):
  context = at_rest(make_context, tmp_path)
  pretrain_lm(context)
  (tmp_path / 'text.txt').write_text((world / 'text.txt').read_text())
  elsewhere = lambda: pretrain_lm(
    at_rest(make_context, tmp_path, data=dataclasses.replace(context.config.data, text=str(tmp_path / 'text.txt')))
  )
  elsewhere()  # the same text under another name
  (tmp_path / 'text.txt').write_text((world / 'text.txt').read_text().replace('hello', 'HELLO', 1))
  with pytest.raises(ConfigError, match=r'the training text \(`text`\) was'):
    elsewhere()


@pytest.mark.long
def test_examples_of_which_nothing_can_be_learned_are_counted(tmp_path, make_context, monkeypatch):
  path, log = tmp_path / 'rows.jsonl', []
  row = {'prompt': 'p', 'reference': 'r', 'chosen': 'same', 'rejected': 'same'}
  path.write_text(''.join(json.dumps(row | change) + '\n' for change in ({}, {'chosen': 'a' * 90}, {'chosen': 'other'}) * 3))
  data = dataclasses.replace(make_context(tmp_path).config.data, triplets=str(path), validation=str(path))
  template = TemplateConfig(max_length=300, max_response_length=40)
  context = at_rest(make_context, tmp_path / 'run', log, data=data, template=template)
  part = pretrain(context)['pretrain']['examples']  # of a run that does not read all of its data
  of_run = context.config.pretrain
  assert part['training']['examples'] == of_run.steps * of_run.batch_size < part['validation']['examples'] == 9
  whole = dataclasses.replace(of_run, steps=2)
  log.clear()
  context = at_rest(make_context, tmp_path / 'whole', log, data=data, template=template, pretrain=whole)
  summary = pretrain(context)['pretrain']
  found = summary['examples']
  assert found['training'] == found['validation']
  assert (found['training']['same_text'], found['training']['cut_responses']) == (3, 3)
  assert found['training']['numbers'] == {'same_text': [1, 4, 7], 'cut_responses': [2, 5, 8]}
  assert log[0].startswith('pretrain: training data: 3 of 9 examples have the same text as chosen and rejected (number 1, 4, 7): ')
  ties = lambda examples: np.zeros((len(examples), 2), np.float32)
  scorer = types.SimpleNamespace(score_pairs=ties, template=Template(template, ByteTokenizer()))
  monkeypatch.setattr(evaluate_stage, '_scorer', lambda context, run: scorer)
  results = evaluate_stage.evaluate_triplets(context, {'validation': context.triplets('validation')})
  assert results['examples']['validation']['same_text'] == 3
  assert results['by_split']['validation']['low'] < results['by_split']['validation']['accuracy'] == 0.5  # all are ties: no certainty
  report.write_report(tmp_path / 'run', {'pretrain': summary, 'evaluate': results})
  text = (tmp_path / 'run/report.md').read_text()
  for name in ('pretrain, training', 'pretrain, validation', 'validation'):
    assert f'- {name}: 3 of 9 examples have the same text as chosen and rejected, which **counts as a tie** (number 1, 4, 7).' in text


def at_rest(make_context, *args, **changes):
  """A context whose run takes one step at a learning rate of zero, so that it saves the parameters that it started from."""
  return make_context(*args, steps=1, warmup_ratio=1.0, evaluate_every=None, **changes)


def test_starts_from_the_decoder_of_a_language_model(tmp_path, make_context):
  context = make_context(tmp_path, steps=2, evaluate_every=None)
  summary = pretrain_lm(context)['pretrain_lm']
  records = step_records(tmp_path / 'pretrain_lm')
  assert [record['step'] for record in records] == [1, 2] and 'reward_histogram' not in records[0] and 'margin' not in records[0]
  assert records[0]['loss'] == pytest.approx(math.log(context.model_config().vocab_size), rel=0.05) and summary['validation_loss'] > 0
  log = []
  pretrain(at_rest(make_context, tmp_path, log, start_from='pretrain_lm'))
  assert told(log) == [f'pretrain: starts from the parameters in {tmp_path / "pretrain_lm"}']
  model = loop.step_lib.build(NEXT_TOKEN, context.model_config(), loop.make_optimizer(context.config.pretrain_lm, 2), context.mesh)
  language_model = jax.device_get(load_params(tmp_path / 'pretrain_lm', model.abstract.params))
  started = parameters(tmp_path / 'pretrain', context)
  assert_same_tree(started['decoder'], language_model['decoder'])
  assert set(started) == {'decoder', 'v_head'} and not started['v_head'].any()


@pytest.mark.parametrize('by_path', [False, True])
def test_starts_from_all_parameters_of_a_reward_model(resumable, finished, tmp_path, make_context, by_path):
  workdir, start = (tmp_path / 'new', str(finished.folder)) if by_path else (resumable, 'pretrain')
  finetune(at_rest(make_context, workdir, start_from=start))
  started, trained = parameters(workdir / 'finetune', finished.context), parameters(finished.folder, finished.context)
  assert trained['v_head'].any()
  assert_same_tree(started, trained)


def test_a_start_that_is_missing_or_does_not_fit(resumable, tmp_path, make_context):
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in .*pretrain_lm') as missing:
    pretrain(make_context(tmp_path / 'new', start_from='pretrain_lm'))
  with pytest.raises(ConfigError, match=r'no checkpoint to start from in nowhere'):
    pretrain(make_context(tmp_path / 'new2', start_from='nowhere'))
  wider = ModelConfig(num_layers=2, d_model=32, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)
  with pytest.raises(ConfigError, match=r'pretrain cannot be started from: model\.d_model is 32, the checkpoint has 16') as wrong:
    finetune(make_context(resumable, start_from='pretrain', model=wider))
  assert '\n' not in f'{missing.value}{wrong.value}'


def test_newest_and_best_checkpoints_stay(tmp_path, make_context, monkeypatch):
  accuracy = iter([0.6, 0.9, 0.5])
  monkeypatch.setattr(loop, 'evaluate', lambda *_: {'loss': 1.0, 'accuracy': next(accuracy)})
  settings = CheckpointingConfig(every_steps=1, keep=2, keep_best=1)
  pretrain(make_context(tmp_path, checkpointing=settings))
  assert checkpoints(tmp_path / 'pretrain') == [8, 11, 12]


def interrupt(monkeypatch, step):
  """Send this process SIGTERM when a step is shown."""

  def update(progress, record):
    if record['step'] == step and 'loss' in record:
      os.kill(os.getpid(), signal.SIGTERM)
    show(progress, record)

  show = StepProgress.update
  monkeypatch.setattr(StepProgress, 'update', update)


def test_sigterm_saves_and_the_resumed_run_ends_the_same(tmp_path, make_context, finished, monkeypatch):
  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    interrupt(patch, step=5)
    with pytest.raises(Preempted, match=r'stopped by SIGTERM, saved at step 6\. The same command resumes'):
      pretrain(make_context(tmp_path))
  assert signal.getsignal(signal.SIGTERM) == handler
  assert checkpoints(tmp_path / 'pretrain')[-1] == 6
  log = []
  summary = pretrain(make_context(tmp_path, log))['pretrain']
  assert told(log) == ['pretrain: resumed from step 6 of 12']
  assert_same_tree(parameters(tmp_path / 'pretrain', finished.context), parameters(finished.folder, finished.context))
  records, expected = (
    [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(f)] for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert records == expected
  assert {k: summary[k] for k in ('loss', 'tokens', 'validation_loss')} == {
    k: finished.summary[k] for k in ('loss', 'tokens', 'validation_loss')
  }


@pytest.mark.long
@pytest.mark.parametrize('step', [4, 12])
def test_sigterm_in_a_validation_is_answered_before_it_ends(tmp_path, make_context, finished, monkeypatch, step):
  passes = []

  def first_batch_only(call, params, batches, mesh):
    passes.append(1)
    if len(passes) == step // 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(call, params, batches, mesh)

  evaluate = loop.evaluate
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'evaluate', first_batch_only)
    with pytest.raises(Preempted, match=rf'stopped by SIGTERM, saved at step {step}\.'):
      pretrain(make_context(tmp_path))
  assert len(passes) == step // 4
  summary = pretrain(make_context(tmp_path))['pretrain']
  assert_same_tree(parameters(tmp_path / 'pretrain', finished.context), parameters(finished.folder, finished.context))
  records, expected = (
    [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(f)] for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert records == expected and summary['validation_loss'] == finished.summary['validation_loss']
  assert checkpoints(tmp_path / 'pretrain') == checkpoints(finished.folder)  # ranked by the validation that was repeated


@pytest.mark.slow  # the same thread waits for other calls: runtime/preemption_test.py
def test_sigterm_while_a_step_is_compiled(tmp_path, make_context, finished, monkeypatch):
  """Also in the middle of a run, when a batch needs more rows than were planned: the batch is read again."""
  plan_packing, compile_call, sizes, release = pipeline.plan_packing, compiled.compile_call, [], threading.Event()
  monkeypatch.setattr(pipeline, 'plan_packing', lambda *args, **kwargs: plan_packing(*args, **kwargs)._replace(rows=1))
  short = dataclasses.replace(make_context(tmp_path).config.data, row_length=56)  # in which steps need different numbers of rows

  def slow(lowered, argument):
    sizes.append(argument)
    if len(sizes) == 3:  # a step, a batch of validation, and a step of another shape
      os.kill(os.getpid(), signal.SIGTERM)
      assert release.wait(120)
    return compile_call(lowered, argument)

  with monkeypatch.context() as patch:
    patch.setattr(compiled, 'compile_call', slow)
    loop._compiled.cache_clear()
    with pytest.raises(Preempted, match=r'saved at step \d+\.') as stopped:
      pretrain(make_context(tmp_path, data=short))
  assert len(sizes) == 3 and checkpoints(tmp_path / 'pretrain')
  release.set()  # only now: the compiler was still at work
  pretrain(make_context(tmp_path, data=short))
  records, expected = (
    [{k: r[k] for k in ('step', 'loss', 'tokens') if k in r} for r in read_metrics(f)] for f in (tmp_path / 'pretrain', finished.folder)
  )
  assert 'saved at step 12' not in str(stopped.value) and len(records) == len(expected)
  for record, other in zip(records, expected, strict=True):
    assert record == pytest.approx(other, rel=1e-4)


def test_what_a_run_would_trip_over_later_is_said_before_its_first_step(tmp_path, make_context, world, monkeypatch):
  forbid_training(monkeypatch)
  long = {'prompt': 'p', 'reference': 'r', 'chosen': 'a' * 90, 'rejected': 'b'}
  (tmp_path / 'validation.jsonl').write_text(json.dumps(long))
  base = make_context(tmp_path).config.data
  data = dataclasses.replace(base, row_length=96, validation=str(tmp_path / 'validation.jsonl'))
  with pytest.raises(
    UserError, match=r'validation\.jsonl: 1 of 1 validation examples have more tokens than data\.row_length=96 .*set .* to 128'
  ):
    pretrain(make_context(tmp_path / 'run', data=data))
  with pytest.raises(UserError, match=r'examples\.jsonl: 40 of 40 training examples'):
    pretrain(make_context(tmp_path / 'run', data=dataclasses.replace(base, row_length=8)))
  for remedy in (128, None):
    with pytest.raises(AssertionError, match='a batch was sent to the device'):
      pretrain(make_context(tmp_path / f'run{remedy}', data=dataclasses.replace(data, row_length=remedy)))


def test_a_step_that_does_not_fit_the_memory_is_refused_with_what_to_change(tmp_path, make_context, monkeypatch):
  monkeypatch.setattr(memory, 'available', lambda _: 300_000)
  monkeypatch.setattr(loop, 'executables', lambda function: compiled.Executables(function))
  with pytest.raises(ConfigError, match=r"set gradient_accumulation_steps to \d+ or more \(now 1\); or model\.remat to 'full'") as error:
    pretrain(make_context(tmp_path / 'refused'))
  assert len(str(error.value)) <= 500 and checkpoints(tmp_path / 'refused' / 'pretrain') == []


def test_the_copy_of_an_asynchronous_save_is_counted_before_the_first_step(tmp_path, make_context, monkeypatch):
  """What is free suffices for the steps and for a save after which training waits, but not for one next to a step."""
  lines = []
  monkeypatch.setattr(loop, 'executables', lambda function: compiled.Executables(function))

  def run(folder, **checkpointing):
    context = make_context(tmp_path / folder)
    config = dataclasses.replace(context.config, checkpointing=dataclasses.replace(context.config.checkpointing, **checkpointing))
    return pretrain(dataclasses.replace(context, config=config, log=lines.append))

  run('measured', asynchronous=False)
  sizes = [float(found[1]) for line in lines if (found := re.search(r'a save needs (\S+) KiB', line))]
  assert len(sizes) == 1, lines
  monkeypatch.setattr(memory, 'available_on_host', lambda: int(1.5 * sizes[0] * 1024))
  monkeypatch.setattr(memory, 'available', lambda _: 1 << 40)
  with pytest.raises(ConfigError, match=r'asynchronous save next to a step needs .* set checkpointing\.asynchronous=False \('):
    run('refused', asynchronous=True)
  assert checkpoints(tmp_path / 'refused' / 'pretrain') == []
  assert run('remedy', asynchronous=False)['pretrain']['steps']


def test_sigterm_in_the_last_step_starts_no_other_stage(tmp_path, make_context, monkeypatch):
  def after_validation(*arguments):
    means = evaluate(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return means

  evaluate = loop.evaluate
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'evaluate', after_validation)
    with pytest.raises(Preempted, match='saved at step 2'):
      pretrain(make_context(tmp_path, steps=2))
  forbid_training(monkeypatch)
  assert pretrain(make_context(tmp_path, steps=2))['pretrain']['steps'] == 2


def test_the_default_number_of_steps_is_one_epoch(tmp_path, make_context):
  summary = pretrain(make_context(tmp_path, steps=None, evaluate_every=None))['pretrain']
  assert summary['steps'] == EXAMPLES // BATCH


@pytest.mark.parametrize(('steps', 'num_examples', 'expected'), [(None, 40, 5), (None, 47, 5), (None, 3, 1), (7, 40, 7)])
def test_an_epoch_has_whole_batches_but_at_least_one(steps, num_examples, expected):
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
