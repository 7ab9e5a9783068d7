"""What the adapters of all trainers share: one client per process, and the forms in which trainers hand over texts."""

from __future__ import annotations

import functools
import os
from typing import Any

from polar_jax.data.thinking import strip_thinking
from polar_jax.serve.client import RewardClient
from polar_jax.types import Text, UserError

ADDRESS_ENV = 'POLAR_REWARD_ADDRESS'


def shared_client(address: str | None = None) -> RewardClient:
  """Return the client that all reward functions of this process share for an address.

  Args:
    address: HOST:PORT or a URL, several with commas between them; None: the environment variable POLAR_REWARD_ADDRESS.

  Raises:
    UserError: there is no address, or it is not a URL.
  """
  address = address or os.environ.get(ADDRESS_ENV)
  if not address:
    raise UserError(f'no address of a reward server; set the environment variable {ADDRESS_ENV}, for example to 127.0.0.1:30000')
  return _client(address)


@functools.cache
def _client(address: str) -> RewardClient:
  return RewardClient(address)


def plain(text: Any) -> Any:
  """Return a text of a data set as `RewardClient` takes it: lists of messages that have a role and a content."""
  if hasattr(text, 'tolist'):  # a row of Parquet that pandas read
    text = text.tolist()
  if not isinstance(text, list | tuple):
    return text
  return [{key: m[key] for key in ('role', 'content') if key in m} if isinstance(m, dict) else m for m in text]


def answer(completion: Any, strip: bool) -> Text:
  """Return what a policy finally said.

  Args:
    completion: a string, or the messages that the policy wrote, of which the last one counts.
    strip: drop the thoughts before it (see `strip_thinking`).
  """
  completion = plain(completion)
  if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
    completion = completion[-1].get('content')
  return strip_thinking(completion) if strip and isinstance(completion, str) else completion


def column(columns: dict[str, Any], name: str, count: int) -> list[Any]:
  """Return a column of the data set that a trainer passes along.

  Raises:
    UserError: there is none, or it has another length.
  """
  if name not in columns:
    raise UserError(f'the data set has no column {name!r}, which holds the reference of each prompt; add it, or name another one')
  values = [plain(value) for value in columns[name]]
  if len(values) != count:
    raise UserError(f'the column {name!r} has {len(values)} values for {count} completions')
  return values
