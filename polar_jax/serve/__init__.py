"""Rewards over HTTP: the server of the `serve` stage, and its client.

`RewardClient` is imported on first use. Neither it nor this module imports JAX or a server framework, so that a trainer's environment needs
only httpx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from polar_jax.serve.client import RewardClient, RewardRequestError

__all__ = ['RewardClient', 'RewardRequestError']


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('polar_jax.serve.client'), name)
