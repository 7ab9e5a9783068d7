"""The clock of phases."""

from __future__ import annotations

import pytest

from polar_jax.runtime import clock as clock_lib
from polar_jax.runtime.clock import Clock


@pytest.fixture
def now(monkeypatch):
  """A settable time."""
  now = [100.0]
  monkeypatch.setattr(clock_lib.time, 'perf_counter', lambda: now[0])
  return now


def test_every_second_goes_to_one_phase(now):
  clock = Clock(['save'])
  for phase, seconds in (('read', 3.0), ('step', 5.0), ('read', 2.0)):
    now[0] += seconds
    assert clock.lap(phase) == seconds
  now[0] += 7.0
  assert clock.seconds == {'save': 0.0, 'read': 5.0, 'step': 5.0} and next(iter(clock.seconds)) == 'save'
  assert clock.elapsed == 17


def test_it_may_start_in_the_past(now):
  clock = Clock(started=90.0)
  assert clock.elapsed == 10 and clock.lap('start') == 10
