"""What a budget of FLOPs should be spent on, by the laws that a sweep found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from polar_jax.config import ConfigError, FitConfig
from polar_jax.model import flops
from polar_jax.scaling import fit, laws
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results


@dataclasses.dataclass(frozen=True)
class Advice:
  """A run that spends `flops`.

  Attributes:
    tokens: of triplets.
    loss, low, high: expected loss on validation, and the 95% interval for one run.
    decades: by how many powers of ten `flops` lies beyond the swept ones; 0 within them.
    split_by: where the division into parameters and tokens comes from.
    learning_rate, batch: by the laws of their optima; None where none could be found.
    paper_batch, paper_learning_rate: by the paper's laws; the second needs `lm_tokens`.
    chips, chip_hours, hours: on `topology` at `mfu`.
  """

  flops: float
  parameters: float
  tokens: float
  loss: float
  low: float
  high: float
  decades: float
  split_by: str
  learning_rate: float | None
  batch: float | None
  paper_learning_rate: float | None
  paper_batch: float
  topology: str
  mfu: float
  chips: int
  chip_hours: float
  hours: float


def advise(rows: Results, found: Mapping[str, Any], config: FitConfig, seed: int = 0) -> Advice:
  """
  Args:
    rows: of results.csv.
    found: what `polar_jax.stages.fit.study` made of them.

  Raises:
    FitError: the rows do not tell how to divide FLOPs into parameters and tokens.
    ConfigError: `fit.topology` names no chip or slice that is known.
  """
  assert config.flops is not None
  budget, envelope = config.flops, rows.envelope()
  parameters, split_by = _split(rows, found, budget)
  tokens = budget / (flops_per_parameter_and_token(rows) * parameters)
  loss, low, high = fit.fit_power_law(envelope.flops, envelope.loss, seed).predict(budget)
  chips, peak = _slice(config.topology)
  chip_hours = budget / (peak * config.mfu) / 3600
  at = {'parameters': parameters, 'tokens': tokens}
  return Advice(
    flops=budget,
    parameters=parameters,
    tokens=tokens,
    loss=loss,
    low=low,
    high=high,
    decades=max(math.log10(budget / rows.flops.max()), math.log10(rows.flops.min() / budget), 0.0),
    split_by=split_by,
    learning_rate=_optimum(found.get('learning_rate'), at),
    batch=_optimum(found.get('batch'), at),
    paper_learning_rate=laws.learning_rate(parameters, config.lm_tokens, tokens) if config.lm_tokens else None,
    paper_batch=laws.batch_size(parameters, tokens),
    topology=config.topology,
    mfu=config.mfu,
    chips=chips,
    chip_hours=chip_hours,
    hours=chip_hours / chips,
  )


def flops_per_parameter_and_token(rows: Results) -> float:
  """k of C = k N D, the median over the rows of largest size: 6 but for what attention adds, and embeddings and the last layer save."""
  largest = rows.rows(np.flatnonzero(rows.parameters == rows.parameters.max()))
  return float(np.median(largest.flops / (largest.parameters * largest.tokens)))


def _split(rows: Results, found: Mapping[str, Any], budget: float) -> tuple[float, str]:
  """(parameters, by what) of the least loss for `budget`."""
  joint = found.get('joint')
  k = flops_per_parameter_and_token(rows)
  if joint and min(joint[name] for name in ('a', 'b', 'alpha', 'beta')) > 0:
    # The least a N^-alpha + b (C / (k N))^-beta.
    both = joint['alpha'] + joint['beta']
    ratio = joint['alpha'] * joint['a'] / (joint['beta'] * joint['b'])
    return ratio ** (1 / both) * (budget / k) ** (joint['beta'] / both), 'the joint law'
  envelope = rows.envelope()
  if len(np.unique(envelope.parameters)) < 3:
    raise FitError('fit.flops: three sizes on the lower envelope, or a joint law, are needed to divide FLOPs into parameters and tokens')
  line = stats.linregress(np.log(envelope.flops), np.log(envelope.parameters))
  return float(np.exp(line.intercept + line.slope * math.log(budget))), 'the sizes on the lower envelope'


def _optimum(tuned: Mapping[str, Any] | None, at: Mapping[str, float]) -> float | None:
  law = (tuned or {}).get('law')
  return law['factor'] * math.prod(at[name] ** e for name, e in law['exponents'].items()) if law else None


def _slice(topology: str) -> tuple[int, float]:
  """(chips, peak FLOP/s of one) of a name such as v5p:4x4x4 or h100:8."""
  chip, _, shape = topology.partition(':')
  sizes = shape.split('x')
  if chip not in flops.CHIPS or not all(size.isdigit() and int(size) for size in sizes):
    known = ', '.join(flops.CHIPS)
    raise ConfigError(f'fit.topology is {topology!r}; it must be a chip ({known}) and how many, as in v5p:4x4x4 or h100:8')
  return math.prod(map(int, sizes)), flops.CHIPS[chip]


def describe(advice: Advice) -> list[str]:
  """The advice in sentences."""
  a = advice
  lines = [
    f'advice: {a.flops:.3g} FLOPs: {a.parameters:.3g} parameters, {a.tokens:.3g} tokens (by {a.split_by})',
    f'advice: expected loss {a.loss:.4f}, 95% interval for one run [{a.low:.4f}, {a.high:.4f}]'
    + (f'; {a.decades:.1f} decades beyond what was swept' if a.decades else ''),
  ]
  rate = 'not known: sweep it' if a.learning_rate is None else f'{a.learning_rate:.3g}'
  batch = 'not known: sweep it' if a.batch is None else f'{a.batch:.0f} triplets'
  paper = f'batch {a.paper_batch:.0f}' + ('' if a.paper_learning_rate is None else f', learning rate {a.paper_learning_rate:.3g}')
  lines.append(f"advice: learning rate {rate}, batch {batch}; by the paper's laws, of models from 50M parameters: {paper}")
  lines.append(f'advice: {a.chip_hours:.3g} chip-hours, {a.hours:.3g} hours on {a.topology} ({a.chips} chips) at {a.mfu:.0%} of their peak')
  return lines
