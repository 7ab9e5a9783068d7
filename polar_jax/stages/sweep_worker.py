"""One job of a sweep in a process of its own: `python -m polar_jax.stages.sweep_worker WORKDIR JOB`.

Started by the sweep stage, or by a cluster's queue. The settings are those that the sweep stage wrote to the workdir.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from polar_jax.config import Config

CONFIG = 'sweep/config.json'
PREEMPTED = 75  # exit status: saved after SIGTERM, to be run again


def read_config(workdir: pathlib.Path) -> Config:
  """The settings of the sweep in `workdir`.

  Raises:
    ConfigError: there is no sweep.
  """
  from polar_jax.config import ConfigError, parse

  path = workdir / CONFIG
  if not path.exists():
    raise ConfigError(f'{path}: no such file; the sweep stage writes it')
  return parse(json.loads(path.read_text()))


def run(workdir: pathlib.Path, name: str) -> None:
  """Runs a job of the sweep in `workdir` on all devices of this process.

  Raises:
    UserError, NonFiniteError, Preempted: as training does.
  """
  from polar_jax import sharding
  from polar_jax.scaling import sweep
  from polar_jax.stages.context import Context

  config = read_config(workdir)
  context = Context(config, workdir, sharding.make_mesh(config.mesh), lambda message: print(message, flush=True))
  sweep.run_job(context, sweep.job_named(config, name))


def main() -> int:
  """Exit status: 0 done, 75 saved after SIGTERM, 1 stopped by an error that a message explains."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('workdir', type=pathlib.Path)
  parser.add_argument('job')
  parser.add_argument('--cores', help='the cores to use, such as 0,1: XLA takes as many threads as it finds')
  args = parser.parse_args()
  if args.cores and hasattr(os, 'sched_setaffinity'):  # before JAX starts its threads
    os.sched_setaffinity(0, {int(core) for core in args.cores.split(',')})

  from polar_jax.runtime import malloc

  if malloc.runs_on_cpu():
    malloc.keep_freed_memory()
  from polar_jax.runtime.preemption import Preempted
  from polar_jax.train.trainer import NonFiniteError
  from polar_jax.types import UserError

  try:
    run(args.workdir, args.job)
    return 0
  except Preempted as stop:
    print(stop, flush=True)
    return PREEMPTED
  except (UserError, NonFiniteError) as error:
    print(f'polar_jax: {error}', file=sys.stderr, flush=True)
    return 1


if __name__ == '__main__':
  sys.exit(main())
