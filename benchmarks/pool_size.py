"""What pre-training gains from more policies, more examples and more layers, on answers of real models (world `files`).

    python benchmarks/pool_size.py --files=DIR/triplets/alpacaeval.jsonl.gz --output=runs/pool_size
    python benchmarks/pool_size.py --files=DIR/triplets/alpacaeval.jsonl.gz --output=runs/pool_size --layers 16 12 --steps 48 24

Pre-trains once as `configs/real.py` does, with the last of `--policies` and the first of `--layers` and `--steps`, and once more for each
other value, the rest being equal. Policies are `synthesize.train_policies`; the smaller sets are parts of the larger ones, and those with
several answers to a prompt come first. Prompts and policies that are held out are the same in all runs, and so are the rows that they are
scored on; a run on fewer policies has seen only a part of those in rows without a held-out one.
Intervals resample prompts; differences from the first run are paired. One seed each: the noise of training is not in the intervals. A run
that has ended is not repeated. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timing
from runs import run_config

ALL = 'all'


class Run(NamedTuple):
  """A run of pre-training.

  Attributes:
    policies: that training examples are drawn from; 'all' that are not held out.
    layers: of the model, of which the lower half stays as it is.
    steps: of training.
  """

  policies: str
  layers: int
  steps: int

  @property
  def name(self) -> str:
    """Name of its folder."""
    return f'policies_{self.policies}_layers_{self.layers}_steps_{self.steps}'


def runs_of(policies: Sequence[str], layers: Sequence[int], steps: Sequence[int]) -> list[Run]:
  """Return the base run, and those that differ from it in one value."""
  base = Run(policies[-1], layers[0], steps[0])
  out = [base, *(base._replace(policies=value) for value in reversed(policies[:-1]))]
  return [*out, *(base._replace(layers=value) for value in layers[1:]), *(base._replace(steps=value) for value in steps[1:])]


def train(run: Run, folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
  """Pre-train in a folder, and return the summary of the run."""
  synthesize = {
    'files': options.files,
    'negatives': options.negatives,
    'evaluation_examples': options.rows,
    **({} if run.policies == ALL else {'train_policies': run.policies}),
  }
  pretrain = {'start_layers': run.layers, 'steps': run.steps, 'batch_size': options.batch, 'evaluate_examples': 16}
  if options.start:
    pretrain['start_from'] = options.start
  settings = {f'synthesize.{name}': value for name, value in synthesize.items()} | {
    f'pretrain.{name}': value for name, value in pretrain.items()
  }
  run_config('real.py', folder, settings | {'stage': 'synthesize,pretrain', 'seed': options.seed, 'model.frozen_layers': run.layers // 2})
  return json.loads((folder / 'pretrain' / 'summary.json').read_text())


def evaluate(runs: Sequence[Run], output: pathlib.Path) -> dict[str, Any]:
  """Score the held-out rows with all runs, and return what evaluation.json says of each set."""
  first, *others = (output / run.name for run in runs)
  sets = sorted(str(path) for path in (first / 'data' / 'held_out').glob('*.jsonl.gz'))
  options = {'checkpoint': first / 'pretrain', 'input': ','.join(sets), 'output': output / 'evaluation'}
  if others:
    options['evaluate.compare'] = ','.join(str(other / 'pretrain') for other in others)
  run_config('evaluate.py', output / 'evaluate', options)
  return json.loads((output / 'evaluation' / 'evaluation.json').read_text())['sets']


def row_of(run: Run, first: Run, summary: Mapping[str, Any], sets: Mapping[str, Any], batch: int) -> dict[str, Any]:
  """Return what the table shows of a run: its sizes, and by set accuracy with interval and the difference of the first run from it."""
  out: dict[str, Any] = {**run._asdict(), 'examples': run.steps * batch, 'tokens': summary['tokens'], 'sets': {}}
  for name, found in sets.items():
    if run == first:
      out['sets'][name] = {key: found[key] for key in ('accuracy', 'low', 'high')} | {'first_minus': None}
    else:
      compared = found['compare'][f'{run.name}/pretrain' if f'{run.name}/pretrain' in found['compare'] else 'pretrain']
      other = compared['other']
      out['sets'][name] = {'accuracy': other['accuracy'], 'low': other['low'], 'high': other['high']}
      out['sets'][name]['first_minus'] = {key: compared[key] for key in ('difference', 'low', 'high')}
  return out


def main(given: Sequence[str] | None = None) -> None:
  """Train, evaluate, and print accuracy by policies, layers and examples."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--files', required=True, help='files of triplets, separated by commas')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--policies', nargs='+', default=['4', '8', '16', ALL], help='the largest last')
  parser.add_argument('--layers', type=int, nargs='+', default=[16])
  parser.add_argument('--steps', type=int, nargs='+', default=[48])
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--negatives', type=int, default=3, help='the fewest policies less one, so that all lists are as long')
  parser.add_argument('--rows', type=int, default=96, help='held-out rows of each set')
  parser.add_argument('--start', help='checkpoint from which runs start, if not that of the config')
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args(given)
  output = options.output.resolve()
  runs = runs_of(options.policies, options.layers, options.steps)
  summaries = [train(run, output / run.name, options) for run in runs]
  sets = evaluate(runs, output)
  rows = [row_of(run, runs[0], summary, sets, options.batch) for run, summary in zip(runs, summaries, strict=True)]
  shown = lambda found: f'{found["accuracy"]:.3f} [{found["low"]:.3f}, {found["high"]:.3f}]'
  minus = lambda found: f'{100 * found["difference"]:+.1f} [{100 * found["low"]:+.1f}, {100 * found["high"]:+.1f}]' if found else ''
  cells = [
    [row['policies'], str(row['layers']), f'{row["examples"]:,}', f'{row["tokens"]:,}']
    + [text for name in sets for text in (shown(row['sets'][name]), minus(row['sets'][name]['first_minus']))]
    for row in rows
  ]
  print(timing.table(['policies', 'layers', 'examples', 'tokens', *(head for name in sets for head in (name, 'first minus this'))], cells))
  print(json.dumps({'seed': options.seed, 'negatives': options.negatives, 'runs': rows}))


if __name__ == '__main__':
  main()
