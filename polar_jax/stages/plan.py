"""The plan stage: whether a run fits a TPU slice and what it would cost, told from a machine without TPUs."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, cast

from polar_jax.config import ConfigError, ModelConfig
from polar_jax.model import flops
from polar_jax.model.presets import PRESETS
from polar_jax.planning import ppo_step, train_step
from polar_jax.planning.topology import GIB
from polar_jax.stages.context import Context
from polar_jax.types import UserError

FILE = 'plan.json'
ASSUMPTIONS = (
  'matrix units at their bfloat16 peak, HBM and links at their stated bandwidths, half of a link figure in each direction',
  'collectives as rings; bytes of HBM are operands and results of every compiled operation that are not kept on the chip',
  'between perfect overlap of computing, HBM and links (overlapped) and none (serial); no stalls for data, saves or restarts',
)


def run(context: Context) -> None:
  """Plans the step of `plan.step`, prints it and writes plan.json.

  Raises:
    ConfigError: the slice, the mesh or a shape cannot be planned.
  """
  config = context.config
  if config.plan.step == 'rft':
    found = ppo_step.plan(config, config.plan.topology, _preset(config.plan.reward), context.log)
    lines, facts = ppo_step.table(found), {**ppo_step.as_json(found), 'parameters': flops.language_model_parameters(_shape(context)).total}
  else:
    model = _shape(context)
    training = train_step.plan(config, model, context.log)
    change = train_step.changes(training, model)
    lines, facts = table(training, change), as_json(training, change)
  for line in lines:
    context.log(line)
  path = context.workdir / FILE
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(facts, indent=2) + '\n')
  os.replace(temporary, path)
  context.log(f'plan: {path}')


def _preset(name: str) -> ModelConfig:
  if name not in PRESETS:
    raise ConfigError(f'plan.reward is {name!r}; it must be one of: {", ".join(PRESETS)}')
  return ModelConfig(**cast(Any, PRESETS[name]))


def _shape(context: Context) -> ModelConfig:
  """The model, with a vocabulary: a plan has no need of the tokenizer where `model` says its size."""
  model = context.config.model
  if model.vocab_size is not None:
    return model
  if context.config.tokenizer.kind == 'trained':
    return dataclasses.replace(model, vocab_size=context.config.synthesize.vocab_size)
  try:
    return context.model_config()
  except UserError as error:
    raise ConfigError(f'model.vocab_size is not set, and no tokenizer tells it ({error}): set it') from error


def as_json(found: train_step.Plan, change: list[str]) -> dict[str, Any]:
  """Sizes in bytes of a chip, times in seconds, FLOPs of all chips together."""
  m, t, roof = found.memory, found.traffic, found.roofline
  return {
    'parameters': found.parameters,
    'fits': found.fits,
    'topology': found.topology,
    'chips': found.chips,
    'mesh': found.mesh,
    'batch': {
      'rows': found.rows,
      'row_length': found.row_length,
      'accumulation': found.accumulation,
      'rows_per_chip': found.rows_per_chip,
      'tokens': found.tokens_per_step,
    },
    'memory': {
      'hbm': found.chip.hbm,
      'peak': m.peak,
      'state': found.state,
      **{name: value for name, value in m._asdict().items() if name not in ('seconds', 'failure')},
    },
    'flops': {'model': found.flops_model, 'hardware': found.flops_hardware, 'xla': found.flops_xla},
    'collectives': t and {kind: {'count': t.count[kind], 'bytes': t.size[kind], 'sent': t.sent[kind]} for kind in t.count},
    'hbm_bytes': t and t.hbm,
    'step_seconds': roof and {**roof._asdict(), 'overlapped': roof.overlapped, 'serial': roof.serial},
    'run': _cost(found),
    'assumptions': list(ASSUMPTIONS),
    'change': change,
    'failure': m.failure,
    'compile_seconds': round(m.seconds, 1),
  }


def _cost(found: train_step.Plan) -> dict[str, Any] | None:
  """What the configured run takes at the two ends of the roofline."""
  if found.roofline is None:
    return None
  ends = {'overlapped': found.roofline.overlapped, 'serial': found.roofline.serial}
  out: dict[str, Any] = {
    'tokens_per_second': {end: found.tokens_per_step / seconds for end, seconds in ends.items()},
    'mfu': {end: found.flops_model / (seconds * found.chips * found.peak_flops) for end, seconds in ends.items()},
    'tokens': found.total_tokens,
  }
  if found.total_tokens:
    hours = {end: found.total_tokens / found.tokens_per_step * seconds / 3600 for end, seconds in ends.items()}
    out['days'] = {end: value / 24 for end, value in hours.items()}
    out['chip_hours'] = {end: value * found.chips for end, value in hours.items()}
  return out


def table(found: train_step.Plan, change: list[str]) -> list[str]:
  """Lines for people, in Markdown."""
  m, gib = found.memory, lambda size: f'{size / GIB:.2f} GiB'
  mesh = ', '.join(f'{axis} {size}' for axis, size in found.mesh.items() if size > 1)
  held = f'{found.tokens_per_step:,.0f} of them real; {found.rows_per_chip} a chip at once'
  batch = f'{found.rows:,} rows of {found.row_length:,} tokens, {held}'
  rows = [
    ('slice', f'{found.topology}: {found.chips} chips, mesh {mesh or "of one chip"}'),
    ('parameters', f'{found.parameters:,}'),
    ('a step', f'{batch}, {found.accumulation} times' if found.accumulation > 1 else batch),
    ('parameters and moments', gib(found.state)),
  ]
  if m.refused:
    rows.append(('needed, as the compiler says', gib(m.refused)))
  elif not m.failure:
    rows += [('arguments', gib(m.argument)), ('temporaries', gib(m.temporary)), ('code', gib(m.code))]
  verdict = 'not known: it did not compile' if m.failure else 'fits' if found.fits else 'does not fit'
  rows.append(('peak of a chip', f'{gib(m.peak)} of {gib(found.chip.hbm)}: {verdict}'))
  rows.append(('FLOPs of a step', f'{found.flops_model:.3g} by the rule of MFU, {found.flops_hardware:.3g} with padding and recomputation'))
  rows += _moved(found)
  lines = ['', '| what | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows)]
  lines += [f'assumes: {line}' for line in ASSUMPTIONS] if found.traffic else []
  return lines + [f'to make it fit: {line}' for line in change]


def _moved(found: train_step.Plan) -> list[tuple[str, str]]:
  t, roof, cost = found.traffic, found.roofline, _cost(found)
  if t is None or roof is None or cost is None:
    return []
  between = lambda ends, form: f'{min(ends.values()):{form}} to {max(ends.values()):{form}}'
  rows = [(kind, f'{t.count[kind]:,.0f} a step, {t.size[kind] / GIB:,.2f} GiB') for kind in sorted(t.count)]
  rows.append(('HBM read and written', f'{t.hbm / GIB:,.1f} GiB a step'))
  rows.append(('seconds', f'{roof.compute:.3g} to compute, {roof.memory:.3g} for HBM, {roof.network:.3g} between chips'))
  rows.append(('a step takes', f'{roof.overlapped:.3g} to {roof.serial:.3g} s'))
  rows.append(('tokens/s', f'{between(cost["tokens_per_second"], ",.0f")}, MFU {between(cost["mfu"], ".0%")}'))
  if cost['tokens']:
    rows.append((f'{cost["tokens"]:.3g} tokens', f'{between(cost["days"], ".3g")} days, {between(cost["chip_hours"], ",.0f")} chip-hours'))
  return rows
