"""The finetune stage: fine-tuning of the reward model on ranked data (equation 8), its seeds, and the ablations of Table 7."""

from __future__ import annotations

import dataclasses
from typing import Any

from polar_jax import api
from polar_jax.config import ConfigError, TrainConfig
from polar_jax.runtime import json_files
from polar_jax.stages import arms
from polar_jax.stages.context import Context


def finetune(context: Context) -> dict[str, Any]:
  """Train on `data.preferences`, or on the preferences of the synthesize stage. Returns the section `finetune` of the report.

  With `ablations` two more arms start from what pre-training started from: one without pre-training, and one that also never sees the
  reference, which makes it a classic reward model. With `equal_compute` another one without pre-training reads as many tokens as
  pre-training and fine-tuning together, with the first seed alone. With `seeds` each of the other arms is trained so many times. Arms
  without pre-training have the learning rate `ablation_learning_rate`, if it is set.
  """
  config = context.config
  without_pretraining = dataclasses.replace(
    config.finetune,
    start_from=config.pretrain.start_from,
    start_layers=config.pretrain.start_layers,
    learning_rate=config.ablation_learning_rate or config.finetune.learning_rate,
  )
  runs: dict[str, Any] = {}
  for seed in range(config.seeds):
    runs |= _run(context, arms.FINETUNE, config.finetune, seed)
    # The world of word problems has neither a language model of its own nor a pre-training stage to skip.
    if config.ablations and config.synthesize.world != 'arithmetic':
      runs |= _run(context, arms.FINETUNE_ONLY, without_pretraining, seed)
      runs |= _run(context, arms.FINETUNE_NO_REFERENCE, without_pretraining, seed, use_reference=False)
  if config.equal_compute:
    summary = runs[arms.FINETUNE]
    steps = round(summary['steps'] * (1 + pretraining_tokens(context) / summary['tokens']))
    runs |= _run(context, arms.FINETUNE_EQUAL_COMPUTE, dataclasses.replace(without_pretraining, steps=steps), 0)
  return {'finetune': {'runs': runs}}


def _run(context: Context, name: str, train: TrainConfig, seed: int, *, use_reference: bool = True) -> dict[str, Any]:
  """Train an arm with a seed. Returns its summary by the name of the run."""
  name = arms.seed_run(name, seed)
  tokenizer = context.tokenizer(train.start_from)
  arguments = context.run_arguments(name)
  arguments['settings'] = dataclasses.replace(arguments['settings'], seed=context.config.seed + seed)
  result = api.train_reward_model(
    context.preferences('train'),
    context.preferences('validation'),
    init=context.init(train),
    args=train,
    tokenizer=tokenizer,
    model=context.model_config(tokenizer, train),
    template=context.template_config(use_reference),
    data=context.config.data,
    **arguments,
  )
  return {name: result.summary}


def pretraining_tokens(context: Context) -> int:
  """Return how many tokens the pre-training of this workdir has read.

  Raises:
    ConfigError: it has not ended.
  """
  path = context.workdir / arms.PRETRAIN / 'summary.json'
  try:
    return json_files.read(path, '')['tokens']
  except (json_files.JsonError, KeyError) as error:
    raise ConfigError(f'equal_compute: needs the tokens of pre-training in {path}; run the stage pretrain to its end first') from error
