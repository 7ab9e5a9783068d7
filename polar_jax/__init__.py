"""POLAR in JAX: reward models as policy discriminators (arXiv 2507.05197).

The names of `polar_jax.api` are importable from here. They are imported on first use, so that `import polar_jax` is fast and starts no
JAX backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

if TYPE_CHECKING:
  from polar_jax.api import (
    LanguageModel,
    LossConfig,
    Prompt,
    RankedList,
    RewardModel,
    RftConfig,
    RunSettings,
    TrainConfig,
    TrainResult,
    Triplet,
    UserError,
    ValueModel,
    load,
    read_examples,
    train_policy,
    train_reward_model,
  )

__all__ = [
  'LanguageModel',
  'LossConfig',
  'Prompt',
  'RankedList',
  'RewardModel',
  'RftConfig',
  'RunSettings',
  'TrainConfig',
  'TrainResult',
  'Triplet',
  'UserError',
  'ValueModel',
  'load',
  'read_examples',
  'train_policy',
  'train_reward_model',
]


def __getattr__(name: str) -> Any:
  if name not in __all__:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module('polar_jax.api'), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
