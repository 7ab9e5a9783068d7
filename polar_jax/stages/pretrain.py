"""The pretrain stage: contrastive pre-training of the reward model on triplets of policies (equation 7)."""

from __future__ import annotations

from typing import Any

from polar_jax import api
from polar_jax.stages.context import Context

RUN = 'pretrain'


def pretrain(context: Context) -> dict[str, Any]:
  """Train on `data.triplets`, or on the triplets of the synthesize stage. Returns the section `pretrain` of the report."""
  train = context.config.pretrain
  tokenizer = context.tokenizer(train.start_from)
  result = api.train_reward_model(
    context.triplets('train'),
    context.triplets('validation'),
    init=context.init(train),
    args=train,
    tokenizer=tokenizer,
    model=context.model_config(tokenizer, train),
    template=context.template_config(),
    data=context.config.data,
    **context.run_arguments(RUN),
  )
  return {'pretrain': result.summary}
