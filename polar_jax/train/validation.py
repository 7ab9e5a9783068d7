"""Validation batches of a training run, and the means of the loss and metrics over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from polar_jax.data import pipeline
from polar_jax.types import PairBatch, Triplet


class PairValidation:
  """Batches of one pass over the first validation examples, in file order.

  The packing is planned when the first batch is needed, because it reads and tokenizes examples.
  """

  def __init__(self, tokens: pipeline.TripletSegments, plan: pipeline.BatchPlan, row_length: int | None, max_examples: int):
    self._plan, self._row_length = plan, row_length
    self._tokens = pipeline.TripletSegments(_Head(tokens.source, min(len(tokens), max_examples)), tokens.template)

  def __iter__(self) -> Iterator[PairBatch]:
    return iter(self._batches)

  @functools.cached_property
  def _batches(self) -> grain.MapDataset:
    order: Any = {'steps': math.ceil(len(self._tokens) / self._plan.size), 'seed': None, 'once': True}
    pack = pipeline.plan_packing(self._tokens, self._plan, self._row_length, **order)
    return pipeline.pair_batches(self._tokens, self._plan, pack, **order)


def text_validation(windows: pipeline.TextWindows, plan: pipeline.BatchPlan, max_examples: int) -> grain.MapDataset:
  """Return the batches of one pass over the first `max_examples` windows, rounded up to whole batches."""
  steps = math.ceil(min(len(windows), max_examples) / plan.size)
  return pipeline.text_batches(windows, plan, steps=steps, seed=None, once=True)


class _Head(Sequence[Triplet]):
  """The first `size` examples of a sequence, read only on access."""

  def __init__(self, examples: Sequence[Triplet], size: int):
    self._examples, self._size = examples, size

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, index):
    return self._examples[index]
