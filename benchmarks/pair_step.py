"""A training step on triplets with shared prefixes, without them, in torch and in TRL, with the same triplets and weights.

    pip install -e '.[bench]' && python benchmarks/pair_step.py

Prompt, reference and candidates of 256 tokens, a model of 26M parameters, float32, two threads. All variants take turns in one process.
The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

THREADS = 2
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('OMP_NUM_THREADS', str(THREADS))
if hasattr(os, 'sched_setaffinity'):  # the only way to limit the number of XLA threads
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

from polar_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
import torch_peers
from flax import nnx
from shapes import LLAMA_26M

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig
from polar_jax.data.layout import group_batch, group_segments, pair_batch, pair_segment
from polar_jax.model.heads import abstract_model
from polar_jax.model.reward_model import RewardModel, group_rewards
from polar_jax.train import losses, step
from polar_jax.train.objectives import RANKING, Objective
from polar_jax.types import GroupBatch, PairBatch

PIECE = 256  # tokens of a prompt, a reference and a candidate; a sequence is prompt, reference, prompt, candidate
MODEL = ModelConfig(**LLAMA_26M, v_head_init='normal', scan_unroll=8)
CANDIDATES = 8


def draw(pairs: int, candidates: int) -> np.ndarray:
  """Return token ids (pairs, candidates, 4 * PIECE). Candidates differ from their first token on, the worst case for sharing."""
  rng = np.random.default_rng(0)
  prefix = rng.integers(100, 8_000, (pairs, 1, 3 * PIECE))
  tails = rng.integers(100, 8_000, (pairs, candidates, PIECE))
  tails[..., 0], tails[..., -1] = 10 + np.arange(candidates), 9
  return np.concatenate([np.broadcast_to(prefix, (pairs, candidates, 3 * PIECE)), tails], axis=2).astype(np.int32)


def shared_rows(ids: np.ndarray) -> PairBatch:
  """Return one row per pair, with a shared prefix."""
  rows = [pair_segment(*pair) for pair in ids]
  return pair_batch(rows, range(len(rows)), [[i] for i in range(len(rows))], max(len(r.tokens) for r in rows), 1)


def plain_rows(ids: np.ndarray) -> GroupBatch:
  """Return one causal row per sequence."""
  rows = ids.reshape(-1, ids.shape[-1])
  position = np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape)
  zeros, last = np.zeros_like(rows), np.full((len(rows), 1), rows.shape[1] - 1, np.int32)
  return GroupBatch(rows, position, zeros, position + 1, zeros, zeros, last, np.arange(len(rows), dtype=np.int32)[:, None])


def plain_rewards(model: RewardModel, batch: GroupBatch) -> jax.Array:
  """Return the rewards of plain rows, whose queries have a single interval."""
  return model(batch.tokens_BT, batch.positions_BT, batch.intervals[:1], batch.reward_index_BQ).reshape(-1)


def two_row_loss(model: RewardModel, batch: GroupBatch) -> Any:
  """Return the ranking loss of pairs whose candidates are in rows of their own, as an objective returns it."""
  rewards_BPC = plain_rewards(model, batch).reshape(-1, 1, 2)
  loss, sums = losses.pair_sums(rewards_BPC, jnp.ones(rewards_BPC.shape[:2]))
  return loss, sums, {'rewards_BPC': rewards_BPC}


TWO_ROWS = Objective('reward', two_row_loss, lambda batch: jnp.float32(batch.tokens_BT.shape[0] / 2))


class Ours:
  """Our training step on a batch."""

  def __init__(self, objective: Objective, batch: Any, mesh: Any):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    functions = step.build(objective, MODEL, tx, mesh)
    self._state, self._batch, self._train = functions.init(jax.random.key(0), None), sharding.put_local(batch, mesh), functions.train
    self.params = jax.tree.map(np.asarray, self._state.params)
    self.losses: list[float] = []

  def step(self) -> None:
    self._state, out = self._train(self._state, self._batch)
    self.losses.append(float(out['scalars']['loss']))


def group_scoring(rounds: int, params: dict[str, Any], torch_model: Any) -> dict[str, list[float]]:
  """Return the seconds to score CANDIDATES candidates of one prompt and reference as one group, as rows, and as rows in torch."""
  ids = draw(1, CANDIDATES)
  (part,) = group_segments(list(ids[0]), ids.size, CANDIDATES)
  group = group_batch([part], [[0]], len(part.tokens), CANDIDATES)
  graphdef, _ = nnx.split(abstract_model(MODEL, 'reward'))
  score = jax.jit(lambda params, batch: group_rewards(nnx.merge(graphdef, params), batch)[0])
  rows = jax.jit(lambda params, batch: plain_rewards(nnx.merge(graphdef, params), batch))
  params, group, plain = jax.device_put((params, group, plain_rows(ids)))
  difference = float(jnp.max(jnp.abs(score(params, group) - rows(params, plain))))
  print(f'{CANDIDATES} candidates as one group of {len(part.tokens):,} tokens and as {CANDIDATES} rows: rewards differ by {difference:.1e}')
  assert difference < 1e-4
  calls = {
    'group': lambda: _wait(score(params, group)),
    'rows': lambda: _wait(rows(params, plain)),
    'torch rows': torch_peers.scorer(torch_model, ids[0]),
  }
  return timing.alternate(calls, rounds)


def _wait(result: Any) -> None:
  jax.block_until_ready(result)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--pairs', type=int, default=2, help='triplets per step')
  parser.add_argument('--rounds', type=int, default=7)
  args = parser.parse_args()
  torch_peers.torch.set_num_threads(THREADS)
  ids = draw(args.pairs, 2)
  one, two = shared_rows(ids), plain_rows(ids)
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    ours, ours_two = Ours(RANKING, one, mesh), Ours(TWO_ROWS, two, mesh)
    plain = torch_peers.PlainLoop(torch_peers.make_model(MODEL, ours.params), ids[:, 0], ids[:, 1])
    trl = torch_peers.Trl(torch_peers.make_model(MODEL, ours.params), ids[:, 0], ids[:, 1], folder)
    torch_losses: list[float] = []
    steps = {
      'one row': ours.step,
      'two rows': ours_two.step,
      'torch': lambda: torch_losses.append(plain.step()),
      'TRL': trl.step,
    }
    # Several warm-up rounds, until the process has all the memory that the steps need: a page fault costs more than the work on the page.
    seconds = timing.alternate(steps, args.rounds, warm_up=3)
    scoring = group_scoring(args.rounds, ours.params, torch_peers.make_model(MODEL, ours.params))
  parameters = sum(p.size for p in jax.tree.leaves(ours.params))
  print(f'{parameters / 1e6:.1f}M parameters, {args.pairs} triplets per step, {THREADS} threads, float32')
  print(f'first loss: one row {ours.losses[0]:.6f}, two rows {ours_two.losses[0]:.6f}, torch {torch_losses[0]:.6f}')
  assert max(abs(ours.losses[0] - other) for other in (ours_two.losses[0], torch_losses[0])) < 1e-4
  tokens = {'one row': one.tokens_BT.size} | dict.fromkeys(('two rows', 'torch', 'TRL'), two.tokens_BT.size)
  rows = [(name, f'{tokens[name]:,}', timing.milliseconds(v), f'{timing.ratio(v, seconds["one row"]):.2f}') for name, v in seconds.items()]
  rows += [(f'score {CANDIDATES}: {name}', '', timing.milliseconds(v), '') for name, v in scoring.items()]
  print(timing.table(('step', 'tokens', 'ms: median [range]', 'relative to one row'), rows))
  timing.report(
    speedup_vs_two_rows=timing.ratio(seconds['two rows'], seconds['one row']),
    ratio_vs_torch=timing.ratio(seconds['torch'], seconds['one row']),
    ratio_vs_trl=timing.ratio(seconds['TRL'], seconds['one row']),
    row_ratio_vs_torch=timing.ratio(seconds['torch'], seconds['two rows']),
    group_speedup_k8=timing.ratio(scoring['rows'], scoring['group']),
    group_speedup_k8_vs_torch=timing.ratio(scoring['torch rows'], scoring['group']),
    tokens_saved=1 - one.tokens_BT.size / two.tokens_BT.size,
    one_row_seconds=statistics.median(seconds['one row']),
    parameters=parameters,
    rounds=args.rounds,
  )


if __name__ == '__main__':
  main()
