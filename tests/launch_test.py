"""Launchers, with stand-ins for the programs that they call."""

from __future__ import annotations

import math
import os
import pathlib
import shutil
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parent.parent / 'launch'

# Runs the jobs of an array one after another, and logs its options.
SBATCH = """#!/usr/bin/env bash
set -e
echo "$@" >> "$CALLS"
for argument in "$@"; do case $argument in --array=1-*) count=${argument#--array=1-};; esac; done
wrapped="${@: -1}"
for ((i = 1; i <= count; i++)); do SLURM_ARRAY_TASK_ID=$i bash -c "$wrapped" >&2; done
echo 41$count
"""


GCLOUD = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in
  *describe*format*) n=$(cat "$STATE" 2> /dev/null || echo 0); echo $((n + 1)) > "$STATE"; [ "$n" -ge 1 ] && echo ACTIVE || echo WAITING ;;
  *describe*) exit 1 ;;
  *--command=*main*) exit 3 ;;
esac
"""


@pytest.mark.parametrize('script', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_scripts_are_valid_and_print_their_usage(script):
  assert os.access(script, os.X_OK)
  subprocess.run(['bash', '-n', script], check=True)
  shown = subprocess.run([script], capture_output=True, text=True, check=False)
  assert shown.returncode == 2 and f'launch/{script.name}' in shown.stderr
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', script], check=True)


def test_a_tpu_slice_is_requested_used_and_deleted(tmp_path):
  fake = tmp_path / 'bin' / 'gcloud'
  fake.parent.mkdir()
  fake.write_text(GCLOUD)
  fake.chmod(0o755)
  # A copy, since the script packs its own checkout.
  script = tmp_path / 'checkout' / 'launch' / 'tpu_vm.sh'
  script.parent.mkdir(parents=True)
  shutil.copy(LAUNCH / 'tpu_vm.sh', script)
  own = {'PATH': f'{fake.parent}:{os.environ["PATH"]}', 'CALLS': str(tmp_path / 'calls'), 'STATE': str(tmp_path / 'state'), 'POLL': '0'}
  settings = {'PROJECT': 'p', 'ZONE': 'z', 'TYPE': 'v5p-128'}
  command = ['bash', str(script), 'slice', '--config=configs/7b.py', '--workdir=/mnt/a b']
  result = subprocess.run(command, env=os.environ | own | settings, capture_output=True, text=True, check=False)
  assert result.returncode == 3, result.stderr  # that of the run
  assert 'slice is WAITING, waiting' in result.stderr
  calls = (tmp_path / 'calls').read_text().splitlines()
  verbs = [next(v for v in ('describe', 'create', 'scp', 'ssh', 'delete') if f' {v} ' in call) for call in calls]
  assert verbs == ['describe', 'create', 'describe', 'describe', 'scp', 'ssh', 'ssh', 'delete']
  assert all('--project=p --zone=z' in call for call in calls)
  assert '--accelerator-type=v5p-128' in calls[1] and '--spot' not in calls[1]
  assert r'python -m polar_jax.main --config=configs/7b.py --workdir=/mnt/a\ b' in calls[6] and '--worker=all' in calls[6]
  missing = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
  assert missing.returncode != 0 and 'set PROJECT' in missing.stderr


def test_the_pods_of_a_slice_are_its_hosts():
  made = yaml.safe_load((LAUNCH / 'gke_jobset.yaml').read_text())
  assert (made['apiVersion'], made['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  (job,) = made['spec']['replicatedJobs']
  pods = job['template']['spec']
  spec = pods['template']['spec']
  chips = math.prod(map(int, spec['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x')))
  (container,) = spec['containers']
  assert pods['parallelism'] == pods['completions'] == chips // container['resources']['limits']['google.com/tpu']
  assert container['command'][:3] == ['python', '-m', 'polar_jax.main']
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {volume['name'] for volume in spec['volumes']}


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


# Process 1 fails; the others would run for a minute.
PYTHON = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo 4711; exit; }
echo "$@"
case "$*" in *FAIL*process=1*) exit 3 ;; *FAIL*) exec sleep 60 ;; esac
"""


def local(tmp_path: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
  fake = tmp_path / 'bin' / 'python'
  fake.parent.mkdir(exist_ok=True)
  fake.write_text(PYTHON)
  fake.chmod(0o755)
  environment = os.environ | {'PATH': f'{fake.parent}:{os.environ["PATH"]}', 'LOGS': str(tmp_path)}
  return subprocess.run([LAUNCH / 'local.sh', *arguments], env=environment, capture_output=True, text=True, check=False, timeout=30)


def test_processes_on_one_machine_are_numbered_and_end_together(tmp_path):
  result = local(tmp_path, '3', '--config=x.py')
  assert result.returncode == 0
  for process in range(3):
    expected = '--config.distributed.coordinator=127.0.0.1:4711 --config.distributed.processes=3'
    line = f'-m polar_jax.main --config=x.py {expected} --config.distributed.process={process}\n'
    assert (tmp_path / f'process_{process}.log').read_text() == line
  assert 'process=0' in result.stdout and 'process=1' not in result.stdout
  failed = local(tmp_path, '3', '--config=FAIL.py')  # in less than that minute
  assert failed.returncode == 3 and 'a process ended with status 3' in failed.stderr
