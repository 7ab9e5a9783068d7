"""Our reward server next to vLLM, which serves the same exported checkpoint: sequences per second and the difference of the rewards.

  python benchmarks/serve_peers.py --make=FOLDER --tokenizer=TOKENIZER.model
  vllm serve FOLDER/exported --runner pooling --trust-remote-code --port 8000
  python benchmarks/serve_peers.py --checkpoint=FOLDER/run --vllm=http://127.0.0.1:8000

The first writes a reward model of random weights; vLLM has an environment of its own (flags for CPUs: docs/pools.md).
Both get the same finished texts on /pooling, in groups of 8 that share prompt and reference, over the same number of connections; they take
turns. Ours is measured exact and packed. Prints a table, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import itertools
import json
import multiprocessing
import pathlib
import random
import time
import urllib.parse
from typing import Any

import jax
import numpy as np
import timing
from serve_load import served_model

import polar_jax
from polar_jax.config import ModelConfig, TemplateConfig

GROUP, ROUNDS = 8, 5
SHAPE = ModelConfig(family='internlm2', num_layers=8, d_model=512, d_ff=1_536, num_heads=8, num_kv_heads=2, head_dim=64)
WORDS = ['the', 'a', 'of', 'rain', 'river', 'old', 'small', 'stone', 'bird', 'light', 'sang', 'fell', 'under', 'over', 'slowly', 'two']


def make(folder: pathlib.Path, tokenizer: str) -> None:
  """Write a reward model of random weights as a run and as a Hugging Face folder."""
  model = polar_jax.RewardModel.init(SHAPE, tokenizer, seed=0)
  model.template_config = TemplateConfig(separator='[UNUSED_TOKEN_131]')  # one token, as POLAR's own is
  model.params['v_head'] = jax.tree.map(lambda a: 0.2 * jax.random.normal(jax.random.key(1), a.shape, a.dtype), model.params['v_head'])
  model.save(folder / 'run')
  model.save_pretrained(folder / 'exported')


def finished_texts(model: polar_jax.RewardModel, groups: int, seed: int) -> list[list[str]]:
  """Return the finished texts of random groups, as POLAR's client sends them."""
  rng = random.Random(seed)
  text = lambda low, high: ' '.join(rng.choices(WORDS, k=rng.randint(low, high)))
  template = model.template
  return [template.candidate_texts(text(40, 120), text(20, 80), [text(10, 80) for _ in range(GROUP)], alone=True) for _ in range(groups)]


def post(connection: http.client.HTTPConnection, texts: list[str]) -> list[float]:
  """Return the rewards of texts from /pooling."""
  body = json.dumps({'input': texts, 'use_activation': False})
  connection.request('POST', '/pooling', body, {'Content-Type': 'application/json'})
  response = connection.getresponse()
  answer = response.read()
  assert response.status == 200, answer[:300]
  return [item['data'][-1][0] for item in json.loads(answer)['data']]


def connect(address: str) -> http.client.HTTPConnection:
  """Return a connection."""
  url = urllib.parse.urlsplit(address)
  return http.client.HTTPConnection(url.hostname or '', url.port, timeout=600)


def load(address: str, groups: list[list[str]], seconds: float, connections: int) -> float:
  """Return sequences per second while connections send one group after another. Runs in a process of its own."""
  begin, counts = time.perf_counter(), [0] * connections

  def send(c: int) -> None:
    with contextlib.closing(connect(address)) as connection:
      for i in itertools.count(c * 7):
        if time.perf_counter() > begin + seconds:
          return
        counts[c] += len(post(connection, groups[i % len(groups)]))

  with concurrent.futures.ThreadPoolExecutor(connections) as pool:
    list(pool.map(send, range(connections)))
  return sum(counts) / (time.perf_counter() - begin)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--make', type=pathlib.Path, help='write a model there, and end')
  parser.add_argument('--tokenizer', help='for --make')
  parser.add_argument('--checkpoint')
  parser.add_argument('--vllm', help='address of a server of the exported checkpoint')
  parser.add_argument('--seconds', type=float, default=8.0, help='of each measurement')
  parser.add_argument('--connections', type=int, default=16)
  args = parser.parse_args()
  if args.make:
    make(args.make, args.tokenizer)
    return
  model = polar_jax.load(args.checkpoint)
  assert isinstance(model, polar_jax.RewardModel)
  groups = finished_texts(model, 64, 0)
  tokens = float(np.mean([len(model.template.encode_finished(text)) for group in groups for text in group]))
  expected = np.array(model.exact_scorer.score_sequences([model.template.encode_finished(text) for text in groups[0]]))
  rates: dict[str, list[float]] = {'exact': [], 'packed': [], 'vllm': []}
  differences: dict[str, float] = {}
  with contextlib.ExitStack() as stack:
    # Both servers of ours are there all the time; the one that gets no requests does nothing.
    addresses = {'exact': stack.enter_context(served_model(model, True, 1_024, 8_192, alone=False))}
    addresses['packed'] = stack.enter_context(served_model(model, False, 1_024, 8_192, alone=False))
    addresses['vllm'] = args.vllm
    clients = stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')))
    for name, address in addresses.items():
      with contextlib.closing(connect(address)) as connection:
        differences[name] = float(np.abs(np.array(post(connection, groups[0])) - expected).max())
    for _, (name, address) in itertools.product(range(ROUNDS), addresses.items()):
      rates[name].append(clients.submit(load, address, groups, args.seconds, args.connections).result())
  medians = {name: float(np.median(values)) for name, values in rates.items()}
  ratios = {name: [ours / theirs for ours, theirs in zip(rates[name], rates['vllm'], strict=True)] for name in ('exact', 'packed')}
  names = {'exact': 'ours, exact', 'packed': 'ours, packed', 'vllm': 'vLLM'}
  rows: list[list[Any]] = [
    [
      names[name],
      f'{value:,.1f}',
      f'{value * tokens:,.0f}',
      f'{np.median(ratios[name]):.2f} [{min(ratios[name]):.2f}, {max(ratios[name]):.2f}]' if name in ratios else '',
      f'{differences[name]:.1e}',
    ]
    for name, value in medians.items()
  ]
  print(timing.table(['server', 'sequences/s', 'tokens/s', 'of vLLM', 'max |difference|'], rows), '\n')
  facts: dict[str, Any] = {f'{name}_sequences_per_second': value for name, value in medians.items()}
  facts |= {f'{name}_over_vllm': float(np.median(values)) for name, values in ratios.items()}
  timing.report(**facts, **{f'{name}_difference_in_millionths': 1e6 * value for name, value in differences.items()}, mean_tokens=tokens)


if __name__ == '__main__':
  main()
