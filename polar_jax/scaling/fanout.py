"""Backends of a sweep: its jobs run in this process, in several on this machine, or on a Ray cluster.

Each backend is a generator that runs jobs and yields (job, error message) as they end, in any order; None in place of the message means
that the job is done. What a job does is up to the caller.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from polar_jax.config import SweepConfig
from polar_jax.runtime import ray_cluster
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.scaling import results
from polar_jax.scaling.grid import Job

Ended = Iterator[tuple[Job, str | None]]
LOG = 'log.txt'  # output of a job that runs in its own process, in its folder
PREEMPTED = 75  # exit status of a process that was saved after SIGTERM and is to be run again
_POLL_SECONDS = 0.2
_RETRIES = 10  # of a Ray task whose node dies; after that the job itself is assumed to be the cause


class JobRunner(NamedTuple):
  """How to run one job on each backend."""

  call: Callable[[Job], str | None]  # in a thread of this process; returns the error message, None when the job is done
  command: Callable[[Job, str], Sequence[str]]  # (job, its CPU cores such as '0,1') -> command line of its process
  task: Callable[[str, str], str | None]  # as `call`, for (workdir, name of the job) on another machine: Ray pickles it


def run_jobs(
  runner: JobRunner, settings: SweepConfig, workdir: pathlib.Path, jobs: Sequence[Job], watch: Callable[[], None], threads: int
) -> Ended:
  """Run jobs on the backend of `sweep.backend`.

  Args:
    runner: runs one job.
    settings: of the sweep.
    workdir: of the sweep.
    jobs: to run, in the order in which they start.
    watch: called regularly while a job runs.
    threads: jobs at a time if the backend is 'inline'.

  Yields:
    Each job when it ends, with its error message or None.

  Raises:
    Preempted: after SIGTERM, once the running jobs are saved.
    ConfigError: the backend is Ray, which is not installed.
  """
  if settings.backend == 'inline':
    return _inline(runner.call, jobs, watch, threads)
  if settings.backend == 'processes':
    return _processes(runner.command, settings.workers, workdir, jobs, watch)
  return _ray(runner.task, settings, workdir, jobs, watch)


def _inline(call: Callable[[Job], str | None], jobs: Sequence[Job], watch: Callable[[], None], threads: int) -> Ended:
  """Run jobs in threads of this process. Runs of one shape share their compiled programs."""
  with SigtermFlag() as stop, concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting, running = collections.deque(jobs), dict[concurrent.futures.Future[str | None], Job]()
    try:
      while waiting or running:
        while waiting and len(running) < threads:
          job = waiting.popleft()
          running[pool.submit(call, job)] = job
        ended, _ = concurrent.futures.wait(running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
        watch()
        for future in ended:
          yield running.pop(future), future.result()
    except BaseException:
      stop.set()  # the other threads save and stop too
      raise


def _processes(
  command: Callable[[Job, str], Sequence[str]], workers: int, workdir: pathlib.Path, jobs: Sequence[Job], watch: Callable[[], None]
) -> Ended:
  """Run each job in its own process on its share of the cores.

  Two runs of a small model with one core each are faster than the same two in turn with two cores.
  """
  waiting = collections.deque(jobs)
  free = collections.deque(_core_shares(workers))
  running: dict[subprocess.Popen, tuple[Job, str]] = {}
  told = False
  with SigtermFlag() as stop:
    try:
      while (waiting and not stop.is_set()) or running:
        while waiting and free and not stop.is_set():
          job, cores = waiting.popleft(), free.popleft()
          running[_start(command(job, cores), job.folder(workdir))] = (job, cores)
        ended = [process for process in running if process.poll() is not None]
        for process in ended:
          job, cores = running.pop(process)
          free.append(cores)
          if process.returncode != PREEMPTED:
            yield job, None if process.returncode == 0 else _failure(job.folder(workdir), process.returncode)
        if not ended:
          watch()
          time.sleep(_POLL_SECONDS)
        if stop.is_set() and not told:
          _terminate(running)
          told = True  # a second signal would end a process that has saved and is on its way out
    finally:
      _terminate(running)
      for process in running:
        process.wait()
    if stop.is_set():
      done = sum(results.read_result(job.folder(workdir)) is not None for job in jobs)
      raise Preempted('sweep', f'{done} of {len(jobs)} runs done, the others saved')


def _terminate(running: dict[subprocess.Popen, Any]) -> None:
  for process in running:
    process.terminate()


def _start(command: Sequence[str], folder: pathlib.Path) -> subprocess.Popen:
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / LOG).open('a', encoding='utf-8') as log:
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _core_shares(workers: int) -> list[str]:
  """Divide the cores of this process among workers, as evenly as possible; workers share cores where there are too few."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [*range(os.cpu_count() or 1)]
  shares = [cores[w::workers] or [cores[w % len(cores)]] for w in range(workers)]
  return [','.join(map(str, share)) for share in shares]


def _failure(folder: pathlib.Path, status: int) -> str:
  """Describe why a process failed, by the last line of its log."""
  path = folder / LOG
  lines = [line for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
  reason = lines[-1].removeprefix('polar_jax: ') if lines else 'no output'
  return f'{reason} (exit status {status}, log: {path})'


def _ray(
  task: Callable[[str, str], str | None], settings: SweepConfig, workdir: pathlib.Path, jobs: Sequence[Job], watch: Callable[[], None]
) -> Ended:
  """Run jobs as Ray tasks, each in a new process. Ray restarts a task whose node dies, and the job resumes from its checkpoint."""
  ray_cluster.check('sweep.backend')
  with ray_cluster.connected(settings.ray_address) as ray:
    # max_calls=1: one process per job, because a JAX backend never releases the devices it holds.
    remote = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus, max_calls=1, max_retries=_RETRIES)(task)
    job_of = {remote.remote(str(workdir.resolve()), job.name): job for job in jobs}
    with SigtermFlag() as stop:
      while job_of and not stop.is_set():
        watch()
        ready, _ = ray.wait([*job_of], timeout=1.0)
        for reference in ready:
          yield job_of.pop(reference), _ray_result(reference)
      if stop.is_set():
        for reference in job_of:
          ray.cancel(reference, force=False)
        raise Preempted('sweep', f'{len(jobs) - len(job_of)} of {len(jobs)} runs done')


def _ray_result(reference: Any) -> str | None:
  import ray

  try:
    return ray.get(reference)
  except ray.exceptions.RayError as error:
    return ' '.join(str(error).split())[:300]
