"""Detection of the cluster, and real processes on loopback: the same losses as one process, and no hang when one is killed."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import fast_compilation
import jax
import numpy as np
import pytest
import small_run

from polar_jax import sharding
from polar_jax.config import ConfigError, DistributedConfig, MeshConfig
from polar_jax.ppo import trainer as ppo_loop
from polar_jax.runtime import distributed
from polar_jax.runtime.distributed import Cluster, detect
from polar_jax.train import trainer as train_loop
from polar_jax.types import UserError

STEPS = 24  # enough for a signal sent after the second to arrive before the last, on a fast machine too
NONE = DistributedConfig()
SLURM = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0', 'SLURM_JOB_ID': '7', 'SLURM_STEP_NODELIST': 'a[1-4]', 'SLURM_LOCALID': '0'}


def test_detect_returns_none_for_one_process():
  assert detect(NONE, {}) is None
  assert detect(NONE, {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'}) is None
  assert detect(NONE, {'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'}) is None


def test_detect_prefers_settings_to_the_environment():
  environ = SLURM | {'SLURM_PROCID': '1'}
  assert detect(NONE, environ) == Cluster('SLURM job 7', method='slurm')
  assert detect(DistributedConfig('a:1', 2, 1), environ) == Cluster('settings', 'a:1', 2, 1)
  jax_own = {'JAX_COORDINATOR_ADDRESS': 'b:2', 'JAX_NUM_PROCESSES': '3', 'JAX_PROCESS_ID': '2'}
  assert detect(NONE, environ | jax_own) == Cluster('JAX_COORDINATOR_ADDRESS', 'b:2', 3, 2)
  assert detect(NONE, {'TPU_WORKER_HOSTNAMES': 'a,b'}) == Cluster('TPU slice (TPU_WORKER_HOSTNAMES)')
  # A shell inside a job is one process, however many tasks the job has.
  assert detect(NONE, environ | {'SLURM_JOB_NAME': 'interactive'}) is None


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (DistributedConfig('a:1', 2), 'belong together'),
    (DistributedConfig(None, 2, 1), 'belong together'),
    (DistributedConfig('a', 2, 1), 'host:port'),
    (DistributedConfig('a:1', 2, 2), 'one of 0 to 1'),
  ],
)
def test_detect_refuses_inconsistent_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    detect(settings, {})


@pytest.mark.parametrize('name', ['SLURM_STEP_NODELIST', 'SLURM_LOCALID', 'SLURM_JOB_ID'])
def test_a_batch_script_without_srun_is_told_what_to_do(name):
  environ = {key: value for key, value in SLURM.items() if key != name}
  with pytest.raises(
    UserError, match=rf'^SLURM_NTASKS is 4, but srun did not start this process \({name} is not set\): .*set SLURM_NTASKS=1'
  ):
    detect(NONE, environ)
  assert detect(NONE, environ | {'SLURM_NTASKS': '1'}) is None  # the advice
  assert detect(NONE, SLURM) == Cluster('SLURM job 7', method='slurm')
  with pytest.raises(UserError, match='SLURM_PROCID is 4, but SLURM_NTASKS is 4'):
    detect(NONE, SLURM | {'SLURM_PROCID': '4'})


def test_detect_names_variables_that_are_not_numbers():
  with pytest.raises(UserError, match=r"SLURM_NTASKS is 'two'"):
    detect(NONE, {'SLURM_NTASKS': 'two'})
  with pytest.raises(UserError, match='JAX_PROCESS_ID'):
    detect(NONE, {'JAX_COORDINATOR_ADDRESS': 'b:2', 'JAX_NUM_PROCESSES': '3'})


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp('distributed'), np.random.default_rng(0)
  (folder / 'examples.jsonl').write_text(small_run.triplets(rng, 50, longest=5))
  settings = {'tokenizer.kind': 'byte', 'data.triplets': 'examples.jsonl', 'data.validation': 'examples.jsonl', 'data.row_length': 32}
  settings['checkpointing.every_steps'] = 2
  small_run.write_config(folder / 'small.py', settings, steps=STEPS, batch_size=8, evaluate_every=12)
  return folder


@contextlib.contextmanager
def started(world: pathlib.Path, workdir: str, processes: int, *settings: str, of_last: tuple[str, ...] = (), flags: str = ''):
  """Start processes. `flags` of XLA: by default they run optimized, as users do: other code rounds differently on other meshes."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  environment = {k: v for k, v in fast_compilation.environment(XLA_FLAGS=flags).items() if not k.startswith(('SLURM', 'TPU'))}
  line = [sys.executable, '-m', 'polar_jax.main', '--config=small.py', f'--workdir={workdir}', *settings]
  running = []
  for process in range(processes):
    own = [f'--config.distributed.coordinator=127.0.0.1:{port}', f'--config.distributed.processes={processes}']
    own = [*own, f'--config.distributed.process={process}'] if processes > 1 else []
    own += of_last if process == processes - 1 else ()
    output = (world / f'{workdir}_{process}.txt').open('w')
    running.append(subprocess.Popen([*line, *own], cwd=world, env=environment, stdout=output, stderr=subprocess.STDOUT))
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.wait()


def output_of(world: pathlib.Path, workdir: str, process: int) -> str:
  return (world / f'{workdir}_{process}.txt').read_text()


def wait_for(path: pathlib.Path, running: list[subprocess.Popen], world: pathlib.Path, workdir: str) -> None:
  deadline = time.monotonic() + 200
  while not (path.exists() and path.stat().st_size):
    assert all(process.poll() is None for process in running) and time.monotonic() < deadline, output_of(world, workdir, 0)
    time.sleep(0.02)


def rows_of(world: pathlib.Path, workdir: str) -> dict[str, list[float]]:
  lines = [json.loads(line) for line in (world / workdir / 'pretrain/metrics.jsonl').read_text().splitlines()]
  return {name: [line[name] for line in lines if name in line] for name in ('loss', 'grad_norm', 'validation_loss', 'tokens')}


def losses(world: pathlib.Path, workdir: str) -> dict[str, list[float]]:
  return {name: values for name, values in rows_of(world, workdir).items() if name != 'tokens'}


@pytest.fixture(scope='module')
def alone(world):
  with started(world, 'alone', 1) as (process,):
    assert process.wait(300) == 0, output_of(world, 'alone', 0)
  return losses(world, 'alone')


@pytest.mark.long
@pytest.mark.parametrize('processes', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_does(world, alone, processes):
  name = f'together{processes}'
  with started(world, name, processes, '--config.mesh.data=2', '--config.mesh.fsdp=-1') as running:
    codes = [process.wait(300) for process in running]
  assert codes == [0] * processes, '\n'.join(output_of(world, name, p) for p in range(processes))
  assert f'distributed: {processes} processes, found by settings' in output_of(world, name, 0)
  theirs = [line for line in output_of(world, name, 1).splitlines() if not line.startswith('[Gloo]')]
  assert theirs == []  # only process 0 prints
  metrics = losses(world, name)
  assert len(metrics['loss']) == STEPS and len(metrics['validation_loss']) == 2
  for metric, values in metrics.items():
    np.testing.assert_allclose(values, alone[metric], rtol=2e-5, err_msg=metric)
  # Real tokens of every step, summed over processes: an example that is read twice or left out would change them.
  assert rows_of(world, name)['tokens'] == rows_of(world, 'alone')['tokens']


@pytest.mark.slow  # the parts: preemption_test.py, train/trainer_test.py
def test_sigterm_to_one_process_saves_on_all_and_the_run_resumes(world, alone):
  settings = ('--config.mesh.data=2', '--config.mesh.fsdp=-1')
  with started(world, 'stopped', 2, *settings) as running:
    wait_for(world / 'stopped/pretrain/checkpoints/2', running, world, 'stopped')
    running[1].send_signal(signal.SIGTERM)
    codes = [process.wait(120) for process in running]
  assert codes == [0, 0], output_of(world, 'stopped', 0) + output_of(world, 'stopped', 1)
  at = re.search(r'stopped by SIGTERM, saved at step (\d+)', output_of(world, 'stopped', 0))
  assert at and 2 <= int(at[1]) < STEPS and (world / 'stopped/pretrain/checkpoints' / at[1]).exists()
  with started(world, 'stopped', 2, *settings) as running:
    assert [process.wait(300) for process in running] == [0, 0]
  assert f'resumed from step {at[1]} of {STEPS}' in output_of(world, 'stopped', 0)
  # On the same mesh the results are equal bit for bit.
  assert losses(world, 'stopped') == losses(world, 'together2')


@pytest.mark.slow  # restoring on another mesh: checkpoints/checkpointer_test.py; a torn checkpoint: train/trainer_test.py
def test_a_run_of_two_processes_resumes_in_one_on_another_mesh(world, alone):
  """The newest checkpoint is also incomplete: the run resumes from the one before it, with the same results."""
  with started(world, 'elastic', 2, '--config.mesh.data=2', '--config.mesh.fsdp=-1') as running:
    wait_for(world / 'elastic/pretrain/checkpoints/6', running, world, 'elastic')
    for process in running:
      process.kill()
      process.wait()
  newest = max(int(path.name) for path in (world / 'elastic/pretrain/checkpoints').iterdir() if path.name.isdigit())
  shutil.rmtree(world / f'elastic/pretrain/checkpoints/{newest}/state')
  with started(world, 'elastic', 1) as (process,):
    assert process.wait(300) == 0, output_of(world, 'elastic', 0)
  output = output_of(world, 'elastic', 0)
  assert f'step {newest} is torn' in output and f'resumed from step {newest - 2} of' in output
  for metric, values in losses(world, 'elastic').items():
    np.testing.assert_allclose(values, alone[metric], rtol=2e-5, err_msg=metric)
  assert rows_of(world, 'elastic')['tokens'] == rows_of(world, 'alone')['tokens']


@pytest.mark.long
def test_hosts_with_different_settings_are_named(world):
  with started(world, 'odd', 3, of_last=('--config.pretrain.learning_rate=1e-2',), flags=fast_compilation.FLAGS) as running:
    assert all(process.wait(120) not in (0, None) for process in running)
  for process in range(3):
    text = output_of(world, 'odd', process)
    assert 'config.pretrain.learning_rate differs between hosts: process 2' in text and 'has 0.01; the others have 0.003' in text, text
  assert not (world / 'odd/config.json').exists()


@pytest.mark.slow  # its report: heartbeat_test.py
def test_a_stopped_process_is_named(world):
  """A stopped process keeps its connections, and the other waits for it. Its own file has its last position."""
  quick = ('--config.pretrain.steps=100000', '--config.distributed.beat=0.2', '--config.distributed.stall=4')
  with started(world, 'still', 2, *quick, flags=fast_compilation.FLAGS) as running:
    wait_for(world / 'still/pretrain/checkpoints/2', running, world, 'still')
    running[1].send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while 'SILENT' not in output_of(world, 'still', 0):  # compiling takes longer than that too
      assert running[0].poll() is None and time.monotonic() < deadline, output_of(world, 'still', 0)
      time.sleep(0.1)
    time.sleep(0.5)  # the report is one write
  text = output_of(world, 'still', 0)
  text = text[text.rindex('no progress for 4 s') :]
  assert re.search(r'process 1 on .*pretrain, step \d+, .*SILENT for .*<- behind', text), text
  assert not re.search(r'process 0 on .*behind', text)


@pytest.mark.long
def test_a_lost_process_stops_the_others_with_a_named_error(world):
  """Immediately: the time limit for a silent process is longer than this test waits."""
  settings = ('--config.pretrain.steps=100000', '--config.checkpointing.every_steps=100000', '--config.distributed.heartbeat=1000')
  with started(world, 'lost', 2, *settings, flags=fast_compilation.FLAGS) as (first, second):
    wait_for(world / 'lost/pretrain/metrics.jsonl', [first, second], world, 'lost')
    second.send_signal(signal.SIGKILL)
    assert first.wait(60) == 1, output_of(world, 'lost', 0)
  text = output_of(world, 'lost', 0)
  assert 'process 0 of 2: another process of the run is gone' in text and 'Traceback' not in text, text


@pytest.mark.slow  # most of a minute, and JAX's part of what the next test above checks
def test_a_silent_process_ends_the_run(world):
  """Its connections stay open, so nothing fails; JAX ends the others after a time without heartbeats."""
  with started(world, 'silent', 2, '--config.pretrain.steps=100000', '--config.distributed.heartbeat=10', flags=fast_compilation.FLAGS) as (
    first,
    second,
  ):
    wait_for(world / 'silent/pretrain/metrics.jsonl', [first, second], world, 'silent')
    second.send_signal(signal.SIGSTOP)
    assert first.wait(60) == 1
  last = output_of(world, 'silent', 0).splitlines()[-1]
  assert re.match('polar_jax: process 0 of 2: .*another process of the run is gone or unreachable.* Start all of them again', last), last


@pytest.mark.slow  # a lost process, above, ends the others in the same way
def test_an_error_of_one_process_ends_all(world):
  """It exits without waiting for the others, which wait for it, and prints why, because the error is its own."""
  (world / 'broken/pretrain').mkdir(parents=True)
  (world / 'broken/pretrain/tensorboard').touch()  # where a folder is to be
  with started(world, 'broken', 2, '--config.distributed.heartbeat=1000', flags=fast_compilation.FLAGS) as running:
    codes = [process.wait(100) for process in running]
  text = output_of(world, 'broken', 0)
  assert codes[0] == 1 and codes[1] not in (0, None), (codes, text)
  assert re.search(r'polar_jax: \S*broken/pretrain/tensorboard/\S*: Not a directory; name a folder', text), text
  assert 'Traceback' not in text and 'NotADirectoryError' in (world / 'broken/error.txt').read_text()


@pytest.mark.long
def test_processes_that_never_connect_are_an_error(world):
  with started(
    world,
    'absent',
    1,
    '--config.distributed.coordinator=127.0.0.1:1',
    '--config.distributed.processes=2',
    '--config.distributed.process=1',
    '--config.distributed.timeout=3',
  ) as (process,):
    assert process.wait(120) not in (0, None)
  assert 'polar_jax: the processes of this run (settings) did not connect within 3 s' in output_of(world, 'absent', 0)


WAIT = """
import sys
from polar_jax.config import DistributedConfig
from polar_jax.runtime import distributed
distributed.start(DistributedConfig(*eval(sys.argv[1]), timeout=2))
"""


@pytest.mark.long
def test_every_process_that_waits_in_vain_says_so():
  """Process 0, and any process that JAX's own detection found: alone, JAX aborts them from C++."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  kept = {k: v for k, v in fast_compilation.environment().items() if not k.startswith(('SLURM', 'TPU'))}
  kept['JAX_COORDINATOR_PORT'] = str(port)
  slurm = SLURM | {'SLURM_NTASKS': '2', 'SLURM_STEP_NODELIST': '127.0.0.1'}
  cases = {
    'settings': ((f'127.0.0.1:{port}', 3, 0), {}),
    'SLURM job 7': ((), slurm | {'SLURM_PROCID': '1'}),
  }
  start = lambda arguments, environment: subprocess.Popen(
    [sys.executable, '-c', WAIT, repr(arguments)], env=kept | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  running = {how: start(*case) for how, case in cases.items()}
  for how, process in running.items():
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2, text
    assert f'polar_jax: the processes of this run ({how}) did not connect within 2 s; start the same command on every host' in text, text
    assert 'stack trace' not in text and 'Traceback' not in text, text


BUSY = """
import sys, time
from polar_jax.config import DistributedConfig
from polar_jax.runtime import distributed
port, process = map(int, sys.argv[1:])
distributed.start(DistributedConfig(f'127.0.0.1:{port}', 2, process, heartbeat=1000))
print('started', flush=True)
while True:
  sum(range(10_000))
"""


def test_an_abort_by_jax_ends_in_words():
  """JAX's client aborts the others when process 0, which has the service, is gone: at once, whatever they do."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = str(free.getsockname()[1])
  running = [
    subprocess.Popen(
      [sys.executable, '-c', BUSY, port, str(p)],
      env=fast_compilation.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for p in range(2)
  ]
  try:
    for process in running:
      assert any(line == 'started\n' for line in process.stdout)
    running[0].kill()
    text, _ = running[1].communicate(timeout=60)
  finally:
    for process in running:
      process.kill()
      process.communicate()
  assert running[1].returncode == 1 and 'another task died' in text, text  # JAX's own line, which may change
  assert text.splitlines()[-1] == (
    'polar_jax: process 1 of 2: JAX ended it, most likely because another process of the run is gone or unreachable (see above). '
    'Start all of them again; they resume from the newest checkpoint.'
  )


@pytest.fixture
def one_of_two(monkeypatch):
  """Makes this process one of two; where it would exit immediately, it raises SystemExit."""

  def leave(status):
    print('left')
    raise SystemExit(status)

  monkeypatch.setattr(distributed.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(distributed.os, '_exit', leave)


AWAITED = jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed:\nconnection closed by peer')
STARTED = ValueError('UNKNOWN: Gloo AllGather failed: Read error: Connection reset by peer')


def test_lost_recognizes_errors_of_collectives(one_of_two):
  assert distributed.lost(AWAITED) and distributed.lost(STARTED)
  assert distributed.lost(jax.errors.JaxRuntimeError('UNAVAILABLE: failed to connect to all addresses'))
  barrier_error = TimeoutError('Timed out while waiting for async_write_complete barrier.')
  assert not distributed.lost(barrier_error)
  barrier_error.__cause__ = jax.errors.JaxRuntimeError('INTERNAL: Barrier failed because: task is set to ERROR: Task 1 heartbeat timeout.')
  assert distributed.lost(barrier_error)
  # Errors of this process alone:
  assert not distributed.lost(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.'))
  assert not distributed.lost(jax.errors.JaxRuntimeError('INTERNAL: the compiler does not know what to do'))
  assert not distributed.lost(ValueError('UNAVAILABLE: Error writing "gs://bucket/state/manifest": connection refused'))


def test_lost_is_false_for_one_process():
  assert not distributed.lost(AWAITED)


@pytest.mark.parametrize(('loop', 'name'), [(train_loop, '_Trainer'), (ppo_loop, 'Trainer')])
@pytest.mark.parametrize('error', [AWAITED, STARTED, KeyError('own')])
@pytest.mark.parametrize('at', ['its start', 'a step'])
def test_a_session_is_closed_unless_others_are_lost(one_of_two, monkeypatch, capsys, loop, name, error, at):
  """Closing would wait for the last checkpoint, which waits for all processes."""

  class Session:
    def __init__(self, *_, **__):
      pass

    def close(self):
      print('closed')

  class Trainer:
    def __init__(self, run, session):
      if at == 'its start':
        raise error

    def run_to_end(self):
      raise error

  monkeypatch.setattr(loop, 'Session', Session)
  monkeypatch.setattr(loop, name, Trainer)
  monkeypatch.setattr(distributed, 'agree', lambda *_: None)
  run = types.SimpleNamespace(
    name='run', fingerprint={}, objective=None, started=None, mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  )
  with pytest.raises(KeyError if isinstance(error, KeyError) else SystemExit):
    loop.train(run)
  out, err = capsys.readouterr()
  if isinstance(error, KeyError):
    assert (out, err) == ('closed\n', '')
  else:
    assert 'process 0 of 2: another process of the run is gone' in err.splitlines()[0] and 'Gloo' in err
    assert out == 'left\nclosed\n'  # closed only because SystemExit unwinds here
