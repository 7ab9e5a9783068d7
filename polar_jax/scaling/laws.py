"""Learning rate and batch size as power laws of size and data: the paper's, and the procedure that finds them from sweeps.

The paper prints its laws (section 3.3) with all quantities "in millions". With millions of tokens they miss its own settings by far;
with parameters in units of 2^20 and tokens in units of 2^30 they give the printed settings to the last digit. Arguments here are plain
counts of parameters and tokens; the units are inside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

from polar_jax.scaling.fit import LEVEL, FitError

_LEAST_SPREAD = 0.02  # of a quantity that the others do not tell, in its own standard deviations
_PARAMETERS, _TOKENS = float(2**20), float(2**30)  # units of the paper's laws


def learning_rate(parameters: float, lm_tokens: float, rm_tokens: float) -> float:
  """The paper's peak learning rate of contrastive pre-training.

  Args:
    parameters: of the reward model.
    lm_tokens: that the language model it starts from had seen.
    rm_tokens: that it is going to see.
  """
  return 0.0002306 * (parameters / _PARAMETERS) ** 0.01125 * (lm_tokens / _TOKENS) ** -0.66587 * (rm_tokens / _TOKENS) ** 0.33916


def batch_size(parameters: float, rm_tokens: float) -> float:
  """The paper's batch size of contrastive pre-training, in triplets."""
  return 31.9032 * (parameters / _PARAMETERS) ** 0.06944 * (rm_tokens / _TOKENS) ** 0.52997


@dataclasses.dataclass(frozen=True)
class Optimum:
  """Where a sweep's loss is lowest. `at_edge`: at the end of what was swept, so that the true optimum may lie beyond."""

  value: float
  loss: float
  at_edge: bool


def optimum(values: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, degree: int) -> Optimum:
  """The lowest point of a polynomial in log value, within what was swept.

  Args:
    values: learning rates or batch sizes, all else equal; at least `degree + 1` different ones.
    loss: of each run.
    degree: 4 for learning rates and 2 for batch sizes, in the paper.

  Raises:
    FitError: too few values, or numbers that have no logarithm.
  """
  values, loss = np.asarray(values, np.float64), np.asarray(loss, np.float64)
  if not (np.isfinite(loss).all() and np.isfinite(values).all() and (values > 0).all()):
    raise FitError('values must be positive, and they and their losses finite')
  distinct = len(np.unique(values))
  if distinct <= degree:
    raise FitError(f'{distinct} different values: a polynomial of degree {degree} needs at least {degree + 1}')
  low, high = float(np.log(values.min())), float(np.log(values.max()))
  unit = (np.log(values) - low) / (high - low)
  curve = np.polynomial.Polynomial.fit(unit, loss, degree, domain=[0, 1])
  # Not the roots of its derivative: those of a quartic that is nearly a parabola are noise.
  dense = np.linspace(0.0, 1.0, 1_001)
  near = int(np.argmin(curve(dense)))
  best = float(dense[near])
  if 0 < near < len(dense) - 1:
    best = float(optimize.minimize_scalar(curve, bounds=(dense[near - 1], dense[near + 1]), method='bounded', options={'xatol': 1e-9}).x)
  return Optimum(math.exp(low + best * (high - low)), float(curve(best)), best in (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class ProductLaw:
  """y = factor * x1^e1 * x2^e2 ...: least squares in logarithms.

  Attributes:
    exponents: by the name of the quantity.
    low, high: their 95% intervals by Student's t; infinite where the rows leave no freedom.
    r2: of log y.
  """

  factor: float
  exponents: dict[str, float]
  low: dict[str, float]
  high: dict[str, float]
  r2: float
  n: int

  def __call__(self, **quantities: float) -> float:
    """The law's value; quantities in the units that it was fitted in."""
    return self.factor * math.prod(float(quantities[name]) ** e for name, e in self.exponents.items())


def _told_apart(logs: np.ndarray) -> bool:
  """Whether the quantities vary, and not one with the other: (settings, quantities).

  Tokens that follow the parameters but for rounding are not of lower rank, and their exponents would be those of the rounding.
  """
  spread = logs.std(axis=0)
  if spread.min() < 1e-6:
    return False
  return bool(np.linalg.svd((logs - logs.mean(axis=0)) / spread, compute_uv=False)[-1] > _LEAST_SPREAD * math.sqrt(len(logs)))


def fit_product_law(quantities: Mapping[str, Sequence[float] | np.ndarray], y: Sequence[float] | np.ndarray) -> ProductLaw:
  """The law that the optima of several settings follow.

  Args:
    quantities: name -> one positive number per setting.
    y: the optimum of each setting.

  Raises:
    FitError: fewer settings than numbers to be found, or settings that do not tell the quantities apart.
  """
  columns = {name: np.asarray(x, np.float64) for name, x in quantities.items()}
  y = np.asarray(y, np.float64)
  for name, x in {**columns, 'y': y}.items():
    if x.shape != y.shape or not (np.isfinite(x) & (x > 0)).all():
      raise FitError(f'{name}: one positive number for each of {len(y)} settings is needed')
  design = np.column_stack([np.ones(len(y)), *(np.log(x) for x in columns.values())])
  freedom = len(y) - design.shape[1]
  if freedom < 0 or not _told_apart(design[:, 1:]):
    raise FitError(f'{len(y)} settings do not tell {", ".join(columns)} apart: vary each of them, independently of the others')
  found, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
  residuals = np.log(y) - design @ found
  total = float(np.sum((np.log(y) - np.log(y).mean()) ** 2))
  reach = np.full(len(found), math.inf)
  if freedom:
    variance = float(residuals @ residuals) / freedom
    reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
  named = dict(zip(columns, zip(found[1:].tolist(), reach[1:].tolist(), strict=True), strict=True))
  return ProductLaw(
    factor=float(np.exp(found[0])),
    exponents={name: e for name, (e, _) in named.items()},
    low={name: e - r for name, (e, r) in named.items()},
    high={name: e + r for name, (e, r) in named.items()},
    r2=1.0 - float(residuals @ residuals) / total if total > 0 else 0.0,
    n=len(y),
  )
