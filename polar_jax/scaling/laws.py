"""Learning rate and batch size as power laws of model and data size: those of the paper, and fits to sweeps.

The paper prints its laws (section 3.3) with all quantities "in millions". With tokens in millions they are far from the paper's own
settings; with parameters in units of 2^20 and tokens in units of 2^30 they reproduce those settings to the last digit. The functions
take plain counts of parameters and tokens and convert the units.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import optimize, stats

from polar_jax.scaling.fit import LEVEL, FitError

_MIN_SPREAD = 0.02  # of a quantity after regression on the others, in units of its own standard deviation
_PARAMETERS, _TOKENS = float(2**20), float(2**30)  # units of the paper's laws


def learning_rate(parameters: float, lm_tokens: float, rm_tokens: float) -> float:
  """Return the paper's peak learning rate of contrastive pre-training.

  Args:
    parameters: of the reward model.
    lm_tokens: on which the language model it starts from was trained.
    rm_tokens: on which it will be trained.
  """
  return 0.0002306 * (parameters / _PARAMETERS) ** 0.01125 * (lm_tokens / _TOKENS) ** -0.66587 * (rm_tokens / _TOKENS) ** 0.33916


def batch_size(parameters: float, rm_tokens: float) -> float:
  """Return the paper's batch size of contrastive pre-training, in triplets."""
  return 31.9032 * (parameters / _PARAMETERS) ** 0.06944 * (rm_tokens / _TOKENS) ** 0.52997


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The lowest point of a sweep. If it is `at_edge`, an end of the swept range, the true optimum may lie outside."""

  value: float
  loss: float
  at_edge: bool


def optimum(values: Sequence[float] | np.ndarray, loss: Sequence[float] | np.ndarray, degree: int) -> Optimum:
  """Return the lowest point of a polynomial in log value, within the swept range.

  Args:
    values: learning rates or batch sizes, all else equal; at least `degree + 1` different ones.
    loss: of each run.
    degree: 4 for learning rates and 2 for batch sizes, in the paper.

  Raises:
    FitError: there are too few values, a value is not positive and finite, or a loss is not finite.
  """
  values, loss = np.asarray(values, np.float64), np.asarray(loss, np.float64)
  if not (np.isfinite(loss).all() and np.isfinite(values).all() and (values > 0).all()):
    raise FitError('values must be positive and finite, and their losses finite')
  distinct = len(np.unique(values))
  if distinct <= degree:
    raise FitError(f'a polynomial of degree {degree} needs at least {degree + 1} different values, got {distinct}')
  low, high = float(np.log(values.min())), float(np.log(values.max()))
  unit = (np.log(values) - low) / (high - low)
  curve = np.polynomial.Polynomial.fit(unit, loss, degree, domain=[0, 1])
  # A grid and a local search: the roots of the derivative of a quartic that is nearly a parabola are noise.
  points = np.linspace(0.0, 1.0, 1_001)
  lowest = int(np.argmin(curve(points)))
  best = float(points[lowest])
  if 0 < lowest < len(points) - 1:
    bounds = (points[lowest - 1], points[lowest + 1])
    best = float(optimize.minimize_scalar(curve, bounds=bounds, method='bounded', options={'xatol': 1e-9}).x)
  return Optimum(math.exp(low + best * (high - low)), float(curve(best)), best in (0.0, 1.0))


@dataclasses.dataclass(frozen=True)
class ProductLaw:
  """y = factor * x1^e1 * x2^e2 * ..., fitted by least squares in log space.

  Attributes:
    factor: of the formula.
    exponents: by the name of the quantity.
    low, high: their 95% intervals (Student's t); infinite if there are no degrees of freedom.
    r2: coefficient of determination of log y.
    n: number of points.
  """

  factor: float
  exponents: dict[str, float]
  low: dict[str, float]
  high: dict[str, float]
  r2: float
  n: int

  def __call__(self, **quantities: float) -> float:
    """Return y for quantities in the units of the fit."""
    return self.factor * math.prod(float(quantities[name]) ** e for name, e in self.exponents.items())


def _identifiable(logs: np.ndarray) -> bool:
  """Return whether the quantities, an array (settings, quantities), vary independently of each other.

  Testing the rank is not enough: if tokens follow from parameters except for rounding, the rounding would determine the exponents.
  """
  spread = logs.std(axis=0)
  if spread.min() < 1e-6:
    return False
  return bool(np.linalg.svd((logs - logs.mean(axis=0)) / spread, compute_uv=False)[-1] > _MIN_SPREAD * math.sqrt(len(logs)))


def fit_product_law(quantities: Mapping[str, Sequence[float] | np.ndarray], y: Sequence[float] | np.ndarray) -> ProductLaw:
  """Fit a product of powers to the optima of several settings.

  Args:
    quantities: name -> one positive number per setting.
    y: the optimum of each setting.

  Raises:
    FitError: there are fewer settings than unknowns, or the quantities do not vary independently.
  """
  columns = {name: np.asarray(x, np.float64) for name, x in quantities.items()}
  y = np.asarray(y, np.float64)
  for name, x in {**columns, 'y': y}.items():
    if x.shape != y.shape or not (np.isfinite(x) & (x > 0)).all():
      raise FitError(f'{name}: needs one positive number for each of {len(y)} settings')
  design = np.column_stack([np.ones(len(y)), *(np.log(x) for x in columns.values())])
  freedom = len(y) - design.shape[1]
  if freedom < 0 or not _identifiable(design[:, 1:]):
    raise FitError(f'{len(y)} settings do not separate the effects of {", ".join(columns)}; vary each of them independently')
  solution, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
  residuals = np.log(y) - design @ solution
  total = float(np.sum((np.log(y) - np.log(y).mean()) ** 2))
  margin = np.full(len(solution), math.inf)
  if freedom:
    variance = float(residuals @ residuals) / freedom
    margin = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
  named = dict(zip(columns, zip(solution[1:].tolist(), margin[1:].tolist(), strict=True), strict=True))
  return ProductLaw(
    factor=float(np.exp(solution[0])),
    exponents={name: e for name, (e, _) in named.items()},
    low={name: e - m for name, (e, m) in named.items()},
    high={name: e + m for name, (e, m) in named.items()},
    r2=1.0 - float(residuals @ residuals) / total if total > 0 else 0.0,
    n=len(y),
  )
