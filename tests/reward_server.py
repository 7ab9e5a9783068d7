"""A tiny reward model with random parameters, and servers of it on free ports."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

import polar_jax
from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, ServeConfig, TemplateConfig
from polar_jax.data.tokenizer import ByteTokenizer

# The backend 'reference' compiles fastest, and compilation takes most of the time of these tests.
SHAPE = ModelConfig(
  num_layers=1, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.3, v_head_init='normal', attention='reference'
)
SETTINGS = ServeConfig(port=0, max_length=256, batch_tokens=2_048, timeout=60, drain=20)


class Reply(NamedTuple):
  status: int
  body: Any
  headers: dict[str, str]


class Client:
  """Sends requests to a server, each over a connection of its own."""

  def __init__(self, address: str):
    parts = urllib.parse.urlsplit(address)
    self.host, self.port = parts.hostname or '', parts.port or 0

  def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None) -> Reply:
    connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
    with contextlib.closing(connection):
      data = raw if raw is not None else None if body is None else json.dumps(body).encode()
      sent = {'Content-Type': 'application/json'} if data is not None else {}
      connection.request(method, path, data, sent | (headers or {}))
      response = connection.getresponse()
      content = response.read()
      is_json = (response.getheader('content-type') or '').startswith('application/json')
      named = {name.lower(): value for name, value in response.getheaders()}
      return Reply(response.status, json.loads(content) if is_json else content.decode(), named)

  def post(self, path: str, body: Any, **how: Any) -> Reply:
    return self.send('POST', path, body, **how)

  def get(self, path: str, **how: Any) -> Reply:
    return self.send('GET', path, **how)


def tiny_model(devices: int = 1) -> polar_jax.RewardModel:
  """Return a reward model of a byte tokenizer, with random parameters."""
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
  tiny = polar_jax.RewardModel.init(SHAPE, ByteTokenizer(), mesh=mesh, seed=1)
  # The budget of the template leaves a byte tokenizer's texts short enough for the two row lengths that a server compiles.
  tiny.template_config = TemplateConfig(max_length=240, max_response_length=100)
  return tiny


class Running(NamedTuple):
  client: Client
  server: Any
  log: list[dict[str, Any]]
  stop: threading.Event
  thread: threading.Thread


@contextlib.contextmanager
def running(model: polar_jax.RewardModel, wait: bool = True, token: str | None = None, **changes: Any) -> Iterator[Running]:
  """A server in a thread. `changes` apply to its settings."""
  from polar_jax.serve.server import RewardServer

  lines: list[dict[str, Any]] = []
  config = dataclasses.replace(SETTINGS, **changes)
  server = RewardServer(model, config, 'tiny', token, lambda line: lines.append(json.loads(line)))
  stop, ready = threading.Event(), threading.Event()
  thread = threading.Thread(target=server.run, args=(stop, ready.set), daemon=True)
  thread.start()
  try:
    assert not wait or ready.wait(120)
    yield Running(Client(server.address), server, lines, stop, thread)
  finally:
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
