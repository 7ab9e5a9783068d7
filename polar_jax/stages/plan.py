"""The plan stage: memory, time and cost of a run on a TPU slice, estimated without TPUs."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from polar_jax.config import ConfigError, ModelConfig
from polar_jax.model import flops
from polar_jax.model.presets import PRESETS
from polar_jax.planning import ppo_step, train_step
from polar_jax.runtime import json_files
from polar_jax.runtime.chips import GIB
from polar_jax.runtime.paths import write_atomically
from polar_jax.stages.context import Context
from polar_jax.types import UserError

FILE = 'plan.json'
ASSUMPTIONS = (
  'matrix units at their bfloat16 peak, HBM and links at their data-sheet bandwidths, half of the interconnect in each direction',
  'ring collectives; HBM traffic is the operands and results of every compiled operation that are not kept on the chip',
  'from perfect overlap of compute, HBM and links (overlapped) to none (serial); no stalls for data, checkpoints or restarts',
)


def run(context: Context) -> None:
  """Plan the step of `plan.step`, print the plan and write plan.json.

  Raises:
    ConfigError: the slice is unknown, the mesh does not fit it, or a shape is not set.
  """
  config = context.config
  if config.plan.step == 'rft':
    ppo = ppo_step.plan(config, config.plan.topology, _preset(config.plan.reward), context.log)
    lines, facts = ppo_step.table(ppo), {**ppo_step.as_json(ppo), 'parameters': flops.language_model_parameters(_shape(context)).total}
  else:
    model = _shape(context)
    training = train_step.plan(config, model, context.log)
    change = train_step.changes(training, model)
    lines, facts = table(training, change), as_json(training, change)
  for line in lines:
    context.log(line)
  path = context.workdir / FILE
  write_atomically(path, json_files.dumps(facts, indent=2) + '\n')
  context.log(f'plan: {path}')


def _preset(name: str) -> ModelConfig:
  """Return the model of a preset."""
  if name not in PRESETS:
    raise ConfigError(f'plan.reward is {name!r}; it must be one of: {", ".join(PRESETS)}')
  return ModelConfig(**cast(Any, PRESETS[name]))


def _shape(context: Context) -> ModelConfig:
  """Return the model's shape with a vocabulary; a plan needs no tokenizer if `model.vocab_size` is set."""
  config, step = context.config, context.config.plan.step
  model = config.model
  if model.vocab_size is not None:
    return model
  if config.tokenizer.kind == 'trained':
    return dataclasses.replace(model, vocab_size=config.synthesize.vocab_size)
  try:
    return context.model_config(train=None if step == 'rft' else getattr(config, step))
  except UserError as error:
    raise ConfigError(f'model.vocab_size is not set, and the tokenizer cannot be opened ({error}); set model.vocab_size') from error


def as_json(plan: train_step.Plan, change: list[str]) -> dict[str, Any]:
  """Return a plan as JSON values: sizes in bytes per chip, times in seconds, FLOPs of all chips together."""
  m, t, roof = plan.memory, plan.traffic, plan.roofline
  return {
    'parameters': plan.parameters,
    'trained': plan.trained,
    'fits': plan.fits,
    'topology': plan.topology,
    'chips': plan.chips,
    'mesh': plan.mesh,
    'batch': {
      'rows': plan.rows,
      'row_length': plan.row_length,
      'accumulation': plan.accumulation,
      'rows_per_chip': plan.rows_per_chip,
      'tokens': plan.tokens_per_step,
    },
    'memory': {
      'hbm': plan.chip.hbm,
      'peak': m.peak,
      'state': plan.state,
      **{name: value for name, value in m._asdict().items() if name not in ('seconds', 'failure')},
    },
    'flops': {'model': plan.flops_model, 'hardware': plan.flops_hardware, 'xla': plan.flops_xla},
    'collectives': t and {kind: {'count': t.count[kind], 'bytes': t.size[kind], 'sent': t.sent[kind]} for kind in t.count},
    'hbm_bytes': t and t.hbm,
    'step_seconds': roof and {**roof._asdict(), 'overlapped': roof.overlapped, 'serial': roof.serial},
    'run': _cost(plan),
    'assumptions': list(ASSUMPTIONS),
    'change': change,
    'failure': m.failure,
    'compile_seconds': round(m.seconds, 1),
  }


def _cost(plan: train_step.Plan) -> dict[str, Any] | None:
  """Return speed, MFU and cost of the run at the two ends of the roofline, or None if the step did not compile."""
  if plan.roofline is None:
    return None
  ends = {'overlapped': plan.roofline.overlapped, 'serial': plan.roofline.serial}
  out: dict[str, Any] = {
    'tokens_per_second': {end: plan.tokens_per_step / seconds for end, seconds in ends.items()},
    'mfu': {end: plan.flops_model / (seconds * plan.chips * plan.peak_flops) for end, seconds in ends.items()},
    'tokens': plan.total_tokens,
  }
  if plan.total_tokens:
    hours = {end: plan.total_tokens / plan.tokens_per_step * seconds / 3600 for end, seconds in ends.items()}
    out['days'] = {end: value / 24 for end, value in hours.items()}
    out['chip_hours'] = {end: value * plan.chips for end, value in hours.items()}
  return out


def table(plan: train_step.Plan, change: list[str]) -> list[str]:
  """Return a plan as Markdown lines."""
  m, gib = plan.memory, lambda size: f'{size / GIB:.2f} GiB'
  mesh = ', '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if size > 1)
  batch = (
    f'{plan.rows:,} rows of {plan.row_length:,} tokens, {plan.tokens_per_step:,.0f} of them real; '
    f'{plan.rows_per_chip} rows per chip at a time'
  )
  rows = [
    ('slice', f'{plan.topology}: {plan.chips} chips, mesh {mesh or "of one chip"}'),
    ('parameters', f'{plan.parameters:,}' if plan.trained == plan.parameters else f'{plan.parameters:,}, and {plan.trained:,} trained'),
    ('a step', f'{batch}, {plan.accumulation} times' if plan.accumulation > 1 else batch),
    ('parameters and moments', gib(plan.state)),
  ]
  if m.refused:
    rows.append(('needed, by the compiler', gib(m.refused)))
  elif not m.failure:
    rows += [('arguments', gib(m.argument)), ('temporaries', gib(m.temporary)), ('code', gib(m.code))]
  verdict = 'unknown: it did not compile' if m.failure else 'fits' if plan.fits else 'does not fit'
  rows.append(('peak per chip', f'{gib(m.peak)} of {gib(plan.chip.hbm)}: {verdict}'))
  rows.append(('FLOPs of a step', f'{plan.flops_model:.3g} by the MFU rule, {plan.flops_hardware:.3g} with padding and recomputation'))
  rows += _moved(plan)
  lines = ['', '| what | |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows)]
  lines += [f'assumes: {line}' for line in ASSUMPTIONS] if plan.traffic else []
  return lines + [f'to make it fit: {line}' for line in change]


def _moved(plan: train_step.Plan) -> list[tuple[str, str]]:
  """Return the table's rows of traffic, time and cost; none if the step did not compile."""
  t, roof, cost = plan.traffic, plan.roofline, _cost(plan)
  if t is None or roof is None or cost is None:
    return []
  between = lambda ends, form: f'{min(ends.values()):{form}} to {max(ends.values()):{form}}'
  rows = [(kind, f'{t.count[kind]:,.0f} per step, {t.size[kind] / GIB:,.2f} GiB') for kind in sorted(t.count)]
  rows.append(('HBM read and written', f'{t.hbm / GIB:,.1f} GiB per step'))
  rows.append(('seconds', f'compute {roof.compute:.3g}, HBM {roof.memory:.3g}, links {roof.network:.3g}'))
  rows.append(('a step takes', f'{roof.overlapped:.3g} to {roof.serial:.3g} s'))
  rows.append(('tokens/s', f'{between(cost["tokens_per_second"], ",.0f")}, MFU {between(cost["mfu"], ".0%")}'))
  if cost['tokens']:
    rows.append((f'{cost["tokens"]:.3g} tokens', f'{between(cost["days"], ".3g")} days, {between(cost["chip_hours"], ",.0f")} chip-hours'))
  return rows
