"""Runs that are killed and restarted end bit for bit like an uninterrupted run. Uses real processes and signals."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fast_compilation
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_run

from polar_jax.checkpoints.checkpointer import FOLDER

STEPS = 60


class World:
  """A folder with a config and examples, in which runs are started."""

  def __init__(self, folder: pathlib.Path):
    self.folder, rng = folder, np.random.default_rng(0)
    (folder / 'examples.jsonl').write_text(small_run.triplets(rng, 50))
    settings = {
      'tokenizer.kind': 'byte',
      'data.triplets': 'examples.jsonl',
      'data.validation': 'examples.jsonl',
      'checkpointing.every_steps': 2,
    }
    small_run.write_config(folder / 'small.py', settings, steps=STEPS, batch_size=4, evaluate_every=25, evaluate_examples=8)
    # All starts share a compilation cache, because a start spends nearly all its time compiling.
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    self.environment = fast_compilation.environment(**cache)

  def start(self, workdir: str) -> subprocess.Popen:
    line = [sys.executable, '-m', 'polar_jax.main', '--config=small.py', f'--workdir={workdir}']
    return subprocess.Popen(line, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def finish(self, workdir: str) -> str:
    process = self.start(workdir)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output

  def checkpoints(self, workdir: str) -> list[str]:
    folder = self.folder / workdir / 'pretrain' / FOLDER
    try:
      return os.listdir(folder)
    except FileNotFoundError:
      return []

  def newest(self, workdir: str) -> int:
    return max((int(name) for name in self.checkpoints(workdir) if name.isdigit()), default=0)

  def unfinished(self, workdir: str) -> list[int]:
    """Return the steps that are being saved."""
    return [int(name.split('.')[0]) for name in self.checkpoints(workdir) if 'checkpoint-tmp' in name]

  def wait_until(self, process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
      assert process.poll() is None, f'ended before it was to be killed:\n{process.stdout.read()}'
      assert time.monotonic() < deadline
      time.sleep(0.0002)

  def final_state(self, workdir: str):
    path = self.folder / workdir / 'pretrain' / FOLDER / str(STEPS) / 'state'
    with ocp.PyTreeCheckpointer() as checkpointer:
      item = checkpointer.metadata(path).item_metadata.tree
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
      return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))

  def metrics(self, workdir: str) -> list[dict]:
    lines = (self.folder / workdir / 'pretrain/metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in small_run.TIMED} for line in lines]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  made = World(tmp_path_factory.mktemp('resume'))
  made.output = made.finish('oracle')
  return made


def assert_same_end(world, workdir):
  state, expected = world.final_state(workdir), world.final_state('oracle')
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
  assert world.metrics(workdir) == world.metrics('oracle')  # floats as text, so bit for bit


def test_uninterrupted_run_is_a_sound_oracle(world):
  steps = [record['step'] for record in world.metrics('oracle') if 'loss' in record]
  assert steps == list(range(1, STEPS + 1))
  assert [record['step'] for record in world.metrics('oracle') if 'validation_loss' in record] == [25, 50, STEPS]
  state = world.final_state('oracle')
  assert state['step'] == STEPS and state['params']['v_head'].any()
  assert sorted(world.checkpoints('oracle'), key=int)[-2:] == [str(STEPS - 2), str(STEPS)] and world.unfinished('oracle') == []
  assert 'resumed' not in world.output


@pytest.mark.long
@pytest.mark.parametrize('kills', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_any_point(world, kills):
  workdir, rng = f'killed{kills}', np.random.default_rng(7)
  inside = 0
  places = sorted(rng.choice(np.arange(4, STEPS - 8), size=kills, replace=False).tolist())
  for kill, place in enumerate(places):
    process = world.start(workdir)
    while_saving = kill % 2 == 0
    if while_saving:  # a save of a step from `place` on has begun and is not complete
      world.wait_until(process, lambda place=place: any(step >= place for step in world.unfinished(workdir)))
    else:
      world.wait_until(process, lambda place=place: world.newest(workdir) >= place)
      time.sleep(rng.uniform(0, 0.05))
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (kill == 0) or 'pretrain: resumed from step' in output
    inside += while_saving and bool(world.unfinished(workdir))
  assert inside, 'no kill fell into a save'
  saved = world.newest(workdir)
  assert f'pretrain: resumed from step {saved} of {STEPS}' in world.finish(workdir)
  assert_same_end(world, workdir)
  assert world.unfinished(workdir) == []


@pytest.mark.slow  # the same within one process: train/trainer_test.py
def test_sigterm_saves_and_prints_how_to_continue(world):
  process = world.start('stopped')
  world.wait_until(process, lambda: world.newest('stopped') >= 10)
  process.terminate()
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0, output
  saved = world.newest('stopped')
  assert output.splitlines()[-1] == f'pretrain: stopped by SIGTERM, saved at step {saved}. The same command resumes from there.'
  assert world.metrics('stopped')[-1]['step'] == saved < STEPS
  assert f'pretrain: resumed from step {saved} of {STEPS}' in world.finish('stopped')
  assert_same_end(world, 'stopped')
