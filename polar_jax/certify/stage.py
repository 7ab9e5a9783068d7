"""The certify stage: whether a reward model gives the same rewards whichever way it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from polar_jax import api
from polar_jax.certify import rows, ways
from polar_jax.certify.comparison import Comparison, as_json, compare
from polar_jax.runtime import paths
from polar_jax.stages.context import Context
from polar_jax.types import Group, UserError

FILE = 'certificate.json'


def certify(context: Context) -> dict[str, Any]:
  """Compare the rewards of `checkpoint` on fixed rows, or those of `input`, in every way there is; print and write the differences.

  Returns:
    The section `certify` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: the checkpoint, a row or a server cannot be used, or a way gives other rewards.
  """
  config, log = context.config, context.log
  model, name = _load(context)
  groups = _rows(context, model)
  target = paths.path_of(config.output) if config.output else context.workdir / FILE
  reference = ways.offline(model, groups)
  count = sum(map(len, reference))
  log(
    f'certify: {count} rewards of {len(groups)} groups by the score stage: {min(map(min, reference)):.4g} to {max(map(max, reference)):.4g}'
  )
  found, failed = [], []
  for way in _ways(context, model, groups, name):
    result = compare([reference[i] for i in way.groups], way.rewards, config.certify.tolerance)
    holds = result.same_bits if way.exact else result.max_difference <= config.certify.tolerance
    found.append({'way': way.name, 'exact': way.exact, 'holds': holds, **as_json(result)})
    log(_line(way, result, holds))
    if not holds:
      failed.append(_failure(way, result))
  content = {'checkpoint': str(config.checkpoint), 'tolerance': config.certify.tolerance, 'holds': not failed, 'ways': found}
  paths.write_atomically(target, json.dumps(content, indent=1, allow_nan=False) + '\n')
  log(f'certify: written to {target}')
  if failed:
    raise UserError(f'certify: {len(failed)} of {len(found)} ways give other rewards: {"; ".join(failed)} ({target})')
  return {'certify': {'ways': len(found), 'rewards': count, 'max_difference': max(way['max_difference'] for way in found)}}


def _load(context: Context) -> tuple[api.RewardModel, str]:
  """Return the model, and its name on servers."""
  opened, tokenizer, template = context.reward_model('certify')
  model = api.load(opened, mesh=context.mesh, compute=context.config.model, template=template.config, tokenizer=tokenizer)
  return model, paths.absolute(opened.path).name


def _rows(context: Context, model: api.RewardModel) -> list[Group]:
  config, use_reference = context.config, model.template.config.use_reference
  if not config.input:
    return rows.fixed_rows()
  return rows.read_rows(paths.path_of(config.input), config.data.on_bad_example, use_reference)


def _ways(context: Context, model: api.RewardModel, groups: list[Group], name: str) -> Iterator[ways.Way]:
  config, log = context.config.certify, context.log
  yield from ways.in_this_process(model, groups)
  yield from ways.by_our_server(model, groups, log)
  if config.transformers:
    yield from ways.by_transformers(model, groups, log)
  yield from ways.by_other_servers(model, groups, config, name)


def _line(way: ways.Way, result: Comparison, holds: bool) -> str:
  bits = 'same bits' if result.same_bits else f'max |difference| {result.max_difference:.2e}, mean {result.mean_difference:.2e}'
  flips = f', {result.flips} of {result.pairs} pairs change places' if result.flips else ''
  return f'  {way.name:<40} {result.compared:>5} rewards  {bits}{flips}{"" if holds else "  DOES NOT HOLD"}'


def _failure(way: ways.Way, result: Comparison) -> str:
  if result.squashed:
    return f'{way.name} applies a sigmoid (serve raw scores: docs/serving.md)'
  return f'{way.name} differs by {result.max_difference:.2e}'
