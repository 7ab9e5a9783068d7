"""One job of a sweep in its own process: `python -m polar_jax.stages.sweep_worker WORKDIR JOB`.

The sweep stage or the queue of a cluster starts it. It reads the settings that the sweep stage wrote to the workdir.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from polar_jax.config import Config
  from polar_jax.stages.context import Context

CONFIG = 'sweep/config.json'


def command(workdir: pathlib.Path, name: str, python: str, cores: str | None = None) -> list[str]:
  """Return the command line of a job.

  Args:
    workdir: of the sweep.
    name: of the job.
    python: the interpreter to start.
    cores: comma-separated CPU cores to run on; None: all.
  """
  line = [python, '-m', 'polar_jax.stages.sweep_worker', str(workdir), name]
  return line if cores is None else [*line, '--cores', cores]


def read_config(workdir: pathlib.Path) -> Config:
  """Read the settings of the sweep in `workdir`.

  Raises:
    ConfigError: there is no sweep.
    JsonError: its file is damaged.
  """
  from polar_jax.config import ConfigError, parse
  from polar_jax.runtime import json_files

  path = workdir / CONFIG
  if not path.exists():
    raise ConfigError(f'{path}: no such file; run the sweep stage in this workdir first (with sweep.jobs_only to train nothing)')
  return parse(json_files.read(path, 'run the sweep stage in this workdir again'))


def _context(workdir: pathlib.Path) -> Context:
  from polar_jax import sharding
  from polar_jax.stages.context import Context

  config = read_config(workdir)
  return Context(config, workdir, sharding.make_mesh(config.mesh), lambda message: print(message, flush=True))


def run(workdir: pathlib.Path, name: str) -> None:
  """Run a job of the sweep in `workdir` on all devices of this process.

  Raises:
    UserError, NonFiniteError, Preempted: from training.
  """
  from polar_jax.scaling import grid
  from polar_jax.stages import sweep_jobs

  context = _context(workdir)
  sweep_jobs.run_job(context, grid.job_named(context.config, name))


def run_task(workdir: str, name: str) -> str | None:
  """Run a job as a Ray task. Returns the error message, or None when the job is done."""
  from polar_jax.scaling import grid
  from polar_jax.stages import sweep_jobs
  from polar_jax.types import UserError

  try:
    context = _context(pathlib.Path(workdir))
    return sweep_jobs.try_job(context, grid.job_named(context.config, name))
  except UserError as error:
    return str(error)


def main() -> int:
  """Run the job of the command line.

  Returns:
    The exit status: 0 done, `fanout.PREEMPTED` saved after SIGTERM, 1 stopped by an error that a message explains.
  """
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('job')
  parser.add_argument('--cores', help='CPU cores to run on, such as 0,1; XLA starts one thread per core')
  args = parser.parse_args()
  if args.cores and hasattr(os, 'sched_setaffinity'):  # before JAX starts its threads
    os.sched_setaffinity(0, {int(core) for core in args.cores.split(',')})

  from absl import logging

  from polar_jax.runtime import malloc, preemption

  logging.set_verbosity(logging.ERROR)  # TFDS and Orbax log every file they touch
  if malloc.runs_on_cpu():
    malloc.keep_freed_memory()
  from polar_jax.runtime.preemption import Preempted
  from polar_jax.scaling import fanout
  from polar_jax.train.session import NonFiniteError
  from polar_jax.types import UserError

  try:
    run(args.workdir, args.job)
    return 0
  except Preempted as stop:
    print(stop, flush=True)
    preemption.leave(fanout.PREEMPTED)
    return fanout.PREEMPTED
  except (UserError, NonFiniteError) as error:
    print(f'polar_jax: {error}', file=sys.stderr, flush=True)
    return 1


if __name__ == '__main__':
  sys.exit(main())
