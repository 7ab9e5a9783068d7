"""The sweep stage: trains the cells of a grid and collects their results in results.csv."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax

from polar_jax.config import ConfigError
from polar_jax.runtime import json_files
from polar_jax.runtime.paths import write_atomically
from polar_jax.scaling import fanout, grid, results
from polar_jax.scaling.grid import Cell, Job
from polar_jax.scaling.progress import LiveTable
from polar_jax.stages import sweep_jobs, sweep_worker
from polar_jax.stages.context import Context
from polar_jax.types import UserError

JOBS = ('jobs_lm.txt', 'jobs.txt')  # first the language models, then the runs that start from them


class SweepError(UserError):
  """Some runs of a sweep failed; the others are done and in its table."""


def run(context: Context) -> dict[str, Any] | None:
  """Train every cell that is not in `results.csv` yet.

  With `sweep.jobs_only`, write the jobs as commands instead, and collect the results of those that have finished elsewhere.

  Returns:
    The section `sweep` of the report.

  Raises:
    ConfigError: the workdir holds a sweep with other settings, or a size of the grid is impossible.
    SweepError: runs failed; the message has their names and reasons.
  """
  if jax.process_count() > 1:
    raise ConfigError('the sweep stage is one process that starts others; run it on one host, or queue its jobs (sweep.jobs_only)')
  config, workdir = context.config, context.workdir
  cells = grid.cells_of(config)
  for size in config.sweep.sizes:
    grid.model_of(config, size)
  context.triplets('train')  # a bad file should fail here, not in every run
  sweep_jobs.check_settings(context)
  surveys = sweep_jobs.surveys(context)
  write_atomically(workdir / sweep_worker.CONFIG, json_files.dumps(dataclasses.asdict(config), indent=2) + '\n')
  table = results.read_table(workdir / results.TABLE)
  missing = [Job(cell.size, cell) for cell in cells if cell.name not in table]
  models = sweep_jobs.language_models(context, [cell for cell in cells if cell.name not in table])
  context.log(f'sweep: {len(cells)} runs, {len(cells) - len(missing)} of them in {results.TABLE} already')
  sweep_jobs.store_tokens(context, [job.cell for job in missing if job.cell])
  if config.sweep.jobs_only:
    _write_commands(context, models, missing)
  else:
    # The longest run first: started last, it would run alone while the other workers idle.
    failed = _run(context, models) or _run(context, sorted(missing, key=functools.partial(grid.cost, config), reverse=True))
    if failed:
      named = '; '.join(f'{name}: {error}' for name, error in list(failed.items())[:5])
      raise SweepError(f'{len(failed)} runs of the sweep failed, the others are done; the same command retries them. {named}')
  _collect(context, cells)
  done = len(results.read_table(workdir / results.TABLE))
  return {'sweep': {'runs': len(cells), 'done': done, 'sizes': list(config.sweep.sizes), 'examples': surveys}}


def _run(context: Context, jobs: Sequence[Job]) -> dict[str, str]:
  """Run jobs and collect their results as they end. Returns error messages by the job's name."""
  settings, workdir = context.config.sweep, context.workdir
  waiting = [job for job in jobs if results.read_result(job.folder(workdir)) is None]
  if not waiting:
    return {}
  table, failed = LiveTable(waiting, workdir, live=settings.backend != 'inline'), dict[str, str]()
  runner = fanout.JobRunner(
    call=lambda job: sweep_jobs.try_job(context, job),
    command=lambda job, cores: sweep_worker.command(workdir, job.name, sys.executable, cores),
    task=sweep_worker.run_task,
  )
  # On one device several runs may train side by side, because small models leave it half idle. On several devices threads that
  # start collectives in different orders would wait for each other.
  threads = settings.workers if context.mesh.size == 1 else 1
  for job, error in fanout.run_jobs(runner, settings, workdir, waiting, table.watch, threads):
    table.ended(job, error)
    if error:
      failed[job.name] = error
    elif job.cell:
      _collect(context, grid.cells_of(context.config))
  return failed


def _collect(context: Context, cells: Sequence[Cell]) -> None:
  """Add the results of finished runs to results.csv. Existing rows stay as they are."""
  path = context.workdir / results.TABLE
  rows: dict[str, dict[str, Any]] = dict(results.read_table(path))
  for cell in cells:
    if cell.name not in rows and (result := results.read_result(Job(cell.size, cell).folder(context.workdir))):
      rows[cell.name] = result
  if rows:
    results.write_table(path, rows, [cell.name for cell in cells])


def _write_commands(context: Context, *groups: Sequence[Job]) -> None:
  """Write one command per line, for the queue of a cluster (launch/sweep_slurm.sh)."""
  for name, jobs in zip(JOBS, groups, strict=True):
    todo = [job for job in jobs if results.read_result(job.folder(context.workdir)) is None]
    path = context.workdir / grid.FOLDER / name
    python = pathlib.Path(sys.executable).name
    write_atomically(path, ''.join(shlex.join(sweep_worker.command(context.workdir, job.name, python)) + '\n' for job in todo))
    context.log(f'sweep: {len(todo)} commands in {path}')
