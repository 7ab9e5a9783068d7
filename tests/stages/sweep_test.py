"""Sweeps in one process, in several processes and as commands for a queue."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import pytest

from polar_jax.config import ConfigError
from polar_jax.model import flops
from polar_jax.runtime.preemption import Preempted
from polar_jax.scaling import grid, results
from polar_jax.scaling.grid import Job
from polar_jax.stages import context as context_lib
from polar_jax.stages import pretrain_lm, sweep_jobs, sweep_worker
from polar_jax.stages import sweep as stage
from polar_jax.train.metrics import read_metrics
from polar_jax.types import UserError


@pytest.fixture(scope='module')
def finished(tmp_path_factory, make_sweep):
  """The context of a sweep that ran in this process. Read only."""
  context = make_sweep(tmp_path_factory.mktemp('finished'))
  section = stage.run(context)['sweep']
  surveyed = section.pop('examples')
  assert section == {'runs': 4, 'done': 4, 'sizes': ['16x1', '8x1']}
  assert {split: (found['examples'], found['same_text']) for split, found in surveyed.items()} == {
    split: (len(context.triplets(name)), 0) for split, name in (('training', 'train'), ('validation', 'validation'))
  }
  return context


def values(workdir):
  """Return the rows of results.csv without their times."""
  table = results.read_table(workdir / results.TABLE)
  return {name: {k: v for k, v in row.items() if k != 'seconds'} for name, row in table.items()}


@pytest.mark.long
def test_stored_tokens_do_not_change_the_results(finished, make_sweep, tmp_path, monkeypatch):
  assert (finished.workdir / sweep_jobs.TOKENS / 'info.json').exists()
  monkeypatch.setattr(sweep_jobs, 'store_tokens', lambda *_: None)
  stage.run(make_sweep(tmp_path))
  assert not (tmp_path / sweep_jobs.TOKENS).exists() and values(tmp_path) == values(finished.workdir)


@pytest.mark.long
def test_seed_of_a_cell_gives_the_same_run_as_the_seed_of_a_sweep(make_sweep, tmp_path):
  """The run starts from its own language model, reads in another order, and has its own name."""
  cells = {'sizes': ('8x1',), 'tokens': (300,)}
  both, other = make_sweep(tmp_path / 'both', seeds=(0, 1), **cells), make_sweep(tmp_path / 'other', **cells)
  stage.run(both)
  stage.run(dataclasses.replace(other, config=dataclasses.replace(other.config, seed=both.config.seed + 1)))
  (first, row), (name, second) = values(both.workdir).items()
  assert name == f'{first}_seed1' and {path.name for path in (both.workdir / grid.FOLDER).glob('*_lm*')} == {'8x1_lm', '8x1_lm_seed1'}
  assert int(second['seed']) == int(row['seed']) + 1 and second['loss'] != row['loss']
  assert [second | {'run': first}] == [*values(other.workdir).values()]


def test_rows_describe_their_runs(finished):
  table = results.read_table(finished.workdir / results.TABLE)
  assert [*table] == [cell.name for cell in grid.cells_of(finished.config)]
  for name, row in table.items():
    logged = [r for r in read_metrics(finished.workdir / grid.FOLDER / name) if 'learning_rate' in r]
    assert int(row['steps']) == len(logged) and int(row['tokens_read']) == logged[-1]['tokens']
    assert abs(int(row['tokens_read']) - int(row['tokens'])) < 0.2 * int(row['tokens'])
    # Exactly the FLOPs of its steps: the sum of MFU x seconds x peak.
    summary = json.loads((finished.workdir / grid.FOLDER / name / 'summary.json').read_text())
    added = sum(r['mfu'] * r['step_seconds'] for r in logged) * summary['peak_flops'] * jax.device_count()
    assert float(row['flops']) == pytest.approx(added, rel=1e-6)
    assert float(row['loss']) == summary['validation_loss']
    shape = dataclasses.replace(finished.config, model=grid.model_of(finished.config, name.split('_')[0]))
    assert int(row['parameters']) == flops.reward_model_parameters(dataclasses.replace(finished, config=shape).model_config()).total
  read = results.read(finished.workdir / results.TABLE)
  assert len(read) == 4 and sorted(set(read.tokens)) == [300, 600]


@pytest.mark.long
def test_a_sweep_opens_its_data_and_tokenizer_once(make_sweep, tmp_path, monkeypatch):
  opened = []
  for name in ('open_triplets', 'load_tokenizer'):
    real = getattr(context_lib, name)
    monkeypatch.setattr(context_lib, name, lambda *args, name=name, real=real: opened.append((name, *args[:2])) or real(*args))
  context = make_sweep(tmp_path, sizes=('8x1',), tokens=(150, 300))
  stage.run(context)
  path = pathlib.Path(context.config.data.triplets)
  tokenizer = ('load_tokenizer', context.config.tokenizer, tmp_path / 'data' / 'tokenizer.json')
  assert sorted(map(str, opened)) == sorted(map(str, [('open_triplets', path, 'train'), ('open_triplets', path, 'validation'), tokenizer]))


def test_finished_runs_are_not_run_again(finished, monkeypatch):
  table_before = (finished.workdir / results.TABLE).read_bytes()
  monkeypatch.setattr(sweep_jobs, 'run_job', lambda *_: pytest.fail('ran again'))
  log = []
  stage.run(dataclasses.replace(finished, log=log.append))
  assert log == ['sweep: 4 runs, 4 of them in results.csv already']
  assert (finished.workdir / results.TABLE).read_bytes() == table_before


def test_rows_of_a_copied_table_count_as_done(finished, make_sweep, tmp_path, monkeypatch):
  (tmp_path / results.TABLE).write_bytes((finished.workdir / results.TABLE).read_bytes())
  monkeypatch.setattr(sweep_jobs, 'run_job', lambda *_: pytest.fail('ran'))
  assert stage.run(make_sweep(tmp_path))['sweep']['done'] == 4


def test_a_larger_grid_runs_only_new_cells(finished, make_sweep, tmp_path, monkeypatch):
  (tmp_path / results.TABLE).write_bytes((finished.workdir / results.TABLE).read_bytes())
  ran = []

  def run_job(context, job):
    ran.append(job.name)
    folder = job.folder(context.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    results.write_result(folder, {'run': job.name, 'steps': 1, 'loss': 0.5})

  monkeypatch.setattr(sweep_jobs, 'run_job', run_job)
  stage.run(make_sweep(tmp_path, tokens=(300, 600, 900)))
  # Language models first, then the longest run of the largest size.
  assert ran == ['8x1_lm', '16x1_lm', '16x1_tokens900_lr0.003_batch4', '8x1_tokens900_lr0.003_batch4']
  order = [*results.read_table(tmp_path / results.TABLE)]
  assert len(order) == 6 and [name.split('_')[:2] for name in order[:3]] == [['8x1', f'tokens{t}'] for t in (300, 600, 900)]


def test_a_workdir_holds_one_sweep(finished):
  changed = dataclasses.replace(finished.config, pretrain_lm=dataclasses.replace(finished.config.pretrain_lm, steps=6))
  with pytest.raises(ConfigError, match=r'pretrain_lm.steps was 5, is 6.*another --workdir'):
    stage.run(dataclasses.replace(finished, config=changed))


def test_settings_of_an_earlier_version_are_read(finished, tmp_path):
  """Settings under the earlier names of sections and options are compared as well."""
  now = json.loads((finished.workdir / sweep_jobs.SETTINGS).read_text())
  old_names = {'pretrain_lm': 'lm', 'pretrain': 'train'}
  before = {}
  for name, value in now.items():
    section, dot, option = name.partition('.')
    option = option.replace('evaluate_examples', 'evaluate_rows')
    before[old_names.get(section, section) + dot + option] = 'lm' if value == 'pretrain_lm' else value
  assert before['train.start_from'] == 'lm' and 'lm.evaluate_rows' in before
  path = tmp_path / sweep_jobs.SETTINGS
  path.parent.mkdir()
  path.write_text(json.dumps(before))
  sweep_jobs.check_settings(dataclasses.replace(finished, workdir=tmp_path))
  path.write_text(json.dumps(before | {'train.weight_decay': 0.5}))
  with pytest.raises(ConfigError, match=r'pretrain\.weight_decay was 0\.5, is'):
    sweep_jobs.check_settings(dataclasses.replace(finished, workdir=tmp_path))


@pytest.mark.long
def test_a_failed_run_is_named_and_the_others_are_done(make_sweep, tmp_path, monkeypatch, capsys):
  real = sweep_jobs.run_job

  def run_job(context, job):
    if job.name.startswith('16x1_tokens600'):
      raise UserError('no such luck')
    return real(context, job)

  monkeypatch.setattr(sweep_jobs, 'run_job', run_job)
  with pytest.raises(stage.SweepError, match=r'1 runs of the sweep failed.*16x1_tokens600_lr0.003_batch4: no such luck'):
    stage.run(make_sweep(tmp_path))
  assert len(results.read_table(tmp_path / results.TABLE)) == 3
  assert 'sweep: 16x1_tokens600_lr0.003_batch4: failed: no such luck' in capsys.readouterr().out
  monkeypatch.setattr(sweep_jobs, 'run_job', real)
  assert stage.run(make_sweep(tmp_path))['sweep']['done'] == 4


@pytest.mark.slow  # in end_to_end_test.py one size starts so too
def test_runs_start_from_the_language_model_of_the_workdir_if_it_has_their_size(make_sweep, tmp_path):
  context = make_sweep(tmp_path, sizes=('8x1', '32x1'), tokens=(300,))
  cells = grid.cells_of(context.config)
  assert [job.name for job in sweep_jobs.language_models(context, cells)] == ['8x1_lm', '32x1_lm']
  pretrain_lm.pretrain_lm(context)
  assert [job.name for job in sweep_jobs.language_models(context, cells)] == ['8x1_lm']
  log: list[str] = []
  sweep_jobs.run_job(dataclasses.replace(context, log=log.append), Job('32x1', cells[-1]))
  assert any(str(tmp_path / pretrain_lm.RUN) in line for line in log)


@pytest.mark.slow  # every process compiles; the run of a single worker is tested below
def test_processes_give_the_same_rows_even_if_stopped_by_sigterm(finished, make_sweep, tmp_path):
  context = make_sweep(tmp_path, backend='processes', workers=2, sizes=('8x1',))
  sent = threading.Event()

  def stop_once_a_run_trains():
    while not sent.is_set():
      if any((tmp_path / grid.FOLDER).glob('8x1_tokens*/metrics.jsonl')):
        os.kill(os.getpid(), signal.SIGTERM)
        sent.set()
      time.sleep(0.02)

  thread = threading.Thread(target=stop_once_a_run_trains)
  thread.start()
  try:
    with pytest.raises(Preempted, match=r'sweep: stopped by SIGTERM, \d of \d runs done, the others saved'):
      stage.run(context)
  finally:
    sent.set()
    thread.join()
  stage.run(context)
  rows, expected = values(tmp_path), values(finished.workdir)
  assert len(rows) == 2
  for name, row in rows.items():
    assert {k: v for k, v in row.items() if k not in ('loss', 'accuracy')} == {
      k: v for k, v in expected[name].items() if k not in ('loss', 'accuracy')
    }
    assert float(row['loss']) == pytest.approx(float(expected[name]['loss']), abs=1e-6)


def test_a_failed_process_is_reported_with_its_last_line(make_sweep, tmp_path, monkeypatch):
  context = make_sweep(tmp_path, backend='processes', workers=2)
  script = 'import sys; print("polar_jax: out of luck", file=sys.stderr); sys.exit(3)'
  monkeypatch.setattr(sys, 'executable', _fake_python(tmp_path, script))
  with pytest.raises(stage.SweepError, match=r'8x1_lm: out of luck \(exit status 3, log: .*log.txt\)'):
    stage.run(context)


def _fake_python(folder: pathlib.Path, script: str) -> str:
  path = folder / 'python'
  path.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{script}'\n")
  path.chmod(0o755)
  return str(path)


@pytest.mark.long
def test_commands_for_a_queue_run_their_jobs(make_sweep, tmp_path):
  context = make_sweep(tmp_path, jobs_only=True, sizes=('8x1',), tokens=(300,))
  stage.run(context)
  models, runs = ((tmp_path / grid.FOLDER / name).read_text().splitlines() for name in stage.JOBS)
  python = pathlib.Path(sys.executable).name
  assert models == [f'{python} -m polar_jax.stages.sweep_worker {tmp_path} 8x1_lm']
  assert len(runs) == 1 and runs[0].endswith('8x1_tokens300_lr0.003_batch4')
  for job in (Job('8x1', None), Job('8x1', grid.cells_of(context.config)[0])):
    sweep_worker.run(tmp_path, job.name)
  stage.run(context)
  assert len(results.read_table(tmp_path / results.TABLE)) == 1
  assert (tmp_path / grid.FOLDER / stage.JOBS[1]).read_text() == ''
  with pytest.raises(ConfigError, match='no run'):
    sweep_worker.run(tmp_path, 'nothing')
  assert 'no run' in (sweep_worker.run_task(str(tmp_path), 'nothing') or '')
  with pytest.raises(ConfigError, match='run the sweep stage in this workdir first'):
    sweep_worker.run(tmp_path / 'elsewhere', 'nothing')


@pytest.mark.long
def test_two_processes_with_one_job_run_it_once(make_sweep, tmp_path):
  context = make_sweep(tmp_path, sizes=('8x1',), tokens=(300,))
  job, outputs = Job('8x1', None), []
  threads = [threading.Thread(target=lambda: outputs.append(sweep_jobs.run_job(context, job))) for _ in range(2)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert len(outputs) == 2 and outputs[0] == outputs[1]
  assert [r['step'] for r in read_metrics(job.folder(tmp_path)) if 'learning_rate' in r] == [1, 2, 3, 4, 5]
