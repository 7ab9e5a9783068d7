"""The sweep stage: runs the grid and gathers results.csv."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax

from polar_jax.config import Config, ConfigError
from polar_jax.model import flops
from polar_jax.scaling import fanout, sweep
from polar_jax.scaling.progress import LiveTable
from polar_jax.scaling.sweep import Job
from polar_jax.stages import sweep_worker as worker
from polar_jax.stages.context import Context
from polar_jax.types import UserError

JOBS = ('jobs_lm.txt', 'jobs.txt')  # first the language models, then the runs that start from them


class SweepError(UserError):
  """Some runs of a sweep failed; the others are done and in its table."""


def run(context: Context) -> dict[str, Any] | None:
  """Trains every cell that `results.csv` does not hold yet. Returns the section `sweep` of the report.

  With `sweep.jobs_only` it writes the commands of the jobs instead, and gathers what jobs elsewhere have finished.

  Raises:
    ConfigError: the workdir holds a sweep with other settings, or the grid asks for what cannot be.
    SweepError: runs failed, naming them and why.
  """
  if jax.process_count() > 1:
    raise ConfigError('the sweep stage is one process that starts others: run it on one host, or queue its jobs (sweep.jobs_only)')
  config, workdir = context.config, context.workdir
  cells = sweep.grid(config)
  for size in config.sweep.sizes:
    sweep.model_of(config, size)
  context.triplets('train')  # an error here is better than one in every run
  sweep.check_settings(context)
  _write_config(context)
  table = sweep.read_table(workdir / sweep.RESULTS)
  missing = [Job(cell.size, cell) for cell in cells if cell.name not in table]
  models = sweep.language_models(context, [cell for cell in cells if cell.name not in table])
  context.log(f'sweep: {len(cells)} runs, {len(cells) - len(missing)} of them in {sweep.RESULTS} already')
  sweep.store_tokens(context, [job.cell for job in missing if job.cell])
  if config.sweep.jobs_only:
    _write_jobs(context, models, missing)
  else:
    # The longest first: a long run that starts last would be waited for alone.
    failed = _run(context, models) or _run(context, sorted(missing, key=lambda job: _cost(config, job), reverse=True))
    if failed:
      named = '; '.join(f'{name}: {error}' for name, error in list(failed.items())[:5])
      raise SweepError(f'{len(failed)} runs of the sweep failed, the others are done; the same command tries them again. {named}')
  _gather(context, cells)
  return {'sweep': {'runs': len(cells), 'done': len(sweep.read_table(workdir / sweep.RESULTS)), 'sizes': list(config.sweep.sizes)}}


def _run(context: Context, jobs: Sequence[Job]) -> dict[str, str]:
  """Runs jobs, gathering their rows as they end. Returns errors by the job's name."""
  waiting = [job for job in jobs if sweep.read_result(job.folder(context.workdir)) is None]
  if not waiting:
    return {}
  table, failed = LiveTable(waiting, context.workdir, live=context.config.sweep.backend != 'inline'), dict[str, str]()
  for job, error in fanout.run_jobs(context, waiting, table.watch):
    table.ended(job, error)
    if error:
      failed[job.name] = error
    elif job.cell:
      _gather(context, sweep.grid(context.config))
  return failed


def _gather(context: Context, cells: Sequence[sweep.Cell]) -> None:
  """Brings finished runs into results.csv. Rows that are there stay as they are."""
  path = context.workdir / sweep.RESULTS
  rows: dict[str, dict[str, Any]] = dict(sweep.read_table(path))
  for cell in cells:
    if cell.name not in rows and (found := sweep.read_result(Job(cell.size, cell).folder(context.workdir))):
      rows[cell.name] = found
  if rows:
    sweep.write_table(path, rows, [cell.name for cell in cells])


def _cost(config: Config, job: Job) -> float:
  assert job.cell is not None
  return flops.reward_model_parameters(sweep.model_of(config, job.size)).without_embedding * job.cell.tokens


def _write_config(context: Context) -> None:
  path = context.workdir / worker.CONFIG
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(dataclasses.asdict(context.config), indent=2) + '\n')


def _write_jobs(context: Context, *parts: Sequence[Job]) -> None:
  """A command per line, for the queue of a cluster (launch/sweep_slurm.sh)."""
  for name, jobs in zip(JOBS, parts, strict=True):
    todo = [job for job in jobs if sweep.read_result(job.folder(context.workdir)) is None]
    command = [pathlib.Path(sys.executable).name, '-m', 'polar_jax.stages.sweep_worker', str(context.workdir)]
    path = context.workdir / sweep.FOLDER / name
    path.write_text(''.join(shlex.join([*command, job.name]) + '\n' for job in todo))
    context.log(f'sweep: {len(todo)} commands in {path}')
