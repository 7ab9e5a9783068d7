"""The finetune stage: fine-tuning of the reward model on ranked data (equation 8), and the ablations of Table 7."""

from __future__ import annotations

import dataclasses
from typing import Any

from polar_jax import api
from polar_jax.config import TrainConfig
from polar_jax.stages.context import Context

# Run names, which are also the names of their folders.
FINETUNE, FINETUNE_ONLY, FINETUNE_NO_REFERENCE = 'finetune', 'finetune_only', 'finetune_no_reference'


def finetune(context: Context) -> dict[str, Any]:
  """Train on `data.preferences`, or on the preferences of the synthesize stage. Returns the section `finetune` of the report.

  With `ablations` two more runs start from the plain language model: one without pre-training, and one that also never sees the
  reference, which makes it a classic reward model.
  """
  config = context.config
  runs = {FINETUNE: _run(context, FINETUNE, config.finetune)}
  # The world of word problems has neither a language model of its own nor a pre-training stage to skip.
  if config.ablations and config.synthesize.world == 'ngram':
    without_pretraining = dataclasses.replace(config.finetune, start_from='pretrain_lm')
    runs[FINETUNE_ONLY] = _run(context, FINETUNE_ONLY, without_pretraining)
    runs[FINETUNE_NO_REFERENCE] = _run(context, FINETUNE_NO_REFERENCE, without_pretraining, use_reference=False)
  return {'finetune': {'runs': runs}}


def _run(context: Context, name: str, train: TrainConfig, *, use_reference: bool = True) -> dict[str, Any]:
  tokenizer = context.tokenizer(context.config.finetune.start_from)
  result = api.train_reward_model(
    context.preferences('train'),
    context.preferences('validation'),
    init=context.init(train),
    args=train,
    tokenizer=tokenizer,
    model=context.model_config(tokenizer, train),
    template=context.template_config(use_reference),
    data=context.config.data,
    **context.run_arguments(name),
  )
  return result.summary
