"""Validation: batches of one pass over held-out examples, and the means of the loss and metrics over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.data import lengths, pipeline
from polar_jax.runtime import preemption
from polar_jax.types import PairBatch


class PairValidation:
  """Batches of one pass over the first validation examples, in file order.

  The packing is planned when the first batch is needed, because it reads and tokenizes examples.
  """

  def __init__(self, tokens: pipeline.TripletSegments, plan: pipeline.BatchPlan, row_length: int | None, max_examples: int):
    """Read nothing yet.

    Args:
      tokens: all validation examples.
      plan: how batches are divided.
      row_length: token positions of a row; None: chosen from the examples.
      max_examples: examples of a pass.
    """
    self._plan, self._row_length = plan, row_length
    self._tokens = tokens.head(max_examples)

  def __iter__(self) -> Iterator[PairBatch]:
    return iter(self._batches)

  def check(self, threads: int) -> PairValidation:
    """Plan the batches now, so that a validation example that cannot be packed is reported before the first step of a run.

    Args:
      threads: that read and tokenize.

    Returns:
      The object itself.

    Raises:
      UserError: an example is longer than a row, or cannot be tokenized.
    """
    if self._row_length is not None:
      lengths.check(self._tokens, range(len(self._tokens)), self._row_length, split='validation', threads=threads)
    _ = self._batches
    return self

  @functools.cached_property
  def _batches(self) -> grain.MapDataset:
    order: Any = {'steps': math.ceil(len(self._tokens) / self._plan.size), 'seed': None, 'once': True}
    pack = pipeline.plan_packing(self._tokens, self._plan, self._row_length, **order)
    return pipeline.pair_batches(self._tokens, self._plan, pack, **order)


def text_validation(windows: pipeline.TextWindows, plan: pipeline.BatchPlan, max_examples: int) -> grain.MapDataset:
  """Return the batches of one pass over the first `max_examples` windows, rounded up to whole batches."""
  steps = math.ceil(min(len(windows), max_examples) / plan.size)
  return pipeline.text_batches(windows, plan, steps=steps, seed=None, once=True)


def evaluate(call: Callable[[Any, Any], dict[str, Any]], params: Any, batches: Iterable[Any], mesh: Mesh) -> dict[str, float]:
  """Return the means of the loss and metrics over `batches`. Sums are added in float64 on the host.

  Args:
    call: `StepFunctions.evaluate`.
    params: of the model.
    batches: of one pass.
    mesh: the devices.

  Raises:
    StopRequested: SIGTERM arrived.
  """
  count, totals = 0.0, dict[str, float]()
  for batch in batches:
    preemption.check()
    output = jax.device_get(call(params, sharding.put_local(batch, mesh)))
    count += float(output['count'])
    for name, value in output['sums'].items():
      totals[name] = totals.get(name, 0.0) + float(value)
  return {name: value / count for name, value in totals.items()}
