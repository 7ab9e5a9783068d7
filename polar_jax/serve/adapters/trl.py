"""Reward functions for TRL's GRPOTrainer and RLOOTrainer.

  trainer = GRPOTrainer(reward_funcs=polar_reward, ...)

The data set needs a column `reference`. Prompts may be strings or lists of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polar_jax.serve.adapters.shared import answer, column, plain, shared_client
from polar_jax.serve.client import RewardClient
from polar_jax.types import Text


def reward_function(
  client: RewardClient | str | None = None,
  *,
  name: str = 'polar_reward',
  reference: str = 'reference',
  strip_thinking: bool = True,
  is_async: bool = False,
) -> Callable[..., Any]:
  """Return a reward function.

  Args:
    client: of the server, or its address; None: the address in the environment variable POLAR_REWARD_ADDRESS.
    name: under which the trainer logs the rewards.
    reference: column of the data set with the references.
    strip_thinking: score only what follows `</think>`.
    is_async: return a coroutine function. TRL awaits several of them at the same time.
  """

  def connected() -> RewardClient:
    return client if isinstance(client, RewardClient) else shared_client(client)

  def rows(prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]) -> tuple[list[Text], list[Text], list[Text]]:
    outputs = [answer(completion, strip_thinking) for completion in completions]
    return [plain(prompt) for prompt in prompts], column(columns, reference, len(outputs)), outputs

  def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    return connected().score_rows(*rows(prompts, completions, columns))

  async def async_reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
    return await connected().ascore_rows(*rows(prompts, completions, columns))

  function = async_reward if is_async else reward
  function.__name__ = function.__qualname__ = name
  return function


polar_reward = reward_function()
async_polar_reward = reward_function(name='async_polar_reward', is_async=True)
