"""Speed and memory of the synthesis of triplets, sampling left out; and whether a server is kept busy.

    python benchmarks/synthesis.py
    python benchmarks/synthesis.py --server=http://localhost:8000 --model=NAME     a server of yours instead of the stand-in

Pairing, clean-up and writing are measured in processor seconds of one core, on answers that are there already. To the server the same
requests are sent by a client that does nothing else, with as many in flight; both take turns. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import pathlib
import random
import resource
import statistics
import tempfile
import threading
import time

import timing

from polar_jax.config import PoolConfig
from polar_jax.synthesis import run
from polar_jax.synthesis.addresses import Addresses
from polar_jax.synthesis.openai import OpenaiSampler
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import PREFIX, PoolPrompt, Request

WORDS = [f'{a}{b}' for a in 'bcdfghklmnprst' for b in ('an', 'e', 'ill', 'o', 'urn')]
POLICIES, WORDS_OF_ANSWER = 20, 60
IN_FLIGHT, REQUESTS, TOKENS, SECONDS = 64, 1_024, 64, 0.25  # of the stand-in: seconds and tokens of an answer


def recorded(folder: pathlib.Path, rows: int) -> PoolConfig:
  """Write answers of several policies to a file, and return the settings that make triplets of them."""
  rng, path = random.Random(0), folder / 'answers.jsonl'
  with path.open('w', encoding='utf-8') as file:
    for number in range(rows):
      prompt, policy = number // (2 * POLICIES), number // 2 % POLICIES
      response = ' '.join(rng.choices(WORDS, k=WORDS_OF_ANSWER)) + '.'
      file.write(json.dumps({'prompt': f'Prompt {prompt}', 'policy': f'p{policy}', 'response': response}) + '\n')
  (folder / 'pool.json').write_text(json.dumps([{'name': 'all', 'kind': 'recorded', 'path': 'answers.jsonl'}]))
  return PoolConfig(pool=str(folder / 'pool.json'), pairs_per_prompt=2 * POLICIES)


def pairing(rounds: int, rows: int) -> list[float]:
  """Return triplets per processor second of some rounds of pairing, clean-up and writing."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    config = recorded(folder, rows)
    run.synthesize(config, 0, folder / 'run', lambda line: None)
    rates = []
    for _ in range(rounds):
      (folder / 'run' / 'data' / 'card.json').unlink()  # what is complete would not be made again
      started = time.process_time()
      made = run.synthesize(config, 0, folder / 'run', lambda line: None)
      rates.append(sum(made['rows'].values()) / (time.process_time() - started))
    return rates


def memory(rows: int) -> tuple[int, int]:
  """Return (triplets, bytes at the peak) of a process that makes triplets of some recorded answers."""
  context = multiprocessing.get_context('spawn')
  receiver, sender = context.Pipe()
  process = context.Process(target=_memory, args=(rows, sender))
  process.start()
  found = receiver.recv()
  process.join()
  return found


def _memory(rows: int, sender) -> None:
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    made = run.synthesize(recorded(folder, rows), 0, folder / 'run', lambda line: None)
  sender.send((sum(made['rows'].values()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
  """Answer completions on one connection, each after `SECONDS`."""
  body = json.dumps({'choices': [{'text': 'x ' * TOKENS, 'finish_reason': 'length'}], 'usage': {'completion_tokens': TOKENS}}).encode()
  reply = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s' % (len(body), body)
  with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
    while True:
      head = await reader.readuntil(b'\r\n\r\n')
      size = next(int(line.split(b':')[1]) for line in head.split(b'\r\n') if line.lower().startswith(b'content-length'))
      seed = json.loads(await reader.readexactly(size))['seed']
      await asyncio.sleep(SECONDS)
      writer.write(reply.replace(b'x x ', b'%04d' % (seed % 10_000), 1))  # another answer for another seed
      await writer.drain()


def serve(port_pipe) -> None:
  """Run the stand-in, and send its port."""

  async def main() -> None:
    server = await asyncio.start_server(_answer, '127.0.0.1', 0)
    port_pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()

  asyncio.run(main())


async def _load(url: str, bodies: list[bytes]) -> int:
  """Send requests with `IN_FLIGHT` connections, and return the tokens of the answers."""
  host, _, port = url.removeprefix('http://').partition(':')
  queue, tokens = iter(bodies), 0

  async def worker() -> None:
    nonlocal tokens
    reader, writer = await asyncio.open_connection(host, int(port or 80))
    for body in queue:
      head = f'POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n'
      writer.write(head.encode() + body)
      reply = await reader.readuntil(b'\r\n\r\n')
      size = next(int(line.split(b':')[1]) for line in reply.split(b'\r\n') if line.lower().startswith(b'content-length'))
      tokens += json.loads(await reader.readexactly(size))['usage']['completion_tokens']
    writer.close()

  await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
  return tokens


def busy(url: str, model: str, rounds: int, requests: int) -> tuple[list[float], list[float]]:
  """Return the tokens per second of this package and of a client that does nothing else, by round."""
  spec = PolicySpec('p', 'openai', max_tokens=TOKENS, settings={'base_url': [url], 'model': model, 'chat': False})
  prompts = [PoolPrompt(f'{i}', f'Prompt {i}', PREFIX, 'f', i, 'train') for i in range(requests)]
  addresses = Addresses()
  sampler = OpenaiSampler(spec, PoolConfig(max_in_flight=IN_FLIGHT), addresses)
  ours, theirs = [], []
  for number in range(rounds + 1):
    units = [[Request(prompt, 0, number * requests + prompt.index) for prompt in prompts[low : low + 64]] for low in range(0, requests, 64)]
    queue, lock, before, started = iter(units), threading.Lock(), sampler.counts()['tokens'], time.perf_counter()

    def lane(queue=queue, lock=lock) -> None:
      while True:
        with lock:
          unit = next(queue, None)
        if unit is None:
          return
        sampler.sample(unit)

    lanes = [threading.Thread(target=lane) for _ in range(2)]
    for thread in lanes:
      thread.start()
    for thread in lanes:
      thread.join()
    ours.append((sampler.counts()['tokens'] - before) / (time.perf_counter() - started))
    settings = {'model': model, 'max_tokens': TOKENS, 'temperature': 1.0, 'top_p': 0.9, 'n': 1, 'stream': False}
    bodies = [json.dumps({**settings, 'prompt': prompt.text, 'seed': prompt.index}).encode() for prompt in prompts]
    started = time.perf_counter()
    theirs.append(asyncio.run(_load(url, bodies)) / (time.perf_counter() - started))
  addresses.close()
  return ours[1:], theirs[1:]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--rows', type=int, default=400_000, help='recorded answers that are paired')
  parser.add_argument('--memory_rows', type=int, default=1_000_000, help='recorded answers of the measurement of memory; 0: none')
  parser.add_argument('--requests', type=int, default=REQUESTS)
  parser.add_argument('--server', help='address of a server, instead of the stand-in')
  parser.add_argument('--model', default='stand-in')
  args = parser.parse_args()
  rates = pairing(args.rounds, args.rows)
  metrics = {'triplets_per_second_and_core': statistics.median(rates)}
  rows = [('pairing, clean-up, writing', f'{statistics.median(rates):,.0f} triplets/s/core', f'[{min(rates):,.0f}, {max(rates):,.0f}]')]
  if args.memory_rows:
    triplets, peak = memory(args.memory_rows)
    metrics |= {'memory_rows': args.memory_rows, 'memory_triplets': triplets, 'peak_mib': peak / 2**20}
    rows.append((f'{args.memory_rows:,} answers, {triplets:,} triplets', f'{peak / 2**20:,.0f} MiB', ''))
  process, url = None, args.server
  if url is None:
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context('spawn').Process(target=serve, args=(sender,), daemon=True)
    process.start()
    url = f'http://127.0.0.1:{receiver.recv()}'
  ours, theirs = busy(url.removesuffix('/v1'), args.model, args.rounds, args.requests)
  if process is not None:
    process.kill()
  share = timing.ratio(ours, theirs)
  metrics |= {'tokens_per_second': statistics.median(ours), 'of_load_tool': share}
  rows.append((f'server, {IN_FLIGHT} in flight', f'{statistics.median(ours):,.0f} tokens/s', f'{share:.1%} of a bare client'))
  print(timing.table(('', 'median', ''), rows))
  timing.report(**metrics)


if __name__ == '__main__':
  main()
