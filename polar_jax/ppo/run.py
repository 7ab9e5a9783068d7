"""What a run of reinforcement fine-tuning is given, and what it saves."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from polar_jax.config import CheckpointingConfig, ModelConfig, ProfileConfig, RftConfig
from polar_jax.data import packing
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo.learner import Learner, build_actor, build_critic
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.train.step import TrainState


class PpoState(NamedTuple):
  """A checkpoint's arrays. The actor's lie where those of any training run do, so that a policy that was tuned is read like any other."""

  params: Any
  opt_state: Any
  step: Any
  critic: Any  # the critic's TrainState as a dict; empty without a critic

  @classmethod
  def join(cls, actor: TrainState, critic: TrainState | None) -> PpoState:
    """From the states of both."""
    return cls(*actor, critic=critic._asdict() if critic is not None else {})

  def part(self) -> tuple[TrainState, TrainState | None]:
    """(actor, critic)."""
    return TrainState(self.params, self.opt_state, self.step), TrainState(**self.critic) if self.critic else None


@dataclasses.dataclass(frozen=True)
class Run:
  """One run: which policy, on which prompts, for which reward, where to."""

  name: str
  folder: pathlib.Path  # of what it logs
  home: pathlib.Path  # of its checkpoints: the same folder, or one in a bucket
  config: RftConfig
  model: ModelConfig  # of the policy, the critic and the frozen start
  checkpointing: CheckpointingConfig
  profile: ProfileConfig
  mesh: Mesh
  seed: int
  prompts: PolicyPrompts
  held_out: PolicyPrompts | None  # measured before and after
  tokenizer: Tokenizer  # the policy's; the reward has its own
  stop_ids: tuple[int, ...]
  reward: RewardSum
  start: Callable[[], dict[str, Any]]  # reads the parameters that the policy starts from, float32, on the mesh
  fingerprint: dict[str, Any]  # settings that must not change between the runs of one workdir
  log: Callable[[str], None]

  @property
  def steps(self) -> int:
    """Of the whole run."""
    return self.config.steps or max(self.config.epochs * len(self.prompts) // self.config.prompts_per_step, 1)

  @property
  def updates(self) -> int:
    """Steps of the optimizers, which their learning rates' schedules are over."""
    answers = self.config.prompts_per_step * self.config.num_generations
    return self.steps * self.config.update_epochs * math.ceil(answers / (self.config.mini_batch_size or answers))

  def actor(self) -> Learner:
    """The policy's jitted functions."""
    return build_actor(self.model, self.config, self.updates, self.mesh)

  def critic(self) -> Learner | None:
    """The critic's; None for methods without one."""
    return build_critic(self.model, self.config, self.updates, self.mesh) if self.has_critic else None

  @property
  def has_critic(self) -> bool:
    """Whether values are learned."""
    return self.config.method == 'ppo' and self.config.advantage == 'gae'

  @property
  def needs_reference(self) -> bool:
    """Whether the frozen start is kept."""
    return self.config.track_kl or (self.config.method == 'ppo' and self.config.kl_in != 'none')

  @property
  def row_length(self) -> int:
    """Tokens of a training row."""
    least = self.config.rollout.max_prompt + self.config.rollout.max_new
    return self.config.row_length or -(-least // packing.LENGTH_MULTIPLE) * packing.LENGTH_MULTIPLE
