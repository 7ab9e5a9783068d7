"""The rft stage: reinforcement fine-tuning of a policy on prompts with reference responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from polar_jax import api
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import Config, ConfigError, RewardConfig, RftConfig
from polar_jax.data.conversation_template import open_template
from polar_jax.data.examples import NoSplitError, open_prompts, report_skipped
from polar_jax.data.readers import is_one_split
from polar_jax.data.template import Template
from polar_jax.ppo import policy as policy_lib
from polar_jax.ppo.rewards.http import HttpReward
from polar_jax.ppo.rewards.python import PythonReward, load_function
from polar_jax.ppo.rewards.sources import ModelReward, RewardSource, RewardSum, RuleReward
from polar_jax.runtime.paths import path_of
from polar_jax.stages import arms
from polar_jax.stages.context import Context
from polar_jax.types import Prompt

RFT = 'rft'


def check(config: Config) -> None:
  """Check, before any stage runs, that the reward function can be imported.

  Raises:
    ConfigError: it cannot.
  """
  if config.rft.reward.source == 'python' and config.rft.reward.model_weight:
    open_function(config.rft.reward)


def rft(context: Context) -> dict[str, Any]:
  """Tune `rft.policy` on `data.prompts`, or on the prompts of the synthesize stage. Returns the section `rft` of the report.

  With `ablations` the policy is also tuned on the references themselves, and with the rule as its only reward, if there is one; with
  `study.seeds` each of them so many times.

  Raises:
    UserError: a setting, a file or an example cannot be used.
  """
  check(context.config)
  runs = runs_of(context.config)
  return {'rft': {'runs': {name.removeprefix(f'{RFT}/'): tune(context, name, *of_run) for name, of_run in runs.items()}}}


def runs_of(config: Config) -> dict[str, tuple[RftConfig, int]]:
  """Return the runs of the stage in their order: name -> (options, number of the seed)."""
  options, seeds = config.rft, config.study.seeds
  if config.ablations and options.method == 'ppo':
    several = {'supervised': _supervised(options), 'model': options}  # the shorter one first: it fails sooner
    if options.reward.rule:
      rule_alone = dataclasses.replace(options.reward, model_weight=0.0, rule_weight=1.0)
      several['rule'] = dataclasses.replace(options, reward=rule_alone)
    return {arms.seed_run(f'{RFT}/{name}', seed): (of_arm, seed) for seed in range(seeds) for name, of_arm in several.items()}
  return {f'{RFT}/seed_{seed}': (options, seed) for seed in range(seeds)} if seeds > 1 else {RFT: (options, 0)}


def _supervised(options: RftConfig) -> RftConfig:
  """Return the options of as many updates that imitate the references, each of which a step reads once."""
  each = options.mini_batch_size and max(options.mini_batch_size // options.num_generations, 1)
  return dataclasses.replace(options, method='sft', num_generations=1, mini_batch_size=each)


def tune(context: Context, name: str, options: RftConfig, seed: int = 0) -> dict[str, Any]:
  """Tune the policy that `options` names in the run `name`, with a seed counted from that of the config. Returns its summary."""
  policy = policy_lib.check_policy(open_pretrained(context.checkpoint(options.policy)), 'rft.policy')
  prompts, held_out = read_prompts(context, 'train'), read_prompts(context, 'validation')
  reward = open_reward(context, options, prompts)
  arguments = context.run_arguments(name)
  arguments['settings'] = dataclasses.replace(arguments['settings'], seed=context.config.seed + seed)
  result = api.train_policy(policy, prompts, reward, args=options, held_out=held_out or None, model=context.config.model, **arguments)
  return result.summary


def read_prompts(context: Context, split: str) -> Sequence[Prompt]:
  """Return the prompts of a split; none for 'validation' if no held-out prompts are named or found next to the others.

  Held-out prompts are the split `validation`, or `test` in data sets without it, such as the official ones.

  Raises:
    UserError: there are no prompts, or one is bad.
  """
  data = context.config.data
  path = path_of(data.prompts) if data.prompts else context.data / 'prompts'
  given = split != 'train' and data.prompts_validation
  if given:
    path = path_of(data.prompts_validation or '')
  elif not path.exists():
    raise ConfigError(f'data.prompts: nothing at {path}; name a data set there, or run the synthesize stage in this workdir first')
  elif split != 'train' and is_one_split(path):
    return []
  names = (split,) if split == 'train' else (split, 'test')
  for name in names:
    try:
      return report_skipped(open_prompts(path, name, data.on_bad_example), path, context.log)
    except NoSplitError:
      if (split == 'train' or given) and name == names[-1]:
        raise
  return []


def open_reward(context: Context, options: RftConfig, prompts: Sequence[Prompt]) -> RewardSum:
  """Return the reward that `rft.reward` describes.

  Args:
    context: config, workdir and devices.
    options: of the run; `options.rollout.max_new` and `prompts` determine the length of scored rows.
    prompts: the training prompts.

  Raises:
    UserError: a checkpoint or function cannot be used.
  """
  config = options.reward
  parts: dict[str, tuple[float, RewardSource]] = {}
  if config.model_weight and config.source == 'http':
    parts['model'] = (config.model_weight, HttpReward(_server_template(context, config), config))
  elif config.model_weight and config.source == 'python':
    parts['python'] = (config.model_weight, open_function(config))
  elif config.model_weight:
    parts['model'] = (config.model_weight, _model_reward(context, options, prompts))
  if config.rule:
    parts['rule'] = (config.rule_weight, RuleReward(config.rule))
  return RewardSum(parts, config.strip_thinking)


def open_function(config: RewardConfig) -> PythonReward:
  """Import the function `rft.reward.function`.

  Raises:
    ConfigError: it is missing, cannot be imported or cannot be called.
  """
  if config.function is None:
    raise ConfigError("rft.reward.source is 'python' and rft.reward.function names no function; set it to 'module:name'")
  return PythonReward(load_function(config.function), config.function)


def _model_reward(context: Context, options: RftConfig, prompts: Sequence[Prompt]) -> ModelReward:
  """Return the reward model in this process, with its own tokenizer and template, in the precision of `model.compute_dtype`."""
  opened = _reward_checkpoint(context, options.reward)
  if opened.head != 'reward':
    raise ConfigError(f'rft.reward.checkpoint {opened.path}: has a {opened.head} head; the reward must be a reward model')
  config = context.config
  model = api.load(opened, mesh=context.mesh, dtype=config.model.compute_dtype, compute=config.model, template=config.template)
  if model.template_config.chat == 'always':
    context.log(f'rft: the reward model {opened.path} reads prompt and response through its chat template (see template.chat)')
  return ModelReward(model.policy_scorer(options, prompts), options.reward)


def _reward_checkpoint(context: Context, config: RewardConfig) -> Pretrained:
  """Open the checkpoint of the reward model."""
  return open_pretrained(context.checkpoint(config.checkpoint))


def _server_template(context: Context, config: RewardConfig) -> Template:
  """Return the template of the served model. The server tokenizes by itself; the tokenizer here only truncates long inputs."""
  if not context.checkpoint(config.checkpoint).exists():
    return context.template()
  opened = _reward_checkpoint(context, config)
  return open_template(opened.template(context.config.template), opened.tokenizer())
