"""The inputs of a run of reinforcement fine-tuning, and the state that it saves."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, ConfigError, ModelConfig, ProfileConfig, RftConfig
from polar_jax.data import packing
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo.learner import ModelFunctions, build_actor, build_critic
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.train.step import TrainState


class PpoState(NamedTuple):
  """The arrays of a checkpoint. The actor's have the names of any training run, so that a tuned policy opens like any other model."""

  params: Any
  opt_state: Any
  step: Any
  critic: Any  # the critic's TrainState as a dict; empty without a critic

  @classmethod
  def join(cls, actor: TrainState, critic: TrainState | None) -> PpoState:
    """Combine the states of both."""
    return cls(*actor, critic=critic._asdict() if critic is not None else {})

  def split(self) -> tuple[TrainState, TrainState | None]:
    """Return (actor, critic)."""
    return TrainState(self.params, self.opt_state, self.step), TrainState(**self.critic) if self.critic else None


@dataclasses.dataclass(frozen=True)
class Run:
  """One run: policy, prompts, reward, settings and folders."""

  name: str
  folder: pathlib.Path  # logs
  home: pathlib.Path  # checkpoints: the same folder, or one in a bucket
  config: RftConfig
  model: ModelConfig  # of the policy, the critic and the reference policy
  checkpointing: CheckpointingConfig
  profile: ProfileConfig
  mesh: Mesh
  seed: int
  prompts: PolicyPrompts
  held_out: PolicyPrompts | None  # evaluated before and after
  tokenizer: Tokenizer  # the policy's; the reward has its own
  stop_ids: tuple[int, ...]
  reward: RewardSum
  initial_params: Callable[[], dict[str, Any]]  # loads those that the policy starts from, float32, on the mesh; unused with a base
  fingerprint: dict[str, Any]  # settings that must not change between the runs of one workdir
  log: Callable[[str], None]
  base: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # parameters under the adapters; empty without
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further entries of the summary, known before the first step

  @property
  def steps(self) -> int:
    """Number of steps of the whole run."""
    return self.config.steps or max(self.config.epochs * len(self.prompts) // self.config.prompts_per_step, 1)

  @property
  def updates(self) -> int:
    """Number of optimizer steps of the whole run, which the schedules of the learning rates span."""
    responses = self.config.prompts_per_step * self.config.num_generations
    return self.steps * self.config.update_epochs * math.ceil(responses / (self.config.mini_batch_size or responses))

  def actor(self) -> ModelFunctions:
    """Return the policy's jitted functions."""
    return build_actor(self.model, self.config, self.updates, self.mesh, self.stop_ids)

  def critic(self) -> ModelFunctions | None:
    """Return the critic's jitted functions; None for methods without one."""
    return build_critic(self.model, self.config, self.updates, self.mesh) if self.has_critic else None

  @property
  def has_critic(self) -> bool:
    """Whether the method learns values."""
    return self.config.method == 'ppo' and self.config.advantage == 'gae'

  @property
  def needs_reference(self) -> bool:
    """Whether the reference policy is kept."""
    return self.config.track_kl or (self.config.method == 'ppo' and self.config.kl_in != 'none')

  @property
  def row_length(self) -> int:
    """Number of tokens of a training row."""
    shortest = self.config.rollout.max_prompt + self.config.rollout.max_new
    return self.config.row_length or sharding.round_up(shortest, packing.LENGTH_MULTIPLE)

  def check(self) -> None:
    """Check, before the first step, what would stop a later one.

    Raises:
      ConfigError: a training row does not hold every prompt with a response.
      UserError: a reward cannot score a prompt, whatever the response.
    """
    needed = self.prompts.longest + self.config.rollout.max_new - 1  # the last token of a response is only ever a target
    if self.row_length < needed:
      raise ConfigError(
        f'rft.row_length is {self.row_length}, but the longest prompt with a response of rft.rollout.max_new={self.config.rollout.max_new} '
        f'tokens takes {needed}: set rft.row_length to {needed} or more, leave it unset, or lower rft.rollout.max_prompt or max_new'
      )
    if self.config.method != 'sft':  # which imitates references whatever their reward
      self.reward.check([self.prompts[i][0] for i in range(len(self.prompts))])
    if self.held_out is not None:
      self.reward.check([self.held_out[i][0] for i in range(min(len(self.held_out), self.config.evaluate_prompts))], 'held-out prompt')
