"""Discovery of the processes of a run, and clear errors when one of them is lost.

The same command is started on every host. The cluster type is read from environment variables; JAX does the rest.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import sys
import threading
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
  """The cluster of a run. JAX detects the fields that are None."""

  how: str  # how it was detected, for messages
  coordinator: str | None = None  # host:port of process 0
  processes: int | None = None
  process: int | None = None
  method: str | None = None  # JAX's name of its detection method


def detect(settings: DistributedConfig, environ: Mapping[str, str]) -> Cluster | None:
  """Return the cluster named by the settings or the environment, or None for a run of one process.

  The order of precedence is: settings, JAX's own variables, a SLURM step of several tasks, a TPU slice of several hosts.

  Raises:
    ConfigError: only some of coordinator, processes and process are set, or they are inconsistent.
    UserError: the environment variables are incomplete or not numbers.
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
    return _slurm(environ)
  if environ.get('JAX_PLATFORMS', '').split(',')[0] == 'cpu':
    return None
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', '') or _integer('MEGASCALE_NUM_SLICES', environ, 1) > 1:
    return Cluster('TPU slice (TPU_WORKER_HOSTNAMES)')
  if _is_tpu_vm(environ):
    return Cluster('TPU VM')
  return None


# What srun sets for each task, and JAX reads.
_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_LOCALID')


def _slurm(environ: Mapping[str, str]) -> Cluster:
  """Return the cluster of a SLURM step.

  Raises:
    UserError: this process is not a task of a step, as in a batch script that calls it without srun.
  """
  missing = [name for name in _SLURM if not environ.get(name)]
  if missing:
    raise UserError(
      f'SLURM_NTASKS is {environ["SLURM_NTASKS"]}, but srun did not start this process ({missing[0]} is not set): start it with '
      '`srun python -m polar_jax ...`, or set SLURM_NTASKS=1 for a run of one process'
    )
  _integer('SLURM_JOB_ID', environ)
  process, processes = _integer('SLURM_PROCID', environ), _integer('SLURM_NTASKS', environ)
  if not 0 <= process < processes:
    raise UserError(f'SLURM_PROCID is {process}, but SLURM_NTASKS is {processes}; start the processes with srun, which sets both')
  return Cluster(f'SLURM job {environ["SLURM_JOB_ID"]}', method='slurm')


def _integer(name: str, environ: Mapping[str, str], default: int | None = None) -> int:
  text = environ.get(name)
  if text is None and default is not None:
    return default
  try:
    return int(text or '')
  except ValueError:
    raise UserError(f'the environment variable {name} is {text!r}; it must be an integer') from None


def _checked(how: str, coordinator: str | None, processes: int | None, process: int | None, error: type[UserError]) -> Cluster:
  if coordinator is None or processes is None or process is None:
    raise error('distributed.coordinator, processes and process belong together; set all three or none')
  if ':' not in coordinator:
    raise error(f'distributed.coordinator is {coordinator!r}; it must be the address of process 0 as host:port')
  if not 0 <= process < processes:
    raise error(f'distributed.process is {process}; it must be one of 0 to {processes - 1}')
  return Cluster(how, coordinator, processes, process)


def _is_tpu_vm(environ: Mapping[str, str]) -> bool:
  """Return whether this is a Cloud TPU VM, where JAX finds the other hosts by the metadata server."""
  chips = list(pathlib.Path('/dev').glob('accel*')) + list(pathlib.Path('/dev').glob('vfio/[0-9]*'))
  return bool(chips) and 'TPU_SKIP_MDS_QUERY' not in environ


def start(settings: DistributedConfig, environ: Mapping[str, str] = os.environ) -> Cluster | None:
  """Join the other processes, before JAX starts its backend.

  Returns:
    The detected cluster, or None for a run of one process.

  Raises:
    ConfigError: as `detect`.
    UserError: as `detect`, or the processes did not connect in time.
  """
  cluster = detect(settings, environ)
  if cluster is None:
    return None
  if cluster.coordinator and cluster.process:
    _wait_for_coordinator(cluster.coordinator, settings.timeout, cluster.how)
  try:
    with _giving_up(cluster, settings.timeout):
      jax.distributed.initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.processes,
        process_id=cluster.process,
        cluster_detection_method=cluster.method,
        # Longer than ours: at the end of its own, JAX's client aborts the process from C++, with a stack trace.
        initialization_timeout=settings.timeout + _GRACE,
        heartbeat_timeout_seconds=settings.heartbeat,
      )
  except Exception as error:  # KeyErrors and others, of environment variables that JAX reads for each kind of cluster
    raise _connection_error(cluster.how, settings.timeout, f'{type(error).__name__}: {" ".join(str(error).split())[:160]}') from error
  _explain_aborts()
  return cluster


def _explain_aborts() -> None:
  """Make an abort of this process from C++ end with one line of ours.

  JAX's client aborts the process when another one is gone or silent. Nothing in Python can prevent that: its callback for lost heartbeats
  cannot be one of Python (its argument has no conversion, so that calling it aborts too). The handler must be one of C, because those of
  `signal.signal` run in the interpreter's main loop, to which an abort does not return.
  """
  who = f'polar_jax: process {jax.process_index()} of {jax.process_count()}'

  def explain(_: int) -> None:
    what = 'JAX ended it, most likely because another process of the run is gone or unreachable (see above).'
    os.write(2, f'{who}: {what} Start all of them again; they resume from the newest checkpoint.\n'.encode())
    os._exit(1)

  _handlers.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(explain))
  ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _handlers[-1])


_handlers: list[Any] = []  # keeps what C calls alive

_GRACE = 60  # seconds


@contextlib.contextmanager
def _giving_up(cluster: Cluster, timeout: float) -> Iterator[None]:
  """Exit this process with one line if the block takes longer than `timeout` seconds: nothing else can end a wait in C++."""

  def exit_with_message() -> None:
    which = '' if cluster.process is None else f'process {cluster.process} of {cluster.processes} waited for the others'
    print(f'polar_jax: {_connection_error(cluster.how, timeout, which)}', file=sys.stderr, flush=True)
    os._exit(2)

  timer = threading.Timer(timeout, exit_with_message)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _wait_for_coordinator(coordinator: str, timeout: float, how: str) -> None:
  """Wait until process 0 listens. If it never does, JAX alone would end this process without a clear message."""
  host, _, port = coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except (OSError, ValueError) as error:
      if time.monotonic() > deadline:
        raise _connection_error(how, timeout, f'{coordinator}: {error}') from error
      time.sleep(0.5)


def _connection_error(how: str, timeout: float, reason: str) -> UserError:
  return UserError(
    f'the processes of this run ({how}) did not connect within {timeout} s; start the same command on every host, '
    f'and check that process 0 is reachable' + (f' ({reason})' if reason else '')
  )


_sync_points = itertools.count()


def preempted() -> bool:
  """Return True, once, when any process has received SIGTERM and all have reached the agreed sync point.

  Call it equally often on every process.
  """
  return multihost_utils.reached_preemption_sync_point(next(_sync_points))


def agree(where: str, facts: Mapping[str, Any]) -> None:
  """Compare `facts` between all processes. Every process must call this.

  Args:
    where: the point of the run, for messages.
    facts: values that must be equal on all processes, by name.

  Raises:
    UserError: a fact differs (on every process; the message has the fact and the hosts).
  """
  if jax.process_count() == 1:
    return
  names = sorted(facts)
  texts = [json.dumps(facts[name], default=str) for name in names]
  names_digest = hashlib.sha256('\n'.join(names).encode()).hexdigest()  # compared first: the tables below must have the same shape
  rows = _gather([socket.gethostname(), names_digest])
  hosts = [f'process {p} ({host})' for p, (host, _) in enumerate(rows)]
  _check_same(where, 'the set of compared values', [row[1] for row in rows], hosts)
  tables = _gather([hashlib.sha256(text.encode()).hexdigest()[:16] + text[: _TEXT_BYTES - 16] for text in texts])
  for row, name in enumerate(names):
    _check_same(where, name, [table[row] for table in tables], hosts)


_TEXT_BYTES = 96  # of each fact that other processes receive: a digest of 16 bytes, then the beginning of its text


def _gather(texts: list[str]) -> list[list[str]]:
  """Return the texts of every process, each truncated to `_TEXT_BYTES` bytes."""
  own = np.zeros((len(texts), _TEXT_BYTES), np.uint8)
  for row, text in enumerate(texts):
    data = text.encode()[:_TEXT_BYTES]
    own[row, : len(data)] = np.frombuffer(data, np.uint8)
  gathered = multihost_utils.process_allgather(own)
  return [[bytes(row).rstrip(b'\0').decode(errors='replace') for row in table] for table in np.asarray(gathered)]


def _check_same(where: str, name: str, values: list[str], hosts: list[str]) -> None:
  (usual, _), *others = collections.Counter(values).most_common()
  if not others:
    return
  odd = '; '.join(f'{host} has {value[16:]}' for host, value in zip(hosts, values, strict=True) if value != usual)
  raise UserError(f'{where}: {name} differs between hosts: {odd}; the others have {usual[16:]}. Start the same command on every host')


# Errors of JAX and XLA when a collective fails. It is a JaxRuntimeError where a result is awaited, and a ValueError where work is
# dispatched; TensorStore raises ValueErrors too, for errors of a disk or bucket.
_COLLECTIVE_FAILED = re.compile(
  r'(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |(UNKNOWN|INTERNAL): .*(gloo|nccl|barrier|heartbeat|connection|socket)', re.I | re.S
)
_DISPATCH_FAILED = re.compile(r'[A-Z_]+: .*(gloo|nccl)', re.I | re.S)


def lost(error: BaseException) -> bool:
  """Return whether an error, or one of its causes, means that another process of the run is gone or unreachable."""
  if jax.process_count() == 1:
    return False
  cause: BaseException | None = error
  while cause is not None:
    if isinstance(cause, jax.errors.JaxRuntimeError) and _COLLECTIVE_FAILED.match(str(cause)):
      return True
    if isinstance(cause, ValueError) and _DISPATCH_FAILED.match(str(cause)):
      return True
    cause = cause.__cause__ or cause.__context__
  return False


def leave(error: Exception) -> NoReturn:
  """Exit this process of a multi-process run after an error: with one line if a peer is lost, else with the traceback.

  The regular shutdown is skipped, because it would wait for all processes while they wait for this one. They stop when the connections
  to this process break.
  """
  who = f'polar_jax: process {jax.process_index()} of {jax.process_count()}'
  if lost(error):
    what = 'another process of the run is gone or unreachable. Start all of them again; they resume from the newest checkpoint.'
    print(f'{who}: {what} ({" ".join(str(error).split())[:300]})', file=sys.stderr)
  else:
    print(f'{who} failed:\n{"".join(traceback.format_exception(error))}', file=sys.stderr)
  sys.stderr.flush()
  sys.stdout.flush()
  os._exit(1)


@contextlib.contextmanager
def leaving_when_lost() -> Iterator[None]:
  """Exit immediately when a peer is lost, because closing the checkpoint manager would wait for the peer's shards."""
  try:
    yield
  except Exception as error:
    if lost(error):
      leave(error)
    raise
