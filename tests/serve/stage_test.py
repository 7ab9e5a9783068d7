"""The stage: its settings, and its life as a process under load."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from reward_server import Client

from polar_jax import api
from polar_jax.config import Config, ConfigError, ServeConfig, TokenizerConfig
from polar_jax.serve import stage
from polar_jax.stages.context import Context
from polar_jax.types import UserError

pytestmark = [pytest.mark.needs('uvicorn'), pytest.mark.long]  # on one Python: they take a minute together
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def checkpoint(model, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('tiny') / 'model'
  model.save(folder)
  return folder


@pytest.fixture
def serve_stage(checkpoint, tmp_path, model):
  def run(checkpoint=checkpoint, **changes):
    serve = dataclasses.replace(ServeConfig(port=0, max_length=128), **changes)
    config = Config(stage='serve', checkpoint=checkpoint and str(checkpoint), tokenizer=TokenizerConfig(kind='checkpoint'), serve=serve)
    return stage.serve(Context(config, tmp_path, model.mesh, lambda _: None))

  return run


def test_a_checkpoint_is_needed(serve_stage):
  with pytest.raises(ConfigError, match='checkpoint is not set'):
    serve_stage(checkpoint=None)


def test_other_heads_are_refused(serve_stage, model, tmp_path):
  lm = api.LanguageModel.init(dataclasses.replace(model.config), 'byte', mesh=model.mesh)
  lm.save(tmp_path / 'lm')
  with pytest.raises(ConfigError, match='is a language model; the serve stage needs a reward model'):
    serve_stage(checkpoint=tmp_path / 'lm')


@pytest.mark.parametrize(
  ('value', 'message'), [(None, 'is not set; set it'), (' ', 'is not set; set it'), ('a b', 'printable ASCII'), ('ü', 'printable')]
)
def test_the_token_of_the_environment(serve_stage, monkeypatch, value, message):
  monkeypatch.delenv('OUR_TOKEN', raising=False)
  if value is not None:
    monkeypatch.setenv('OUR_TOKEN', value)
  with pytest.raises(ConfigError, match=message) as error:
    serve_stage(token_env='OUR_TOKEN')
  assert value is None or not value.strip() or value not in str(error.value)


def test_an_address_in_use(serve_stage):
  with socket.create_server(('127.0.0.1', 0)) as taken, pytest.raises(UserError, match=r'serve\.port=\d+: cannot listen there'):
    serve_stage(port=taken.getsockname()[1])
  with pytest.raises(UserError, match=r'serve\.host=no\.such\.host\.invalid'):
    serve_stage(host='no.such.host.invalid')


def test_missing_packages(serve_stage, monkeypatch):
  monkeypatch.setattr(stage.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'polar_jax\[serve\]'"):
    serve_stage()


def test_server_json_exists_while_the_server_is_ready(serve_stage, tmp_path, monkeypatch):
  stop = threading.Event()
  monkeypatch.setattr(stage.preemption.SigtermFlag, '__enter__', lambda self: setattr(self, '_main', False) or stop)
  (tmp_path / stage.FILE).write_text('{"address": "of a server that was killed"}')
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(serve_stage)
    address = wait_for_address(tmp_path, running.done)
    assert address['address'].startswith('http://127.0.0.1:') and address['pid'] == os.getpid()
    stop.set()
    assert running.result(30)['serve']['sequences'] == 0
  assert not (tmp_path / stage.FILE).exists()


def test_a_device_that_fails_ends_the_stage_with_its_error(serve_stage, tmp_path, monkeypatch):
  from polar_jax.serve.batches import ExactBatches
  from polar_jax.serve.engine import Engine

  monkeypatch.setattr(Engine, '_serve', lambda self: (_ for _ in ()).throw(SystemError('bug')))
  with pytest.raises(SystemError, match='bug'):
    serve_stage()
  monkeypatch.setattr(ExactBatches, 'warm_up', lambda self: (_ for _ in ()).throw(RuntimeError('RESOURCE_EXHAUSTED')))
  with pytest.raises(RuntimeError, match='RESOURCE_EXHAUSTED'):
    serve_stage()
  assert not (tmp_path / stage.FILE).exists()


def wait_for_address(workdir, has_ended, pid=None):
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not has_ended():
    with contextlib.suppress(FileNotFoundError):
      found = json.loads((workdir / stage.FILE).read_text())  # always whole, because it is written atomically
      if 'pid' in found and pid in (None, found['pid']):
        return found
    time.sleep(0.02)
  raise AssertionError('the server did not start')


FLAGS = ('--config.model.attention=reference',)


def environment():
  return {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=8', 'count=1')}


class Process:
  """A server in a process of its own."""

  def __init__(self, checkpoint, workdir):
    self._workdir = workdir
    self._log = workdir / f'log-{time.monotonic_ns()}.txt'
    limits = ('--config.serve.port=0', '--config.serve.max_length=256')
    command = [sys.executable, '-m', 'polar_jax.main', f'--config={ROOT / "configs/serve.py"}', f'--config.checkpoint={checkpoint}']
    with self._log.open('w') as log:
      self._process = subprocess.Popen([*command, *limits, *FLAGS, f'--workdir={workdir}'], env=environment(), stdout=log, stderr=log)
    self.address = wait_for_address(workdir, lambda: self._process.poll() is not None, self._process.pid)['address']

  def end(self, number):
    self._process.send_signal(number)
    return self._process.wait(60)

  def statuses(self):
    """Return the statuses of all requests in the log."""
    lines = [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith('{"time"')]
    return [line['status'] for line in lines if line['event'] == 'request']


class Crowd:
  """Clients that ask all the time, each time something else. `outcomes` has (address, text, status or error, rewards)."""

  def __init__(self, address, clients=8):
    self.address, self.outcomes, self._ended = address, [], threading.Event()
    self._threads = [threading.Thread(target=self._ask, args=(i,), daemon=True) for i in range(clients)]
    for thread in self._threads:
      thread.start()

  def _ask(self, client):
    number = 0
    while not self._ended.is_set():
      number += 1
      address, text = self.address, f'{client}-{number}'
      try:
        reply = Client(address).post('/score', {'prompt': 'p', 'reference': text, 'outputs': [text, '']})
        self.outcomes.append((address, text, reply.status, reply.body.get('rewards')))
      except OSError as error:  # refused, or reset by the kill
        self.outcomes.append((address, text, type(error).__name__, None))
        time.sleep(0.05)

  def answered(self, address):
    return [(text, rewards) for at, text, status, rewards in self.outcomes if at == address and status == 200]

  def wait(self, address, count):
    deadline = time.monotonic() + 60
    while len(self.answered(address)) < count:
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def end(self):
    self._ended.set()
    for thread in self._threads:
      thread.join(60)


@pytest.mark.long
def test_killed_and_ended_under_load(checkpoint, tmp_path):
  """After kill -9 the next server takes over; after SIGTERM every accepted request is answered; rewards are those of the score stage."""
  first = Process(checkpoint, tmp_path)
  crowd = Crowd(first.address)
  crowd.wait(first.address, 50)
  assert first.end(signal.SIGKILL) == -signal.SIGKILL and (tmp_path / stage.FILE).exists()
  second = Process(checkpoint, tmp_path)
  crowd.address = second.address
  crowd.wait(second.address, 50)
  status = second.end(signal.SIGTERM)
  crowd.end()
  assert status == 0
  assert not (tmp_path / stage.FILE).exists()
  statuses = second.statuses()
  assert set(statuses) <= {200, 503}
  answered = crowd.answered(second.address)
  assert len(answered) == statuses.count(200) >= 50
  answered += crowd.answered(first.address)
  examples = [{'prompt': 'p', 'reference': text, 'output': output} for text, _ in answered for output in (text, '')]
  assert [reward for _, rewards in answered for reward in rewards] == score(checkpoint, examples, tmp_path)


def score(checkpoint, examples, folder):
  """Return the rewards of the score stage, in a process with the same settings."""
  source, target = folder / 'examples.jsonl', folder / 'scores.jsonl'
  source.write_text(''.join(json.dumps(example) + '\n' for example in examples))
  files = (f'--config.checkpoint={checkpoint}', f'--config.input={source}', f'--config.output={target}', f'--workdir={folder / "score"}')
  command = [sys.executable, '-m', 'polar_jax.main', f'--config={ROOT / "configs/score.py"}', *files, *FLAGS]
  subprocess.run(command, env=environment(), check=True, capture_output=True)
  return [json.loads(line)['reward'] for line in target.read_text().splitlines()]
