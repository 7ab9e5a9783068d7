"""Exact scoring against packed scoring of the same sequences, which share no prefix, and packed scoring of groups that do.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --rows=pool/gsm8k.jsonl.gz --tokenizer=tokenizer.json

A reward model with random weights scores sequences of prompt, reference, prompt and candidate. Their lengths resemble those of a chat
model's responses (log-normal, a long tail), or are those of rows with `prompt` and `response`: one response is the reference, the
`--group` next ones of the same prompt are the candidates. The alternatives take turns. Tokens are those of whole sequences, padding not
counted, also where a shared prefix is computed once. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import pathlib
import statistics
import types
from collections.abc import Callable, Sequence

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import numpy as np
import timing
from flax import nnx
from shapes import LLAMA_26M

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, TokenizerConfig
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.model.presets import PRESETS
from polar_jax.model.reward_model import RewardModel
from polar_jax.scoring.exact import ExactScorer
from polar_jax.scoring.scorer import Scorer, ladder_length
from polar_jax.types import Group

_LONGEST = 512  # tokens of a text

Lengths = tuple[int, int, list[int]]  # of a prompt, its reference and its candidates


def drawn(groups: int, size: int) -> list[Lengths]:
  """Return lengths like those of a chat model's texts."""
  rng = np.random.default_rng(0)
  draw = lambda n: np.clip(rng.lognormal(4.9, 0.6, n), 16, _LONGEST).astype(int).tolist()
  return [(prompt, reference, draw(size)) for prompt, reference in zip(draw(groups), draw(groups), strict=True)]


def of_rows(file: str, tokenizer: str, groups: int, size: int) -> list[Lengths]:
  """Return the lengths of the texts of prompts that have enough responses."""
  read = load_tokenizer(TokenizerConfig(kind='file', path=tokenizer), pathlib.Path())
  count = lambda text: min(len(read.encode(text)), _LONGEST)
  by_prompt: dict[str, list[str]] = {}
  with gzip.open(file, 'rt', encoding='utf-8') as lines:
    for line in lines:
      row = json.loads(line)
      by_prompt.setdefault(row['prompt'], []).append(row['response'])
  enough = {prompt: texts for prompt, texts in by_prompt.items() if len(texts) > size}
  if len(enough) < groups:
    raise SystemExit(f'{file}: {len(enough)} prompts have {size + 1} responses; set --groups to at most as many, or a smaller --group')
  return [(count(p), count(t[0]), [count(x) for x in t[1 : size + 1]]) for p, t in list(enough.items())[:groups]]


def sequences_of(lengths: Sequence[Lengths], vocab_size: int) -> list[list[list[int]]]:
  """Return the random token ids of the candidates of each group, which share prompt, reference and prompt."""
  rng = np.random.default_rng(1)
  ids = lambda n: rng.integers(1, vocab_size, n).tolist()
  groups = []
  for prompt, reference, candidates in lengths:
    prefix = ids(2 * prompt + reference)
    groups.append([prefix + ids(n) for n in candidates])
  return groups


def _keep(into: dict[str, np.ndarray], name: str, score: Callable[[], np.ndarray]) -> None:
  into[name] = score()


def main() -> None:
  """Measure and print."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--preset', choices=PRESETS, help='shape of the model; default: one of 26M parameters')
  parser.add_argument('--rows', help='a .jsonl.gz of rows with prompt and response')
  parser.add_argument('--tokenizer', help='tokenizer.json, for --rows')
  parser.add_argument('--groups', type=int, default=3)
  parser.add_argument('--group', type=int, default=8, help='candidates of a group')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  if args.rows and not args.tokenizer:
    parser.error('--rows needs --tokenizer, which turns texts into tokens')
  lengths = of_rows(args.rows, args.tokenizer, args.groups, args.group) if args.rows else drawn(args.groups, args.group)
  config = ModelConfig(**{'vocab_size': 8_192, 'v_head_init': 'normal', **(PRESETS[args.preset] if args.preset else LLAMA_26M)})
  groups = sequences_of(lengths, config.known_vocab_size)
  sequences = [sequence for group in groups for sequence in group]
  mesh = sharding.make_mesh(MeshConfig())
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(RewardModel(config, rngs=nnx.Rngs(0)), nnx.Param)))()
  # Examples stand for token ids: candidates are named by their number.
  template = types.SimpleNamespace(encode_candidates=lambda prompt, reference, candidates, *_: [sequences[int(c)] for c in candidates])
  exact = ExactScorer(params, config, template, mesh)  # type: ignore[arg-type]
  packed = Scorer(params, config, template, mesh, ladder=True)  # type: ignore[arg-type]
  names = iter(range(len(sequences)))
  together = [Group('', '', tuple(str(next(names)) for _ in group)) for group in groups]
  alone = [Group('', '', (str(i),)) for i in range(len(sequences))]
  score = {
    'exact': lambda: exact.score_sequences(sequences),
    'packed, nothing shared': lambda: np.concatenate(packed.score(alone)),
    'packed groups': lambda: np.concatenate(packed.score(together)),
  }
  found: dict[str, np.ndarray] = {}
  seconds = timing.alternate({name: functools.partial(_keep, found, name, scored) for name, scored in score.items()}, args.rounds)
  difference = max(float(np.abs(rewards - found['exact']).max()) for rewards in found.values())
  tokens = sum(map(len, sequences))
  padding = 1 - tokens / sum(ladder_length(len(s)) for s in sequences)
  per_second = lambda count, s: f'{count / statistics.median(s):,.1f}'
  rows = [(n, timing.milliseconds(s), per_second(len(sequences), s), per_second(tokens, s)) for n, s in seconds.items()]
  mean = tokens / len(sequences)
  print(f'{len(sequences)} sequences of {mean:.0f} tokens; padding of exact rows {padding:.0%}; rewards differ by at most {difference:.1e}')
  print(timing.table(('scorer', 'ms: median [range]', 'sequences/s', 'tokens/s'), rows))
  share = timing.ratio(seconds['packed, nothing shared'], seconds['exact'])
  gain = timing.ratio(seconds['packed, nothing shared'], seconds['packed groups'])
  timing.report(
    exact_of_packed=share, groups_of_packed=gain, padding=padding, difference=f'{difference:.1e}', sequences=len(sequences), tokens=tokens
  )


if __name__ == '__main__':
  main()
