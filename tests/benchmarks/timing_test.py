from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def timing():
  spec = importlib.util.spec_from_file_location('timing', BENCHMARKS / 'timing.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_steps_take_turns_and_warm_up_rounds_do_not_count(timing):
  order = []
  steps = {'a': lambda: order.append('a'), 'b': lambda: order.append('b') or float(len(order))}
  seconds = timing.alternate(steps, rounds=3, warm_up=2)
  assert order == ['a', 'b'] * 5
  assert seconds['b'] == [6.0, 8.0, 10.0]  # the step's own seconds, of the rounds that count
  assert len(seconds['a']) == 3


def test_seconds_of_a_call(timing):
  (seconds,) = timing.alternate({'sleep': lambda: time.sleep(0.05)}, rounds=1)['sleep']
  assert 0.05 <= seconds < 5


def test_a_slow_period_does_not_change_a_ratio(timing):
  assert timing.ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1]) == pytest.approx(2)


def test_report_is_one_line(timing, capsys):
  timing.report(a=1 / 3, b=2, c={'d': 1})
  (line,) = capsys.readouterr().out.splitlines()
  assert json.loads(line) == {'a': 0.3333, 'b': 2, 'c': {'d': 1}}


@pytest.mark.long
def test_benchmarks_import():
  """Benchmarks run rarely, so a name that was moved would go unnoticed. In a process of its own, because importing one sets up malloc."""
  others = {'pair_step', 'rollout', 'torch_llama', 'torch_peers', 'lm_eval_backends'}  # need torch or lm-eval
  names = sorted({path.stem for path in BENCHMARKS.glob('*.py')} - others)
  assert 'ppo_step' in names
  subprocess.run([sys.executable, '-c', f'import {", ".join(names)}'], check=True, cwd=BENCHMARKS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['attention.py', 'packing.py'])
def test_the_last_line_of_a_benchmark_is_json(name):
  done = subprocess.run([sys.executable, str(BENCHMARKS / name)], check=True, capture_output=True, text=True)
  assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
