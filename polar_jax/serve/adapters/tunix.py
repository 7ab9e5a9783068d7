"""The reward function of a Tunix run: `reward_functions: [polar_jax.serve.adapters.tunix]`. Tunix takes every public function defined here.

The data set needs a column `reference`. If its `prompts` are in a chat template, a column `raw_prompt` should hold them without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_jax.serve.adapters.trl import reward_function

_REWARD = reward_function()


def polar_reward(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
  """Return one reward per completion.

  Raises:
    UserError: there are none.
  """
  return _REWARD(columns.get('raw_prompt', prompts), completions, **columns)
