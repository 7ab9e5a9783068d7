"""Contents of a run's folder apart from the weights: the settings that must not change on resume, and the tokenizer."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

from polar_jax.checkpoints import checkpointer, tokenizer_files
from polar_jax.config import ModelConfig, RftConfig, TemplateConfig, TrainConfig
from polar_jax.data.identity import tokenizer_digest
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model.heads import HEADS
from polar_jax.runtime import paths

ASSETS = 'assets'  # folder next to the checkpoints: tokenizer files and, for imported models, config.json and other small files

# Settings that change how a run is computed, logged or reported, but not its results: they may change when a run is resumed.
_MODEL_COMPUTE = ('attention', 'remat', 'scan_unroll')
_TRAIN_FREE = ('log_every', 'evaluate_every', 'evaluate_examples', 'offload')
_RFT_FREE = ('log_every', 'evaluate_every', 'evaluate_prompts', 'alarms')
_RFT_COMPUTE = (
  'rft.micro_batch_rows',
  'rft.reward.rows_per_batch',
  'rft.rollout.max_concurrent',
  'rft.actor.offload',
  'rft.critic.offload',
)


def training_settings(
  objective: str,
  train: TrainConfig,
  model: ModelConfig,
  template: TemplateConfig,
  tokenizer: Tokenizer,
  seed: int,
  data: Mapping[str, Any],
) -> dict[str, Any]:
  """Return the settings that must not change while a training run is resumed, because they determine its results.

  Args:
    objective: name of the objective, which determines the head of the checkpoint.
    train: batch size, learning rate, steps and so on.
    model: shape of the model.
    template: how examples become token sequences.
    tokenizer: identified by a digest (see `polar_jax.data.identity`).
    seed: of initialization and data order.
    data: digests that identify the training and validation data.
  """
  options = traverse_util.flatten_dict(dataclasses.asdict(train), sep='.')
  settings = {k: v for k, v in options.items() if k not in _TRAIN_FREE and not k.startswith('lora.')}
  adapters = {} if train.lora.rank is None else _dotted('lora', train.lora)
  return {**_common(objective, model, tokenizer, seed), **_dotted('template', template), **settings, **adapters, **data}


def policy_settings(rft: RftConfig, model: ModelConfig, tokenizer: Tokenizer, seed: int, data: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that must not change while a run of reinforcement fine-tuning is resumed.

  Args:
    rft: the options of the run.
    model: shape of the policy.
    tokenizer: the policy's.
    seed: of initialization, sampling and prompt order.
    data: digests that identify prompts and chat template.
  """
  unread = _RFT_FREE if rft.lora.rank else (*_RFT_FREE, 'lora')
  options = {k: v for k, v in _dotted('rft', rft).items() if k.split('.')[1] not in unread and k not in _RFT_COMPUTE}
  return {**_common('next_token', model, tokenizer, seed), **options, **data}


def model_settings(head: str, model: ModelConfig, template: TemplateConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """Return the settings stored with a checkpoint that has only parameters: those needed to open it and score with it.

  Args:
    head: 'reward', 'lm' or 'value'.
    model: shape of the model.
    template: how the model reads examples.
    tokenizer: the model's, if it has one.
  """
  tokenizer_settings = {} if tokenizer is None else {'tokenizer': tokenizer_digest(tokenizer)}
  return {'objective': HEADS[head].objective, **_dotted('model', model), **_dotted('template', template), **tokenizer_settings}


def _common(objective: str, model: ModelConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
  """Return the settings that are needed to open any checkpoint."""
  shape = {k: v for k, v in _dotted('model', model).items() if k.partition('.')[2] not in _MODEL_COMPUTE}
  return {'objective': objective, 'seed': seed, 'tokenizer': tokenizer_digest(tokenizer), **shape}


def _dotted(prefix: str, section: Any) -> dict[str, Any]:
  """Return the fields of a config section by dotted name."""
  return traverse_util.flatten_dict({prefix: dataclasses.asdict(section)}, sep='.')


def keep_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
  """Copy the tokenizer's files into a run's folder, so that scoring and exporting need nothing else.

  A run with a checkpoint keeps its own tokenizer; resuming it with a different one is rejected later.
  """
  path = getattr(tokenizer, 'path', None)
  if path is None or jax.process_index() != 0 or checkpointer.exists(folder):
    return
  assets = folder / ASSETS
  paths.copy(path, assets / f'tokenizer{path.suffix}')
  for name in set(tokenizer_files.TOKENIZER_FILES) - {'tokenizer.json', 'tokenizer.model'}:
    if (path.parent / name).is_file():
      paths.copy(path.parent / name, assets / name)
