"""Overhead of saving: without saving, saving asynchronously (the default), and saving before the next step.

    python benchmarks/checkpointing.py

Rounds of a few training steps with a save after the first, by the checkpointer that runs use, take turns with rounds without a save.
Prints the time of a round and how long the call that saves blocks it. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
import time

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import optax
import timing
from attention import draw_rows

from polar_jax import sharding
from polar_jax.checkpoints.checkpointer import Checkpointer
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig
from polar_jax.train import step
from polar_jax.train.objectives import RANKING

MODEL = ModelConfig(vocab_size=32_768, num_layers=2, d_model=512, d_ff=1_536, num_heads=8, num_kv_heads=4, head_dim=64)
STEPS = 8  # per round


class Round:
  """A few steps with a save after the first. All rounds share the compiled step."""

  def __init__(self, functions: step.StepFunctions, batch: object, checkpointer: Checkpointer | None):
    self._functions, self._batch, self._checkpointer = functions, batch, checkpointer
    self._state, self._saved, self.stalls = functions.init(jax.random.key(0), None), 0, list[float]()

  def __call__(self) -> float:
    """Run one round and return its seconds."""
    started = time.perf_counter()
    for index in range(STEPS):
      self._state, _ = self._functions.train(self._state, self._batch)
      jax.block_until_ready(self._state)
      if index == 0 and self._checkpointer:
        before = time.perf_counter()
        self._saved += 1
        self._checkpointer.save(self._saved, self._state, {}, {}, {})
        self.stalls.append(time.perf_counter() - before)
    seconds = time.perf_counter() - started
    if self._checkpointer:
      self._checkpointer.wait()  # so that background writing does not slow the next round
    return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  rounds = parser.parse_args().rounds
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    functions = step.build(RANKING, MODEL, optax.adamw(1e-5), mesh)
    batch = sharding.put_local(draw_rows(1, 1_024, 2), mesh)
    open_in = lambda name, asynchronous: Checkpointer(
      pathlib.Path(folder) / name, CheckpointingConfig(keep=1, keep_best=0, asynchronous=asynchronous), 'validation_loss', True
    )
    variants = {
      'nothing saved': Round(functions, batch, None),
      'asynchronously': Round(functions, batch, open_in('asynchronous', True)),
      'before the next step': Round(functions, batch, open_in('synchronous', False)),
    }
    seconds = timing.alternate(variants, rounds)
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(functions.abstract))
  free = seconds['nothing saved']
  rows = []
  for name, values in seconds.items():
    stall = timing.milliseconds(variants[name].stalls[1:]) if variants[name].stalls else ''
    rows.append((name, timing.milliseconds(values), stall, f'{timing.ratio(values, free):.3f}'))
  print(f'{STEPS} steps, one save of {size / 1e6:,.0f} MB; {jax.devices()[0].device_kind}')
  print(timing.table(('saved', 'ms per round', 'ms per call', 'relative to nothing saved'), rows))
  stall = lambda name: statistics.median(variants[name].stalls[1:])
  timing.report(
    megabytes=size / 1e6,
    step_seconds=statistics.median(free) / STEPS,
    asynchronous_stall=stall('asynchronously'),
    synchronous_stall=stall('before the next step'),
    asynchronous_ratio=timing.ratio(seconds['asynchronously'], free),
    synchronous_ratio=timing.ratio(seconds['before the next step'], free),
  )
  for variant in variants.values():
    if variant._checkpointer:
      variant._checkpointer.close()


if __name__ == '__main__':
  main()
