"""How the processes of one run find each other, and what is said when one of them is lost.

The same command is started on every host. Which cluster it is, the environment tells; JAX does the rest.
"""

from __future__ import annotations

import os
import pathlib
import socket
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import jax

from polar_jax.config import ConfigError, DistributedConfig
from polar_jax.types import UserError


class Cluster(NamedTuple):
  """Where a run was started. None: JAX finds it out by itself."""

  how: str
  coordinator: str | None = None  # host:port of process 0
  processes: int | None = None
  process: int | None = None
  method: str | None = None  # JAX's name of the way to find out


def detect(settings: DistributedConfig, environ: Mapping[str, str]) -> Cluster | None:
  """The cluster that settings or environment speak of, None for a run of one process.

  Settings come first, then JAX's own variables, a SLURM step of several tasks, a TPU slice of several hosts.

  Raises:
    ConfigError: only some of coordinator, processes and process are set, or they contradict each other.
  """
  given = (settings.coordinator, settings.processes, settings.process)
  if any(value is not None for value in given):
    return _checked('settings', *given, ConfigError)
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  if names[0] in environ and names[1] in environ:
    return _checked('JAX_COORDINATOR_ADDRESS', environ[names[0]], _integer(names[1], environ), _integer(names[2], environ), UserError)
  if (
    _integer('SLURM_NTASKS', environ, 1) > 1 and 'SLURM_PROCID' in environ and environ.get('SLURM_JOB_NAME') not in ('interactive', 'bash')
  ):
    return Cluster(f'SLURM job {environ.get("SLURM_JOB_ID", "?")}', method='slurm')
  if environ.get('JAX_PLATFORMS', '').split(',')[0] == 'cpu':
    return None
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', '') or _integer('MEGASCALE_NUM_SLICES', environ, 1) > 1:
    return Cluster('TPU slice (TPU_WORKER_HOSTNAMES)')
  if _is_tpu_vm(environ):
    return Cluster('TPU VM')
  return None


def _integer(name: str, environ: Mapping[str, str], default: int | None = None) -> int:
  text = environ.get(name)
  if text is None and default is not None:
    return default
  try:
    return int(text or '')
  except ValueError:
    raise UserError(f'the environment variable {name} is {text!r}; it must be a whole number') from None


def _checked(how: str, coordinator: str | None, processes: int | None, process: int | None, error: type[UserError]) -> Cluster:
  if coordinator is None or processes is None or process is None:
    raise error('distributed.coordinator, processes and process belong together: set all three, or none')
  if ':' not in coordinator:
    raise error(f'distributed.coordinator is {coordinator!r}; it must be the address of process 0 as host:port')
  if not 0 <= process < processes:
    raise error(f'distributed.process is {process}; it must be one of 0 to {processes - 1}')
  return Cluster(how, coordinator, processes, process)


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
  """A Cloud TPU VM, whose metadata JAX asks for the other hosts."""
  chips = list(pathlib.Path('/dev').glob('accel*')) + list(pathlib.Path('/dev').glob('vfio/[0-9]*'))
  return bool(chips) and 'TPU_SKIP_MDS_QUERY' not in environ


def start(settings: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Cluster | None:
  """Joins the other processes, before JAX starts its backend. Returns what was detected.

  Raises:
    ConfigError, UserError: as `detect`; or the others did not come in time.
  """
  found = detect(settings, environ)
  if found is None:
    return None
  if found.coordinator and found.process:
    _await(found.coordinator, settings.timeout, found.how)
  try:
    jax.distributed.initialize(
      coordinator_address=found.coordinator,
      num_processes=found.processes,
      process_id=found.process,
      cluster_detection_method=found.method,
      initialization_timeout=settings.timeout,
      heartbeat_timeout_seconds=settings.heartbeat,
    )
  except (RuntimeError, ValueError) as error:
    raise _not_found(found.how, settings.timeout, ' '.join(str(error).split())[:300]) from error
  return found


def _await(coordinator: str, timeout: float, how: str) -> None:
  """Returns once process 0 listens. JAX, left to find out that nobody does, ends the process without a word for the user."""
  host, _, port = coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except (OSError, ValueError) as error:
      if time.monotonic() > deadline:
        raise _not_found(how, timeout, f'{coordinator}: {error}') from error
      time.sleep(0.5)


def _not_found(how: str, timeout: float, said: str) -> UserError:
  return UserError(
    f'the processes of this run ({how}) did not find each other within {timeout} s: start the same command on every host, '
    f'and see that process 0 can be reached ({said})'
  )


def lost(error: Exception) -> NoReturn:
  """Ends this process because another one of the run is gone: what they would do together cannot be done any more.

  Without the orderly end, which waits for all processes.
  """
  said = ' '.join(str(error).split())[:300]
  who = f'process {jax.process_index()} of {jax.process_count()}'
  what = 'another process of the run is gone, or cannot be reached. Start all of them again: they resume from the newest checkpoint.'
  print(f'polar_jax: {who}: {what} ({said})', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(1)
