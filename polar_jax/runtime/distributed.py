"""How the processes of one run find each other, and what is said when one of them is lost.

The same command is started on every host. Which cluster it is, the environment tells; JAX does the rest.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

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


_questions = itertools.count()


def preempted() -> bool:
  """Whether SIGTERM has come to some process, and all are at the question at which they agreed to stop. True once.

  All processes of the run must ask equally often.
  """
  return multihost_utils.reached_preemption_sync_point(next(_questions))


def agree(what: str, facts: Mapping[str, Any]) -> None:
  """Compares `facts` between all processes. Every one must call it, with the same names.

  Raises:
    UserError: on every process: which fact differs, and on which hosts.
  """
  if jax.process_count() == 1:
    return
  names = sorted(facts)
  shown = [json.dumps(facts[name], default=str) for name in names]
  whole = hashlib.sha256('\n'.join(names).encode()).hexdigest()  # comes first: the tables below have a row for each name
  rows = _gather([socket.gethostname(), whole])
  hosts = [f'process {p} ({host})' for p, (host, _) in enumerate(rows)]
  _same(what, 'what is compared', [row[1] for row in rows], hosts)
  tables = _gather([hashlib.sha256(text.encode()).hexdigest()[:16] + text[: _SHOWN - 16] for text in shown])
  for row, name in enumerate(names):
    _same(what, name, [table[row] for table in tables], hosts)


_SHOWN = 96  # bytes of each fact that other processes are told: a digest of 16, and the beginning of what it is


def _gather(texts: list[str]) -> list[list[str]]:
  """The texts of every process, each cut to `_SHOWN` bytes."""
  mine = np.zeros((len(texts), _SHOWN), np.uint8)
  for row, text in enumerate(texts):
    data = text.encode()[:_SHOWN]
    mine[row, : len(data)] = np.frombuffer(data, np.uint8)
  every = multihost_utils.process_allgather(mine)
  return [[bytes(row).rstrip(b'\0').decode(errors='replace') for row in table] for table in np.asarray(every)]


def _same(what: str, name: str, values: list[str], hosts: list[str]) -> None:
  (usual, _), *others = collections.Counter(values).most_common()
  if not others:
    return
  odd = '; '.join(f'{host} has {value[16:]}' for host, value in zip(hosts, values, strict=True) if value != usual)
  raise UserError(f'{what}: {name} is not the same on every host: {odd}; the others have {usual[16:]}. Start the same command everywhere')


# How JAX and XLA say that what processes do together has failed. Where a result is awaited the error is a JaxRuntimeError, where work is
# started a ValueError, which TensorStore raises too, of a disk or a bucket.
_FAILED_TOGETHER = re.compile(
  r'(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |(UNKNOWN|INTERNAL): .*(gloo|nccl|barrier|heartbeat|connection|socket)', re.I | re.S
)
_FAILED_TOGETHER_AT_START = re.compile(r'[A-Z_]+: .*(gloo|nccl)', re.I | re.S)


def lost(error: BaseException) -> bool:
  """Whether an error, or what it came of, says that another process of the run is gone or cannot be reached."""
  if jax.process_count() == 1:
    return False
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, jax.errors.JaxRuntimeError) and _FAILED_TOGETHER.match(str(cause)):
      return True
    if isinstance(cause, ValueError) and _FAILED_TOGETHER_AT_START.match(str(cause)):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def leave(error: Exception) -> NoReturn:
  """Ends this process, of several, by an error: with one line if others are gone, else with its traceback.

  Without the orderly end, which waits for all processes, as they wait for this one. Theirs ends when its connections break.
  """
  who = f'polar_jax: process {jax.process_index()} of {jax.process_count()}'
  if lost(error):
    what = 'another process of the run is gone, or cannot be reached. Start all of them again: they resume from the newest checkpoint.'
    print(f'{who}: {what} ({" ".join(str(error).split())[:300]})', file=sys.stderr)
  else:
    print(f'{who} ends by an error:\n{"".join(traceback.format_exception(error))}', file=sys.stderr)
  sys.stderr.flush()
  sys.stdout.flush()
  os._exit(1)


@contextlib.contextmanager
def leaving_when_lost() -> Iterator[None]:
  """Leaves at once when another process is lost: what is closed around it may wait for that one's part of a checkpoint."""
  try:
    yield
  except Exception as error:
    if lost(error):
      leave(error)
    raise
