"""The reward server under load, against the offline scorer of the same mode in the same process.

  python benchmarks/serve_load.py [--size=tiny|1_8b] [--seconds=6] [--modes=exact,packed]

Measures, for exact and packed rewards:
  throughput  sequences per second at saturation through HTTP, as a share of those of `ExactScorer.score` or `Scorer.score`
  groups      packed: tokens per second of groups of 8 that share prompt and reference, over the same sequences sent separately with
              prompts that differ
  latency     median and 99th percentile at offered loads of 25% to 80% of the throughput, arrivals at random (Poisson)

Parameters are random, and texts too. Clients run in a process of their own. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import http.client
import itertools
import json
import multiprocessing
import random
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import timing

import polar_jax
from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, ServeConfig, TemplateConfig
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.presets import PRESETS
from polar_jax.serve.server import RewardServer
from polar_jax.types import Group

GROUP = 8  # candidates of a group
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Size:
  """A model, and texts in characters, which are tokens of the byte tokenizer."""

  model: ModelConfig
  prompt: int
  reference: int
  output: int
  groups: int  # of the offline measurement
  batch_tokens: int


SIZES = {
  'tiny': Size(
    ModelConfig(num_layers=3, d_model=256, d_ff=768, num_heads=4, num_kv_heads=2, head_dim=64, init_std=0.05), 150, 60, 60, 32, 8_192
  ),
  '1_8b': Size(ModelConfig(**PRESETS['polar_1_8b']), 1_000, 400, 400, 128, 32_768),
}


def texts(rng: random.Random, size: Size, shared: bool, groups: int) -> list[dict[str, Any]]:
  """Return groups of random texts. Without `shared`, each of their sequences is a group of its own, with another prompt."""
  word = lambda length: ''.join(rng.choices('abcdefghijklmnopqrstuvwxyz ', k=length))
  out = []
  for _ in range(groups):
    if shared:
      out.append({'prompt': word(size.prompt), 'reference': word(size.reference), 'outputs': [word(size.output) for _ in range(GROUP)]})
    else:
      out += [{'prompt': word(size.prompt), 'reference': word(size.reference), 'outputs': [word(size.output)]} for _ in range(GROUP)]
  return out


def sequences(groups: list[dict[str, Any]]) -> int:
  """Return the number of candidates."""
  return sum(len(group['outputs']) for group in groups)


def saturate(address: str, size: Size, shared: bool, seconds: float, connections: int, seed: int) -> float:
  """Return sequences per second while connections send one request after another. Runs in a process of its own.

  The time ends with the last answer to a request that was sent within `seconds`.
  """
  url = urllib.parse.urlsplit(address)
  rng = random.Random(seed)
  bodies = [json.dumps(texts(rng, size, shared, 1)).encode() for _ in range(4 * connections)]
  begin = time.perf_counter()
  end = begin + seconds
  counts = [0] * connections

  def send(c: int) -> None:
    connection = http.client.HTTPConnection(url.hostname or '', url.port, timeout=600)
    with contextlib.closing(connection):
      for i in itertools.count(c * 4):
        if time.perf_counter() > end:
          return
        connection.request('POST', '/score', bodies[i % len(bodies)], {'Content-Type': 'application/json'})
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 200, answer[:300]
        counts[c] += GROUP

  with concurrent.futures.ThreadPoolExecutor(connections) as pool:
    list(pool.map(send, range(connections)))
  return sum(counts) / (time.perf_counter() - begin)


def latencies(address: str, size: Size, rate: float, seconds: float, seed: int) -> list[float]:
  """Return the seconds of each request of one group, sent at random times, `rate` per second. Runs in a process of its own."""
  url = urllib.parse.urlsplit(address)
  rng = random.Random(seed)
  bodies = [json.dumps(group).encode() for group in texts(rng, size, True, max(int(rate * seconds * 1.5), 8))]

  async def ask(body: bytes) -> float:
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f'POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'
    writer.write(head.encode() + body)
    answer = await reader.read()
    writer.close()
    assert b' 200 ' in answer[:20], answer[:300]
    return time.perf_counter() - started

  async def run() -> list[float]:
    tasks, end = [], time.perf_counter() + seconds
    for body in bodies:
      if time.perf_counter() > end:
        break
      tasks.append(asyncio.create_task(ask(body)))
      await asyncio.sleep(rng.expovariate(rate))
    return list(await asyncio.gather(*tasks))

  return asyncio.run(run())


@contextlib.contextmanager
def served_model(model: polar_jax.RewardModel, exact: bool, max_length: int, batch_tokens: int, alone: bool = True) -> Iterator[str]:
  """The address of a server of the model, in threads of this process. Unless it is `alone` there, others compile while it is ready."""
  config = ServeConfig(port=0, exact=exact, max_length=max_length, batch_tokens=batch_tokens)
  server = RewardServer(model, config, 'benchmark', write_log=lambda _: None)
  with server.in_thread() as address:
    yield address
    assert not alone or server.metrics.late_compilations == 0, 'something was compiled after the warm-up'


def offline(model: polar_jax.RewardModel, groups: list[dict[str, Any]], exact: bool) -> float:
  """Return sequences per second of the scorer that the score stage or `RewardModel.score` uses."""
  given = [Group(group['prompt'], group['reference'], group['outputs']) for group in groups]
  started = time.perf_counter()
  if exact:
    model.exact_scorer.score([dataclasses.replace(group, candidates=[output]) for group in given for output in group.candidates])
  else:
    model.scorer.score(given, alone=True)
  return sequences(groups) / (time.perf_counter() - started)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', choices=SIZES, default='tiny')
  parser.add_argument('--seconds', type=float, default=6.0, help='of each measurement')
  parser.add_argument('--modes', default='exact,packed')
  parser.add_argument('--connections', type=int, default=32)
  args = parser.parse_args()
  size = SIZES[args.size]
  mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=1))
  compute = 'float32' if args.size == 'tiny' else 'bfloat16'
  model = polar_jax.RewardModel.init(
    dataclasses.replace(size.model, vocab_size=ByteTokenizer.vocab_size, compute_dtype=compute), 'byte', mesh=mesh
  )
  model.template_config = TemplateConfig()
  metrics: dict[str, Any] = {'size': args.size, 'device': jax.devices()[0].device_kind}
  rows, latency_rows = [], []
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, context) as clients:
    for mode in args.modes.split(','):
      exact = mode == 'exact'
      rng = random.Random(1)
      offline(model, texts(rng, size, True, size.groups), exact)  # compiles, before the server counts compilations
      length = 2 * size.prompt + size.reference + size.output + 16
      with served_model(model, exact, length, size.batch_tokens) as address:
        load = lambda shared, seed, address=address: clients.submit(
          saturate, address, size, shared, args.seconds, args.connections, seed
        ).result()
        alone, through, separate = [], [], []
        for round_ in range(ROUNDS):  # in turns, because machines are slower at times
          alone.append(offline(model, texts(rng, size, True, size.groups), exact))
          through.append(load(True, round_))
          separate += [] if exact else [load(False, round_)]
        rate = float(np.median(through))
        rows.append([f'{mode}: offline', f'{np.median(alone):,.1f}', ''])
        rows.append([f'{mode}: through HTTP', f'{rate:,.1f}', f'{rate / np.median(alone):.0%} of offline'])
        metrics |= {f'{mode}_offline': float(np.median(alone)), f'{mode}_http': rate, f'{mode}_share': rate / float(np.median(alone))}
        if not exact:
          slower = float(np.median(separate))
          rows.append(['packed: separate sequences', f'{slower:,.1f}', f'groups of {GROUP} are {rate / slower:.2f}x as fast'])
          metrics['groups_over_separate'] = rate / slower
        for share in (0.25, 0.5, 0.8):
          seconds = clients.submit(latencies, address, size, share * rate / GROUP, args.seconds, 3).result()
          p50, p99 = np.percentile(seconds, [50, 99])
          latency_rows.append([mode, f'{share:.0%}', len(seconds), f'{p50 * 1e3:,.0f}', f'{p99 * 1e3:,.0f}'])
          metrics |= {f'{mode}_p50_at_{share:g}': float(p50), f'{mode}_p99_at_{share:g}': float(p99)}
  print(timing.table(['', 'sequences/s', ''], rows), '\n')
  print(timing.table(['mode', 'offered load', 'requests', 'p50, ms', 'p99, ms'], latency_rows), '\n')
  timing.report(**metrics)


if __name__ == '__main__':
  main()
