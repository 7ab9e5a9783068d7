"""Sources of PPO's rewards: a reward model in this process, a rule, and the weighted sum of any sources (see also http and python).

Rewards are float32 throughout, one per response, in the order of the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from polar_jax import sharding
from polar_jax.config import RewardConfig
from polar_jax.data.template import Template, join_messages
from polar_jax.data.thinking import strip_thinking
from polar_jax.ppo.rewards import rules
from polar_jax.runtime import preemption
from polar_jax.scoring.scorer import Scorer
from polar_jax.types import Group, Prompt, Text, UserError

_MAX_SHOWN = 60  # characters of a text in a message


class RewardError(UserError):
  """A response has no usable reward. The message is one line that names prompt and response."""


class RewardSource(Protocol):
  """Anything that scores responses."""

  def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return rewards (n,), float32, of each response to the prompt with the same index. Several responses to a prompt repeat it.

    Raises:
      UserError: a text cannot be scored, or has no finite reward.
    """


class ModelReward:
  """A reward model in this process. Responses with equal prompt and reference share the computation of their prefix.

  Equal responses are scored once, so that their rewards are equal to the last bit. Apart from rounding, no reward depends on the
  other responses: a prompt that has to be cut is cut for each response as if that were the only one.

  Attributes:
    template: of the reward model.
  """

  def __init__(self, scorer: Scorer, config: RewardConfig):
    self._scorer, self._wrapper = scorer, config.wrapper
    self.template = scorer.template

  def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return rewards (n,), float32.

    Raises:
      RewardError: a reward is not finite.
    """
    candidates_of: dict[tuple[str, str], dict[str, int]] = {}
    texts_of: dict[tuple[str, str], tuple[Text, Text]] = {}
    entries = []
    for prompt, response in zip(prompts, responses, strict=True):
      texts: tuple[Text, Text] = prompt.prompt, prompt.reference
      if not self._scorer.template.reads_roles:
        texts = join_messages(prompt.prompt, 'prompt'), join_messages(prompt.reference, 'reference')
      key = repr(texts[0]), repr(texts[1])
      texts_of.setdefault(key, texts)
      candidates = candidates_of.setdefault(key, {})
      entries.append((candidates, candidates.setdefault(response, len(candidates))))
    groups = [Group(*texts_of[key], tuple(candidates), self._wrapper) for key, candidates in candidates_of.items()]
    scored = self._scorer.score(groups, alone=True)
    rewards_of = {id(candidates): rewards for candidates, rewards in zip(candidates_of.values(), scored, strict=True)}
    rewards = np.array([rewards_of[id(candidates)][c] for candidates, c in entries], np.float32)
    return check_rewards(rewards, 'the reward model', prompts, responses)


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
  """A rule: 1 for a response that it accepts, else 0. It compares with the prompt's `answer`, or with its reference if that is ''."""

  def __init__(self, rule: str):
    self._rule = rules.RULES[rule]

  def check(self, prompts: Sequence[Prompt], what: str) -> None:
    """Check that the rule can read the answer of every prompt.

    Args:
      prompts: of the data set.
      what: name of an entry, for messages.

    Raises:
      RewardError: it cannot; the message counts such prompts.
    """
    bad: list[tuple[int, rules.NoAnswerError]] = []
    for i, prompt in enumerate(prompts):
      try:
        self._rule('', _answer(prompt))
      except rules.NoAnswerError as error:
        bad.append((i, error))
    if bad:
      i, reason = bad[0]
      raise RewardError(
        f'{what} {i} {shorten(prompts[i].prompt)}: {reason} ({len(bad)} of {len(prompts)} such prompts); remove them, give them '
        'an `answer`, or do not set rft.reward.rule'
      )

  def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return rewards (n,), float32, each 0 or 1.

    Raises:
      RewardError: the rule cannot read an answer.
    """
    rewards = np.zeros(len(responses), np.float32)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
      try:
        rewards[i] = self._rule(response, _answer(prompt))
      except rules.NoAnswerError as error:
        raise RewardError(f'prompt {i} {shorten(prompt.prompt)}: {error}; remove this example, or do not set rft.reward.rule') from error
    return rewards


def _answer(prompt: Prompt) -> str:
  """Return the text that a rule compares with."""
  return prompt.answer or join_messages(prompt.reference, 'reference')


class RewardSum:
  """A weighted sum of any number of named sources.

  Args:
    parts: name to (weight, source). Every source scores, also one of weight 0, which is then only measured.
    strip_thinking: let all sources score what `strip_thinking` leaves of a response.
  """

  def __init__(self, parts: Mapping[str, tuple[float, RewardSource]], strip_thinking: bool):
    if not parts:
      raise ValueError('a sum of rewards needs at least one source')
    self._parts, self._strip = dict(parts), strip_thinking

  def check(self, prompts: Sequence[Prompt], what: str = 'prompt') -> None:
    """Check, before any response is sampled, that no source will refuse one of the prompts.

    Args:
      prompts: of the data set.
      what: name of an entry, for messages.

    Raises:
      RewardError: a rule finds no answer to compare with.
    """
    for _, source in self._parts.values():
      if isinstance(source, RuleReward):
        source.check(prompts, what)

  @property
  def template(self) -> Template | None:
    """The template of the first source that has one; None if all are functions or rules."""
    templates = (getattr(source, 'template', None) for _, source in self._parts.values())
    return next((template for template in templates if template is not None), None)

  def components(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the raw rewards (n,), float32, of every source by its name.

    Raises:
      RewardError: a reward is not finite; the message names source, prompt and response.
      UserError: raised by a source.
    """
    if self._strip:
      responses = [strip_thinking(response) for response in responses]
    return {name: check_rewards(source.score(prompts, responses), name, prompts, responses) for name, (_, source) in self._parts.items()}

  def total(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the weighted sum (n,), float32, of the result of `components`. A single source of weight 1 is returned bit for bit."""
    weighted = [weight * components[name].astype(np.float64) for name, (weight, _) in self._parts.items()]
    return np.sum(weighted, axis=0).astype(np.float32)


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
      with preemption.interruptible():
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


def check_rewards(rewards: np.ndarray, source: str, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
  """Return `rewards` unchanged if they are finite float32 numbers, one per response.

  Args:
    rewards: to be checked.
    source: its name, for messages.
    prompts: of each response.
    responses: texts.

  Raises:
    RewardError: some are not finite; the message has their number, and names prompt and response of the first.
    TypeError: they have another type or shape.
  """
  if rewards.dtype != np.float32 or rewards.shape != (len(responses),):
    raise TypeError(f'{source}: rewards must be float32 of shape ({len(responses)},), not {rewards.dtype} of shape {rewards.shape}')
  bad = np.flatnonzero(~np.isfinite(rewards))
  if bad.size:
    i = int(bad[0])
    raise RewardError(
      f'{source} gave the reward {rewards[i]} ({bad.size} of {len(responses)} are not finite): prompt {i} {shorten(prompts[i].prompt)}, '
      f'response {shorten(responses[i])}; check the reward model in float32'
    )
  return rewards


def shorten(text: Text) -> str:
  """Return the first characters of a text, quoted on one line."""
  joined = join_messages(text, 'text')
  return repr(joined[:_MAX_SHOWN]) + ('...' if len(joined) > _MAX_SHOWN else '')
