"""Where the time of a PPO step goes: rollout, reward, log-probabilities and values, updates; and whether anything is compiled again.

  python benchmarks/ppo_step.py

Random weights: a policy of about 3.5M parameters on bytes, a critic and a reward model of the same shape; 32 prompts, 4 answers to
each of up to 64 tokens. Once with a critic (GAE), once with groups of answers in its place (GRPO). A few minutes on two CPU cores.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from polar_jax.malloc import keep_freed_memory

keep_freed_memory()

import jax
import jax.monitoring
import numpy as np
from flax import nnx

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig, RewardConfig, RftConfig, RolloutConfig, TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.ppo import loop
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.reward import Mixture, ModelReward
from polar_jax.ppo.run import Run
from polar_jax.scoring.scorer import Scorer
from polar_jax.train.metrics import read_metrics
from polar_jax.types import Prompt

STEPS = 7  # the first compiles
PHASES = ('rollout', 'reward', 'logprobs', 'update')
MODEL = ModelConfig(
  vocab_size=261, num_layers=4, d_model=256, d_ff=768, num_heads=4, num_kv_heads=2, head_dim=64, v_head_init='normal', scan_unroll=4
)


def make_run(folder: pathlib.Path, mesh: jax.sharding.Mesh, advantage: str) -> Run:
  """A run on prompts of random letters."""
  tokenizer, rng = ByteTokenizer(), np.random.default_rng(0)
  text = lambda low, high: bytes(rng.integers(97, 123, int(rng.integers(low, high))).tolist()).decode()
  prompts = [Prompt(text(20, 100), text(20, 60)) for _ in range(256)]
  config = RftConfig(
    steps=STEPS,
    prompts=32,
    samples=4,
    advantage=advantage,
    rows=4,
    row_length=512,
    rollout=RolloutConfig(max_prompt=128, max_new=64, slots=64),
    reward=RewardConfig(),
  )
  params = lambda kind: jax.jit(lambda: nnx.to_pure_dict(nnx.state(kind(MODEL, rngs=nnx.Rngs(0)), nnx.Param)))()
  scorer = Scorer(params(RewardModel), MODEL, Template(TemplateConfig(), tokenizer), mesh, row_length=768, rows=8)
  return Run(
    name=advantage,
    folder=folder / advantage,
    config=config,
    model=MODEL,
    checkpointing=CheckpointingConfig(every_steps=1_000, keep_best=0),
    mesh=mesh,
    seed=0,
    prompts=PolicyPrompts(prompts, tokenizer, None, 128),
    held_out=None,
    tokenizer=tokenizer,
    stop_ids=(tokenizer.eos_id,),
    reward=Mixture({'model': (1.0, ModelReward(scorer, config.reward))}, strip_thinking=True),
    start=lambda: params(LanguageModel),
    fingerprint={'objective': 'next_token'},
    log=lambda message: None,
  )


def measure(advantage: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
  """Medians over the steps after the first, and how much was compiled during them."""
  compiled: list[float] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(seconds) if event.endswith('backend_compile_duration') else None
  )
  with tempfile.TemporaryDirectory() as folder:
    run = make_run(pathlib.Path(folder), mesh, advantage)
    with jax.set_mesh(mesh):
      trainer = loop.Trainer(run)
      rows = []
      for step in range(STEPS):
        if step == 1:
          compiled.clear()
        rows.append(trainer.one_step()[0])
        trainer.step += 1
      again = len(compiled)
      trainer.close()
    assert not read_metrics(run.folder)  # nothing but steps was timed
  found = {phase: statistics.median(row[f'seconds_{phase}'] for row in rows[1:]) for phase in PHASES}
  total = statistics.median(row['step_seconds'] for row in rows[1:])
  tokens = statistics.median(row['tokens_per_second'] for row in rows[1:])
  return {**found, 'step': total, 'tokens_per_second': tokens, 'compilations_after_the_first_step': again}


def main() -> None:
  mesh = sharding.make_mesh(MeshConfig())
  results = {advantage: measure(advantage, mesh) for advantage in ('gae', 'grpo')}
  print('| | ' + ' | '.join(PHASES) + ' | step, s | answer tokens/s | compiled again |')
  print('|---' * (len(PHASES) + 4) + '|')
  for name, r in results.items():
    shares = ' | '.join(f'{100 * r[phase] / r["step"]:.0f}%' for phase in PHASES)
    print(f'| {name} | {shares} | {r["step"]:.2f} | {r["tokens_per_second"]:,.0f} | {r["compilations_after_the_first_step"]} |')
  print(json.dumps({'steps': STEPS - 1, 'results': results}))


if __name__ == '__main__':
  main()
