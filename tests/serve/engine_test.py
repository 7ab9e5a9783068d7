"""The queue and the device thread, with a stand-in for the device that multiplies."""

from __future__ import annotations

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.serve.batches import Batches, Call
from polar_jax.serve.engine import Engine, EngineError, Item, Job, QueueFullError, TooLateError

pytestmark = pytest.mark.needs('uvicorn')


class Sums(Batches):
  """The reward of a sequence is the sum of its tokens. `gate` holds the device; `seen` has the groups of each batch."""

  in_flight = 2

  def __init__(self):
    self.gate, self.entered, self.seen = threading.Event(), threading.Event(), []
    self.gate.set()

  def warm_up(self):
    yield 'nothing'

  def dispatch(self, groups):
    self.entered.set()
    assert self.gate.wait(30)
    self.seen.append([[tuple(ids.tolist()) for ids in group] for group in groups])
    sequences = [ids for group in groups for ids in group]
    if any(ids[0] == 666 for ids in sequences):
      raise RuntimeError('out of memory')
    for i, ids in enumerate(sequences):
      value = np.nan if ids[0] == 13 else float(ids.sum())
      yield Call(np.array([i, -1]), jnp.array([value, 77.0], jnp.float32), len(ids))


def item(*ids, key=None, shared=0):
  array = np.array(ids, np.int32)
  return Item(array, array.tobytes() if key is None else key, shared)


def job(*items, seconds=60.0):
  return Job(list(items), time.monotonic() + seconds)


@pytest.fixture
def device():
  return Sums()


@pytest.fixture
def make(device):
  engines = []

  def start(batch_tokens=100, queue_tokens=1_000):
    engine = Engine(device, batch_tokens, queue_tokens)
    engine.start()
    assert engine.ready.wait(10)
    engines.append(engine)
    return engine

  yield start
  device.gate.set()
  for engine in engines:
    engine.stop()
    engine.thread.join(10)
    assert not engine.alive


def held(device, engine):
  """Submit a job that the device is busy with."""
  device.gate.clear()
  first = job(item(1))
  engine.submit(first)
  assert device.entered.wait(10)
  device.seen.clear()
  return first


def test_many_jobs_get_their_own_rewards(make):
  engine = make(queue_tokens=100_000)
  rng = np.random.default_rng(0)
  jobs = [job(*(item(*rng.integers(20, 90, rng.integers(1, 9))) for _ in range(rng.integers(0, 6)))) for _ in range(200)]
  threads = [threading.Thread(target=lambda part=jobs[i::8]: [engine.submit(j) for j in part]) for i in range(8)]
  for thread in threads:
    thread.start()
  for j in jobs:
    assert j.future.result(20).tolist() == [s.ids.sum() for s in j.sequences]
  for thread in threads:
    thread.join()
  assert (engine.waiting_tokens, engine.waiting_sequences, engine._by_key, list(engine._jobs)) == (0, 0, {}, [])


def test_jobs_take_turns(make, device):
  engine = make(batch_tokens=2)
  held(device, engine)
  large, small = job(*(item(20 + i, 1) for i in range(10))), job(item(99, 1))
  engine.submit(large)
  engine.submit(small)
  device.gate.set()
  small.future.result(10), large.future.result(10)
  order = [batch[0][0] for batch in device.seen]
  assert order.index((99, 1)) == 2  # after the job that was held, and one sequence of the large one


def test_groups_are_shared_across_jobs_and_equal_sequences_computed_once(make, device):
  engine = make()
  held(device, engine)
  jobs = [job(item(5, 5, 1, key=b'p'), item(9)), job(item(5, 5, 2, key=b'p'), item(5, 5, 1, key=b'p'))]
  for j in jobs:
    engine.submit(j)
  device.gate.set()
  assert [j.future.result(10).tolist() for j in jobs] == [[11, 9], [12, 11]]
  assert device.seen[1] == [[(5, 5, 1), (5, 5, 2)], [(9,)]]


def test_a_batch_is_bounded_by_the_tokens_to_compute(make, device):
  engine = make(batch_tokens=10)
  held(device, engine)
  shared = job(*(item(7, 7, 7, 7, i, key=b'p', shared=4) for i in range(20, 40)))
  engine.submit(shared)
  device.gate.set()
  shared.future.result(10)
  assert [len(batch[0]) for batch in device.seen[1:]] == [6, 6, 6, 2]  # five tokens, then one for each


def test_cancelled_jobs_leave_the_queue(make, device):
  engine = make()
  held(device, engine)
  gone, kept = job(item(30), item(5, 1, key=b'p')), job(item(31), item(5, 2, key=b'p'))
  engine.submit(gone)
  engine.submit(kept)
  engine.cancel(gone)
  assert (engine.waiting_sequences, engine.waiting_tokens) == (2, 3)
  device.gate.set()
  assert kept.future.result(10).tolist() == [31, 7]
  assert gone.future.cancelled() and (30,) not in [ids for batch in device.seen for group in batch for ids in group]


def test_jobs_that_are_too_late_are_dropped(make, device):
  engine = make()
  held(device, engine)
  late, kept = job(item(30), seconds=0.0), job(item(31))
  engine.submit(late)
  engine.submit(kept)
  device.gate.set()
  assert kept.future.result(10).tolist() == [31]
  with pytest.raises(TooLateError):
    late.future.result(10)


def test_a_full_queue_refuses(make, device):
  engine = make(queue_tokens=5)
  held(device, engine)
  engine.submit(job(item(20, 20, 20)))
  with pytest.raises(QueueFullError) as error:
    engine.submit(job(item(20, 20, 20)))
  assert 0 < error.value.seconds <= 60
  engine.submit(job(item(20, 20)))
  device.gate.set()


def test_faults_fail_their_batch_only(make, device):
  engine = make(batch_tokens=1)
  bad, nan, good = job(item(666)), job(item(21), item(13)), job(item(20))
  for j in (bad, nan, good):
    engine.submit(j)
  assert good.future.result(10).tolist() == [20]
  for j, message in ((bad, 'failed to compute'), (nan, 'a reward is nan')):
    with pytest.raises(EngineError, match=message):
      j.future.result(10)
  assert engine.alive


def test_a_dead_thread_leaves_nobody_waiting(make, device, monkeypatch):
  engine = make()
  first = held(device, engine)
  waiting = job(item(9))
  engine.submit(waiting)
  monkeypatch.setattr(engine, '_fetch', lambda _: (_ for _ in ()).throw(SystemError('bug')))
  device.gate.set()
  for j in (first, waiting):
    with pytest.raises(EngineError, match='stopped'):
      j.future.result(10)
  engine.thread.join(10)
  assert not engine.alive and isinstance(engine.failure, SystemError)
  with pytest.raises(EngineError):
    engine.submit(job(item(1)))
