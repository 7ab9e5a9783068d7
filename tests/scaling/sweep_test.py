"""A sweep in one process, in several and as commands for a queue: what its rows hold, that nothing runs twice, and what it says."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from polar_jax.config import (
  Config,
  ConfigError,
  ModelConfig,
  SweepConfig,
)
from polar_jax.model import flops
from polar_jax.runtime.preemption import Preempted
from polar_jax.scaling import fanout, results, sweep
from polar_jax.scaling import progress as table
from polar_jax.scaling.sweep import Cell, Job
from polar_jax.stages import sweep as sweep_stage
from polar_jax.stages import sweep_worker as worker
from polar_jax.stages.pretrain_lm import pretrain_lm
from polar_jax.train.metrics import read_metrics
from polar_jax.types import UserError


@pytest.fixture(scope='module')
def finished(tmp_path_factory, make):
  """A sweep that ran in this process. Not to be changed."""
  workdir = tmp_path_factory.mktemp('finished')
  context = make(workdir)
  assert sweep_stage.run(context) == {'sweep': {'runs': 4, 'done': 4, 'sizes': ['16x1', '8x1']}}
  return context


def values(workdir):
  """Rows of results.csv but for their times."""
  return {name: {k: v for k, v in row.items() if k != 'seconds'} for name, row in sweep.read_table(workdir / sweep.RESULTS).items()}


def test_the_grid_is_every_combination_in_order_of_size():
  grid = SweepConfig(sizes=('16x1', '8x1'), tokens=(600, 300), learning_rates=(1e-3, 2e-3), batches=(4, 8))
  cells = sweep.grid(dataclasses.replace(Config(), sweep=grid, model=ModelConfig(head_dim=8)))
  assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 * 2
  assert [cell.size for cell in cells] == ['8x1'] * 8 + ['16x1'] * 8
  assert cells[0] == Cell('8x1', 300, 1e-3, 4) and cells[-1] == Cell('16x1', 600, 2e-3, 8)


def test_tokens_grow_with_a_power_of_the_parameters():
  model = ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=50)
  config = Config(model=model, sweep=SweepConfig(sizes=('16x2', '32x2'), tokens=(1_000_000,), tokens_exponent=0.5))
  # Embedding, four attention matrices and three of the feed-forward in each of two layers, five norms, the head.
  count = lambda width: 50 * width + 2 * (4 * width**2 + 3 * width * 2 * width) + 5 * width + width
  cells = sweep.grid(config)
  assert [cell.tokens for cell in cells] == [1_000_000, round(1e6 * np.sqrt(count(32) / count(16)), -4)]
  assert sweep.job_named(config, cells[1].name).cell == cells[1]


def test_runs_read_what_was_tokenised_once(finished, make, tmp_path, monkeypatch):
  """And learn from it what they learn without."""
  assert (finished.workdir / sweep.TOKENS / 'info.json').exists()
  monkeypatch.setattr(sweep, 'store_tokens', lambda *_: None)
  sweep_stage.run(make(tmp_path))
  assert not (tmp_path / sweep.TOKENS).exists() and values(tmp_path) == values(finished.workdir)


def test_a_run_of_another_seed_is_what_a_sweep_of_that_seed_trains(make, tmp_path):
  """From a language model of its own, in another order, and with a name of its own."""
  grid = {'sizes': ('8x1',), 'tokens': (300,)}
  both, other = make(tmp_path / 'both', seeds=(0, 1), **grid), make(tmp_path / 'other', **grid)
  sweep_stage.run(both)
  sweep_stage.run(dataclasses.replace(other, config=dataclasses.replace(other.config, seed=both.config.seed + 1)))
  (first, row), (name, second) = values(both.workdir).items()
  assert name == f'{first}_seed1' and {path.name for path in (both.workdir / sweep.FOLDER).glob('*_lm*')} == {'8x1_lm', '8x1_lm_seed1'}
  assert int(second['seed']) == int(row['seed']) + 1 and second['loss'] != row['loss']
  assert [second | {'run': first}] == [*values(other.workdir).values()]


def test_a_size_keeps_the_proportions_of_the_model():
  base = ModelConfig(num_layers=3, d_model=64, d_ff=192, num_heads=4, num_kv_heads=2, head_dim=16, init_std=0.12, scan_unroll=3)
  config = Config(model=base)
  assert sweep.model_of(config, '64x3') == base
  wide = sweep.model_of(config, '128x5')
  assert (wide.num_layers, wide.d_ff, wide.num_heads, wide.num_kv_heads, wide.scan_unroll) == (5, 384, 8, 4, 5)
  assert wide.init_std == pytest.approx(0.12 / np.sqrt(2))
  narrow = sweep.model_of(config, '8x1')  # narrower than a head
  assert (narrow.head_dim, narrow.num_heads, narrow.num_kv_heads) == (8, 1, 1)
  between = sweep.model_of(config, '40x3')  # no multiple of a head
  assert (between.head_dim, between.num_heads, between.num_kv_heads) == (10, 4, 2)


@pytest.mark.parametrize('size', ['64', 'ax3', '64x0', '7x1', '41x2', '0x1', '64x3x2'])
def test_what_is_no_size_is_refused(size):
  with pytest.raises(ConfigError, match=r'sweep\.sizes'):
    sweep.model_of(Config(model=ModelConfig(head_dim=16)), size)


def test_a_row_holds_what_its_run_did(finished):
  table_rows = sweep.read_table(finished.workdir / sweep.RESULTS)
  assert [*table_rows] == [cell.name for cell in sweep.grid(finished.config)]
  for name, row in table_rows.items():
    logged = [r for r in read_metrics(finished.workdir / sweep.FOLDER / name) if 'learning_rate' in r]
    assert int(row['steps']) == len(logged) and int(row['tokens_read']) == logged[-1]['tokens']
    assert abs(int(row['tokens_read']) - int(row['tokens'])) < 0.2 * int(row['tokens'])
    # Exactly the FLOPs of its steps: MFU x seconds x peak, added up.
    summary = json.loads((finished.workdir / sweep.FOLDER / name / 'summary.json').read_text())
    added = sum(r['mfu'] * r['step_seconds'] for r in logged) * summary['peak_flops'] * jax.device_count()
    assert float(row['flops']) == pytest.approx(added, rel=1e-6)
    assert float(row['loss']) == summary['validation_loss']
    shape = dataclasses.replace(finished.config, model=sweep.model_of(finished.config, name.split('_')[0]))
    assert int(row['parameters']) == flops.reward_model_parameters(dataclasses.replace(finished, config=shape).model_config()).total
  read = results.read(finished.workdir / sweep.RESULTS)
  assert len(read) == 4 and sorted(set(read.tokens)) == [300, 600]


def test_what_is_done_is_not_run_again(finished, make, monkeypatch):
  table_before = (finished.workdir / sweep.RESULTS).read_bytes()
  monkeypatch.setattr(sweep, 'run_job', lambda *_: pytest.fail('ran again'))
  log = []
  sweep_stage.run(dataclasses.replace(finished, log=log.append))
  assert log == ['sweep: 4 runs, 4 of them in results.csv already']
  assert (finished.workdir / sweep.RESULTS).read_bytes() == table_before


def test_rows_in_the_table_count_as_done_wherever_they_came_from(finished, make, tmp_path, monkeypatch):
  (tmp_path / sweep.RESULTS).write_bytes((finished.workdir / sweep.RESULTS).read_bytes())
  monkeypatch.setattr(sweep, 'run_job', lambda *_: pytest.fail('ran'))
  assert sweep_stage.run(make(tmp_path))['sweep']['done'] == 4


def test_a_larger_grid_runs_only_what_is_new(finished, make, tmp_path, monkeypatch):
  (tmp_path / sweep.RESULTS).write_bytes((finished.workdir / sweep.RESULTS).read_bytes())
  ran = []

  def run_job(context, job):
    ran.append(job.name)
    folder = job.folder(context.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / sweep.RESULT).write_text(json.dumps({'run': job.name, 'steps': 1, 'loss': 0.5}))

  monkeypatch.setattr(sweep, 'run_job', run_job)
  sweep_stage.run(make(tmp_path, tokens=(300, 600, 900)))
  # Language models first, then the longest run of the largest size.
  assert ran == ['8x1_lm', '16x1_lm', '16x1_tokens900_lr0.003_batch4', '8x1_tokens900_lr0.003_batch4']
  order = [*sweep.read_table(tmp_path / sweep.RESULTS)]
  assert len(order) == 6 and [name.split('_')[:2] for name in order[:3]] == [['8x1', f'tokens{t}'] for t in (300, 600, 900)]


def test_a_workdir_holds_one_sweep(finished, make):
  changed = dataclasses.replace(finished.config, pretrain_lm=dataclasses.replace(finished.config.pretrain_lm, steps=6))
  with pytest.raises(ConfigError, match=r'pretrain_lm.steps was 5, is 6.*another --workdir'):
    sweep_stage.run(dataclasses.replace(finished, config=changed))


def test_a_run_that_fails_is_named_and_the_others_are_done(make, tmp_path, monkeypatch, capsys):
  real = sweep.run_job

  def run_job(context, job):
    if job.name.startswith('16x1_tokens600'):
      raise UserError('no such luck')
    return real(context, job)

  monkeypatch.setattr(sweep, 'run_job', run_job)
  with pytest.raises(sweep_stage.SweepError, match=r'1 runs of the sweep failed.*16x1_tokens600_lr0.003_batch4: no such luck'):
    sweep_stage.run(make(tmp_path))
  assert len(sweep.read_table(tmp_path / sweep.RESULTS)) == 3
  assert 'sweep: 16x1_tokens600_lr0.003_batch4: failed: no such luck' in capsys.readouterr().out
  monkeypatch.setattr(sweep, 'run_job', real)
  assert sweep_stage.run(make(tmp_path))['sweep']['done'] == 4


def test_the_language_model_of_the_workdir_serves_the_size_that_it_has(make, tmp_path):
  context = make(tmp_path, sizes=('8x1', '32x1'), tokens=(300,))
  cells = sweep.grid(context.config)
  assert [job.name for job in sweep.language_models(context, cells)] == ['8x1_lm', '32x1_lm']
  pretrain_lm(context)
  assert [job.name for job in sweep.language_models(context, cells)] == ['8x1_lm']
  log: list[str] = []
  sweep.run_job(dataclasses.replace(context, log=log.append), Job('32x1', cells[-1]))
  assert any(str(tmp_path / 'pretrain_lm') in line for line in log)


@pytest.mark.slow  # each process compiles anew; a worker's own run: below
def test_processes_give_the_same_rows(finished, make, tmp_path):
  """And one that was stopped by SIGTERM goes on where it was."""
  context = make(tmp_path, backend='processes', workers=2, sizes=('8x1',))
  sent = threading.Event()

  def watch_and_stop():
    folder = tmp_path / sweep.FOLDER
    while not sent.is_set():
      if any(job.exists() for job in folder.glob('8x1_tokens*/metrics.jsonl')):
        os.kill(os.getpid(), signal.SIGTERM)
        sent.set()
      time.sleep(0.02)

  thread = threading.Thread(target=watch_and_stop)
  thread.start()
  try:
    with pytest.raises(Preempted, match=r'sweep: stopped by SIGTERM, \d of \d runs done, the others saved'):
      sweep_stage.run(context)
  finally:
    sent.set()
    thread.join()
  sweep_stage.run(context)
  mine, theirs = values(tmp_path), values(finished.workdir)
  assert len(mine) == 2
  for name, row in mine.items():
    assert {k: v for k, v in row.items() if k not in ('loss', 'accuracy')} == {
      k: v for k, v in theirs[name].items() if k not in ('loss', 'accuracy')
    }
    assert float(row['loss']) == pytest.approx(float(theirs[name]['loss']), abs=1e-6)


def test_a_process_that_dies_is_reported_with_its_last_words(make, tmp_path, monkeypatch):
  context = make(tmp_path, backend='processes', workers=2)
  script = 'import sys; print("polar_jax: out of luck", file=sys.stderr); sys.exit(3)'
  monkeypatch.setattr(sys, 'executable', _fake_python(tmp_path, script))
  with pytest.raises(sweep_stage.SweepError, match=r'8x1_lm: out of luck \(exit status 3, log: .*log.txt\)'):
    sweep_stage.run(context)


def _fake_python(folder: pathlib.Path, script: str) -> str:
  path = folder / 'python'
  path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{script}'\n")
  path.chmod(0o755)
  return str(path)


def test_jobs_for_a_queue_are_commands_that_run(finished, make, tmp_path):
  context = make(tmp_path, jobs_only=True, sizes=('8x1',), tokens=(300,))
  sweep_stage.run(context)
  models, runs = ((tmp_path / sweep.FOLDER / name).read_text().splitlines() for name in sweep_stage.JOBS)
  assert models == [f'python -m polar_jax.stages.sweep_worker {tmp_path} 8x1_lm'] or models[0].endswith('8x1_lm')
  assert len(models) == len(runs) == 1 and runs[0].endswith('8x1_tokens300_lr0.003_batch4')
  for job in (Job('8x1', None), Job('8x1', sweep.grid(context.config)[0])):
    worker.run(tmp_path, job.name)
  sweep_stage.run(context)
  assert len(sweep.read_table(tmp_path / sweep.RESULTS)) == 1
  assert (tmp_path / sweep.FOLDER / sweep_stage.JOBS[1]).read_text() == ''
  with pytest.raises(ConfigError, match='no run'):
    worker.run(tmp_path, 'nothing')


def test_two_that_run_one_job_do_it_once(make, tmp_path):
  context = make(tmp_path, sizes=('8x1',), tokens=(300,))
  job, found = Job('8x1', None), []
  threads = [threading.Thread(target=lambda: found.append(sweep.run_job(context, job))) for _ in range(2)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert len(found) == 2 and found[0] == found[1]
  assert [r['step'] for r in read_metrics(job.folder(tmp_path)) if 'learning_rate' in r] == [1, 2, 3, 4, 5]


def test_the_table_shows_what_runs_first_and_fits_the_terminal():
  jobs = [Job(size, None) for size in ('1x1', '2x2', '3x3', '4x4')]
  states = [table.State(), table.State(5, 0.5, done=True), table.State(3, 0.61234), table.State(1, error='oh')]
  lines = table.render(jobs, states, 10).split('\n')
  assert lines == [
    '3x3_lm  step 3        loss 0.6123',
    '4x4_lm  failed',
    '2x2_lm  done          loss 0.5000',
    '1x1_lm  waiting',
    '1 of 4 done, 1 failed',
  ]
  assert table.render(jobs, states, 3).split('\n')[-1] == '1 of 4 done, 1 failed, 2 not shown'


def test_in_a_terminal_the_table_is_drawn_over_itself(finished):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  jobs = [Job(cell.size, cell) for cell in sweep.grid(finished.config)]
  live = table.LiveTable(jobs, finished.workdir, out=out)
  live.watch()
  live.watch()  # too soon to draw again
  assert out.getvalue().count('done') == 4 + 1 and '\x1b[' not in out.getvalue()
  live.ended(jobs[0], None)
  assert out.getvalue().count('\x1b[5F\x1b[J') == 1


def test_cores_are_divided_among_workers(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1, 2, 5, 7})
  assert fanout._shares(2) == ['0,2,7', '1,5']
  assert fanout._shares(6) == ['0', '1', '2', '5', '7', '0']
