"""Where the jobs of a sweep run: in this process, in several on this machine, or on a Ray cluster.

Every way is a generator that runs jobs and yields (job, error) as they end, in whatever order; error None: done.
"""

from __future__ import annotations

import collections
import concurrent.futures
import importlib.util
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polar_jax.config import ConfigError, SweepConfig
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.scaling import sweep
from polar_jax.scaling.sweep import Job
from polar_jax.stages import sweep_worker as worker
from polar_jax.stages.context import Context
from polar_jax.train.trainer import NonFiniteError
from polar_jax.types import UserError

Ended = Iterator[tuple[Job, str | None]]
LOG = 'log.txt'  # of a job in a process of its own
_LOOK_EVERY = 0.2  # seconds
_RETRIES = 10  # of a job whose node or process dies: more often, and the job itself is what kills them


def run_jobs(context: Context, jobs: Sequence[Job], watch: Callable[[], None]) -> Ended:
  """Runs `jobs` by `sweep.backend`.

  Args:
    watch: called now and then while something runs.

  Raises:
    Preempted: after SIGTERM, once what runs is saved.
    ConfigError: Ray is wanted and not there.
  """
  backend = {'inline': _inline, 'processes': _processes, 'ray': _ray}[context.config.sweep.backend]
  return backend(context, jobs, watch)


def _inline(context: Context, jobs: Sequence[Job], watch: Callable[[], None]) -> Ended:
  """Runs of one shape share what was compiled; on one device several may run side by side, since small models leave it half idle."""
  # Two threads that start collectives in different orders would wait for each other.
  workers = context.config.sweep.workers if context.mesh.size == 1 else 1
  with SigtermFlag() as stop, concurrent.futures.ThreadPoolExecutor(workers) as threads:
    waiting, running = collections.deque(jobs), dict[concurrent.futures.Future, Job]()
    try:
      while waiting or running:
        while waiting and len(running) < workers:
          job = waiting.popleft()
          running[threads.submit(sweep.run_job, context, job)] = job
        ended, _ = concurrent.futures.wait(running, _LOOK_EVERY, concurrent.futures.FIRST_COMPLETED)
        watch()
        for future in ended:
          yield running.pop(future), _error(future)
    except BaseException:
      stop.set()  # the others save and stop too
      raise


def _error(future: concurrent.futures.Future) -> str | None:
  try:
    future.result()
    return None
  except (UserError, NonFiniteError) as error:
    return str(error)


def _processes(context: Context, jobs: Sequence[Job], watch: Callable[[], None]) -> Ended:
  """The cores are divided among the workers: two runs of a small model with a core each are faster than one after the other with two."""
  waiting = collections.deque(jobs)
  free = collections.deque(_shares(context.config.sweep.workers))
  running: dict[subprocess.Popen, tuple[Job, str]] = {}
  with SigtermFlag() as stop:
    try:
      while (waiting and not stop.is_set()) or running:
        while waiting and free and not stop.is_set():
          job, cores = waiting.popleft(), free.popleft()
          running[_start(context.workdir, job, cores)] = (job, cores)
        ended = [process for process in running if process.poll() is not None]
        for process in ended:
          job, cores = running.pop(process)
          free.append(cores)
          if process.returncode != worker.PREEMPTED:
            yield job, None if process.returncode == 0 else _why(context.workdir, job, process.returncode)
        if not ended:
          watch()
          time.sleep(_LOOK_EVERY)
        if stop.is_set():
          _end(running)
    finally:
      _end(running)
      for process in running:
        process.wait()
    if stop.is_set():
      done = sum(sweep.read_result(job.folder(context.workdir)) is not None for job in jobs)
      raise Preempted('sweep', f'{done} of {len(jobs)} runs done, the others saved')


def _end(running: dict[subprocess.Popen, Any]) -> None:
  for process in running:
    process.terminate()


def _start(workdir: pathlib.Path, job: Job, cores: str) -> subprocess.Popen:
  folder = job.folder(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / LOG).open('a', encoding='utf-8') as log:
    command = [sys.executable, '-m', 'polar_jax.stages.sweep_worker', str(workdir), job.name, '--cores', cores]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def _shares(workers: int) -> list[str]:
  """The cores of each worker, as equal as they divide; where they are fewer than the workers, workers share."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [*range(os.cpu_count() or 1)]
  shares = [cores[w::workers] or [cores[w % len(cores)]] for w in range(workers)]
  return [','.join(map(str, share)) for share in shares]


def _why(workdir: pathlib.Path, job: Job, status: int) -> str:
  path = job.folder(workdir) / LOG
  lines = [line for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if line.strip()]
  said = lines[-1].removeprefix('polar_jax: ') if lines else 'it said nothing'
  return f'{said} (exit status {status}, log: {path})'


def _ray(context: Context, jobs: Sequence[Job], watch: Callable[[], None]) -> Ended:
  """Runs as Ray tasks, each in a fresh process. A task whose node dies is started again elsewhere and resumes from its checkpoint."""
  if importlib.util.find_spec('ray') is None:
    raise ConfigError("sweep.backend is 'ray', which is not installed: pip install 'polar_jax[ray]'")
  import ray

  s: SweepConfig = context.config.sweep
  ours = not ray.is_initialized()
  if ours:
    ray.init(address=s.ray_address, log_to_driver=False, include_dashboard=False, configure_logging=False)
  try:
    # A fresh process for each run: what a backend of JAX once took, it keeps.
    remote = ray.remote(num_cpus=s.cpus, num_gpus=s.gpus, max_calls=1, max_retries=_RETRIES)(_on_ray)
    workdir = str(context.workdir.resolve())
    of = {remote.remote(workdir, job.name): job for job in jobs}
    with SigtermFlag() as stop:
      while of and not stop.is_set():
        watch()
        ready, _ = ray.wait([*of], timeout=1.0)
        for reference in ready:
          yield of.pop(reference), _result_on_ray(reference)
      if stop.is_set():
        for reference in of:
          ray.cancel(reference, force=False)
        raise Preempted('sweep', f'{len(jobs) - len(of)} of {len(jobs)} runs done')
  finally:
    if ours:
      ray.shutdown()


def _result_on_ray(reference: Any) -> str | None:
  import ray

  try:
    return ray.get(reference)
  except ray.exceptions.RayError as error:
    return ' '.join(str(error).split())[:300]


def _on_ray(workdir: str, name: str) -> str | None:
  """In the process of a Ray task: the error, None when the job is done."""
  try:
    worker.run(pathlib.Path(workdir), name)
    return None
  except (UserError, NonFiniteError) as error:
    return str(error)
