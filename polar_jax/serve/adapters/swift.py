"""A reward of ms-swift's GRPO. A file that `--external_plugins` names registers it: `orms['polar'] = PolarReward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_jax.serve.adapters.shared import answer, column, plain, shared_client


class PolarReward:
  """Scores completions against the column `reference` of the data set. The prompt is what precedes the last of `messages`.

  Args:
    args: of the trainer; not used.
  """

  def __init__(self, args: Any = None, **_: Any):
    self.args = args

  def __call__(self, completions: Sequence[str], messages: Sequence[list[dict[str, Any]]], **columns: Any) -> list[float]:
    prompts = [plain(conversation[:-1]) for conversation in messages]
    outputs = [answer(completion, True) for completion in completions]
    return shared_client().score_rows(prompts, column(columns, 'reference', len(outputs)), outputs)
