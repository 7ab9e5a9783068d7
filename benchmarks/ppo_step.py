"""Time of a PPO step by phase, and compilations after the first step.

    python benchmarks/ppo_step.py

A byte-level policy of 3.3M parameters with random weights, a reward model of the same size, and a critic if advantages are computed by
GAE; 16 prompts per step with 4 responses of at most 64 tokens each, every response also scored under a shuffled reference. The two runs
take turns. Functions that are compiled after the first step are named. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from polar_jax.runtime.malloc import keep_freed_memory

keep_freed_memory()

import jax
import jax.monitoring
import numpy as np
import timing
from flax import nnx

from polar_jax import sharding
from polar_jax.config import (
  CheckpointingConfig,
  MeshConfig,
  ModelConfig,
  ProfileConfig,
  RewardConfig,
  RftConfig,
  RolloutConfig,
  TemplateConfig,
)
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rewards.sources import ModelReward, RewardSum
from polar_jax.ppo.run import Run
from polar_jax.ppo.trainer import Trainer
from polar_jax.scoring.scorer import Scorer
from polar_jax.train.session import Session
from polar_jax.types import Prompt

PHASES = ('rollout', 'reward', 'logprobs', 'update')
MODEL = ModelConfig(
  vocab_size=ByteTokenizer.vocab_size,
  num_layers=4,
  d_model=256,
  d_ff=768,
  num_heads=4,
  num_kv_heads=2,
  head_dim=64,
  v_head_init='normal',
  scan_unroll=4,
)
CONFIG = RftConfig(
  prompts_per_step=16,
  num_generations=4,
  micro_batch_rows=4,
  row_length=512,
  rollout=RolloutConfig(max_prompt=128, max_new=64, max_concurrent=32),
  reward=RewardConfig(rows_per_batch=8, row_length=768),
)
# A random policy stops after some 30 tokens, so that responses differ in length, as those of real policies do.
STOP_IDS = (ByteTokenizer.eos_id, *range(5))


class Letters(ByteTokenizer):
  """Decodes every token to a letter. Random bytes are not UTF-8, and replacement characters would triple the text length."""

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    return ''.join(chr(97 + i % 26) for i in ids)


class Steps:
  """The steps of one run, with the seconds of each phase and the functions that were compiled after the first step."""

  def __init__(self, advantage: str, scorer: Scorer, mesh: jax.sharding.Mesh, folder: pathlib.Path, steps: int):
    config = dataclasses.replace(CONFIG, advantage=advantage, steps=steps)
    tokenizer, rng = Letters(), np.random.default_rng(0)
    words = lambda low, high: tokenizer.decode(rng.integers(0, 26, int(rng.integers(low, high))).tolist())
    run = Run(
      name=advantage,
      folder=folder / advantage,
      config=config,
      model=MODEL,
      checkpointing=CheckpointingConfig(),
      profile=ProfileConfig(),
      mesh=mesh,
      seed=0,
      prompts=PolicyPrompts([Prompt(words(20, 100), words(20, 60)) for _ in range(256)], tokenizer, None, config.rollout.max_prompt),
      held_out=None,
      tokenizer=tokenizer,
      stop_ids=STOP_IDS,
      reward=RewardSum({'model': (1.0, ModelReward(scorer, config.reward))}, strip_thinking=True),
      initial_params=lambda: draw(LanguageModel, 0),
      fingerprint={},
      log=print,
    )
    self.trainer, self.rows, self.compiled = (
      Trainer(run, Session(run, 'evaluation_raw', best_is_lower=False)),
      list[dict[str, Any]](),
      list[str](),
    )
    self.recording = False
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def _on_event(self, event: str, seconds: float, **about: Any) -> None:
    if self.recording and event == '/jax/core/compile/backend_compile_duration':
      self.compiled.append(str(about.get('fun_name', '?')))

  def step(self) -> float:
    """Run one step and return its seconds."""
    self.recording = bool(self.rows)
    row, _ = self.trainer.one_step()
    self.recording = False
    self.trainer.session.advance()
    self.rows.append(row)
    return row['step_seconds']

  def median(self, key: str) -> float:
    """Return the median of a metric over the steps after the first."""
    return statistics.median(row[key] for row in self.rows[1:])


def draw(kind: type[nnx.Module], seed: int) -> Any:
  """Return random parameters of a model."""
  return jax.jit(lambda: nnx.to_pure_dict(nnx.state(kind(MODEL, rngs=nnx.Rngs(params=seed)), nnx.Param)))()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5, help='steps of each run after the first')
  args = parser.parse_args()
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    template, c = Template(TemplateConfig(), Letters()), CONFIG.reward
    scorer = Scorer(draw(RewardModel, 1), MODEL, template, mesh, row_length=c.row_length, rows=c.rows_per_batch)
    runs = {name: Steps(name, scorer, mesh, pathlib.Path(folder), args.rounds + 1) for name in ('gae', 'grpo')}
    seconds = timing.alternate({name: run.step for name, run in runs.items()}, args.rounds)
    for run in runs.values():
      run.trainer.session.close()
  parameters = sum(p.size for p in jax.tree.leaves(runs['gae'].trainer.actor_state.params))
  responses = CONFIG.prompts_per_step * CONFIG.num_generations
  devices = f'{len(mesh.devices.flat)} x {mesh.devices.flat[0].device_kind}'
  print(f'{parameters / 1e6:.1f}M parameters each, {responses} responses per step, {devices}')
  rows, by_run = [], {}
  for name, run in runs.items():
    share = {p: statistics.median(row[f'seconds_{p}'] / row['step_seconds'] for row in run.rows[1:]) for p in PHASES}
    speed, length = run.median('tokens_per_second'), run.median('length')
    again = len(run.compiled)
    shares = (f'{100 * s:.0f}%' for s in share.values())
    rows.append((name, timing.milliseconds(seconds[name]), *shares, f'{speed:,.0f}', f'{length:.1f}', again))
    by_run[name] = {f'share_{p}': round(s, 3) for p, s in share.items()}
    by_run[name] |= {'seconds': round(statistics.median(seconds[name]), 3), 'tokens_per_second': round(speed, 1), 'compiled_again': again}
  print(timing.table(('run', 'ms per step: median [range]', *PHASES, 'tokens/s', 'length', 'compiled again'), rows))
  for name, run in runs.items():
    if run.compiled:
      print(f'{name}: compiled after the first step: {", ".join(run.compiled)}')
  timing.report(**by_run, parameters=parameters, responses=responses, rounds=args.rounds)


if __name__ == '__main__':
  main()
