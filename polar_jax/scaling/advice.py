"""Advice on how to spend a budget of FLOPs, by the scaling laws of a sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from polar_jax.config import ConfigError, FitConfig
from polar_jax.runtime.chips import CHIPS
from polar_jax.scaling import fit, laws
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results


@dataclasses.dataclass(frozen=True)
class Advice:
  """A run that spends `flops`.

  Attributes:
    flops: the budget.
    parameters: of the model.
    tokens: of triplets to train on.
    loss, low, high: expected validation loss, and the 95% interval for one run.
    decades: orders of magnitude by which `flops` is outside the swept range; 0 inside.
    split_by: the law by which the budget is divided into parameters and tokens.
    learning_rate, batch: by the laws fitted to their optima; None without such a law.
    paper_learning_rate, paper_batch: by the paper's laws; the former needs `fit.lm_tokens`.
    topology, mfu: where and how efficiently the run would train.
    chips, chip_hours, hours: of `topology` at that `mfu`.
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


def advise(rows: Results, analysis: Mapping[str, Any], config: FitConfig, seed: int = 0) -> Advice:
  """Return the run that should spend `fit.flops`.

  Args:
    rows: the runs of a sweep.
    analysis: result of `polar_jax.scaling.analysis.analyze` for them.
    config: budget, topology and MFU.
    seed: of the bootstrap.

  Raises:
    FitError: the runs do not determine how to divide FLOPs into parameters and tokens.
    ConfigError: `fit.topology` is not a known chip with a number of chips.
  """
  assert config.flops is not None
  budget, envelope = config.flops, rows.envelope()
  parameters, split_by = _split(rows, analysis, budget)
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
    learning_rate=_optimum(analysis.get('learning_rate'), at),
    batch=_optimum(analysis.get('batch'), at),
    paper_learning_rate=laws.learning_rate(parameters, config.lm_tokens, tokens) if config.lm_tokens else None,
    paper_batch=laws.batch_size(parameters, tokens),
    topology=config.topology,
    mfu=config.mfu,
    chips=chips,
    chip_hours=chip_hours,
    hours=chip_hours / chips,
  )


def flops_per_parameter_and_token(rows: Results) -> float:
  """Return k of C = k N D, the median over the runs of the largest size.

  It is 6, plus the share of attention, minus that of the embedding table and of the last layer.
  """
  largest = rows.rows(np.flatnonzero(rows.parameters == rows.parameters.max()))
  return float(np.median(largest.flops / (largest.parameters * largest.tokens)))


def _split(rows: Results, analysis: Mapping[str, Any], budget: float) -> tuple[float, str]:
  """Return the number of parameters with the lowest loss for `budget`, and the name of the law that determines it."""
  joint = analysis.get('joint')
  k = flops_per_parameter_and_token(rows)
  if joint and min(joint[name] for name in ('a', 'b', 'alpha', 'beta')) > 0:
    # The minimum of a N^-alpha + b (C / (k N))^-beta over N.
    both = joint['alpha'] + joint['beta']
    ratio = joint['alpha'] * joint['a'] / (joint['beta'] * joint['b'])
    return ratio ** (1 / both) * (budget / k) ** (joint['beta'] / both), 'the joint law'
  envelope = rows.envelope()
  if len(np.unique(envelope.parameters)) < 3:
    raise FitError('fit.flops: needs three sizes on the lower envelope, or a joint law, to divide FLOPs; sweep more sizes')
  line = stats.linregress(np.log(envelope.flops), np.log(envelope.parameters))
  return float(np.exp(line.intercept + line.slope * math.log(budget))), 'the sizes on the lower envelope'


def _optimum(tuned: Mapping[str, Any] | None, at: Mapping[str, float]) -> float | None:
  law = (tuned or {}).get('law')
  return law['factor'] * math.prod(at[name] ** e for name, e in law['exponents'].items()) if law else None


def _slice(topology: str) -> tuple[int, float]:
  """Return (number of chips, peak FLOP/s of one) of a topology such as v5p:4x4x4 or h100:8."""
  chip, _, shape = topology.partition(':')
  sizes = shape.split('x')
  if chip not in CHIPS or not all(size.isdigit() and int(size) for size in sizes):
    known = ', '.join(CHIPS)
    raise ConfigError(f'fit.topology is {topology!r}; it must be a chip ({known}) and their number, as in v5p:4x4x4 or h100:8')
  return math.prod(map(int, sizes)), CHIPS[chip].peak_flops


def describe(advice: Advice) -> list[str]:
  """Return the advice as lines of text."""
  a = advice
  lines = [
    f'advice: {a.flops:.3g} FLOPs: {a.parameters:.3g} parameters, {a.tokens:.3g} tokens (by {a.split_by})',
    f'advice: expected loss {a.loss:.4f}, 95% interval for one run [{a.low:.4f}, {a.high:.4f}]'
    + (f'; {a.decades:.1f} decades outside the swept range' if a.decades else ''),
  ]
  rate = 'unknown: sweep it' if a.learning_rate is None else f'{a.learning_rate:.3g}'
  batch = 'unknown: sweep it' if a.batch is None else f'{a.batch:.0f} triplets'
  paper = f'batch {a.paper_batch:.0f}' + ('' if a.paper_learning_rate is None else f', learning rate {a.paper_learning_rate:.3g}')
  lines.append(f"advice: learning rate {rate}, batch {batch}; by the paper's laws (of models from 50M parameters): {paper}")
  lines.append(f'advice: {a.chip_hours:.3g} chip-hours, {a.hours:.3g} hours on {a.topology} ({a.chips} chips) at {a.mfu:.0%} MFU')
  return lines
