"""Triplets against ranked lists with several rejected candidates, in the miniature: accuracy at equal tokens, and seconds.

    python -m polar_jax.main --config=configs/tiny.py --config.stage=synthesize,pretrain_lm --workdir=runs/tiny
    python benchmarks/negatives.py --base=runs/tiny --output=runs/negatives

A list has one reference, one chosen candidate by its policy and `--negatives` rejected ones, each by a further policy; prompt and
reference are computed once. All runs start from the language model of `--base` and take as many steps, with as many examples each as have
the tokens of 32 triplets. Accuracy is that on triplets of the split `validation`, which are the same for all. Means over seeds, lowest and
highest in brackets. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np
import timing
from runs import run_config

_CONFIG = 'tiny.py'
_BATCH = 32  # triplets of a step


def synthesize(folder: pathlib.Path, negatives: int, examples: int) -> None:
  """Make the triplets or lists, unless they are there. Policies, tokenizer, prompts and validation are those of the base."""
  if not (folder / 'data' / 'triplets').exists():
    names = {
      'negatives': negatives,
      'train_examples': examples,
      'documents': 0,
      'preference_examples': 8,
      'preference_evaluation_examples': 8,
    }
    run_config(_CONFIG, folder, {'stage': 'synthesize'} | {f'synthesize.{name}': value for name, value in names.items()})


def tokens_of(base: pathlib.Path, negatives: int) -> float:
  """Return the mean number of tokens of an example, from the mean lengths of prompts and trajectories."""
  import polar_jax

  triplets = polar_jax.read_examples(base / 'data' / 'triplets' / 'triplets', 'validation')
  some = [triplets[i].metadata for i in range(500)]
  prompt, trajectory = (float(np.mean([len(ids[name]) for ids in some])) for name in ('prompt_ids', 'reference_ids'))
  return 2 * prompt + (negatives + 2) * trajectory


def train(folder: pathlib.Path, base: pathlib.Path, negatives: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
  """Pre-train in the workdir, and return accuracy, tokens and seconds."""
  per_triplet, per_list = tokens_of(base, 1), tokens_of(base, negatives)
  work = folder / f'seed_{seed}'
  work.mkdir(parents=True, exist_ok=True)
  if not (work / 'data').exists():
    (work / 'data').symlink_to((folder / 'data').resolve())
  settings = {
    'start_from': (base / 'pretrain_lm').resolve(),
    'steps': round(options.tokens / (_BATCH * per_triplet)),
    'batch_size': round(_BATCH * per_triplet / per_list),
    'evaluate_every': 10**6,  # only at the end
    'evaluate_examples': 2_000,
    'loss.name': options.loss,
  }
  row_length = {} if negatives == 1 else {'data.row_length': 1_280}
  options_of_run = {f'pretrain.{name}': value for name, value in settings.items()} | row_length
  run_config(_CONFIG, work, {'stage': 'pretrain', 'seed': seed} | options_of_run)
  summary = json.loads((work / 'pretrain' / 'summary.json').read_text())
  return {
    'accuracy': summary['validation_accuracy'],
    'loss': summary['validation_loss'],
    'tokens': summary['tokens'],
    'seconds': summary['seconds_by_part']['step'],
    'examples': summary['steps'] * settings['batch_size'],
  }


def main() -> None:
  """Make the data, train, and print accuracy by number of negatives."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--base', type=pathlib.Path, required=True, help='workdir of the tiny config with its data and language model')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--negatives', type=int, nargs='+', default=[1, 3, 7])
  parser.add_argument('--tokens', type=float, default=2e6)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--loss', default='bradley_terry', choices=['bradley_terry', 'plackett_luce'])
  options = parser.parse_args()
  found: dict[int, list[dict[str, float]]] = {}
  for negatives in options.negatives:
    folder = options.output / f'negatives_{negatives}'
    synthesize(folder, negatives, round(options.tokens / tokens_of(options.base, negatives) * 1.05))
    found[negatives] = [train(folder, options.base, negatives, seed, options) for seed in range(options.seeds)]
  spread = lambda values, digits: f'{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]'
  rows = [
    [
      str(negatives),
      f'{np.mean([run["examples"] for run in runs]):,.0f}',
      f'{np.mean([run["tokens"] for run in runs]) / 1e6:.2f}M',
      spread([run['accuracy'] for run in runs], 3),
      spread([run['loss'] for run in runs], 3),
      spread([run['seconds'] for run in runs], 0),
    ]
    for negatives, runs in found.items()
  ]
  print(timing.table(['negatives', 'examples', 'tokens', 'validation accuracy', 'loss', 'seconds'], rows))
  print(json.dumps({'loss': options.loss, 'runs': found}))


if __name__ == '__main__':
  main()
