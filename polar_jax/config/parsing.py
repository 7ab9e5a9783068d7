"""From an edited ConfigDict, or a plain dict, to a validated `Config`."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from polar_jax.config.base import ConfigError, OptionInfo, info
from polar_jax.config.renamed import RENAMED_VALUES, current_name
from polar_jax.config.rft import RftConfig
from polar_jax.config.root import Config
from polar_jax.config.stages import check_stage, requested_stages
from polar_jax.config.synthesis import OF_FILES, READ_OF_POOLS, PoolConfig, SynthesizeConfig
from polar_jax.config.training import LossConfig, check_adapters


def default_config() -> ml_collections.ConfigDict:
  """Return the defaults of all options, unlocked, for a config file to edit and return."""

  def build(section: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
      value = getattr(section, f.name)
      if dataclasses.is_dataclass(value):
        out[f.name] = build(value)
      else:
        kind, optional = plain_type(hints[f.name])
        out[f.name] = config_dict.placeholder(kind) if optional and value is None else value
    return out

  return build(Config())


def parse(raw: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
  """Turn an edited ConfigDict, or a plain dict of sections, into a frozen `Config`. Absent options keep their defaults.

  Raises:
    ConfigError: A setting is unknown or invalid; the message names it, its value and what is allowed.
  """
  config = _parse_section(raw, Config(), '')
  _check_together(config)
  return config


def check_name(name: str) -> None:
  """Check that a dotted name is that of an option or a section.

  Raises:
    ConfigError: It is neither; the message has its present name if it is a former one, else the names that exist.
  """
  section: Any = Config()
  parts = name.split('.')
  for i, part in enumerate(parts):
    prefix = '.'.join(parts[:i])
    if not dataclasses.is_dataclass(section):
      raise ConfigError(f'unknown setting {name}; {prefix} is a setting, not a section')
    if part not in {f.name for f in dataclasses.fields(section)}:
      known_once = current_name(name) != name
      raise _unknown(name if known_once else '.'.join(parts[: i + 1]), prefix, section)
    section = getattr(section, part)


def may_be_none(name: str) -> bool:
  """Return whether a dotted name is that of an option of which None is a value."""
  section: Any = Config()
  *parts, last = name.split('.')
  for part in parts:
    section = getattr(section, part, None)
  if not dataclasses.is_dataclass(section):
    return False
  hint = typing.get_type_hints(type(section)).get(last)
  return hint is not None and plain_type(hint)[1]


def plain_type(hint: Any) -> tuple[type, bool]:
  """Return (type, whether None is allowed) for an annotation such as `int` or `int | None`."""
  args = [a for a in typing.get_args(hint) if a is not types.NoneType]
  return (args[0], True) if isinstance(hint, types.UnionType) else (hint, False)


def _unknown(name: str, prefix: str, section: Any) -> ConfigError:
  """Return the error for a name that does not exist in `section`, whose own name is `prefix`."""
  known = lambda of: ', '.join(sorted(f.name for f in dataclasses.fields(of)))
  new = current_name(name)
  if new == name:
    return ConfigError(f'unknown setting {name}; {prefix or "the config"} has: {known(section)}')
  try:
    check_name(new)
    return ConfigError(f'unknown setting {name}; it is called {new} now')
  except ConfigError:  # no option of the former section either
    former, present = name.partition('.')[0], new.partition('.')[0]
    return ConfigError(f'unknown setting {name}; section {former} is called {present} now and has: {known(getattr(Config(), present))}')


def _parse_section(raw: Any, default: Any, prefix: str) -> Any:
  """Parse a section and those in it. What `raw` leaves out keeps the value of `default`: sections of one class differ in defaults."""
  cls = type(default)
  names = {f.name for f in dataclasses.fields(cls)}
  for key in raw:
    if key not in names:
      inside = next(iter(raw[key]), None) if hasattr(raw[key], 'keys') else None  # an option of a former section
      raise _unknown(
        f'{prefix}{key}.{inside}' if inside and current_name(f'{prefix}{key}') != f'{prefix}{key}' else f'{prefix}{key}',
        prefix[:-1],
        default,
      )
  hints = typing.get_type_hints(cls)
  values = {}
  for f in dataclasses.fields(cls):
    if f.name not in raw:
      continue
    hint, value, name = hints[f.name], raw[f.name], f'{prefix}{f.name}'
    if dataclasses.is_dataclass(hint):
      if not hasattr(value, 'keys'):
        raise ConfigError(f'{name} is a section with settings of its own; it cannot be set to {value!r}')
      values[f.name] = _parse_section(value, getattr(default, f.name), f'{name}.')
    else:
      values[f.name] = _check_value(name, value, hint, info(f.metadata))
  return dataclasses.replace(default, **values)


def _check_value(name: str, value: Any, hint: Any, allowed: OptionInfo) -> Any:
  if typing.get_origin(hint) is tuple:
    return _check_tuple(name, value, hint, allowed)
  kind, optional = plain_type(hint)
  if value is None:
    if optional:
      return None
    raise ConfigError(f'{name} must be a {kind.__name__}, not None')
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(f'{name} must be a {kind.__name__}{" or None" if optional else ""}, not {value!r}')
  if allowed.choices and value not in allowed.choices:
    raise ConfigError(f'{name} is {value!r}; it must be one of: {", ".join(allowed.choices)}')
  if value in RENAMED_VALUES.get(name, {}):
    raise ConfigError(
      f"{name} is {value!r}; that stage is called {RENAMED_VALUES[name][value]!r} now (a folder of that name is './{value}')"
    )
  if isinstance(value, (int, float)):
    _check_bounds(name, value, allowed)
  return value


def _check_bounds(name: str, value: float, allowed: OptionInfo) -> None:
  if not math.isfinite(value):
    raise ConfigError(f'{name} is {value!r}; it must be finite')
  if allowed.min is not None and value < allowed.min:
    raise ConfigError(f'{name} is {value!r}; it must be >= {allowed.min}')
  if allowed.exclusive_min is not None and value <= allowed.exclusive_min:
    raise ConfigError(f'{name} is {value!r}; it must be > {allowed.exclusive_min}')
  if allowed.max is not None and value > allowed.max:
    raise ConfigError(f'{name} is {value!r}; it must be <= {allowed.max}')


def _check_tuple(name: str, value: Any, hint: Any, allowed: OptionInfo) -> tuple:
  kind = typing.get_args(hint)[0]
  if not isinstance(value, (tuple, list)) or not value:
    raise ConfigError(f'{name} must be a tuple of {kind.__name__}, such as {name}="(1, 2)" on the command line, not {value!r}')
  checked = tuple(_check_value(f'{name}[{i}]', item, kind, allowed) for i, item in enumerate(value))
  if len(set(checked)) < len(checked):
    raise ConfigError(f'{name} is {value!r}; its values must differ')
  return checked


def _check_world(s: SynthesizeConfig) -> None:
  """Check that no setting of `synthesize` is about another world."""
  of_pools = [f.name for f in dataclasses.fields(PoolConfig) if s.world != 'pool' and getattr(s, f.name) not in (None, f.default)]
  of_pools = [name for name in of_pools if name not in READ_OF_POOLS.get(s.world, ())]
  if of_pools:
    raise ConfigError(
      f"synthesize.{of_pools[0]} is set, but synthesize.world is {s.world!r}; set it to 'pool', as in configs/synthesize.py (docs/pools.md)"
    )
  defaults = SynthesizeConfig()
  of_files = [name for name in OF_FILES if s.world != 'files' and getattr(s, name) != getattr(defaults, name)]
  if of_files:
    raise ConfigError(f"synthesize.{of_files[0]} is set, but synthesize.world is {s.world!r}; set it to 'files' (docs/real.md)")


def _check_together(c: Config) -> None:
  """Check the rules that involve several settings, or parts of one."""
  check_stage(c.stage)
  m, s = c.model, c.synthesize
  if m.num_heads % m.num_kv_heads:
    raise ConfigError(f'model.num_heads ({m.num_heads}) must be a multiple of model.num_kv_heads ({m.num_kv_heads})')
  if m.head_dim % 2:
    raise ConfigError(f'model.head_dim is {m.head_dim}; it must be even for rotary embeddings')
  if m.rope_low_freq_factor >= m.rope_high_freq_factor:
    raise ConfigError(
      f'model.rope_low_freq_factor ({m.rope_low_freq_factor}) must be less than model.rope_high_freq_factor ({m.rope_high_freq_factor})'
    )
  if m.rope_beta_slow >= m.rope_beta_fast:
    raise ConfigError(f'model.rope_beta_slow ({m.rope_beta_slow}) must be less than model.rope_beta_fast ({m.rope_beta_fast})')
  if m.rope_scaling == 'yarn' and m.rope_theta <= 1:
    raise ConfigError(f"model.rope_theta is {m.rope_theta}; it must be more than 1 with model.rope_scaling 'yarn'")
  of_windows = [name for name in ('global_every', 'rope_local_theta') if getattr(m, name) is not None]
  if of_windows and m.sliding_window is None:
    raise ConfigError(f'model.{of_windows[0]} is set, but no layer has a window; set model.sliding_window too')
  if c.tokenizer.kind == 'file' and c.tokenizer.path is None:
    raise ConfigError("tokenizer.path is not set, but tokenizer.kind is 'file'; set it to a tokenizer.json or tokenizer.model")
  if s.prefix_min_tokens > s.prefix_max_tokens:
    raise ConfigError(f'synthesize.prefix_min_tokens ({s.prefix_min_tokens}) exceeds synthesize.prefix_max_tokens ({s.prefix_max_tokens})')
  if s.unseen_policies > s.policies - 2:
    raise ConfigError(f'synthesize.unseen_policies ({s.unseen_policies}) must leave two of synthesize.policies ({s.policies}) to train on')
  _check_world(s)
  sizes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.context)
  if 0 in sizes or sizes.count(-1) > 1:
    raise ConfigError(f'mesh {sizes} (data, fsdp, tensor, context): sizes must be positive, and at most one may be -1')
  if c.pretrain_lm.loss != LossConfig():
    raise ConfigError('pretrain_lm.loss is set, but a language model is trained on the next token alone; set it for pretrain or finetune')
  for name in ('pretrain', 'finetune'):
    getattr(c, name).loss.check(f'{name}.loss')
  for name, optimizer in (
    ('pretrain_lm', c.pretrain_lm),
    ('pretrain', c.pretrain),
    ('finetune', c.finetune),
    ('rft.actor', c.rft.actor),
    ('rft.critic', c.rft.critic),
  ):
    optimizer.check_optimizer(name)
  for stage in ('pretrain_lm', 'pretrain', 'finetune', 'rft'):
    check_adapters(f'{stage}.lora', getattr(c, stage).lora)
    if m.frozen_layers and getattr(c, stage).lora.rank is not None:
      raise ConfigError(f'model.frozen_layers is set, but the adapters of {stage}.lora freeze every layer already; set one of them')
  if s.negatives > 1 and {'synthesize', 'sweep'} <= {*requested_stages(c)} and c.data.triplets is None:
    raise ConfigError(
      f'synthesize.negatives is {s.negatives}, but a sweep pre-trains on triplets; set it to 1, or leave out the stage sweep'
    )
  if c.ablation_learning_rate is not None and not (c.ablations or c.equal_compute):
    raise ConfigError('ablation_learning_rate is set, but no arm without pre-training is trained; set ablations or equal_compute to True')
  _check_rft(c.rft)


def _check_rft(r: RftConfig) -> None:
  responses = r.prompts_per_step * r.num_generations
  if r.mini_batch_size is not None and r.mini_batch_size > responses:
    raise ConfigError(
      f'rft.mini_batch_size ({r.mini_batch_size}) exceeds the {responses} responses of a step (rft.prompts_per_step x rft.num_generations)'
    )
  if r.num_generations == 1 and (r.advantage != 'gae' or r.reward.normalize == 'group'):
    raise ConfigError(
      "rft.num_generations is 1, but rft.advantage 'grpo' and 'rloo' and rft.reward.normalize 'group' compare responses to one prompt; "
      'set it to 2 or more'
    )
  if r.row_length is not None and r.row_length < r.rollout.max_prompt + r.rollout.max_new:
    raise ConfigError(
      f'rft.row_length ({r.row_length}) is less than rft.rollout.max_prompt + rft.rollout.max_new '
      f'({r.rollout.max_prompt + r.rollout.max_new}); a prompt and its response must fit'
    )
  if r.kl_in == 'loss' and r.kl_estimator == 'k1':
    raise ConfigError("rft.kl_in is 'loss', but the gradient of rft.kl_estimator 'k1' is 0 on average; use 'k2' or 'k3'")
  if r.kl_target is not None and r.kl_horizon <= 0.2 * responses:
    raise ConfigError(f'rft.kl_horizon ({r.kl_horizon:g}) must exceed a fifth of the {responses} responses of a step')
  if r.lora.dropout:
    raise ConfigError(f'rft.lora.dropout is {r.lora.dropout:g}, but PPO compares log-probabilities before and after an update; set it to 0')
  if r.reward.source == 'python' and r.reward.function is None:
    raise ConfigError("rft.reward.source is 'python', but rft.reward.function is not set; set it to 'module:name'")
  if r.reward.source != 'python' and r.reward.function is not None:
    raise ConfigError(f"rft.reward.function is set, but rft.reward.source is {r.reward.source!r}; set rft.reward.source to 'python'")
  if r.reward.rule_weight and r.reward.rule is None:
    raise ConfigError('rft.reward.rule_weight is set without a rule; set rft.reward.rule')
  if not r.reward.model_weight and not r.reward.rule_weight:
    raise ConfigError('rft.reward.model_weight and rft.reward.rule_weight are both 0, so every reward is 0; set one of them')
  if r.rollout.min_new > r.rollout.max_new:
    raise ConfigError(f'rft.rollout.min_new ({r.rollout.min_new}) exceeds rft.rollout.max_new ({r.rollout.max_new})')
