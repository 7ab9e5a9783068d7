"""Figures of answers: their text, what they earn, what they look like, and how a policy does on held-out prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.config import RftConfig
from polar_jax.data.template import join_messages
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo import diagnostics
from polar_jax.ppo.rewards import shaping
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import Run
from polar_jax.types import Prompt, Rollouts


class Scores(NamedTuple):
  """What answers earned.

  Attributes:
    raw_R: the mixture, as it came.
    shaped_R: what PPO optimises.
    shuffled_R: the mixture under the references of other prompts; None where it was not asked for, or there is one prompt only.
    metrics: means, for the log.
  """

  raw_R: np.ndarray
  shaped_R: np.ndarray
  shuffled_R: np.ndarray | None
  metrics: dict[str, float]


def texts(rollouts: Rollouts, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[str]:
  """What the reward reads of each answer: its tokens as text, without the one that ended it and without special tokens."""
  out = []
  for row, length in zip(rollouts.tokens_RT, rollouts.length_R, strict=True):
    ids = row[:length].tolist()
    out.append(tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids, skip_special=True))
  return out


def score(
  reward: RewardSum,
  config: RftConfig,
  normalizer: shaping.Normalizer,
  prompts: Sequence[Prompt],
  outputs: Sequence[str],
  rollouts: Rollouts,
  shuffle: tuple[int, ...] | None,
) -> Scores:
  """Rewards of a step's answers, and their control: the same answers under other prompts' references (seed `shuffle`; None: not now)."""
  components = reward.components(prompts, outputs)
  raw_R = reward.total(components)
  reference_R = None
  if config.reward.normalize == 'reference':
    own = [join_messages(p.reference, 'reference') for p in prompts]
    reference_R = reward.total(reward.components(prompts, own))
  shuffled_R = None
  if shuffle is not None:
    others = diagnostics.shuffled_references(prompts, shuffle)
    shuffled_R = None if others is None else reward.total(reward.components(others, outputs))
  group_R = np.repeat(np.arange(len(prompts) // config.num_generations), config.num_generations)
  shaped_R, metrics = shaping.shape(
    raw_R,
    normalizer=normalizer,
    group_R=group_R,
    reference_score_R=reference_R,
    length_R=rollouts.length_R,
    stopped_R=rollouts.stopped_R,
    max_new=config.rollout.max_new,
    config=config.reward,
  )
  metrics = {'reward': float(shaped_R.mean()), 'raw': float(raw_R.mean()), 'raw_std': float(raw_R.std()), **metrics}
  metrics |= {name: float(values.mean()) for name, values in components.items()}
  if shuffled_R is not None:
    metrics |= {'shuffled': float(shuffled_R.mean()), 'shuffled_gap': float(raw_R.mean() - shuffled_R.mean())}
  return Scores(raw_R, shaped_R, shuffled_R, metrics)


def answers(prompts: Sequence[Prompt], outputs: Sequence[str], rollouts: Rollouts) -> dict[str, float]:
  """What answers look like, whatever they earn."""
  references = [join_messages(p.reference, 'reference') for p in prompts]
  return {
    'length': float(rollouts.length_R.mean()),
    'truncated': float(1 - rollouts.stopped_R.mean()),
    'empty': float(np.mean([not text for text in outputs])),
    'overlap': float(diagnostics.overlap(outputs, references).mean()),
    'distinct_1': diagnostics.distinct(outputs, 1),
    'distinct_2': diagnostics.distinct(outputs, 2),
  }


def evaluate(run: Run, params: Any) -> dict[str, float]:
  """The likeliest answers to the first `rft.evaluate_prompts` held-out prompts: what they earn, and what they look like."""
  assert run.held_out is not None
  chosen = [run.held_out[i] for i in range(min(len(run.held_out), run.config.evaluate_prompts))]
  prompts = [prompt for prompt, _ in chosen]
  greedy = dataclasses.replace(run.config.rollout, temperature=0.0)
  rollouts = RolloutEngine(run.model, run.mesh, greedy, run.stop_ids).generate(params, [ids for _, ids in chosen], (0,))
  outputs = texts(rollouts, run.tokenizer, run.stop_ids)
  components = run.reward.components(prompts, outputs)
  means = {name: float(values.mean()) for name, values in components.items()}
  look = answers(prompts, outputs, rollouts)
  return {'raw': float(run.reward.total(components).mean()), **means, **{name: look[name] for name in ('length', 'truncated', 'overlap')}}
