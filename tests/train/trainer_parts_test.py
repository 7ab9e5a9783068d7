"""The methods of the trainer one by one, with the step, the session and the clock replaced."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest

from polar_jax.config import TrainConfig
from polar_jax.ppo import trainer as ppo_trainer
from polar_jax.sharding import Share
from polar_jax.train import trainer as trainer_lib
from polar_jax.train.objectives import NEXT_TOKEN, RANKING
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
  trainer.run = types.SimpleNamespace(name='run', train=config, num_examples=48, plan=plan, log=lines.append, planned_rows=8, model='model')
  trainer.written, trainer.histograms, trainer.shown, trainer.lines = written, histograms, shown, lines
  trainer.learning_rates, trainer.tokens, trainer.flops, trainer.peak_flops = np.arange(10) / 8, 100, 5.0, 50.0
  trainer.fetched_at, trainer.compiled_rows = 10.0, set()
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
  trainer = make_trainer(pending=pending(step, {'rewards_BPC': rewards, 'index': np.array([[4, 7], [2, -1]])}))
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
  rows = {'index': np.array([[4, 7], [2, -1], [1, 9]]), 'rewards_BPC': np.zeros((3, 2, 2))}
  trainer = make_trainer(pending=pending(**{name: float('nan')}, rows=rows))
  with pytest.raises(NonFiniteError, match=r'run: step 4 has .*: none; the batch has examples \[1, 2, 4, 7, 9\]'):
    trainer._write_pending()
  assert not trainer.written and trainer.tokens == 100
  rows['rewards_BPC'][1, 1, 0], rows['rewards_BPC'][0, 0, 1] = np.inf, np.nan  # that of a padded pair spoils its row
  with pytest.raises(NonFiniteError, match=r'non-finite outputs: examples \[2, 4, 7\]'):
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


@pytest.mark.parametrize(('validated_step', 'ranked'), [(4, True), (3, False)])
def test_a_checkpoint_is_ranked_by_a_validation_of_its_own_step(validated_step, ranked):
  calls = []
  trainer = make_trainer(pending=None, iterator_state={'at': 3}, validation={'validation_loss': 1.0}, validation_due=True, state='state')
  trainer.validated_step = validated_step
  trainer.session.save = lambda *arguments, again: calls.append((*arguments, again))
  trainer._save(again=True)
  data = {'iterator': {'at': 3}, 'tokens': 100, 'flops': 5.0, 'validated': {'validation_loss': 1.0}, 'validation_due': True}
  assert calls == [('state', data, {'validation_loss': 1.0} if ranked else {}, True)]


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
