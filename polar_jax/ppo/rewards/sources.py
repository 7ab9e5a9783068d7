"""Where the rewards of PPO come from: a reward model in this process, a server of one (`reward_http`), a rule, or a weighted sum.

Rewards are float32 from end to end, one for each answer, in the order of the answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from polar_jax import sharding
from polar_jax.config import RewardConfig
from polar_jax.data.template import Template, join_messages
from polar_jax.ppo.rewards import rules
from polar_jax.scoring.scorer import Scorer
from polar_jax.types import Group, Prompt, Text, UserError

_THINKING = re.compile(r'<think>(.*?)</think>(.*)', re.DOTALL)
_SHOWN = 60  # characters of a text in a message


class RewardError(UserError):
  """An answer has no usable reward. The message is one line that names prompt and answer."""


class RewardSource(Protocol):
  def score(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> np.ndarray:
    """Rewards (n,), float32: of each output to the prompt at its place. Several outputs of one prompt repeat the prompt.

    Raises:
      UserError: a text cannot be scored, or there is no finite reward of it.
    """


class ModelReward:
  """A reward model in this process. Outputs of equal prompt and reference share the computation of their prefix.

  Equal outputs are scored once, so that their rewards are equal to the last bit. Apart from rounding no reward depends on the
  other outputs: where a prompt has to be cut, it is cut for each output as if that were the only one.
  """

  def __init__(self, scorer: Scorer, config: RewardConfig):
    self._scorer, self._wrapper = scorer, config.wrapper

  def score(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> np.ndarray:
    found: dict[tuple[str, str], dict[str, int]] = {}
    places = []
    for prompt, output in zip(prompts, outputs, strict=True):
      candidates = found.setdefault((join_messages(prompt.prompt, 'prompt'), join_messages(prompt.reference, 'reference')), {})
      places.append((candidates, candidates.setdefault(output, len(candidates))))
    groups = [Group(*texts, tuple(candidates), self._wrapper) for texts, candidates in found.items()]
    scored = self._scorer.score(groups, alone=True)
    rewards_of = {id(candidates): rewards for candidates, rewards in zip(found.values(), scored, strict=True)}
    rewards = np.array([rewards_of[id(candidates)][c] for candidates, c in places], np.float32)
    return check_rewards(rewards, 'the reward model', prompts, outputs)


def scored_row_length(template: Template, prompts: Sequence[Prompt], wrapper: str, max_new: int) -> int:
  """Return how many tokens a row needs for the longest prompt and reference of a sample with a response of `max_new` tokens, with room.

  Args:
    template: of the reward model.
    prompts: the prompts to come; at most a few hundred of them are read.
    wrapper: 'sft' or 'pretrain'.
    max_new: tokens of a response, in the policy's tokens.
  """
  sample = prompts[:: max(len(prompts) // 256, 1)]
  longest = max(len(template.encode_candidates(p.prompt, p.reference, [''], wrapper)[0]) for p in sample)
  return sharding.round_up(longest + 2 * max_new, 128)


class RuleReward:
  """1 where a rule accepts an output, else 0. It compares with the prompt's `answer`, or with its reference if that is ''."""

  def __init__(self, rule: str):
    self._rule = rules.RULES[rule]

  def score(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> np.ndarray:
    rewards = np.zeros(len(outputs), np.float32)
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
      try:
        rewards[i] = self._rule(output, prompt.answer or join_messages(prompt.reference, 'reference'))
      except rules.NoAnswerError as error:
        raise RewardError(f'prompt {i} {shorten(prompt.prompt)}: {error}; leave this row out, or set rft.reward.rule_weight=0') from error
    return rewards


class RewardSum:
  """A weighted sum of sources.

  Args:
    parts: name to (weight, source). Every part is scored, one of weight 0 too: it is then only measured.
    strip_thinking: score what `strip_thinking` leaves of an output.
  """

  def __init__(self, parts: Mapping[str, tuple[float, RewardSource]], strip_thinking: bool):
    if not parts:
      raise ValueError('a mixture of rewards needs a part')
    self._parts, self._strip = dict(parts), strip_thinking

  def components(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Raw rewards (n,), float32, of every part by its name.

    Raises:
      RewardError: a reward is not finite, naming the part, the prompt and the output.
      UserError: as the sources raise it.
    """
    if self._strip:
      outputs = [strip_thinking(output) for output in outputs]
    return {name: check_rewards(source.score(prompts, outputs), name, prompts, outputs) for name, (_, source) in self._parts.items()}

  def total(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weighted sum (n,), float32, of what `components` gave; a single part of weight 1 comes back bit for bit."""
    weighted = [weight * components[name].astype(np.float64) for name, (weight, _) in self._parts.items()]
    return np.sum(weighted, axis=0).astype(np.float32)


def strip_thinking(text: str) -> str:
  """What follows the first `</think>` behind the first `<think>`, without white space around it; the text as it is if there is none.

  The official rule: POLAR's reward function searches anywhere in the answer (re.search), so that words before `<think>` are dropped
  too, and later tags stay. An answer cut while thinking, or whose `<think>` stood in the prompt, is scored whole.
  """
  match = _THINKING.search(text)
  return match.group(2).strip() if match else text


def score_on_first_process(score: Callable[[], np.ndarray], count: int, expected: type[UserError], elsewhere: UserError) -> np.ndarray:
  """Return the rewards (n,), float32, that the first process computes, so that all processes have the same bits.

  Args:
    score: computes the rewards; only the first process calls it.
    count: n.
    expected: errors that every process raises, once `score` has raised one on the first process.
    elsewhere: raised in its place by the other processes.
  """
  rewards, failure = np.zeros(count, np.float32), None
  if jax.process_index() == 0:
    try:
      rewards = score()
    except expected as error:
      failure = error
  if jax.process_count() > 1:
    rewards, failed = multihost_utils.broadcast_one_to_all((rewards, np.bool_(failure is not None)))
    if failed and failure is None:
      failure = elsewhere
  if failure is not None:
    raise failure
  return np.asarray(rewards)


def check_rewards(rewards: np.ndarray, source: str, prompts: Sequence[Prompt], outputs: Sequence[str]) -> np.ndarray:
  """`rewards`, if they are finite float32 numbers, one for each output.

  Raises:
    RewardError: naming the source, prompt and output of the first that is not finite, and how many there are.
  """
  if rewards.dtype != np.float32 or rewards.shape != (len(outputs),):
    raise TypeError(f'{source}: rewards must be float32 of shape ({len(outputs)},), not {rewards.dtype} of shape {rewards.shape}')
  bad = np.flatnonzero(~np.isfinite(rewards))
  if bad.size:
    i = int(bad[0])
    raise RewardError(
      f'{source} gave the reward {rewards[i]} ({bad.size} of {len(outputs)} are not finite): prompt {i} {shorten(prompts[i].prompt)}, '
      f'output {shorten(outputs[i])}; check the reward model in float32'
    )
  return rewards


def shorten(text: Text) -> str:
  """The first characters of a text, quoted on one line."""
  joined = join_messages(text, 'text')
  return repr(joined[:_SHOWN]) + ('...' if len(joined) > _SHOWN else '')
