"""Custom reward functions for verl. They need no file of the user's:

  custom_reward_function.path=pkg://polar_jax.serve.adapters.verl custom_reward_function.name=compute_score

`ground_truth` is the reference, and `extra_info` holds the prompt, as in the rows of POLAR's own recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.serve.adapters.shared import answer, plain, shared_client
from polar_jax.types import Text, UserError


async def compute_score(
  data_source: Any,
  solution_str: str,
  ground_truth: Any,
  extra_info: Mapping[str, Any] | None = None,
  *,
  address: str | None = None,
  prompt_key: str = 'prompt',
  strip_thinking: bool = True,
  reward_router_address: Any = None,
  reward_model_tokenizer: Any = None,
) -> float:
  """Return the reward of one response. Those that come within some milliseconds are sent in one request.

  Args:
    data_source: not used.
    solution_str: the response.
    ground_truth: the reference, a string or a list of messages.
    extra_info: holds the prompt.
    address: of the server, from `custom_reward_function.reward_kwargs.address`; None: the environment variable POLAR_REWARD_ADDRESS.
    prompt_key: key of the prompt in `extra_info`.
    strip_thinking: score only what follows `</think>`.
    reward_router_address: of verl's own reward model; not used.
    reward_model_tokenizer: of verl's own reward model; not used.

  Raises:
    UserError: there is no reward.
  """
  prompt = _prompt(extra_info, prompt_key, 'extra_info')
  return await shared_client(address).ascore_one(prompt, plain(ground_truth), answer(solution_str, strip_thinking))


def compute_score_batch(
  data_sources: Sequence[Any],
  solution_strs: Sequence[str],
  ground_truths: Sequence[Any],
  extra_infos: Sequence[Mapping[str, Any]],
  prompt_key: str = 'prompt',
  *,
  address: str | None = None,
  strip_thinking: bool = True,
) -> list[float]:
  """Return the rewards of a batch, for `reward_manager=batch` of verl up to 0.7.0. Arguments are those of `compute_score`, in lists.

  Raises:
    UserError: there are no rewards.
  """
  prompts = [_prompt(extra_info, prompt_key, f'extra_infos[{i}]') for i, extra_info in enumerate(extra_infos)]
  outputs = [answer(solution, strip_thinking) for solution in solution_strs]
  return shared_client(address).score_rows(prompts, list(map(plain, ground_truths)), outputs)


def _prompt(extra_info: Mapping[str, Any] | None, key: str, name: str) -> Text:
  if not extra_info or extra_info.get(key) is None:
    raise UserError(f'{name} has no {key!r}; put the prompt of each row there (prompt_key names another key)')
  return plain(extra_info[key])
