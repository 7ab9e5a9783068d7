"""Contents of a run's folder apart from the weights: the settings that must not change on resume, and the tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from polar_jax.checkpoints import checkpointer, tokenizer_files
from polar_jax.config import ModelConfig, RftConfig, TemplateConfig, TrainConfig
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model.heads import HEADS
from polar_jax.runtime import paths
from polar_jax.types import Prompt, Triplet

ASSETS = 'assets'  # folder next to the checkpoints: tokenizer files and, for imported models, config.json and other small files

# Settings that change how a run is computed, logged or reported, but not its results: they may change when a run is resumed.
_MODEL_COMPUTE = ('attention', 'remat', 'scan_unroll')
_TRAIN_REPORTING = ('log_every', 'evaluate_every', 'evaluate_examples')
_RFT_FREE = ('log_every', 'evaluate_every', 'evaluate_prompts', 'alarms')
_RFT_COMPUTE = ('rft.micro_batch_rows', 'rft.reward.rows_per_batch', 'rft.rollout.max_concurrent')


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
    tokenizer: identified by a digest of its file.
    seed: of initialization and data order.
    data: settings that identify the training data.
  """
  settings = {k: v for k, v in dataclasses.asdict(train).items() if k not in _TRAIN_REPORTING}
  return {**_common(objective, model, tokenizer, seed), **_dotted('template', template), **settings, **data}


def policy_settings(rft: RftConfig, model: ModelConfig, tokenizer: Tokenizer, seed: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
  """Return the settings that must not change while a run of reinforcement fine-tuning is resumed.

  Args:
    rft: the options of the run.
    model: shape of the policy.
    tokenizer: the policy's.
    seed: of initialization, sampling and prompt order.
    prompts: identified by a digest.
  """
  options = {k: v for k, v in _dotted('rft', rft).items() if k.split('.')[1] not in _RFT_FREE and k not in _RFT_COMPUTE}
  digest = texts_digest(prompts, lambda p: (p.prompt, p.reference, p.answer, p.metadata.get('policy_prompt')))
  return {**_common('next_token', model, tokenizer, seed), **options, 'rows': digest}


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


def examples_digest(examples: Sequence[Triplet]) -> str:
  """Return a digest that identifies a sequence of examples; see `texts_digest`."""
  return texts_digest(examples, lambda e: (e.prompt, e.reference, e.chosen, e.rejected))


def texts_digest(examples: Sequence[Any], read: Callable[[Any], tuple]) -> str:
  """Return the number of examples and a digest of a few of them, enough to notice that a resumed run reads other data."""
  size = len(examples)
  texts = [read(examples[i]) for i in sorted({0, size // 3, size // 2, size - 1})]
  return f'{size}:{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}'


def tokenizer_digest(tokenizer: Tokenizer) -> str:
  """Return a digest of the tokenizer's file, or 'byte' for the byte tokenizer."""
  path = getattr(tokenizer, 'path', None)
  return 'byte' if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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
