"""The command that runs all benchmarks: what is gathered, limits, and that the benchmarks themselves still run."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def run_all(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  spec = importlib.util.spec_from_file_location('run_all', BENCHMARKS / 'run_all.py')
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, 'run_all', module)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, '_HERE', tmp_path)
  monkeypatch.setattr(module, 'machine', lambda: {'devices': '1 x cpu', 'cpu': '2 cores', 'python': '3', 'packages': {'jax': '1'}})
  return module


def write(folder, name, code):
  (folder / f'{name}.py').write_text(code)


def run(module, tmp_path, *benchmarks, arguments=()):
  module.PROFILES['cpu'] = benchmarks
  module.main([f'--output={tmp_path / "results.json"}', *arguments])
  return json.loads((tmp_path / 'results.json').read_text())['benchmarks']


def test_tables_and_results_are_gathered_and_kept(run_all, tmp_path, capsys):
  write(tmp_path, 'a', "import sys; print('a word'); print('| x |'); print('|---|'); print('| 1 |'); print('{\"x\": %s}' % sys.argv[1])")
  found = run(run_all, tmp_path, run_all.Benchmark('a', '1'), run_all.Benchmark('a', '2', name='b'))
  assert found['a']['result'] == {'x': 1} and found['b']['result'] == {'x': 2} and not found['a']['missing']
  assert found['a']['table'] == ['| x |', '|---|', '| 1 |'] and found['b']['command'] == 'python benchmarks/a.py 2'
  assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {'a': {'x': 1}, 'b': {'x': 2}}
  write(tmp_path, 'a', 'print(\'{"x": 3}\')')
  page = tmp_path / 'page.md'
  found = run(run_all, tmp_path, *run_all.PROFILES['cpu'], arguments=('--only', 'b', f'--markdown={page}'))
  assert found['a']['result'] == {'x': 1} and found['b']['result'] == {'x': 3}
  assert '## a\n\n`python benchmarks/a.py 1`' in page.read_text() and '| 1 |' in page.read_text() and 'jax 1' in page.read_text()


@pytest.mark.parametrize(
  ('code', 'needs', 'reason'),
  [
    ("raise SystemExit('no device')", (), 'ended with status 1: no device'),
    ('import sys; sys.exit(3)', (), 'ended with status 3: no message'),
    ("print('a word')", (), "its last line is not a JSON object: 'a word'"),
    ('print(1)', ('no-such-package', 'pytest'), 'needs no-such-package'),
  ],
)
def test_a_benchmark_without_a_result_says_why(run_all, tmp_path, code, needs, reason):
  write(tmp_path, 'a', code)
  write(tmp_path, 'b', "print('{}')")
  found = run(run_all, tmp_path, run_all.Benchmark('a', needs=needs), run_all.Benchmark('b'))
  assert found['a']['missing'] == reason and found['a']['result'] is None
  assert found['b']['result'] == {}  # the others run


def test_limits_hold_and_processes_that_it_started_end_too(run_all, tmp_path):
  child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid())); __import__('time').sleep(600)"
  write(tmp_path, 'a', f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])')
  began = time.monotonic()
  found = run(run_all, tmp_path, run_all.Benchmark('a', minutes=2 / 60))
  assert found['a']['missing'] == 'did not end within 2 s' and time.monotonic() - began < 60
  pid = int((tmp_path / 'pid').read_text())
  for _ in range(100):
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return
    if pathlib.Path(f'/proc/{pid}/stat').exists() and pathlib.Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z':
      return
    time.sleep(0.1)
  pytest.fail('the process that it started still runs')


def test_unknown_names_are_refused(run_all, tmp_path, capsys):
  with pytest.raises(SystemExit):
    run(run_all, tmp_path, run_all.Benchmark('a'), arguments=('--only', 'z'))
  assert '--only: z not in the profile cpu: a' in capsys.readouterr().err


def test_names_are_unique_and_scripts_exist(run_all):
  for name, benchmarks in run_all.PROFILES.items():
    keys = [b.key for b in benchmarks]
    assert len(set(keys)) == len(keys), name
    assert all((BENCHMARKS / f'{b.script}.py').exists() for b in benchmarks)
  assert sum(b.minutes for b in run_all.PROFILES['cpu']) <= 61
  assert sum(b.minutes for b in run_all.PROFILES['accelerator']) <= 11


@pytest.mark.long
def test_the_accelerator_script_runs_at_toy_sizes(tmp_path):
  environment = {**os.environ, 'OUT': str(tmp_path), 'PYTHON': sys.executable, 'PROFILE': 'toy', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run([BENCHMARKS / 'accelerator.sh'], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  content = json.loads((tmp_path / 'accelerator.json').read_text())
  assert {name: entry['missing'] for name, entry in content['benchmarks'].items()} == dict.fromkeys(
    ('packing', 'mfu', 'scoring', 'decode'), ''
  )
  assert 'remat' in content['benchmarks']['mfu']['result'] and content['benchmarks']['decode']['table']
  assert 'cpu' in content['machines'][0]['devices'] and 'jax' in content['machines'][0]['packages']
  assert '## decode' in (tmp_path / 'accelerator.md').read_text()


def test_wheels_that_are_missing_are_an_error_that_says_how_to_get_them(tmp_path):
  (tmp_path / 'wheels').mkdir()
  environment = {**os.environ, 'OUT': str(tmp_path), 'PYTHON': sys.executable}
  done = subprocess.run([BENCHMARKS / 'accelerator.sh', tmp_path / 'wheels'], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 1 and "pip wheel --wheel-dir WHEELS '.[cuda]'" in done.stderr.splitlines()[-1]
