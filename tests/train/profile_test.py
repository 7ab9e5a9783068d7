from __future__ import annotations

import types

import pytest

from polar_jax.config import ProfileConfig
from polar_jax.train import profile


@pytest.mark.parametrize(
  ('steps', 'skip', 'total', 'expected'),
  [
    (2, 1, 5, ['start before step 1', 'stop after step 2']),
    (1, 0, 3, ['start before step 0', 'stop after step 0']),
    (4, 1, 3, ['start before step 1', 'stop at the end']),
    (0, 1, 3, []),
    (2, 9, 3, []),
  ],
)
def test_steps_are_captured_after_those_that_are_skipped(tmp_path, monkeypatch, steps, skip, total, expected):
  events, lines, now = [], [], ['']
  monkeypatch.setattr(profile.jax.profiler, 'start_trace', lambda folder: events.append(f'start {now[0]}'))
  monkeypatch.setattr(profile.jax.profiler, 'stop_trace', lambda: events.append(f'stop {now[0]}'))
  monkeypatch.setattr(profile.jax, 'block_until_ready', lambda results: results)
  profiler = profile.Profiler(ProfileConfig(steps=steps, skip=skip), tmp_path, lines.append)
  for step in range(total):
    now[0] = f'before step {step}'
    profiler.before(step)
    now[0] = f'after step {step}'
    profiler.after(step + 1, types.SimpleNamespace())
  now[0] = 'at the end'
  profiler.close()
  profiler.close()
  assert events == expected
  assert lines == ([f'profile of {steps} steps: tensorboard --logdir {tmp_path / "profile"}'] if expected else [])


def test_the_results_of_the_last_captured_step_are_awaited(tmp_path, monkeypatch):
  events = []
  monkeypatch.setattr(profile.jax.profiler, 'start_trace', lambda folder: events.append(folder))
  monkeypatch.setattr(profile.jax.profiler, 'stop_trace', lambda: events.append('stop'))
  monkeypatch.setattr(profile.jax, 'block_until_ready', events.append)
  profiler = profile.Profiler(ProfileConfig(steps=2, skip=1), tmp_path, lambda line: None)
  for step in range(4):
    profiler.before(step)
    profiler.after(step + 1, f'results {step}')
  assert events == [str(tmp_path / 'profile'), 'results 2', 'stop']
