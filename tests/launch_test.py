"""Launchers against stand-ins of the programs that they call."""

from __future__ import annotations

import os
import pathlib
import subprocess

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'

# Runs the jobs of an array one after another, and notes its options.
SBATCH = """#!/usr/bin/env bash
set -e
echo "$@" >> "$CALLS"
for argument in "$@"; do case $argument in --array=1-*) count=${argument#--array=1-};; esac; done
wrapped="${@: -1}"
for ((i = 1; i <= count; i++)); do SLURM_ARRAY_TASK_ID=$i bash -c "$wrapped" >&2; done
echo 41$count
"""


def launch(tmp_path: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
  (tmp_path / 'bin').mkdir(exist_ok=True)
  fake = tmp_path / 'bin' / 'sbatch'
  fake.write_text(SBATCH)
  fake.chmod(0o755)
  environment = os.environ | {'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'CALLS': str(tmp_path / 'calls')}
  command = ['bash', str(LAUNCH / 'sweep_slurm.sh'), *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def sweep(tmp_path: pathlib.Path, models: list[str], runs: list[str]) -> pathlib.Path:
  folder = tmp_path / 'a workdir' / 'sweep'
  folder.mkdir(parents=True)
  for name, lines in (('jobs_lm.txt', models), ('jobs.txt', runs)):
    (folder / name).write_text(''.join(line + '\n' for line in lines))
  return folder.parent


def test_a_sweep_is_two_arrays_and_the_second_waits(tmp_path):
  done = tmp_path / 'done'
  workdir = sweep(tmp_path, [f"echo 'model one' >> {done}"], [f"echo 'run {i}' >> {done}" for i in (1, 2)])
  result = launch(tmp_path, str(workdir), '--gres=gpu:1')
  assert result.returncode == 0, result.stderr
  assert result.stdout == 'language models: 411; runs: 412\n'
  assert done.read_text().splitlines() == ['model one', 'run 1', 'run 2']
  first, second = (tmp_path / 'calls').read_text().splitlines()
  assert '--array=1-1 --gres=gpu:1' in first and 'dependency' not in first
  assert '--array=1-2 --dependency=afterok:411 --gres=gpu:1' in second


def test_without_models_nothing_waits(tmp_path):
  result = launch(tmp_path, str(sweep(tmp_path, [], ['true'])))
  assert result.stdout == 'language models: none to train; runs: 411\n'
  assert 'dependency' not in (tmp_path / 'calls').read_text()


def test_a_workdir_without_jobs_is_named(tmp_path):
  result = launch(tmp_path, str(tmp_path))
  assert result.returncode == 1 and f'{tmp_path}/sweep/jobs_lm.txt: no such file' in result.stderr
  assert launch(tmp_path).returncode == 2
