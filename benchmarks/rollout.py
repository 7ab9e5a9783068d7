"""Rollout throughput in tokens per second, compared with transformers' generate in static batches and its continuous batching.

    pip install -e '.[bench]' && python benchmarks/rollout.py

One Llama of 26M parameters with the same weights in both, float32, two threads, sampling at temperature 1, without stop tokens: every
response has a prescribed length. Lengths resemble those of a chat model's responses (log-normal, mean near 160 tokens, a long tail), or
with --responses=FILE are those of real responses (a .jsonl.gz with `response`, and --tokenizer=tokenizer.json); one further batch has a
fixed length. Ours and static batches take turns; continuous batching, the slowest, runs once. Takes fifty minutes on two cores. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

THREADS = 2
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('OMP_NUM_THREADS', str(THREADS))
if hasattr(os, 'sched_setaffinity'):  # the only way to limit the number of XLA threads
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

from polar_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()

import gzip
import json
import pathlib
import time

import jax
import numpy as np
import timing
import torch
import torch_llama
import transformers
from flax import nnx
from shapes import LLAMA_26M

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, RolloutConfig, TokenizerConfig
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.model.language_model import LanguageModel
from polar_jax.ppo.rollout import RolloutEngine

MODEL = ModelConfig(**LLAMA_26M, rope_theta=1e4, scan_unroll=8)
LONGEST_PROMPT, LONGEST = 128, 512


def torch_model(params: dict[str, Any]) -> transformers.LlamaForCausalLM:
  """Return transformers' Llama with our parameters."""
  model = transformers.LlamaForCausalLM(torch_llama.llama_config(MODEL, tie_word_embeddings=False)).float().eval()
  torch_llama.load(model, MODEL, params, {'lm_head.weight': params['lm_head']})
  return model


class _Limits(transformers.StoppingCriteria):
  """Ends each sequence at its own length."""

  def __init__(self, width: int, limits: Sequence[int]):
    self._ends = torch.tensor([width + n for n in limits])

  def __call__(self, input_ids, scores, **_: Any):
    return input_ids.shape[1] >= self._ends


def static(model: transformers.LlamaForCausalLM, prompts: Sequence[list[int]], limits: Sequence[int], batch: int) -> None:
  """Run generate on `batch` prompts at a time, padded on the left; a batch ends with its longest response."""
  for low in range(0, len(prompts), batch):
    rows, max_new = prompts[low : low + batch], limits[low : low + batch]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
      model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=max(max_new),
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=transformers.StoppingCriteriaList([_Limits(width, max_new)]),
      )


def continuous(model: transformers.LlamaForCausalLM, prompts: Sequence[list[int]], limits: Sequence[int]) -> None:
  """Run transformers' continuous batching, every request with its own length."""
  config = transformers.GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max(limits), eos_token_id=-1, pad_token_id=0)
  manager = model.init_continuous_batching(generation_config=config)
  manager.start()
  try:
    for prompt, limit in zip(prompts, limits, strict=True):
      manager.add_request(list(prompt), max_new_tokens=int(limit))
    tokens = [len(manager.get_result(timeout=300).generated_tokens) for _ in prompts]
  finally:
    manager.stop(block=True)
  if sorted(tokens) != sorted(map(int, limits)):
    raise RuntimeError('continuous batching returned responses of other lengths than requested')


def drawn_lengths(count: int, responses: str | None, tokenizer: str | None) -> np.ndarray:
  """Return the lengths in tokens of `count` responses, at most LONGEST."""
  rng = np.random.default_rng(0)
  if responses is None:
    return np.clip(rng.lognormal(4.9, 0.6, count), 16, LONGEST).astype(int)
  with gzip.open(responses, 'rt', encoding='utf-8') as file:
    texts = [json.loads(line)['response'] for line in file]
  read = load_tokenizer(TokenizerConfig(kind='file', path=tokenizer), pathlib.Path())
  chosen = rng.choice(len(texts), count, replace=False)
  return np.clip([len(read.encode(texts[i])) for i in chosen], 1, LONGEST)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--prompts', type=int, default=256)
  parser.add_argument('--slots', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--responses')
  parser.add_argument('--tokenizer')
  args = parser.parse_args()
  torch.set_num_threads(THREADS)
  mesh = sharding.make_mesh(MeshConfig())
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(LanguageModel(MODEL, rngs=nnx.Rngs(0)), nnx.Param)))()
  theirs = torch_model(jax.device_get(params))
  rng = np.random.default_rng(1)
  prompts = [rng.integers(1, MODEL.vocab_size, int(n)).tolist() for n in rng.integers(24, LONGEST_PROMPT, args.prompts)]
  config = RolloutConfig(max_prompt=LONGEST_PROMPT, max_new=LONGEST, max_concurrent=args.slots)
  engine = RolloutEngine(MODEL, mesh, config, ())
  cases = {'real lengths': drawn_lengths(args.prompts, args.responses, args.tokenizer), 'fixed length': np.full(args.slots, 128)}
  rows, results = [], dict[str, Any]()
  for case, limits in cases.items():
    most, asked = [int(n) for n in limits], prompts[: len(limits)]

    def ours(asked=asked, most=most) -> None:
      found = engine.generate(params, asked, (0,), most)
      assert found.length_R.tolist() == most

    steps: dict[str, Callable[[], None]] = {
      'ours': ours,
      'static': lambda asked=asked, most=most: static(theirs, asked, most, args.slots),
    }
    seconds = timing.alternate(steps, args.rounds)
    try:
      began = time.perf_counter()
      continuous(theirs, asked, most)
      seconds['continuous'] = [time.perf_counter() - began]
    except Exception as error:  # it targets GPUs, and its requirements change between versions
      print(f'continuous batching does not run on this machine: {type(error).__name__}: {str(error)[:200]}', flush=True)
    for name, values in seconds.items():
      speed = sum(most) / statistics.median(values)
      times = timing.ratio(values, seconds['ours'][: len(values)])
      rows.append((case, name, f'{sum(most):,}', f'{max(most)}', f'{speed:,.0f}', f'{times:.2f}'))
      results |= {f'{case} {name} tokens_per_second': speed, f'{case} {name} times_ours': times}
  print(timing.table(('responses', 'engine', 'tokens', 'longest', 'tokens/s', 'time relative to ours'), rows))
  timing.report(**{name.replace(' ', '_'): value for name, value in results.items()})


if __name__ == '__main__':
  main()
