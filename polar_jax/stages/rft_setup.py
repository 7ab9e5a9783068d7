"""Opens policy, reward and prompts of reinforcement fine-tuning as a config names them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import Config, ConfigError, ModelConfig, RewardConfig, RftConfig
from polar_jax.data.examples import NoSplitError, open_prompts
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo import prompts
from polar_jax.ppo.rewards.http import HttpReward
from polar_jax.ppo.rewards.python import PythonReward, load_function
from polar_jax.ppo.rewards.sources import ModelReward, RewardSource, RewardSum, RuleReward
from polar_jax.ppo.run import Run
from polar_jax.runtime.paths import path_of
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import training as stages
from polar_jax.types import Prompt

# Settings that may change while a workdir is resumed.
_FREE = ('log_every', 'evaluate_every', 'evaluate_prompts', 'alarms')


def open_run(context: stages.Context, name: str, config: RftConfig) -> Run:
  """The run that `context.config` describes, in the folder `name` of the workdir, with `config` in place of its `rft`."""
  policy = open_policy(context, config)
  tokenizer = policy.tokenizer()
  model = policy.compute_like(context.config.model)
  folder = policy.assets if policy.assets.is_dir() else None  # a run on bytes has no tokenizer files
  chat = None if folder is None else prompts.open_chat(folder, config.rollout.chat)
  stop_ids = prompts.stop_ids(tokenizer, folder, config.rollout.stop, chat)
  read = lambda rows: prompts.PolicyPrompts(rows, tokenizer, chat, config.rollout.max_prompt, log=context.log)
  rows, held_out = _rows(context, 'train'), _rows(context, 'test')
  kept = read(rows)
  run = Run(
    name=name,
    folder=context.workdir / name,
    home=context.home(name),
    config=config,
    model=model,
    checkpointing=context.config.checkpointing,
    profile=context.config.profile,
    mesh=context.mesh,
    seed=context.config.seed,
    prompts=kept,
    held_out=read(held_out) if held_out else None,
    tokenizer=tokenizer,
    stop_ids=stop_ids,
    reward=open_reward(context, config.reward, rows, config.rollout.max_new),
    start=lambda: policy.params(context.mesh, 'float32', head='lm'),
    fingerprint=fingerprint(context.config, config, model, tokenizer, rows),
    log=context.log,
  )
  stages.keep_tokenizer(tokenizer, run.home)
  return run


def open_policy(context: stages.Context, config: RftConfig) -> Pretrained:
  """The checkpoint that the policy starts from.

  Raises:
    UserError: there is none, or it has no language-model head.
  """
  path = context.home(stages.LM) if config.policy == 'pretrain_lm' else path_of(config.policy)
  opened = open_pretrained(path)
  if opened.head != 'lm':
    raise ConfigError(f'rft.policy {path}: has a {opened.head} head; only a language model answers prompts')
  return opened


def open_reward(context: stages.Context, config: RewardConfig, rows: Sequence[Prompt], max_new: int) -> RewardSum:
  """What `rft.reward` describes.

  Args:
    rows: the prompts to come; with `max_new` they say how long scored rows get.

  Raises:
    UserError: a checkpoint cannot be used.
  """
  parts: dict[str, tuple[float, RewardSource]] = {}
  if config.model_weight and config.source == 'http':
    parts['model'] = (config.model_weight, HttpReward(_server_template(context, config), config))
  elif config.model_weight and config.source == 'python':
    parts['python'] = (config.model_weight, open_function(config))
  elif config.model_weight:
    parts['model'] = (config.model_weight, ModelReward(open_scorer(context, config, rows, max_new), config))
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


def open_scorer(context: stages.Context, config: RewardConfig, rows: Sequence[Prompt], max_new: int) -> Scorer:
  """The reward model in this process, with its own tokenizer and template."""
  path = _reward_path(context, config)
  opened = open_pretrained(path)
  if opened.head != 'reward':
    raise ConfigError(f'rft.reward.checkpoint {path}: has a {opened.head} head; only a reward model gives rewards')
  model = opened.compute_like(context.config.model)
  template = Template(opened.template(context.config.template), opened.tokenizer())
  length = config.row_length or _row_length(template, rows, config.wrapper, max_new)
  params = opened.params(context.mesh, model.compute_dtype)
  return Scorer(params, model, template, context.mesh, row_length=length, rows=config.rows_per_batch, grow=True)


def _row_length(template: Template, rows: Sequence[Prompt], wrapper: str, max_new: int) -> int:
  """Tokens that hold the longest prompt and reference of a sample with an answer of `max_new` tokens, and some more."""
  sample = rows[:: max(len(rows) // 256, 1)]
  longest = max(len(template.encode_candidates(p.prompt, p.reference, [''], wrapper)[0]) for p in sample)
  return -(-(longest + 2 * max_new) // 128) * 128


def _reward_path(context: stages.Context, config: RewardConfig) -> pathlib.Path:
  stages_ = {'pretrain': stages.PRETRAIN, 'finetune': stages.FINETUNE}
  return context.home(stages_[config.checkpoint]) if config.checkpoint in stages_ else path_of(config.checkpoint)


def _server_template(context: stages.Context, config: RewardConfig) -> Template:
  """A server tokenises by itself; the tokenizer is needed here to cut what is too long, by its own rule."""
  path = _reward_path(context, config)
  if not path.exists():
    return context.template()
  opened = open_pretrained(path)
  return Template(opened.template(context.config.template), opened.tokenizer())


def _rows(context: stages.Context, split: str) -> Sequence[Prompt]:
  """Prompts of a split; of the held-out one none, where none is named and none stands beside the others."""
  data = context.config.data
  path = path_of(data.prompts) if data.prompts else context.data / 'prompts'
  if split == 'test' and data.prompts_validation:
    path = path_of(data.prompts_validation)
  elif not path.exists():
    raise ConfigError(f'data.prompts: no rows at {path}; name a data set there, or run the synthesize stage in this workdir first')
  elif split == 'test' and path.is_file():
    return []
  try:
    return stages.report_skipped(open_prompts(path, split, data.on_bad_example), path, context.log)
  except NoSplitError:
    if split == 'test' and not data.prompts_validation:
      return []
    raise


def fingerprint(config: Config, rft_config: RftConfig, model: ModelConfig, tokenizer: Tokenizer, rows: Sequence[Prompt]) -> dict[str, Any]:
  """What must not change while a workdir is resumed. The first entries are those that any checkpoint is opened by."""
  same_maths = {'attention', 'remat', 'scan_unroll', 'rft.micro_batch_rows', 'rft.reward.rows_per_batch', 'rft.rollout.max_concurrent'}
  settings = _flat('rft', {k: v for k, v in dataclasses.asdict(rft_config).items() if k not in _FREE})
  return {
    'objective': 'next_token',
    'seed': config.seed,
    'tokenizer': stages.tokenizer_fingerprint(tokenizer),
    **{f'model.{k}': v for k, v in dataclasses.asdict(model).items() if k not in same_maths},
    **{k: v for k, v in settings.items() if k not in same_maths},
    'rows': stages.texts_fingerprint(rows, lambda p: (p.prompt, p.reference, p.answer, p.metadata.get('policy_prompt'))),
  }


def _flat(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, value in settings.items():
    out |= _flat(f'{prefix}.{name}', value) if isinstance(value, dict) else {f'{prefix}.{name}': value}
  return out
