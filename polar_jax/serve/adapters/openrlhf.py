"""A reward function for OpenRLHF, for a file that `--reward.remote_url` names. `labels` are the references.

The queries hold the chat template's text. The server takes the answers out of them, as it does for `--reward.remote_url http://...`; this
function also drops thoughts from them before, and waits longer for a server that restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_jax.data.thinking import strip_thinking
from polar_jax.serve.adapters.shared import plain, shared_client
from polar_jax.serve.client import RewardRequestError


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
  """Return the rewards of prompts with their answers, as the dictionary that OpenRLHF reads.

  Args:
    queries: prompts with the answers after them, with all special tokens.
    prompts: the prompts, in the chat template.
    labels: the references.

  Raises:
    UserError: there are no rewards. OpenRLHF logs it and goes on without them.
  """
  queries = [_without_thinking(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
  reply = shared_client().post('/get_reward', {'query': queries, 'prompts': list(prompts), 'labels': list(map(plain, labels))})
  rewards = reply.get('rewards') if isinstance(reply, dict) else None
  if not isinstance(rewards, list) or len(rewards) != len(queries):
    raise RewardRequestError(f'the reply of /get_reward does not have {len(queries)} rewards; check that the server is one of polar_jax')
  return {'rewards': rewards, 'scores': rewards, 'extra_logs': {'polar': rewards}}


def _without_thinking(query: str, prompt: str) -> str:
  return prompt + strip_thinking(query[len(prompt) :]) if query.startswith(prompt) else query
