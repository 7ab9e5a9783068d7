"""Cost of padding: the share of empty token positions, by batch size, devices and steps of a run.

    python benchmarks/packing.py
    python benchmarks/packing.py --triplets=mine.jsonl --tokenizer=tokenizer.model --reward_token_id=92527

Without triplets of your own, lengths are drawn to resemble those of chat models' responses (log-normal, mean near 1,200 tokens, a long
tail). The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import numpy as np
import timing

from polar_jax.config import TemplateConfig, TokenizerConfig
from polar_jax.data import packing, pipeline
from polar_jax.data.examples import open_triplets
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer

BATCHES, SHARDS, RUNS = (32, 128, 320, 1_280), (1, 8), (1_000, 10_000)
MEASURED_STEPS = 40


def real_lengths(file: str, tokenizer: str, reward_token_id: int | None) -> np.ndarray:
  """Return the length in tokens of the segment of every triplet in a file."""
  settings = TokenizerConfig(kind='file', path=tokenizer)
  template = Template(TemplateConfig(reward_token_id=reward_token_id), load_tokenizer(settings, pathlib.Path(tokenizer)))
  encoded = pipeline.TripletSegments(open_triplets(pathlib.Path(file), 'train', 'raise'), template)
  return np.array([len(encoded[i].tokens) for i in range(len(encoded))])


def drawn_lengths() -> np.ndarray:
  """Return lengths like those of triplets with responses of chat models."""
  return np.clip(np.random.default_rng(0).lognormal(6.85, 0.66, 4_000), 64, 8_600).astype(int)


def waste(lengths: np.ndarray, batch: int, shards: int, steps: int) -> tuple[int, float, int]:
  """Return (row length, pad fraction, compiled shapes) of a run with the row length that is chosen for it."""
  rng = np.random.default_rng(1)
  drawn = [rng.choice(lengths, batch) for _ in range(MEASURED_STEPS)]
  sampled = max(min(packing.SAMPLE_STEPS, packing.SAMPLE_TRIPLETS // batch), 1)
  plan = packing.choose_plan([list(d) for d in drawn[:sampled]], int(lengths.max()), shards, steps)
  rows = [plan.rows_for(len(packing.first_fit(d, plan.row_length, plan.max_pairs))) for d in drawn]
  return plan.row_length, 1 - sum(d.sum() for d in drawn) / (sum(rows) * plan.row_length), len(set(rows))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--triplets', help='file of triplets: .jsonl, .jsonl.gz or .parquet')
  parser.add_argument('--tokenizer', help='tokenizer.json or tokenizer.model, for --triplets')
  parser.add_argument('--reward_token_id', type=int)
  args = parser.parse_args()
  lengths = real_lengths(args.triplets, args.tokenizer, args.reward_token_id) if args.triplets else drawn_lengths()
  print(f'{len(lengths):,} triplets, {lengths.mean():,.0f} tokens on average, {lengths.max():,} at most; one per row of the longest')
  print(f'would leave {1 - lengths.mean() / lengths.max():.0%} of the positions empty')
  table, pad_fraction = [], {}
  for batch in BATCHES:
    for shards in SHARDS:
      for steps in RUNS:
        row_length, padding, shapes = waste(lengths, batch, shards, steps)
        table.append((f'{batch:,}', shards, f'{steps:,}', f'{row_length:,}', f'{padding:.1%}', shapes))
        pad_fraction[f'{batch} x {shards} x {steps}'] = round(float(padding), 4)
  print(timing.table(('triplets per step', 'devices', 'steps of the run', 'chosen row length', 'padding', 'compilations'), table))
  items = np.random.default_rng(2).choice(lengths, 4_096)
  started = time.perf_counter()
  packing.first_fit(items, int(lengths.max()), len(items))
  timing.report(pad_fraction=pad_fraction, pack_4096_seconds=time.perf_counter() - started, mean_tokens=float(lengths.mean()))


if __name__ == '__main__':
  main()
