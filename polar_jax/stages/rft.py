"""The rft stage: reinforcement fine-tuning of a policy, or in the miniature the study of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from polar_jax.config import Config
from polar_jax.miniature import study
from polar_jax.ppo import trainer as loop
from polar_jax.stages import training as stages
from polar_jax.stages.rft_setup import open_function, open_run

RFT = 'rft'  # folder of the run in a workdir


def check(config: Config) -> None:
  """Check what can be checked before any stage runs: that a reward function can be imported.

  Raises:
    ConfigError: it cannot.
  """
  if config.rft.reward.source == 'python' and config.rft.reward.model_weight:
    open_function(config.rft.reward)


def rft(context: stages.Context) -> dict[str, Any]:
  """Reinforcement fine-tuning of `rft.policy` on `data.prompts`; in the miniature, whose policies are known, the study of it.

  With `ablations` and a rule, the policy is tuned a second time with the rule as its only reward.

  Raises:
    UserError: a setting, a file or a row cannot be used.
  """
  config = context.config
  check(config)
  if config.data.prompts is None and config.synthesize.world == 'ngram':
    return {'rft': study.run(context)}
  arms = {RFT: config.rft}
  if config.ablations and config.rft.reward.rule:
    rule_alone = dataclasses.replace(config.rft.reward, model_weight=0.0, rule_weight=1.0)
    arms = {f'{RFT}/rule': dataclasses.replace(config.rft, reward=rule_alone), f'{RFT}/model': config.rft}
  return {'rft': {'runs': {name.removeprefix(f'{RFT}/'): loop.train(open_run(context, name, arm)) for name, arm in arms.items()}}}
