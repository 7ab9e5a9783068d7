"""Goodput: the clock of a run's parts, and its report."""

from __future__ import annotations

import json

import pytest

from polar_jax.config import CheckpointingConfig, ProfileConfig
from polar_jax.runtime import clock as clock_lib
from polar_jax.stages.pretrain import pretrain
from polar_jax.train.goodput import PARTS, GoodputClock
from polar_jax.train.metrics import MetricsLog, read_metrics


def test_every_second_goes_to_one_part(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(clock_lib.time, 'perf_counter', lambda: now[0])
  clock = GoodputClock()
  assert clock.goodput == 0
  for part, seconds in (('start', 3.0), ('step', 5.0), ('save', 1.0), ('step', 2.0)):
    now[0] += seconds
    clock.lap(part)
  assert clock.seconds == dict.fromkeys(PARTS, 0.0) | {'start': 3.0, 'step': 7.0, 'save': 1.0}
  assert clock.goodput == 7 / 11
  clock.resume({'step': 9.0, 'start': 1.0}, lost=4.0)
  assert clock.seconds['step'] == 16 and clock.seconds['start'] == 4 and clock.seconds['lost'] == 4
  assert clock.goodput == 16 / 25


def test_steps_that_will_be_taken_again_are_lost(tmp_path):
  log = MetricsLog(tmp_path, 0)
  for step in range(1, 6):
    log.write({'step': step, 'step_seconds': 2.0**step})
  log.write({'step': 5, 'validation_loss': 1.0})
  log.close()
  again = MetricsLog(tmp_path, 3)
  again.close()
  assert again.lost == 2**4 + 2**5


@pytest.mark.long
def test_a_run_reports_its_seconds_by_part_and_a_resumed_one_adds(tmp_path, make_context):
  every = CheckpointingConfig(every_steps=3)
  pretrain(make_context(tmp_path, checkpointing=every))
  summary = json.loads((tmp_path / 'pretrain/summary.json').read_text())
  parts = summary['seconds_by_part']
  assert set(parts) == set(PARTS) and all(parts[part] > 0 for part in PARTS if part != 'lost') and parts['lost'] == 0
  assert summary['goodput'] == pytest.approx(parts['step'] / sum(parts.values()), rel=1e-2)
  records = [record for record in read_metrics(tmp_path / 'pretrain') if 'loss' in record]
  assert all(0 <= record['goodput'] < 1 for record in records)
  # Without the last checkpoint, as after a kill, its steps are taken again.
  (newest,) = (path for path in (tmp_path / 'pretrain/checkpoints').iterdir() if path.name == '12')
  newest.rename(tmp_path / 'elsewhere')
  pretrain(make_context(tmp_path, checkpointing=every))
  resumed = json.loads((tmp_path / 'pretrain/summary.json').read_text())['seconds_by_part']
  assert resumed['lost'] > 0 and resumed['start'] > parts['start']


@pytest.mark.long
@pytest.mark.parametrize('steps', [2, 100])
def test_steps_are_captured_by_the_profiler(tmp_path, make_context, steps):
  """Even if the run ends before the capture does."""
  log = []
  pretrain(make_context(tmp_path, log, steps=6, profile=ProfileConfig(steps=steps, skip=2)))
  assert list((tmp_path / 'pretrain/profile').rglob('*.xplane.pb'))
  assert [line for line in log if line.startswith(f'profile of {steps} steps: tensorboard --logdir')]
