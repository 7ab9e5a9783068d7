"""The plan of a run, and the engine with samplers of the test's own."""

from __future__ import annotations

import collections
import functools
import hashlib
import threading
import time

import pytest

from polar_jax.config import PoolConfig
from polar_jax.runtime.preemption import StopRequested
from polar_jax.synthesis import workers
from polar_jax.synthesis.engine import Engine
from polar_jax.synthesis.plan import Plan
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import QuarantineError, Sample
from polar_jax.synthesis.store import Store, StoreError


class Echo:
  """Answers with a digest of the request. May fail at some calls."""

  def __init__(self, fail_at=None, error=None, seconds=0.0):
    self.calls, self._fail_at, self._error, self._seconds, self._lock = [], fail_at, error, seconds, threading.Lock()
    self.running = self.most_running = 0

  def sample(self, requests):
    with self._lock:
      self.calls.append(requests)
      number = len(self.calls) - 1
      self.running += 1
      self.most_running = max(self.running, self.most_running)
    time.sleep(self._seconds)
    with self._lock:
      self.running -= 1
    if self._fail_at is not None and number >= self._fail_at:
      raise self._error
    return [Sample(hashlib.sha256(repr(request).encode()).hexdigest(), True, 1) for request in requests]

  def counts(self):
    return {'requests': sum(map(len, self.calls))}


def split_of(identifier):
  return 'unseen_prompts' if int(identifier) % 5 == 4 else 'train'


def open_store(tmp_path, prompts=20):
  store = Store(tmp_path / 's.sqlite', {})
  store.add_prompts([(f'{i}', f'prompt {i}', 'prefix', 'f') for i in range(prompts)], split_of)
  return store


def plan_of(store, specs, **changes):
  for spec in specs:
    store.add_policy(spec.name, spec.identity())
  settings = {'seed': 3, 'policies': 2, 'samples': 2, 'shard_size': 8} | changes
  return Plan(specs, store, ['prefix'], **settings)


@pytest.fixture
def specs():
  return [PolicySpec(name, 'openai', held_out=name in 'de') for name in 'abcde']


def sampled(store):
  return [row for split in ('train', 'unseen_prompts') for row in store.samples(0, 99, split)]


def test_each_prompt_is_answered_by_drawn_policies(tmp_path, specs):
  store = open_store(tmp_path, 4_000)
  weighted = [PolicySpec('a', 'openai', weight=3.0), *specs[1:]]
  plan = plan_of(store, weighted)
  count = collections.Counter(name for prompt in store.all_prompts() for name in plan.answering(prompt))
  for prompt in store.prompts(0, 100):
    names = plan.answering(prompt)
    assert len(names & set('abc')) == 2 and names & set('de') == (set('de') if prompt.split == 'unseen_prompts' else set())
  # Two of (3, 1, 1) without replacement: a is left out if b and c come first, 2 * (1/5 * 1/4).
  assert count['a'] / 4_000 == pytest.approx(0.9, abs=0.02) and count['b'] / 4_000 == pytest.approx(0.55, abs=0.035)
  store.close()


def test_units_and_seeds_do_not_depend_on_what_was_done(tmp_path, specs):
  store = open_store(tmp_path)
  plan = plan_of(store, specs)
  units = list(plan.units('a'))
  assert [unit.shard for unit in units] == [0, 1, 2] and plan.num_shards == 3 and plan.missing('a') == 3
  store.finish_unit('a', 1, [], [], 0, {})
  assert list(plan.units('a')) == [units[0], units[2]]
  asked = [(name, request.prompt.id, request.sample) for name in 'abcde' for unit in plan.units(name) for request in unit.requests]
  seeds = {request.seed for name in 'abcde' for unit in plan.units(name) for request in unit.requests}
  assert len(set(asked)) == len(asked) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
  held_out = [request.prompt.id for unit in plan.units('d') for request in unit.requests]
  assert held_out and all(int(identifier) % 5 == 4 for identifier in held_out)
  store.close()


def run(tmp_path, specs, samplers, local=(), log=None, **changes):
  store = open_store(tmp_path, **changes)
  engine = Engine(plan_of(store, specs), store, log or (lambda line: None), threading.Event())
  servers = {name: sampler for name, sampler in samplers.items() if name not in local}
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(workers, 'open_sampler', lambda spec: samplers[spec.name])
      engine.run(servers, [spec for spec in specs if spec.name in local], functools.partial(workers.run, PoolConfig()))
  finally:
    rows, costs = sampled(store), store.costs()
    store.close()
  return engine, rows, costs


def test_stopped_anywhere_and_started_again_gives_the_same_samples(tmp_path, specs):
  _, whole, _ = run(tmp_path / 'whole', specs, {name: Echo() for name in 'abcde'})
  assert len(whole) == 2 * (2 * 20 + 2 * 4)
  asked = collections.Counter()
  for fail_at in (0, 1, 2, None):
    samplers = {name: Echo(fail_at, StopRequested()) for name in 'abcde'}
    try:
      run(tmp_path / 'stopped', specs, samplers, local='abc')
    except StopRequested:
      assert fail_at is not None
    for name, sampler in samplers.items():
      done = sampler.calls[: len(sampler.calls) if fail_at is None else fail_at]
      asked.update((name, *request) for requests in done for request in requests)
  _, rows, _ = run(tmp_path / 'stopped', specs, {name: Echo(0, AssertionError('nothing is left to do')) for name in 'abcde'})
  assert rows == whole
  assert max(asked.values()) == 1  # no unit is done twice


def test_a_policy_that_fails_is_given_up_and_keeps_what_it_gave(tmp_path, specs):
  lines = []
  samplers = {name: Echo(1 if name == 'b' else None, QuarantineError('down')) for name in 'abcde'}
  engine, rows, costs = run(tmp_path, specs, samplers, log=lines.append)
  assert engine.quarantined == {'b': 'down'}
  assert any('b: given up, and what it finished is kept: down' in line for line in lines)
  by_policy = collections.Counter(row.policy for row in rows)
  assert 0 < by_policy['b'] < by_policy['a'] and costs['b']['requests'] > by_policy['b']
  again, rows, _ = run(tmp_path, specs, {name: Echo() for name in 'abcde'})
  assert not again.quarantined and sorted(rows) == sorted(run(tmp_path / 'whole', specs, {name: Echo() for name in 'abcde'})[1])


def test_an_error_of_one_thread_stops_the_run(tmp_path, specs):
  samplers = {name: Echo(0 if name == 'c' else None, StoreError('disk full')) for name in 'abcde'}
  with pytest.raises(StoreError, match='disk full'):
    run(tmp_path, specs, samplers)


def test_servers_are_sampled_at_the_same_time(tmp_path, specs):
  both = threading.Barrier(2, timeout=20)

  class Meets(Echo):
    def __init__(self):
      super().__init__()
      self.first = threading.Lock()

    def sample(self, requests):
      if self.first.acquire(blocking=False):  # of its two threads one waits
        both.wait()  # only returns if the other policy is asked meanwhile
      return super().sample(requests)

  run(tmp_path, specs[:2], {'a': Meets(), 'b': Meets()})
  slow = Echo(seconds=0.05)
  run(tmp_path / 'lanes', specs[:2], {'a': slow, 'b': Echo()}, prompts=40)
  assert slow.most_running == 2
