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

from polar_jax import api, sharding
from polar_jax.config import Config, ConfigError, MeshConfig, ServeConfig, TokenizerConfig
from polar_jax.serve import stage
from polar_jax.stages.context import Context
from polar_jax.types import Group, UserError

pytestmark = pytest.mark.needs('uvicorn')
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


def wait_for_address(workdir, has_ended, pid=None):
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline and not has_ended():
    with contextlib.suppress(FileNotFoundError):
      found = json.loads((workdir / stage.FILE).read_text())  # always whole, because it is written atomically
      if 'pid' in found and pid in (None, found['pid']):
        return found
    time.sleep(0.02)
  raise AssertionError('the server did not start')


class Process:
  """A server in a process of its own."""

  def __init__(self, checkpoint, workdir):
    self.workdir, self.log = workdir, (workdir / 'log.txt').open('w')
    flags = [
      f'--config.checkpoint={checkpoint}',
      '--config.serve.port=0',
      '--config.serve.max_length=256',
      '--config.model.attention=reference',
    ]
    command = [sys.executable, '-m', 'polar_jax.main', f'--config={ROOT / "configs/serve.py"}', *flags, f'--workdir={workdir}']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=8', 'count=1')}
    self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

  def address(self):
    return wait_for_address(self.workdir, lambda: self.process.poll() is not None, self.process.pid)['address']

  def end(self, number):
    self.process.send_signal(number)
    return self.process.wait(60)


@pytest.mark.long
def test_killed_and_ended_under_load(checkpoint, tmp_path, model):
  """Clients ask all the time. After kill -9 they find the new server; after SIGTERM every request that was accepted is answered."""
  from tests.serve.conftest import Client  # noqa: PLC0415

  scorer = api.load(checkpoint, mesh=sharding.make_mesh(MeshConfig(), model.mesh.devices.flat[:1])).exact_scorer
  address, ended, outcomes = [''], threading.Event(), []

  def ask(thread):
    number = 0
    while not ended.is_set():
      number += 1
      text = f'{thread}-{number}'
      try:
        reply = Client(address[0]).post('/score', {'prompt': 'p', 'reference': text, 'outputs': [text, '']})
        outcomes.append((text, reply.status, reply.body.get('rewards')))
      except OSError as error:  # refused, or reset by the kill
        outcomes.append((text, type(error).__name__, None))
        time.sleep(0.05)

  first = Process(checkpoint, tmp_path)
  address[0] = first.address()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for thread in range(8):
      pool.submit(ask, thread)
    while sum(status == 200 for _, status, _ in outcomes) < 50:
      time.sleep(0.02)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Process(checkpoint, tmp_path)
    address[0] = second.address()
    before = len(outcomes)
    while sum(status == 200 for _, status, _ in outcomes[before:]) < 50:
      time.sleep(0.02)
    mark = len(outcomes)
    status = second.end(signal.SIGTERM)
    ended.set()
  assert status == 0, (tmp_path / 'log.txt').read_text()
  assert not (tmp_path / stage.FILE).exists()
  # After SIGTERM: an answer, 503, or a connection that was refused; never one that broke off in the middle of an accepted request.
  kinds = {kind for _, kind, _ in outcomes[mark:]}
  assert kinds <= {200, 503, 'ConnectionRefusedError', 'RemoteDisconnected', 'ConnectionResetError'}, kinds
  right = [(text, rewards) for text, kind, rewards in outcomes if kind == 200]
  groups = [Group('p', text, [candidate]) for text, _ in right for candidate in (text, '')]
  assert [rewards for _, rewards in right] == scorer.score(groups).reshape(-1, 2).tolist()
  accepted = {json.loads(line)['id'] for line in (tmp_path / 'log.txt').read_text().splitlines() if line.startswith('{"time"')}
  assert len(accepted) >= 50
