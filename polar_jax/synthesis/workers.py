"""Where policies without a server are sampled: in this process, in several on this machine, or on a Ray cluster.

Each backend is a generator that takes (policy, unit) pairs and yields every unit with its results, in any order.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from polar_jax.config import ConfigError, PoolConfig
from polar_jax.synthesis.plan import Unit
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, QuarantineError, Request, Sample, Sampler
from polar_jax.types import UserError

_POLL_SECONDS = 0.2
_AHEAD = 2  # units in flight for each worker, so that none waits for this process


class Attempt(NamedTuple):
  """What came of a unit."""

  unit: Unit
  results: list[Sample | Failure] | QuarantineError
  counts: dict[str, int]  # what it cost


Tasks = Iterator[tuple[PolicySpec, Unit]]
Watch = Callable[[], None]
_opened: list[tuple[PolicySpec, Sampler]] = []  # at most one: the policy that this process sampled last


def open_sampler(spec: PolicySpec) -> Sampler:
  """Open a policy that is sampled in this process."""
  if spec.kind == 'vllm':
    from polar_jax.synthesis.vllm_offline import VllmSampler

    return VllmSampler(spec)
  from polar_jax.synthesis import local  # loads JAX

  return local.CheckpointSampler(spec) if spec.kind == 'checkpoint' else local.NgramSampler(spec)


def sample_unit(spec: PolicySpec, requests: Sequence[Request]) -> tuple[list[Sample | Failure], dict[str, int]]:
  """Return the answers to some requests and what they cost. The policy stays open until this process samples another one.

  Raises:
    QuarantineError: the policy cannot be opened or sampled.
  """
  if not _opened or _opened[0][0] != spec:
    _opened.clear()  # frees its memory before the next one is loaded
    try:
      _opened.append((spec, open_sampler(spec)))
    except ConfigError:
      raise
    except UserError as error:
      raise QuarantineError(str(error)) from error
  sampler = _opened[0][1]
  before = sampler.counts()
  results = sampler.sample(requests)
  return results, {name: value - before.get(name, 0) for name, value in sampler.counts().items()}


def run(config: PoolConfig, tasks: Tasks, watch: Watch) -> Generator[Attempt, None, None]:
  """Sample units on the backend of `synthesize.backend`.

  Args:
    config: of the pool.
    tasks: the units, policy by policy.
    watch: called regularly; may raise to stop.

  Raises:
    ConfigError: the backend is not installed, or a policy has a setting that it cannot have.
  """
  if config.backend == 'inline':
    return _inline(tasks, watch)
  if config.backend == 'processes':
    return _processes(tasks, watch, config.processes)
  from polar_jax.synthesis import ray_workers  # which needs this module

  return ray_workers.run(config, tasks, watch)


def _inline(tasks: Tasks, watch: Watch) -> Generator[Attempt, None, None]:
  try:
    for spec, unit in tasks:
      watch()
      try:
        attempt = Attempt(unit, *sample_unit(spec, unit.requests))
      except QuarantineError as error:
        attempt = Attempt(unit, error, {})
      yield attempt
  finally:
    _opened.clear()


def _processes(tasks: Tasks, watch: Watch, workers: int) -> Generator[Attempt, None, None]:
  # Spawned, because a process that has started JAX must not be forked. They leave signals to this process.
  context = multiprocessing.get_context('spawn')
  pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_signals)
  running: dict[concurrent.futures.Future[Any], Unit] = {}
  try:
    more = True
    while more or running:
      while more and len(running) < _AHEAD * workers:
        task = next(tasks, None)
        more = task is not None
        if task is not None:
          running[pool.submit(sample_unit, task[0], task[1].requests)] = task[1]
      ended, _ = concurrent.futures.wait(running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
      watch()
      for future in ended:
        unit = running.pop(future)
        try:
          yield Attempt(unit, *future.result())
        except QuarantineError as error:
          yield Attempt(unit, error, {})
        except concurrent.futures.process.BrokenProcessPool as error:
          raise UserError(
            f'a process that sampled {unit.policy!r} ended without a word, perhaps for lack of memory; lower synthesize.processes, then '
            'repeat the command: finished units are kept'
          ) from error
  finally:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if running else []:  # what they do is done again
      process.kill()


def _ignore_signals() -> None:
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
