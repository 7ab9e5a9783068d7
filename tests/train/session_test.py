"""The session of a run: the files on disk when a checkpoint is saved, and how a run stops, ends and resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.checkpoints import space
from polar_jax.config import CheckpointingConfig, ConfigError, ProfileConfig
from polar_jax.runtime import heartbeat, preemption
from polar_jax.runtime.preemption import Preempted
from polar_jax.train.metrics import SAMPLES, read_metrics
from polar_jax.train.session import Session


class State(NamedTuple):
  params: Any


@pytest.fixture
def settings(tmp_path):
  """Settings of a run of four steps, whose logs and checkpoints are in different folders."""
  return types.SimpleNamespace(
    name='run',
    folder=tmp_path / 'logs',
    home=tmp_path / 'home',
    checkpointing=CheckpointingConfig(every_steps=2),
    profile=ProfileConfig(),
    fingerprint={'objective': 'none'},
    log=lambda _: None,
    steps=4,
  )


def start(settings):
  """Return a session with open logs and the state to continue with."""
  session = Session(settings, 'loss', best_is_lower=True)
  state, tokens = State({'w': jnp.zeros(3)}), 0
  if session.resumed:
    state, data = session.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
    tokens = data['tokens']
  session.open_logs(log_every=100)
  return session, state, tokens


def run_until(session, state, tokens, last, kill_at=None):
  """Take steps, each of which adds one to the parameters and ten tokens."""
  state_now = [state, tokens]
  save = lambda: session.save(state_now[0], {'tokens': state_now[1]}, {})
  with session.running():
    while not session.is_complete and session.step < last:
      state_now = [State(jax.tree.map(lambda x: x + 1, state_now[0].params)), state_now[1] + 10]
      session.advance()
      session.metrics.write({'step': session.step, 'step_seconds': 1.0, 'tokens': state_now[1]})
      if session.step == kill_at:
        os.kill(os.getpid(), signal.SIGTERM)
      if session.is_save_due:
        save()
      session.stop_if_preempted(save, finished=session.is_complete)
    return session.finish(save, lambda timing: {'tokens': state_now[1], **timing})


def test_records_are_on_disk_before_their_steps_are_saved(settings, monkeypatch):
  session, state, _ = start(settings)
  samples, on_disk = session.open_log(SAMPLES), []

  def save(step, *_, **__):
    on_disk.append((step, *(len(read_metrics(f, file)) for f in (settings.folder, settings.home) for file in ('metrics.jsonl', SAMPLES))))

  monkeypatch.setattr(session.checkpointer, 'save', save)
  with session.running():
    for _ in range(2):
      session.advance()
      session.metrics.write({'step': session.step})
      samples.write({'step': session.step})
      session.save(state, {}, {})
  session.close()
  assert on_disk == [(1, 1, 1, 1, 1), (2, 2, 2, 2, 2)]


def test_a_stopped_session_resumes_and_ends_like_an_uninterrupted_one(settings):
  session, *start_values = start(settings)
  assert not session.resumed and session.step == 0
  with pytest.raises(Preempted, match=r'run: stopped by SIGTERM, saved at step 3\.'):
    run_until(session, *start_values, last=4, kill_at=3)
  session.close()
  assert not (settings.folder / 'summary.json').exists()

  session, *start_values = start(settings)
  assert session.resumed and session.step == session.first_step == 3 and start_values[1] == 30
  np.testing.assert_array_equal(start_values[0].params['w'], 3.0)
  summary = run_until(session, *start_values, last=4)
  session.close()
  assert 0 < summary['seconds'] < 600  # of this start
  assert summary['tokens'] == 40 and json.loads((settings.home / 'summary.json').read_text()) == summary
  assert [record['step'] for record in read_metrics(settings.folder)] == [1, 2, 3, 4]

  session, *start_values = start(settings)  # a finished run keeps its summary
  assert session.is_complete and run_until(session, *start_values, last=4) == summary
  session.close()


def test_sigterm_in_the_last_step_lets_the_run_end_but_not_the_next_stage_start(settings):
  session, *start_values = start(settings)
  with pytest.raises(Preempted, match=r'saved at step 4\.'):
    run_until(session, *start_values, last=4, kill_at=4)
  session.close()
  assert json.loads((settings.folder / 'summary.json').read_text())['tokens'] == 40


def test_checkpoints_are_due_by_steps_but_not_at_the_end(settings):
  session, *_ = start(settings)
  due = []
  with session.running():
    for _ in range(settings.steps):
      session.advance()
      due.append(session.is_save_due)
  session.close()
  assert due == [False, True, False, False]


def test_a_stop_before_the_first_step_saves_nothing(settings):
  session, *_ = start(settings)
  stopped = pytest.raises(Preempted, match=r'run: stopped by SIGTERM, before its first step\. The same command')
  with stopped, session.running(), session.saving_if_stopped(lambda: pytest.fail('there is nothing to save')):
    os.kill(os.getpid(), signal.SIGTERM)
    preemption.check()
  session.close()


def test_an_evaluation_that_was_stopped_is_logged_and_ranked_once(settings):
  session, state, _ = start(settings)
  with session.running():
    for step in (1, 2):
      session.advance()
      session.metrics.write({'step': step, 'loss': 0.0})
      session.save(state, {'tokens': 0}, {})
    session.metrics.write({'step': 2, 'validation_loss': 1.0})
  session.close()
  session = Session(settings, 'loss', best_is_lower=True)
  session.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
  session.open_logs(100, evaluates_again=True)
  assert [record['step'] for record in read_metrics(settings.folder)] == [1, 2]
  session.save(state, {'tokens': 7}, {'loss': 0.5}, again=True)
  session.close()
  session, _, tokens = start(settings)
  assert tokens == 7 and session.step == 2
  session.close()


def test_the_only_checkpoint_is_never_given_up_for_another(settings):
  session, state, _ = start(settings)
  with session.running():
    session.advance()
    session.save(state, {'tokens': 1}, {})
    session.checkpointer.wait()
    session.save(state, {'tokens': 2}, {}, again=True)
  session.close()
  session, _, tokens = start(settings)
  assert tokens == 1
  session.close()


def test_checkpoints_that_do_not_fit_the_disk_are_refused_before_the_first_step(settings, monkeypatch):
  session, *_ = start(settings)
  usage = types.SimpleNamespace(free=4 * 3 * 4 - 1)  # a state has three float32; checkpoints: keep 2, keep_best 1, one being written
  monkeypatch.setattr(space.shutil, 'disk_usage', lambda _: usage)
  abstract = State({'w': jax.ShapeDtypeStruct((3,), jnp.float32)})
  settings.steps = 100
  with pytest.raises(
    ConfigError, match=r'run: checkpoints will take up to 48 bytes .* has 47 bytes free: make room, .* lower check'
  ) as error:
    session.check_space(abstract)
  assert len(str(error.value)) <= 500
  settings.checkpointing = CheckpointingConfig(every_steps=2, keep=1)  # a remedy of the message
  session.check_space(abstract)
  settings.checkpointing, settings.steps = CheckpointingConfig(every_steps=40), 100
  session.check_space(abstract)  # three checkpoints in all
  session.check_space(State({'w': jax.ShapeDtypeStruct((3,), jnp.float32)}), evaluate_every=None)
  with pytest.raises(ConfigError):
    session.check_space(abstract, evaluate_every=50)
  session.close()


@pytest.mark.parametrize(
  ('on_disk', 'steps', 'evaluate_every', 'count'),
  [
    ([], 100, None, 4),  # keep 2, keep_best 1 and one being written
    ([2, 4], 100, None, 2),
    ([2, 4, 6, 8, 10], 100, None, 0),  # older ones make room
    ([2], 6, None, 2),  # those of steps 4 and 6
    ([2, 4], 5, None, 1),
    ([], 1, None, 1),
  ],
)
def test_only_checkpoints_that_are_not_there_yet_need_room(settings, monkeypatch, on_disk, steps, evaluate_every, count):
  session, *_ = start(settings)
  checked = []
  monkeypatch.setattr(space, 'check', lambda *arguments: checked.append(arguments))
  settings.steps, checkpointer = steps, session.checkpointer
  session.checkpointer = types.SimpleNamespace(steps=on_disk)
  abstract = State({'w': jax.ShapeDtypeStruct((3,), jnp.float32)})
  session.check_space(abstract, evaluate_every)
  monkeypatch.setattr('polar_jax.train.session.jax.process_index', lambda: 1)
  session.check_space(abstract, evaluate_every)  # the first process alone looks
  assert checked == [('run', settings.home, settings.checkpointing, 12 * count)]
  session.checkpointer = checkpointer
  session.close()


def test_records_before_the_first_step_stay_only_if_there_is_a_checkpoint(settings):
  settings.folder.mkdir(parents=True)
  (settings.folder / 'metrics.jsonl').write_text('{"step": 0, "evaluation_raw": 1.0}\n{"step": 1, "step_seconds": 2.5}\n')
  session, *_ = start(settings)
  assert read_metrics(settings.folder) == [] and session.clock.seconds['lost'] == 2.5
  assert not session.is_complete and session.steps_taken == 0
  session.close()


def test_a_summary_of_a_run_that_took_no_step_is_written_if_it_is_missing(settings):
  session, *values = start(settings)
  summary = run_until(session, *values, last=4)
  session.close()
  assert set(summary) == {'tokens', 'seconds', 'seconds_by_part', 'goodput'}
  assert (settings.folder / 'summary.json').read_text() == json.dumps(summary, indent=2) + '\n'
  assert all(value == round(value, 3) for value in summary['seconds_by_part'].values())
  (settings.folder / 'summary.json').unlink()
  (settings.home / 'summary.json').unlink()
  session, *values = start(settings)
  assert run_until(session, *values, last=4)['tokens'] == 40 and (settings.home / 'summary.json').exists()
  session.close()


def test_only_the_first_process_writes_a_summary(settings, monkeypatch):
  session, *values = start(settings)
  write, first = session._write_summary, jax.process_index

  def as_another(summarize):
    monkeypatch.setattr('polar_jax.train.session.jax.process_index', lambda: 1)
    try:
      return write(summarize)
    finally:
      monkeypatch.setattr('polar_jax.train.session.jax.process_index', first)

  session._write_summary = as_another
  assert run_until(session, *values, last=4) == {} and not (settings.folder / 'summary.json').exists()
  session.close()


def test_an_evaluation_of_the_restored_step_stays_by_default(settings):
  session, state, _ = start(settings)
  with session.running():
    session.advance()
    session.metrics.write({'step': 1, 'validation_loss': 1.0})
    session.open_log(SAMPLES).write({'step': 1, 'validation_loss': 1.0})
    session.save(state, {'tokens': 0}, {})
  session.close()
  session, *_ = start(settings)
  session.open_log(SAMPLES)
  assert [len(read_metrics(settings.folder, file)) for file in ('metrics.jsonl', SAMPLES)] == [1, 1]
  session.close()


def test_another_machine_continues_with_the_logs_that_were_kept(settings):
  session, state, _ = start(settings)
  with session.running():
    for step in (1, 2):
      session.advance()
      session.metrics.write({'step': step})
      session.save(state, {'tokens': step}, {})
  session.close()
  shutil.rmtree(settings.folder)
  session, *_ = start(settings)
  assert [record['step'] for record in read_metrics(settings.folder)] == [1, 2]
  session.close()


def test_a_run_ends_or_stops_once_its_checkpoint_is_written(settings):
  session, *_ = start(settings)
  events, checkpointer = [], session.checkpointer
  session.checkpointer = types.SimpleNamespace(wait=lambda: events.append('wait') or time.sleep(0.02))
  save = lambda: events.append('save')
  with session.running():
    session.advance()
    assert heartbeat._position[:2] == ('run', 1)
    summary = session.finish(save, lambda timing: events.append('summarize') or timing)
    assert summary['seconds_by_part']['save'] >= 0.02 and summary['seconds'] >= 0.02
    assert events == ['save', 'wait', 'summarize']
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match=r'saved at step 1\.'):
      session.stop_if_preempted(save, finished=False)
  assert events[3:] == ['save', 'wait']
  session.checkpointer = checkpointer
  session.close()


def test_everything_that_was_opened_is_closed(settings):
  session, *_ = start(settings)
  samples, closed = session.open_log(SAMPLES), []
  opened = {'profiler': session.profiler, 'progress': session.progress, 'checkpointer': session.checkpointer}
  for name, part in opened.items():
    part.close = lambda name=name, close=part.close: closed.append(name) or close()
  session.close()
  assert closed == ['profiler', 'progress', 'checkpointer'] and session.metrics._file.closed and samples._file.closed


def test_progress_begins_at_the_restored_step(settings, monkeypatch):
  opened = []
  monkeypatch.setattr(
    'polar_jax.train.session.StepProgress', lambda *given: opened.append(given) or types.SimpleNamespace(close=lambda: None)
  )
  session, state, _ = start(settings)
  with session.running():
    session.advance()
    session.save(state, {'tokens': 0}, {})
  session.close()
  start(settings)[0].close()
  assert opened == [('run', 4, 0, 100), ('run', 4, 1, 100)]


def test_what_is_saved_replaces_nothing_by_default(settings):
  session, state, _ = start(settings)
  calls, checkpointer = [], session.checkpointer
  session.checkpointer = types.SimpleNamespace(save=lambda *given, again: calls.append((*given, again)))
  session.advance()
  session.save(state, {'tokens': 7}, {'loss': 0.5})
  session.save(state, {'step': 9}, {}, again=True)
  seconds, fingerprint = session.clock.seconds, settings.fingerprint
  assert calls == [
    (1, state, {'step': 1, 'tokens': 7, 'seconds': seconds}, fingerprint, {'loss': 0.5}, False),
    (1, state, {'step': 9, 'seconds': seconds}, fingerprint, {}, True),
  ]
  session.checkpointer = checkpointer
  session.close()
