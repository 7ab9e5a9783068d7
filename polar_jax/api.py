"""The Python API. Every name here is importable from `polar_jax` itself, which imports it on first use.

  import polar_jax
  model = polar_jax.load('POLAR-7B')
  model.score('What is 2 + 2?', reference='4', candidates=['4', '5'])

The command-line stages call the same functions.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from polar_jax.api_models import LanguageModel, RewardModel, ValueModel, load
from polar_jax.api_training import RunSettings, TrainResult, train_policy, train_reward_model
from polar_jax.config import LossConfig, RftConfig, TrainConfig
from polar_jax.data.examples import open_triplets
from polar_jax.types import Prompt, RankedList, Triplet, UserError

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


def read_examples(path: str | pathlib.Path, split: str = 'train') -> Sequence[Triplet]:
  """Read ranked examples (`prompt`, `reference`, `chosen`, `rejected`) from a .jsonl, .jsonl.gz or .parquet file, a folder or a TFDS set.

  Args:
    path: a file, which is read whatever the split; a folder with `<split>.jsonl` or another format; or a TFDS folder.
    split: 'train', 'validation' or 'test'.

  Raises:
    UserError: the data does not exist, or an example is bad; the message names file, example and field.
  """
  return open_triplets(path, split)
