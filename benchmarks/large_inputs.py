"""Time to the first step and memory of a run on many triplets, from a .jsonl file and from a TFDS data set, and of tokenizing many prompts.

    python benchmarks/large_inputs.py
    python benchmarks/large_inputs.py --examples=100_000 --kinds=jsonl
    python benchmarks/large_inputs.py --examples=1_250_000 --kinds=prompts --policy=FOLDER

Writes the triplets (texts of random words, some 1,400 bytes each), and trains a model of one layer for three steps in a fresh process for
each kind. The time counts from the call of `train_reward_model` to the end of the first step, without writing the files or importing
packages; memory is the peak of the resident memory, less that before the call. `prompts` reads a .jsonl of prompts with references, and
renders and tokenizes each for the policy `--policy` (its tokenizer and chat template). The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import timing
from memory import resident

_GIB = 2**30
_WORDS = 4_000


def examples(count: int) -> Iterator[dict[str, str]]:
  """Yield triplets of random words."""
  rng = np.random.default_rng(0)
  letters = np.array(list('abcdefghijklmnopqrstuvwxyz'))
  words = np.array([''.join(rng.choice(letters, rng.integers(2, 10))) for _ in range(_WORDS)])
  for i in range(count):
    drawn = words[rng.integers(0, _WORDS, 200)].tolist()
    parts = (drawn[:20], drawn[20:80], drawn[80:140], drawn[140:])
    yield {name: f'{i} {" ".join(part)}' for name, part in zip(('prompt', 'reference', 'chosen', 'rejected'), parts, strict=True)}


def write(kind: str, folder: pathlib.Path, count: int) -> pathlib.Path:
  """Write the triplets, and return the path to train on."""
  from polar_jax.data import tfds
  from polar_jax.types import Triplet

  if kind == 'tfds':
    return tfds.write_triplets(folder, 'large', {'train': (Triplet(**e) for e in examples(count))}, 'Random words.', {})
  path = folder / 'large.jsonl'
  with path.open('w') as file:
    for example in examples(count):
      file.write(json.dumps(example) + '\n')
  return path


def measure(path: str) -> None:
  """Train on `path` in this process, and print time and memory. Runs in a process of its own."""
  import polar_jax
  from polar_jax.config import ModelConfig
  from polar_jax.train import trainer

  first: list[float] = []
  pending = trainer._Trainer._write_pending

  def note(self: Any) -> None:
    pending(self)
    first.append(time.perf_counter())

  trainer._Trainer._write_pending = note  # type: ignore[method-assign]
  before, started = resident()['VmRSS'], time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    polar_jax.train_reward_model(
      path,
      init='scratch',
      output_dir=folder,
      model=ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=16),
      tokenizer='byte',
      args=polar_jax.TrainConfig(steps=3, batch_size=8),
    )
  print(json.dumps({'seconds': first[0] - started, 'bytes': resident()['VmHWM'] - before}))


def measure_prompts(path: str, policy: str) -> None:
  """Open and tokenize the prompts of `path` in this process, and print time and memory. Runs in a process of its own."""
  from polar_jax.data import examples as data
  from polar_jax.data.tokenizer import open_tokenizer
  from polar_jax.ppo import prompts

  tokenizer = open_tokenizer(policy)
  chat = prompts.open_chat(policy, 'auto')
  before, started = resident()['VmRSS'], time.perf_counter()
  given = data.open_prompts(path, 'train')
  opened = time.perf_counter()
  found = prompts.PolicyPrompts(given, tokenizer, chat, 1_024)
  seconds = time.perf_counter() - started
  tokens = found._ends[-1]
  facts = {'chat_template': chat is not None, 'seconds_to_open': opened - started, 'tokens': tokens}
  print(json.dumps({'seconds': seconds, 'bytes': resident()['VmHWM'] - before, **facts}))


def main() -> None:
  """Write, measure and print."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--examples', type=int, default=1_000_000)
  parser.add_argument('--kinds', nargs='+', default=['jsonl', 'tfds'], choices=['jsonl', 'tfds', 'prompts'])
  parser.add_argument('--policy', help='folder of the tokenizer and the chat template for prompts')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.measure:
    measure_prompts(options.measure, options.policy) if options.policy else measure(options.measure)
    return
  if ('prompts' in options.kinds) != bool(options.policy):
    parser.error('--kinds=prompts needs --policy, and no other kind does')
  results: dict[str, Any] = {'examples': options.examples}
  for kind in options.kinds:
    with tempfile.TemporaryDirectory() as folder:
      path = write(kind, pathlib.Path(folder), options.examples)
      size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
      command = [sys.executable, __file__, f'--measure={path}', *([f'--policy={options.policy}'] if kind == 'prompts' else [])]
      done = subprocess.run(command, capture_output=True, text=True, check=True)
      results[kind] = {'file_bytes': size, **json.loads(done.stdout.splitlines()[-1])}
  rows = [
    [kind, f'{found["file_bytes"] / _GIB:.2f}', f'{found["seconds"]:.1f}', f'{found["bytes"] / _GIB:.2f}']
    for kind, found in results.items()
    if kind != 'examples'
  ]
  print(timing.table([f'{options.examples:,} examples', 'file, GiB', 'seconds', 'memory, GiB'], rows))
  print(json.dumps(results))


if __name__ == '__main__':
  main()
