"""The backend ray: with a stand-in for Ray, and on a real cluster of this machine, a node of which is removed while it works."""

from __future__ import annotations

import collections
import functools
import importlib.machinery
import json
import pathlib
import sys
import textwrap
import threading
import types

import pytest
from optional import ray

from polar_jax.config import ConfigError, PoolConfig
from polar_jax.synthesis import ray_workers, run, store, workers
from polar_jax.synthesis.plan import Unit
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import PREFIX, PoolPrompt, QuarantineError, Request, Sample
from polar_jax.types import UserError


class Echo:
  """A sampler that says who opened it."""

  opened: list[str] = []  # noqa: RUF012

  def __init__(self, spec):
    self.opened.append(spec.name)
    if spec.settings.get('error'):
      raise spec.settings['error']

  def sample(self, requests):
    return [Sample(f'{request.prompt.text} {request.seed}', True, 1) for request in requests]

  def counts(self):
    return {'requests': 1}


class FakeRay(types.ModuleType):
  """What the backend calls of Ray, in this process: a call runs when its result is asked for.

  Attributes:
    lost: how often the next calls for a policy find that their actor is lost; '' is the start of an actor.
    most: the largest number of actors that were alive at once.
  """

  def __init__(self, nodes, **lost):
    super().__init__('ray')
    self.__spec__ = importlib.machinery.ModuleSpec('ray', None)
    self.nodes = lambda: [{'Alive': True, 'Resources': resources} for resources in nodes] + [{'Alive': False, 'Resources': {'CPU': 99.0}}]
    self.calls, self.lost, self.most, self.alive = [], collections.Counter(lost), 0, []
    self.exceptions = types.SimpleNamespace(RayError=type('RayError', (Exception,), {}))

    class TaskError(self.exceptions.RayError):
      def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause

    self.exceptions.RayTaskError = TaskError

  def is_initialized(self):
    return False

  def init(self, **settings):
    self.calls.append(settings['address'])

  def shutdown(self):
    self.calls.append('shutdown')

  def remote(self, **options):
    self.calls.append(options)
    return lambda program: types.SimpleNamespace(remote=lambda: self._start(program()))

  def _start(self, program):
    method = lambda call: types.SimpleNamespace(remote=lambda *arguments: functools.partial(call, *arguments))
    self.alive.append(types.SimpleNamespace(start=method(program.start), sample=method(program.sample)))
    self.most = max(self.most, len(self.alive))
    return self.alive[-1]

  def wait(self, references, timeout):
    return references[:2], references[2:]

  def get(self, reference):
    name = reference.args[0].name if reference.args else 'start'
    if self.lost[name]:
      self.lost[name] -= 1
      raise self.exceptions.RayError('node died')
    try:
      return reference()
    except Exception as error:
      raise self.exceptions.RayTaskError(error) from error

  def kill(self, handle):
    self.alive.remove(handle)


def spec_of(name, **settings):
  return PolicySpec(name, 'ngram', settings=settings)


def units_of(*specs, count=6):
  prompt = PoolPrompt('p', 'the cat', PREFIX, 'f', 0, 'train')
  return iter([(spec, Unit(spec.name, shard, [Request(prompt, 0, shard)])) for spec in specs for shard in range(count)])


@pytest.fixture
def sampled(monkeypatch):
  """A function that samples units with a stand-in for Ray, and returns (its actors, attempts, policies that were opened)."""

  def sample(units, nodes=({'CPU': 2.0}, {'CPU': 1.0}), lost=None, **settings):
    monkeypatch.setitem(sys.modules, 'ray', fake := FakeRay(nodes, **lost or {}))
    monkeypatch.setattr(workers, 'open_sampler', Echo)
    monkeypatch.setattr(Echo, 'opened', [])
    workers._opened.clear()
    attempts = list(workers.run(PoolConfig(backend='ray', ray_address='host:1', **settings), units, lambda: None))
    workers._opened.clear()
    assert not fake.alive and fake.calls[0] == 'host:1' and fake.calls[-1] == 'shutdown'
    return fake, attempts, list(Echo.opened)

  return sample


def results_of(attempts):
  return sorted((a.unit.policy, a.unit.shard, str(a.results)) for a in attempts)


def test_actors_reserve_what_they_need_and_are_as_many_as_there_is_room_for(sampled):
  fake, attempts, _ = sampled(units_of(spec_of('a'), spec_of('b')))
  assert fake.calls[1] == {'num_cpus': 1, 'num_gpus': 0, 'max_restarts': 0, 'max_task_retries': 0} and fake.most == 3
  assert results_of(attempts) == sorted((n, i, str([Sample(f'the cat {i}', True, 1)])) for n in 'ab' for i in range(6))
  assert sampled(units_of(spec_of('a'), count=2))[0].most == 2  # no more than units
  gpus = [{'CPU': 64.0, 'GPU': 8.0}, {'CPU': 64.0}]
  fake, _, _ = sampled(units_of(spec_of('a'), count=20), gpus, gpus=2, cpus=4)
  assert fake.most == 4 and fake.calls[1]['num_gpus'] == 2 and fake.calls[1]['num_cpus'] == 4
  assert sampled(units_of(spec_of('a')), gpus, cpus=999)[0].most == 1  # a cluster that grows is asked for one
  assert sampled(units_of(spec_of('a')), gpus, cpus=0)[0].most == 2


def test_an_actor_with_gpus_has_one_policy(sampled, monkeypatch):
  ended = []
  monkeypatch.setattr(FakeRay, 'kill', lambda self, handle: (ended.append(handle), self.alive.remove(handle)))
  units = lambda: units_of(spec_of('a'), spec_of('b'), spec_of('c'), count=9)
  fake, attempts, _ = sampled(units(), [{'CPU': 9.0, 'GPU': 2.0}], gpus=1)
  assert len(attempts) == 27 and fake.most == 2 and 4 <= len(ended) <= 6
  ended.clear()
  sampled(units(), [{'CPU': 2.0}])
  assert len(ended) == 2


def test_units_of_actors_that_are_lost_are_done_again(sampled, caplog):
  units = lambda: units_of(spec_of('a'), spec_of('b'))
  fake, attempts, _ = sampled(units(), lost={'a': 3, 'b': 4, 'start': 5})
  assert results_of(attempts) == results_of(sampled(units())[1]) and not any(fake.lost.values())
  assert 'an actor of the Ray cluster was lost, and its 2 units are done again: node died' in caplog.text
  _, attempts, _ = sampled(units(), lost={'b': 999})
  reasons = {a.unit.policy: a.results for a in attempts}
  assert isinstance(reasons['b'], QuarantineError) and 'Ray lost 10 processes that sampled it: node died' in str(reasons['b'])
  assert len([a for a in attempts if a.unit.policy == 'a']) == 6
  with pytest.raises(UserError, match='Ray could not start a process in 10 tries: node died'):
    sampled(units(), lost={'start': 999})


def test_a_policy_that_cannot_be_opened_is_not_opened_for_each_unit(sampled):
  _, attempts, opened = sampled(units_of(spec_of('bad', error=QuarantineError('no such\nmodel')), spec_of('b')), [{'CPU': 1.0}])
  assert {str(a.results) for a in attempts if a.unit.policy == 'bad'} == {'no such model'} and opened.count('bad') <= 2
  assert len([a for a in attempts if a.unit.policy == 'b']) == 6
  with pytest.raises(ConfigError, match='temperature'):  # a setting, not a policy that is down
    sampled(units_of(spec_of('bad', error=ConfigError('temperature'))))


def test_a_run_that_stops_ends_its_actors(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', fake := FakeRay([{'CPU': 2.0}]))
  monkeypatch.setattr(workers, 'open_sampler', Echo)
  attempts = workers.run(PoolConfig(backend='ray'), units_of(spec_of('a')), lambda: None)
  next(attempts)
  assert fake.alive
  attempts.close()
  workers._opened.clear()
  assert not fake.alive and fake.calls[-1] == 'shutdown'


def test_ray_is_missing(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'polar_jax\[ray\]'"):
    list(workers.run(PoolConfig(backend='ray'), iter([]), lambda: None))


# On a real cluster.

ENGINE = """
  # A stand-in for vLLM, which loads slowly, and writes down where.
  import os, pathlib, time, types, zlib
  class SamplingParams:
    def __init__(self, **settings): self.seed = settings['seed']
  class LLM:
    def __init__(self, model, **engine):
      time.sleep(engine.get('seconds', 0))
      with (pathlib.Path(__file__).parent / 'loaded').open('a') as file:
        file.write(f'{model} {os.getpid()} {os.environ.get("CUDA_VISIBLE_DEVICES")}\\n')
      self.model = model
    def generate(self, texts, sampling, use_tqdm):
      time.sleep(0.05)
      text = lambda text, one: f'{self.model} says {zlib.crc32(f"{text}{one.seed}".encode())}.'
      output = lambda *of: types.SimpleNamespace(text=text(*of), token_ids=[1], finish_reason='stop')
      return [types.SimpleNamespace(outputs=[output(*of)], prompt_token_ids=[1]) for of in zip(texts, sampling)]
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  """A cluster whose head samples nothing. Its processes find the stand-in for vLLM."""
  from ray.cluster_utils import Cluster

  (tmp_path / 'vllm.py').write_text(textwrap.dedent(ENGINE))
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv('PYTHONPATH', f'{tmp_path}:{pathlib.Path(run.__file__).parents[2]}')
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  started = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})
  try:
    yield started
  finally:
    ray.shutdown()
    started.shutdown()


def write_pool(folder, policies, **settings):
  folder.mkdir(parents=True, exist_ok=True)
  words = [f'{a}{b}' for a in 'bcdfgh' for b in ('an', 'e', 'ill')]
  text = '\n\n'.join(' '.join(words[(i * k * k) % len(words)] for k in range(60)) + '.' for i in range(1, 60))
  (folder / 'text.txt').write_text(text)
  (folder / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': f'{words[i % 18]} {words[i % 17]} {i}'}) + '\n' for i in range(200)))
  (folder / 'pool.json').write_text(json.dumps(policies))
  common = {'unit_prompts': 4, 'near_duplicates': 0.0, 'policies_per_prompt': 9, 'unseen_share': 0.2, **settings}
  return lambda **more: PoolConfig(pool=str(folder / 'pool.json'), prompts=str(folder / 'prompts.jsonl'), **common | more)


def synthesize(config, workdir):
  lines: list[str] = []
  return run.synthesize(config, 0, workdir, lines.append), lines


@pytest.mark.slow
@pytest.mark.needs('ray')
def test_a_node_that_is_removed_changes_no_triplet(cluster, tmp_path, monkeypatch, caplog):
  nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
  policies = [{'name': f'n{i}', 'kind': 'ngram', 'path': 'text.txt', 'order': i, 'vocab_size': 300, 'max_tokens': 200} for i in (1, 2, 3)]
  config = write_pool(tmp_path / 'pool', policies, samples_per_prompt=4)
  working, removed, finish = set(), threading.Event(), store.Store.finish_unit
  sample = ray_workers._Actors._take

  def take(self, reference, actor, task):
    working.add(actor)
    return sample(self, reference, actor, task)

  def finish_unit(self, *arguments):
    finish(self, *arguments)
    if len([actor for actor in working if actor.is_ready]) >= 3 and not removed.is_set():
      removed.set()
      cluster.remove_node(nodes[1], allow_graceful=False)

  monkeypatch.setattr(ray_workers._Actors, '_take', take)
  monkeypatch.setattr(store.Store, 'finish_unit', finish_unit)
  on_ray, lines = synthesize(config(backend='ray', ray_address=cluster.address), tmp_path / 'ray')
  assert removed.is_set(), 'the run ended before three actors were at work'
  assert 'units are done again' in caplog.text
  assert not any('given up' in line for line in lines)
  monkeypatch.setattr(store.Store, 'finish_unit', finish)
  inline, _ = synthesize(config(), tmp_path / 'inline')
  assert on_ray['fingerprints'] == inline['fingerprints'] and on_ray['rows'] == inline['rows']


@pytest.mark.slow
@pytest.mark.needs('ray')
def test_an_engine_is_loaded_once_for_each_actor_and_has_a_gpu(cluster, tmp_path):
  for _ in range(2):
    cluster.add_node(num_cpus=2, num_gpus=1)
  policies = [{'name': name, 'kind': 'vllm', 'model': name, 'engine': {'seconds': 0.5}} for name in 'xyz']
  config = write_pool(tmp_path / 'pool', policies)
  on_ray, _ = synthesize(config(backend='ray', ray_address=cluster.address, gpus=1), tmp_path / 'ray')
  loaded = [line.split() for line in (tmp_path / 'loaded').read_text().splitlines()]
  by_policy = collections.Counter(model for model, _, _ in loaded)
  assert set(by_policy) == set('xyz') and max(by_policy.values()) <= 2  # of 50 units each, on two GPUs
  assert {devices for _, _, devices in loaded} == {'0'} and len({process for _, process, _ in loaded}) == len(loaded)
  inline, _ = synthesize(config(), tmp_path / 'inline')
  assert on_ray['fingerprints'] == inline['fingerprints']
