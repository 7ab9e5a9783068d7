"""Backends of a sweep, with jobs that do next to nothing."""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
import signal
import sys
import threading
import time
import types

import pytest

from polar_jax.config import ConfigError, SweepConfig
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.scaling import fanout, results
from polar_jax.scaling.fanout import JobRunner
from polar_jax.scaling.grid import Job

JOBS = [Job(size, None) for size in ('1x1', '2x2', '3x3')]


def unused(*_):
  raise AssertionError('this backend was not requested')


def run(runner: JobRunner, folder: pathlib.Path, threads: int = 1, **settings) -> dict[str, str | None]:
  ended = fanout.run_jobs(runner, SweepConfig(**settings), folder, JOBS, lambda: None, threads)
  return {job.name: error for job, error in ended}


def test_inline_yields_the_message_of_a_failed_job_and_goes_on(tmp_path):
  order = []

  def call(job):
    order.append(job.name)
    return 'no luck' if job.size == '2x2' else None

  assert run(JobRunner(call, unused, unused), tmp_path) == {'1x1_lm': None, '2x2_lm': 'no luck', '3x3_lm': None}
  assert order == ['1x1_lm', '2x2_lm', '3x3_lm']


def test_inline_runs_as_many_jobs_at_a_time_as_threads(tmp_path):
  together = threading.Barrier(3, timeout=30)  # passes only once three jobs wait for each other

  def call(job):
    together.wait()

  assert set(run(JobRunner(call, unused, unused), tmp_path, threads=3).values()) == {None}


def test_inline_raises_unexpected_errors(tmp_path):
  called = []
  with pytest.raises(ZeroDivisionError):
    run(JobRunner(lambda job: called.append(job) or 1 / 0, unused, unused), tmp_path)
  assert called == JOBS[:1]  # no other one was started


def test_processes_report_the_last_line_of_a_failed_job(tmp_path):
  def command(job, cores):
    script = f'import sys; print("on cores {cores}"); print("polar_jax: no luck", file=sys.stderr); sys.exit({3 * (job.size == "2x2")})'
    return [sys.executable, '-c', script]

  JOBS[0].folder(tmp_path).mkdir(parents=True)  # of an earlier start
  ended = run(JobRunner(unused, command, unused), tmp_path, backend='processes', workers=2)
  log = tmp_path / 'sweep/2x2_lm/log.txt'
  assert ended == {'1x1_lm': None, '2x2_lm': f'no luck (exit status 3, log: {log})', '3x3_lm': None}
  assert 'on cores ' in log.read_text()


def test_core_shares_divide_the_cores_among_workers(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', {0: {0, 1, 2, 5, 7}}.__getitem__)
  assert fanout._core_shares(2) == ['0,2,7', '1,5']
  assert fanout._core_shares(6) == ['0', '1', '2', '5', '7', '0']
  monkeypatch.delattr(os, 'sched_getaffinity')  # as on macOS
  for count, shares in ((3, ['0,2', '1']), (None, ['0', '0'])):
    monkeypatch.setattr(os, 'cpu_count', lambda count=count: count)
    assert fanout._core_shares(2) == shares


@pytest.mark.parametrize('backend', ['inline', 'processes'])
def test_the_table_is_watched_while_jobs_run_and_jobs_share_what_there_is(tmp_path, monkeypatch, backend):
  monkeypatch.setattr(fanout, '_POLL_SECONDS', 0.01)
  watched, cores = [], []
  command = lambda job, own: cores.append(own) or [sys.executable, '-c', 'import time; time.sleep(0.1)']
  runner = JobRunner(lambda job: time.sleep(0.05), command, unused)
  settings = SweepConfig(backend=backend, workers=2)
  ended = list(fanout.run_jobs(runner, settings, tmp_path, JOBS, lambda: watched.append(1), 1))
  assert sorted(job.name for job, _ in ended) == ['1x1_lm', '2x2_lm', '3x3_lm'] and len(watched) >= 3
  assert set(cores) == (set(fanout._core_shares(2)) if backend == 'processes' else set())


def test_processes_stop_after_sigterm_and_those_that_were_saved_have_not_ended(tmp_path, monkeypatch):
  monkeypatch.setattr(fanout, '_POLL_SECONDS', 0.01)
  results_of = JOBS[2].folder(tmp_path)
  results_of.mkdir(parents=True)
  results.write_result(results_of, {'steps': 1})
  ready = tmp_path / 'ready'
  first = f"""import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while not pathlib.Path({str(ready)!r}).exists():
  time.sleep(0.01)
os.kill(os.getppid(), signal.SIGTERM)
sys.exit(75)"""
  second = f"""import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75)))
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)"""
  started, ended, signalled, terminate = [], [], [], fanout._terminate
  monkeypatch.setattr(fanout, '_terminate', lambda running: signalled.append(len(running)) or terminate(running))
  command = lambda job, cores: started.append(job) or [sys.executable, '-c', first if job is JOBS[0] else second]
  with pytest.raises(Preempted, match='1 of 3 runs done, the others saved'):
    for job, error in fanout.run_jobs(
      JobRunner(unused, command, unused), SweepConfig(backend='processes', workers=2), tmp_path, JOBS, lambda: None, 1
    ):
      ended.append((job, error))
  assert started == JOBS[:2] and not ended
  assert len([count for count in signalled if count]) == 1  # a second signal would end one that has saved and is on its way out


def test_a_process_without_output_says_so(tmp_path):
  (tmp_path / fanout.LOG).write_text('\n \n')
  assert fanout._failure(tmp_path, 9) == f'no output (exit status 9, log: {tmp_path / fanout.LOG})'


class FakeRay(types.ModuleType):
  """Runs a task when its result is asked for."""

  def __init__(self, initialized: bool = False):
    super().__init__('ray')
    self.__spec__ = importlib.machinery.ModuleSpec('ray', None)
    self.initialized, self.calls, self.options, self.cancelled, self.waits = initialized, [], None, [], []
    self.exceptions = types.SimpleNamespace(RayError=type('RayError', (Exception,), {}))

  def is_initialized(self):
    return self.initialized

  def init(self, **settings):
    self.calls.append(('init', settings))

  def shutdown(self):
    self.calls.append('shutdown')

  def remote(self, **options):
    self.options = options
    return lambda task: types.SimpleNamespace(remote=lambda *arguments: (task, arguments))

  def wait(self, references, timeout):
    self.waits.append(timeout)
    return references[:1], references[1:]

  def get(self, reference):
    task, arguments = reference
    return task(*arguments)

  def cancel(self, reference, force):
    self.cancelled.append((reference[1][1], force))


def test_ray_runs_each_job_in_a_process_of_its_own_and_reports_its_failure(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', ray := FakeRay())
  places, watched = [], []

  def task(workdir, name):
    places.append((workdir, name))
    if name == '3x3_lm':
      raise ray.exceptions.RayError('the node\n  died ' + 'x' * 400)
    return 'no luck' if name == '2x2_lm' else None

  settings = SweepConfig(backend='ray', cpus=3, gpus=0.5, ray_address='host:1')
  ended = fanout.run_jobs(JobRunner(unused, unused, task), settings, tmp_path, JOBS, lambda: watched.append(1), 1)
  errors = {job.name: error for job, error in ended}
  assert errors == {'1x1_lm': None, '2x2_lm': 'no luck', '3x3_lm': ('the node died ' + 'x' * 400)[:300]}
  assert places == [(str(tmp_path.resolve()), job.name) for job in JOBS] and len(watched) == 3
  assert ray.options == {'num_cpus': 3, 'num_gpus': 0.5, 'max_calls': 1, 'max_retries': 10}
  quiet = {'log_to_driver': False, 'include_dashboard': False, 'configure_logging': False}
  assert ray.calls == [('init', {'address': 'host:1', **quiet}), 'shutdown'] and set(ray.waits) == {1.0}
  monkeypatch.setitem(sys.modules, 'ray', ray := FakeRay(initialized=True))
  assert run(JobRunner(unused, unused, lambda *_: None), tmp_path, backend='ray') == dict.fromkeys(errors) and ray.calls == []


def test_ray_cancels_what_sigterm_leaves_and_counts_what_is_done(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', ray := FakeRay())
  task = lambda workdir, name: os.kill(os.getpid(), signal.SIGTERM) if name == '1x1_lm' else None
  with pytest.raises(Preempted, match='1 of 3 runs done'):
    run(JobRunner(unused, unused, task), tmp_path, backend='ray')
  assert ray.cancelled == [('2x2_lm', False), ('3x3_lm', False)] and ray.calls[-1] == 'shutdown'
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"run: pip install 'polar_jax\[ray\]'"):
    run(JobRunner(unused, unused, task), tmp_path, backend='ray')


def test_an_error_of_one_job_lets_the_others_save_and_stop(tmp_path):
  waits, stopped = threading.Event(), []

  def call(job):
    if job is JOBS[0]:
      waits.wait(10)
      raise ZeroDivisionError
    with SigtermFlag() as stop:  # as a run does in its thread
      waits.set()
      stopped.append(stop.wait(10))

  with pytest.raises(ZeroDivisionError):
    run(JobRunner(call, unused, unused), tmp_path, threads=2)
  assert stopped[0]


def test_processes_are_ended_after_an_error_of_this_one(tmp_path):
  script = f"""import os, pathlib, time
pathlib.Path({str(tmp_path)!r}, 'new').write_text(str(os.getpid()))
os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})
time.sleep(60)"""

  def watch():
    if (tmp_path / 'pid').exists():
      raise ZeroDivisionError

  runner = JobRunner(unused, lambda job, cores: [sys.executable, '-c', script], unused)
  with pytest.raises(ZeroDivisionError):
    list(fanout.run_jobs(runner, SweepConfig(backend='processes', workers=1), tmp_path, JOBS[:1], watch, 1))
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / 'pid').read_text()), 0)
