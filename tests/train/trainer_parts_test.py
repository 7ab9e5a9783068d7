"""The methods of the trainer one by one, with the step, the session and the clock replaced."""

from __future__ import annotations

import contextlib
import inspect
import json
import types
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import LoraConfig, ModelConfig, TrainConfig
from polar_jax.ppo import trainer as ppo_trainer
from polar_jax.sharding import Share
from polar_jax.train import step as step_lib
from polar_jax.train import trainer as trainer_lib
from polar_jax.train.objectives import NEXT_TOKEN, RANKING, Objective
from polar_jax.train.session import NonFiniteError


def make_trainer(**attributes) -> trainer_lib._Trainer:
  """Return a trainer without a model, data or folders, which notes what it writes in `written`."""
  trainer = object.__new__(trainer_lib._Trainer)
  written, histograms, shown, lines = [], [], [], []
  logs = types.SimpleNamespace(write=written.append, histogram=lambda *arguments: histograms.append(arguments))
  trainer.session = types.SimpleNamespace(
    step=4, metrics=logs, progress=types.SimpleNamespace(update=shown.append), clock=types.SimpleNamespace(goodput=0.75)
  )
  config = TrainConfig(batch_size=6, log_every=2)
  plan = types.SimpleNamespace(share=types.SimpleNamespace(low=1, high=2, of=4))
  trainer.run = types.SimpleNamespace(
    name='run', train=config, num_examples=48, plan=plan, log=lines.append, planned_rows=8, model=ModelConfig(), frozen={}
  )
  trainer.written, trainer.histograms, trainer.shown, trainer.lines = written, histograms, shown, lines
  trainer.learning_rates, trainer.tokens, trainer.flops, trainer.peak_flops = np.arange(10) / 8, 100, 5.0, 50.0
  trainer.fetched_at, trainer.compiled_rows, trainer.frozen = 10.0, set(), ()
  vars(trainer).update(attributes)
  return trainer


def pending(step: int = 4, rows=None, **scalars) -> trainer_lib._PendingStep:
  scalars = {'loss': 0.5, 'grad_norm': 1.0, 'parameter_norm': 2.0, 'tokens': 30, 'accuracy': 0.25} | scalars
  return trainer_lib._PendingStep(step, {'scalars': scalars, 'rows': rows or {'index': np.arange(2)}}, 40.0, 600.0, 7.0)


@pytest.mark.parametrize(('step', 'shows_histogram'), [(4, True), (3, False)])
def test_the_record_of_a_step_by_hand(monkeypatch, step, shows_histogram):
  monkeypatch.setattr(trainer_lib.time, 'perf_counter', lambda: 13.0)
  monkeypatch.setattr(trainer_lib.jax, 'device_count', lambda: 2)
  rewards = np.array([[[1.0, 2.0], [3.0, 0.0]], [[5.0, 6.0], [9.0, 9.0]]])
  trainer = make_trainer(pending=pending(step, {'rewards_BPC': rewards, 'index': np.array([[4, 7], [0, -1]])}))
  trainer._write_pending()
  trainer._write_pending()  # once
  (record,) = trainer.written
  histogram = record.pop('reward_histogram')
  assert record == {
    'stage': 'run',
    'step': step,
    'loss': 0.5,
    'accuracy': 0.25,
    'grad_norm': 1.0,
    'parameter_norm': 2.0,
    'learning_rate': (step - 1) / 8,
    'epoch': step * 6 / 48,
    'tokens': 130,
    'flops': 7.0,
    'pad_fraction': 0.25,
    'step_seconds': 3.0,
    'tokens_per_second': 10.0,
    'mfu': 600 / 3 / (50 * 2),
    'goodput': 0.75,
  }
  assert (histogram['low'], histogram['high'], sum(histogram['chosen'])) == (0.0, 6.0, 3)  # without padding
  chosen, rejected = [1.0, 3.0, 5.0], [2.0, 0.0, 6.0]
  shown = [(s, name, values.tolist()) for s, name, values in trainer.histograms]
  assert shown == ([(4, 'rewards/chosen', chosen), (4, 'rewards/rejected', rejected)] if shows_histogram else [])
  assert len(trainer.shown) == 1 and trainer.tokens == 130 and trainer.fetched_at == 13.0 and trainer.pending is None


@pytest.mark.parametrize('name', ['loss', 'grad_norm', 'parameter_norm'])
def test_a_step_that_is_not_finite_names_the_examples_of_bad_rows(name):
  rows = {'index': np.array([[4, 7], [2, -1], [0, 9]]), 'rewards_BPC': np.zeros((3, 2, 2))}
  trainer = make_trainer(pending=pending(**{name: float('nan')}, rows=rows))
  with pytest.raises(NonFiniteError, match=r'run: step 4 has .*: none; the batch has examples \[0, 2, 4, 7, 9\]'):
    trainer._write_pending()
  assert not trainer.written and trainer.tokens == 100
  rows['rewards_BPC'][1, 1, 0], rows['rewards_BPC'][2, 0, 1] = np.inf, np.nan  # that of a padded pair spoils its row
  with pytest.raises(NonFiniteError, match=r'non-finite outputs: examples \[0, 2, 9\]'):
    make_trainer(pending=pending(**{name: float('inf')}, rows=rows))._write_pending()


def test_the_counts_of_a_process_are_scaled_to_the_whole_batch():
  trainer = make_trainer(count_flops=lambda model, batch: 10.0)
  found = trainer._pending_step(types.SimpleNamespace(tokens_BT=np.zeros((3, 5))), 'output')
  assert found == (4, 'output', 3 * 5 * 4, 3 * 10.0 * 4, 5.0 + 3 * 10.0 * 4) and trainer.flops == 125.0


def test_a_shape_is_new_once_and_an_unplanned_one_is_logged():
  trainer = make_trainer()
  assert [trainer._note_shape(rows) for rows in (8, 8, 9, 9, 8)] == [True, False, True, False, False]
  assert trainer.lines == ['run: step 5 needs 9 rows, planned 8: one more compilation']


def test_the_summary_by_hand(tmp_path):
  steps = [
    {'step': i, 'loss': float(i), 'accuracy': i / 100, 'tokens_per_second': float(i**2), 'pad_fraction': i / 10, 'mfu': float(i % 7)}
    for i in range(1, 62)
  ]
  rows = [*steps, {'step': 61, 'validation_loss': 9.0}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  trainer = make_trainer(validation={'validation_loss': 9.0}, peak_source='chip')
  trainer.run.folder, trainer.run.facts = tmp_path, {'parameters': 3}
  found = trainer._summarize({'seconds': 2.0})
  assert found.pop('mfu_rule')
  assert found == {
    'steps': 4,
    'tokens': 100,
    'flops': 5.0,
    'rows': 24,
    'loss': 60.0,  # the last three of 61
    'accuracy': pytest.approx(0.6),
    'seconds': 2.0,
    'tokens_per_second': 31.0**2,
    'pad_fraction': pytest.approx(3.1),
    'mfu': float(np.median([i % 7 for i in range(1, 62)])),
    'peak_flops': 50.0,
    'peak_source': 'chip',
    'validation_loss': 9.0,
    'parameters': 3,
  }
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in steps[:39]))
  assert trainer._summarize({})['loss'] == 39.0  # the last one of 39


@pytest.mark.parametrize(('validated_step', 'ranked'), [(4, True), (3, False)])
def test_a_checkpoint_is_ranked_by_a_validation_of_its_own_step(validated_step, ranked):
  calls = []
  trainer = make_trainer(pending=None, iterator_state={'at': 3}, validation={'validation_loss': 1.0}, validation_due=True, state='state')
  trainer.validated_step = validated_step
  trainer.session.save = lambda *arguments, again: calls.append((*arguments, again))
  trainer._save(again=True)
  trainer._save()
  data = {'iterator': {'at': 3}, 'tokens': 100, 'flops': 5.0, 'validated': {'validation_loss': 1.0}, 'validation_due': True}
  assert calls == [('state', data, {'validation_loss': 1.0} if ranked else {}, again) for again in (True, False)]


def test_a_validation_is_written_shown_and_remembered(monkeypatch):
  monkeypatch.setattr(trainer_lib, 'evaluate', lambda *arguments: {'loss': 0.5, 'accuracy': 0.75} if arguments == (1, 2, 3, 4) else None)
  monkeypatch.setattr(trainer_lib.time, 'perf_counter', lambda: 99.0)
  trainer = make_trainer(pending=None, evaluate_step=1, state=types.SimpleNamespace(params=2), validation_due=True)
  trainer.run.validation, trainer.run.mesh = 3, 4
  trainer._validate()
  means = {'validation_loss': 0.5, 'validation_accuracy': 0.75}
  assert trainer.validation == means and trainer.validated_step == 4 and not trainer.validation_due and trainer.fetched_at == 99.0
  assert trainer.written == trainer.shown == [{'stage': 'run', 'step': 4, **means}]


class Stopped(Exception):
  """Ends a test where it has seen enough."""


@pytest.mark.parametrize('module', [trainer_lib, ppo_trainer])
def test_processes_agree_on_the_settings_of_a_run_before_anything_is_opened(monkeypatch, module):
  def agree(name, fingerprint):
    raise Stopped(name, fingerprint)

  monkeypatch.setattr(module.distributed, 'agree', agree)
  with pytest.raises(Stopped) as stopped:
    module.train(types.SimpleNamespace(name='run', fingerprint={'a': 1}))
  assert stopped.value.args == ('run', {'a': 1})


@pytest.mark.parametrize(('objective', 'metric', 'lower'), [(NEXT_TOKEN, 'validation_loss', True), (RANKING, 'validation_accuracy', False)])
def test_the_best_checkpoint_is_that_of_the_lowest_loss_or_the_highest_accuracy(monkeypatch, objective, metric, lower):
  def session(run, best_metric, *, best_is_lower, started):
    raise Stopped(best_metric, best_is_lower, started)

  monkeypatch.setattr(trainer_lib.distributed, 'agree', lambda *_: None)
  monkeypatch.setattr(trainer_lib, 'Session', session)
  with pytest.raises(Stopped) as stopped:
    trainer_lib.train(types.SimpleNamespace(name='run', fingerprint={}, objective=objective, started=3.0))
  assert stopped.value.args == (metric, lower, 3.0)


def test_batches_are_divided_among_devices_and_micro_batches(monkeypatch):
  monkeypatch.setattr(trainer_lib.sharding, 'batch_shards', lambda mesh: 4)
  monkeypatch.setattr(trainer_lib.sharding, 'local_share', lambda mesh: Share(1, 2, 3))
  plan = trainer_lib.batch_plan(TrainConfig(batch_size=24, gradient_accumulation_steps=3), 'mesh')
  assert (plan.size, plan.multiple, plan.share) == (24, 12, Share(1, 2, 3))
  assert [trainer_lib.num_steps(TrainConfig(batch_size=10, steps=steps), 35) for steps in (None, 7)] == [3, 7]
  assert trainer_lib.num_steps(TrainConfig(batch_size=10), 3) == 1


class Steps:
  """A session of `total` steps that notes what happens in `events`."""

  def __init__(self, total, save_due=(), start=0):
    self.total, self.save_due, self.step, self.first_step, self.events, self.metrics = total, save_due, start, start, [], None
    self.clock = types.SimpleNamespace(lap=lambda part: self.events.append(part))
    note = lambda what: lambda *arguments: self.events.append((what, *arguments))
    self.profiler = types.SimpleNamespace(before=note('before'), after=note('after'))

  is_complete = property(lambda self: self.step >= self.total)
  is_save_due = property(lambda self: self.step in self.save_due)
  steps_taken = property(lambda self: self.step - self.first_step)

  def advance(self):
    self.step += 1

  def running(self):
    return contextlib.nullcontext()

  @contextlib.contextmanager
  def saving_if_stopped(self, save):
    try:
      yield
    except Stopped:
      save()
      raise

  def stop_if_preempted(self, save, *, finished):
    self.events.append(('may stop', finished))

  def finish(self, save, summarize):
    self.events.append('finish')
    save()
    return summarize({'seconds': 1.0})


def loop(total, validation='batches', evaluate_every=None, save_due=(), start=0, due_before=False):
  """Run the loop of a trainer whose steps only count."""
  trainer = make_trainer(validation_due=due_before, validated_step=-1, state=types.SimpleNamespace(params='params'))
  session = trainer.session = Steps(total, save_due, start)
  trainer.run.validation, trainer.run.train = validation, TrainConfig(evaluate_every=evaluate_every)

  def validate():
    session.events.append(('validate', session.step))
    trainer.validated_step, trainer.validation_due = session.step, False

  def take_step():
    session.advance()
    session.events.append(session.step)

  trainer._take_step, trainer._validate = take_step, validate
  trainer._save = lambda again=False: session.events.append(('save', session.step, again, trainer.validation_due))
  trainer._summarize = lambda timing: timing | {'own': 2}
  assert trainer.run_to_end() == ('params', {'seconds': 1.0, 'own': 2})
  return session.events


def test_the_loop_validates_at_the_end_and_in_between_and_saves_what_it_validated():
  stop, end = [('may stop', False)], [('may stop', True), 'finish']
  save = lambda step: [('save', step, False, False), 'save']
  assert loop(5, evaluate_every=2, save_due=[1]) == [
    *(1, 'evaluate', *save(1), *stop),
    *(2, ('validate', 2), 'evaluate', *save(2), *stop),
    *(3, 'evaluate', *stop),
    *(4, ('validate', 4), 'evaluate', *save(4), *stop),
    *(5, ('validate', 5), 'evaluate', *end, ('save', 5, False, False)),
  ]
  assert loop(2) == [1, 'evaluate', *stop, 2, ('validate', 2), 'evaluate', *end, ('save', 2, False, False)]
  assert loop(2, None, 1) == [1, 'evaluate', *stop, 2, 'evaluate', *end, ('save', 2, False, False)]
  again = [('validate', 1), ('save', 1, True, False)]  # a pass that was stopped is repeated
  assert loop(2, start=1, due_before=True) == [*again, 2, ('validate', 2), 'evaluate', *end, ('save', 2, False, False)]
  assert loop(1, start=1, due_before=True) == [*again, 'finish', ('save', 1, False, False)]


def test_a_validation_that_is_stopped_is_due_when_the_run_resumes():
  trainer, saved = make_trainer(validation_due=False, validated_step=-1), []
  session = trainer.session = Steps(3)
  trainer.run.validation, trainer.run.train = 'batches', TrainConfig(evaluate_every=1)

  def stopped():
    raise Stopped

  trainer._take_step, trainer._validate = session.advance, stopped
  trainer._save = lambda again=False: saved.append((session.step, again, trainer.validation_due))
  with pytest.raises(Stopped):
    trainer.run_to_end()
  assert saved == [(1, False, True)]


@pytest.mark.parametrize('one_at_a_time', [True, False])
def test_a_step_is_dispatched_before_the_metrics_of_the_one_before_are_fetched(monkeypatch, one_at_a_time):
  trainer = make_trainer(one_at_a_time=one_at_a_time, state='state 0', pending='pending 0', count_flops=None)
  session = trainer.session = Steps(9)
  events, note = session.events, lambda what: lambda *arguments: session.events.append((what, *arguments))
  batch = types.SimpleNamespace(tokens_BT=np.zeros((8, 4)))
  trainer.iterator = type('Batches', (), {'__next__': lambda self: batch, 'get_state': lambda self: f'iterator after {session.step}'})()
  trainer.run.mesh = 'mesh'
  monkeypatch.setattr(trainer_lib.sharding, 'put_local', lambda host, mesh: host if mesh == 'mesh' else None)
  monkeypatch.setattr(trainer_lib.jax, 'block_until_ready', note('wait'))
  trainer._compile, trainer._write_pending = note('compile'), note('write')
  trainer._pending_step = lambda host, output: ('pending', host is batch, output)

  def train_step(state, given):
    events.append(('train', state, given is batch))
    return f'state {session.step + 1}', f'output {session.step + 1}'

  trainer.train_step = train_step
  for step in (1, 2):
    trainer._take_step()
    assert events == [
      'data',
      *([('compile', batch)] if step == 1 else []),
      *([('wait', f'state {step - 1}')] if one_at_a_time else []),
      ('before', step - 1),
      ('train', f'state {step - 1}', True),
      'compile' if step == 1 else 'step',
      ('write',),
      ('after', step, f'output {step}'),
      'step',
    ]
    assert (trainer.state, trainer.iterator_state) == (f'state {step}', f'iterator after {step}')
    assert trainer.pending == ('pending', True, f'output {step}')
    events.clear()


def test_the_first_shape_is_checked_together_with_validation(monkeypatch):
  """And with a checkpoint, of which the state is copied next to either of them."""
  checked, saves = [], []

  def check(what, memory, mesh, log, remedies):
    checked.append((what, memory, mesh, remedies.args))
    return f'fit of {what}'

  monkeypatch.setattr(trainer_lib.memory_lib, 'check', check)
  monkeypatch.setattr(trainer_lib.memory_lib, 'check_save', lambda *arguments: saves.append(arguments[:4]))
  monkeypatch.setattr(trainer_lib.sharding, 'batch_shards', lambda mesh: 4)
  monkeypatch.setattr(trainer_lib.sharding, 'put_local', lambda batch, mesh: batch)
  call = lambda name: types.SimpleNamespace(prepare=lambda *arguments: (name, *arguments))
  batch, other = (types.SimpleNamespace(tokens_BT=np.zeros(shape)) for shape in ((8, 16), (12, 5)))
  trainer = make_trainer(train_step=call('train'), evaluate_step=call('evaluate'), state=types.SimpleNamespace(params='params'))
  trainer.run.mesh, trainer.run.validation, trainer.compiled_rows = 'mesh', [other, batch], {8}
  trainer.run.checkpointing = types.SimpleNamespace(asynchronous='asynchronous')
  trainer._compile(batch)
  fits = ['fit of run: a step of 8 x 16 tokens', 'fit of run: validation of 12 x 5 tokens']
  assert saves == [('run', trainer.state, 'asynchronous', fits)]
  model, config = trainer.run.model, trainer.run.train
  step = ('run: a step of 8 x 16 tokens', ('train', trainer.state, batch), 'mesh', (model, config, 2))
  assert checked == [step, ('run: validation of 12 x 5 tokens', ('evaluate', 'params', other), 'mesh', (model, config, 3))]
  for rows, validation in (({8, 9}, [other]), ({8}, None)):
    checked.clear()
    trainer.compiled_rows, trainer.run.validation = rows, validation
    saves.clear()
    trainer._compile(batch)
    assert checked == [step] and len(saves) == (rows == {8})  # before the first step alone


class Opened:
  """A session that notes what a trainer asks of it."""

  def __init__(self, saved=None):
    self.resumed, self.saved, self.asked = saved is not None, saved, []

  def check_space(self, abstract, evaluate_every):
    self.asked.append((abstract, evaluate_every))

  def restore(self, abstract):
    return f'restored {abstract}', self.saved

  def open_logs(self, *arguments):
    self.asked.append(arguments)


def started(monkeypatch, session, validation=None, platform='gpu', **changes):
  """Return a new trainer of a run of five steps."""

  class Iterator:
    at = 'start'

    def set_state(self, state):
      self.at = state

    def get_state(self):
      return self.at

  read = []
  monkeypatch.setattr(
    trainer_lib.pipeline, 'iterate', lambda batches, *, threads, prefetch: read.append((batches, threads, prefetch)) or Iterator()
  )
  functions = types.SimpleNamespace(train='train', evaluate='evaluate', abstract='abstract', init=lambda key, start: (key, start))
  monkeypatch.setattr(trainer_lib, '_functions', lambda run: functions)
  monkeypatch.setattr(trainer_lib, 'executables', lambda function: f'executables of {function}')
  monkeypatch.setattr(trainer_lib.jax.random, 'key', lambda seed: f'key {seed}')
  monkeypatch.setattr(trainer_lib.flops, 'peak_flops', lambda device: (50.0, 'table'))
  run = types.SimpleNamespace(
    train=TrainConfig(evaluate_every=3, log_every=7, learning_rate=1.0, warmup_ratio=0.4, final_lr_ratio=0.0),
    steps=5,
    validation=validation,
    objective=RANKING,
    profile=types.SimpleNamespace(peak_flops=None),
    batches='batches',
    threads=2,
    prefetch=6,
    seed=4,
    load_start=None,
    frozen={},
    mesh=types.SimpleNamespace(devices=np.array([types.SimpleNamespace(platform=platform)], object)),
  )
  vars(run).update(changes)
  trainer = trainer_lib._Trainer(run, session)
  assert read == [('batches', 2, 6)] and (trainer.train_step, trainer.evaluate_step) == ('executables of train', 'executables of evaluate')
  return trainer


def test_a_new_run_starts_from_its_seed(monkeypatch):
  session = Opened()
  trainer = started(monkeypatch, session)
  assert trainer.state == ('key 4', None) and session.asked == [('abstract', None), (7, False)]
  np.testing.assert_allclose(trainer.learning_rates, [0, 0.5, 1, 0.75, 0.25], atol=1e-6)
  assert (trainer.tokens, trainer.flops, trainer.validation, trainer.validated_step, trainer.validation_due) == (0, 0.0, {}, -1, False)
  assert (trainer.iterator_state, trainer.pending, trainer.compiled_rows, trainer.one_at_a_time) == ('start', None, set(), False)
  assert (trainer.peak_flops, trainer.peak_source) == (50.0, 'table') and trainer.count_flops is trainer_lib.flops.reward_model_flops
  session = Opened()
  profile = types.SimpleNamespace(peak_flops=9.0)
  trainer = started(monkeypatch, session, [1], 'cpu', load_start=lambda: {'decoder': 1}, objective=NEXT_TOKEN, profile=profile)
  assert trainer.state == ('key 4', {'decoder': 1}) and session.asked == [('abstract', 3), (7, False)] and trainer.one_at_a_time
  assert (trainer.peak_flops, trainer.peak_source) == (9.0, 'profile.peak_flops')
  assert trainer.count_flops is trainer_lib.flops.language_model_flops


@pytest.mark.parametrize(
  ('validation', 'due', 'expected'), [([1], True, True), (None, True, False), ([1], False, False), ([1], None, False)]
)
def test_a_resumed_run_continues_where_it_was(monkeypatch, validation, due, expected):
  saved = {'iterator': 'third batch', 'tokens': 70, 'flops': 3.0, 'validated': {'validation_loss': 2.0}}
  session = Opened(saved if due is None else saved | {'validation_due': due})  # older checkpoints have none
  trainer = started(monkeypatch, session, validation, load_start=lambda: pytest.fail('a resumed run loads no start'))
  assert trainer.state == 'restored abstract' and trainer.iterator.at == trainer.iterator_state == 'third batch'
  assert (trainer.tokens, trainer.flops, trainer.validation) == (70, 3.0, {'validation_loss': 2.0})
  assert trainer.validation_due is expected and session.asked[1] == (7, expected)


def test_runs_that_differ_in_their_schedule_share_compiled_functions(monkeypatch):
  built = []

  def build(*arguments):
    built.append(arguments)
    return trainer_lib.step_lib.StepFunctions('init', 'train', 'evaluate', 'abstract', 'frozen')

  monkeypatch.setattr(trainer_lib.step_lib, 'build', build)
  monkeypatch.setattr(trainer_lib.step_lib, 'scheduled_init', lambda *arguments: arguments)
  monkeypatch.setattr(trainer_lib, 'make_optimizer', lambda *arguments: arguments)
  trainer_lib._compiled.cache_clear()
  configs = [TrainConfig(learning_rate=rate, gradient_accumulation_steps=2, b1=b1) for rate, b1 in ((0.1, 0.9), (0.2, 0.9), (0.2, 0.8))]
  make = lambda train, steps: types.SimpleNamespace(objective=RANKING, model=ModelConfig(), train=train, mesh='mesh', steps=steps)
  try:
    found = [trainer_lib._functions(make(config, steps)) for steps, config in enumerate(configs)]
  finally:
    trainer_lib._compiled.cache_clear()
  assert found == [(('init', config, steps), 'train', 'evaluate', 'abstract', 'frozen') for steps, config in enumerate(configs)]
  assert built == [
    (RANKING, ModelConfig(), (trainer_lib.without_schedule(config), 1), 'mesh', 2, LoraConfig()) for config in (configs[0], configs[2])
  ]


class PairRows(NamedTuple):
  w: jnp.ndarray
  index: jnp.ndarray
  pairs: jnp.ndarray


@pytest.mark.parametrize(('accumulation', 'weights'), [(1, [1.0]), (2, [3.0, 0.0, 2.0, 1.0]), (1, [0.0, 0.0]), (3, [0.5, 1.0, 1.0])])
def test_sums_are_divided_by_the_count_of_the_whole_batch(accumulation, weights):
  """The loss of a row is w x p^2 for a parameter p; without anything to count nothing is divided by zero."""

  class Model(nnx.Module):
    def __init__(self):
      self.p = nnx.Param(jnp.float32(3.0))

  def loss_sums(model, batch):
    return jnp.sum(batch.w * model.p[...] ** 2), {'weight': jnp.sum(batch.w)}, {'index': batch.index, 'pairs': batch.pairs}

  pairs = np.arange(4 * len(weights)).reshape(-1, 2, 2)
  batch = PairRows(jnp.array(weights), jnp.arange(len(weights)), jnp.array(pairs))
  objective = Objective('reward', loss_sums, lambda batch: jnp.sum(batch.w > 0))
  graphdef, state = nnx.split(Model())
  metrics, rows, grads = step_lib._loss_and_grads(
    lambda params, number: nnx.merge(graphdef, params), objective, nnx.to_pure_dict(state), batch, accumulation
  )
  mean = sum(weights) / max(sum(w > 0 for w in weights), 1)
  assert {name: float(value) for name, value in metrics.items()} == pytest.approx({'loss': 9 * mean, 'weight': mean})
  assert float(grads['p']) == pytest.approx(6 * mean) and rows['index'].tolist() == list(range(len(weights)))
  np.testing.assert_array_equal(rows['pairs'], pairs)


def test_a_step_is_one_micro_batch_by_default():
  assert inspect.signature(step_lib.build).parameters['accumulation'].default == 1 == TrainConfig().gradient_accumulation_steps
