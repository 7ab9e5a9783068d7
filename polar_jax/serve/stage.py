"""The serve stage: a reward model over HTTP until SIGTERM."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import os
import re
import resource
import signal
import threading
import time
import warnings
from typing import Any

import jax

from polar_jax import api
from polar_jax.config import ConfigError, ServeConfig
from polar_jax.runtime import paths, preemption
from polar_jax.stages.context import Context

FILE = 'server.json'  # in the workdir while the server is ready: its address and process
_PACKAGES = ('starlette', 'uvicorn', 'prometheus_client')
_OPEN_FILES = 65_536
_TOKEN = re.compile('[!-~]{1,4096}')


def serve(context: Context) -> dict[str, Any]:
  """Serve the reward model `checkpoint` until SIGTERM or Ctrl-C.

  Returns:
    The section `serve` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: the checkpoint or the address cannot be used.
  """
  config = context.config.serve
  _check(context)
  token = _token(config)
  model, name = _load(context)
  _allow_connections()
  # Imported here, after the check that their packages are installed.
  from polar_jax.serve.server import RewardServer

  warnings.filterwarnings('ignore', message='.* has no token for ')  # the warning quotes a text, of a client here
  file = context.workdir / FILE
  with preemption.SigtermFlag() as stop, _Interrupt(stop):
    server = RewardServer(model, config, name, token)
    file.unlink(missing_ok=True)  # of a server that was killed
    started = time.monotonic()
    context.log(f'serve: {name} at {server.address} ({"exact" if config.exact else "packed"}); compiling before the first request')
    if token is None and not _is_loopback(config.host):
      context.log(f'serve: anyone who reaches {config.host} may use the model: set serve.token_env to require a token')

    def on_ready() -> None:
      paths.write_atomically(file, json.dumps({'address': server.address, 'pid': os.getpid()}) + '\n')
      context.log(f'serve: ready after {time.monotonic() - started:.0f} s; address in {file}')

    def on_drain() -> None:
      file.unlink(missing_ok=True)
      context.log('serve: ending; requests in progress are answered first')

    server.run(stop, on_ready, on_drain)
  return {'serve': {**server.metrics.totals(), 'seconds': time.monotonic() - started}}


def _check(context: Context) -> None:
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise ConfigError(f"stage serve needs {missing[0]}; run: pip install 'polar_jax[serve]'")
  if jax.process_count() > 1:
    raise ConfigError('stage serve runs in one process; start it without distributed, and one server on each host')


def _token(config: ServeConfig) -> str | None:
  if config.token_env is None:
    return None
  token = os.environ.get(config.token_env, '').strip()
  if not token:
    raise ConfigError(f'serve.token_env is {config.token_env}, but that environment variable is not set; set it to the token')
  if not _TOKEN.fullmatch(token):
    raise ConfigError(f'the token in {config.token_env} must be of printable ASCII characters without spaces')
  return token


def _load(context: Context) -> tuple[api.RewardModel, str]:
  """Return the model, and its name in replies."""
  config = context.config
  opened, tokenizer, template = context.reward_model('serve')
  model = api.load(opened, mesh=context.mesh, compute=config.model, template=template.config, tokenizer=tokenizer)
  return model, config.serve.model_name or paths.absolute(opened.path).name


def _allow_connections() -> None:
  """Raise the number of open files, which connections are, to what the system allows this process."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(OSError, ValueError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES) if hard != resource.RLIM_INFINITY else _OPEN_FILES, hard))


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


class _Interrupt:
  """Context manager in which Ctrl-C sets an event; the second one interrupts as usual."""

  def __init__(self, event: threading.Event):
    self._event = event

  def __enter__(self) -> None:
    self._is_main = threading.current_thread() is threading.main_thread()
    if self._is_main:
      self._before = signal.signal(signal.SIGINT, self._handle)

  def __exit__(self, *_: Any) -> None:
    if self._is_main:
      signal.signal(signal.SIGINT, self._before)

  def _handle(self, *_: Any) -> None:
    self._event.set()
    signal.signal(signal.SIGINT, self._before)
