"""Lengths of the examples that a run will read, checked before its first step instead of in the step that packs them."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence

from polar_jax.config import DataConfig
from polar_jax.data import packing, pipeline
from polar_jax.sharding import round_up
from polar_jax.types import UserError

_AT_ONCE = 1_024  # examples of one task of a thread
_NAMED = 5  # examples that a message lists


def check_run(source: pipeline.TripletSegments, plan: pipeline.BatchPlan, data: DataConfig, *, steps: int, seed: int) -> None:
  """Check that the training examples of a run fit `data.row_length`, if it is set.

  Args:
    source: the segments of the data set.
    plan: the batch of a step.
    data: how the examples are packed and read.
    steps: number of steps of the run.
    seed: of the shuffle.

  Raises:
    UserError: as `check`.
  """
  if data.row_length is not None:
    indices = pipeline.examples_of_run(plan, len(source), steps=steps, seed=seed)
    check(source, indices, data.row_length, split='training', threads=data.read_threads)


def check(source: pipeline.TripletSegments, indices: Sequence[int], row_length: int, *, split: str, threads: int) -> None:
  """Check that examples fit rows. Those that are short enough by their number of bytes are not tokenized.

  Args:
    source: the segments of the data set.
    indices: the examples to check.
    row_length: tokens of a row.
    split: name of the data set, for messages.
    threads: that read and tokenize.

  Raises:
    UserError: an example is longer than a row; the message counts such examples and gives the length that they need.
  """

  def longer(part: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, n) for i, n in zip(part, source.most_tokens(part, row_length), strict=True) if n > row_length]

  parts = [indices[low : low + _AT_ONCE] for low in range(0, len(indices), _AT_ONCE)]
  with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
    found = [pair for some in pool.map(longer, parts) for pair in some]
  if not found:
    return
  where = getattr(source.source, 'path', None)
  longest, tokens = max(found, key=lambda pair: pair[1])
  named = ', '.join(str(i) for i, _ in found[:_NAMED]) + (', ...' if len(found) > _NAMED else '')
  raise UserError(
    f'{f"{where}: " if where else ""}{len(found)} of {len(indices)} {split} examples have more tokens than data.row_length={row_length} '
    f'(counted from 0: {named}; the longest is example {longest} with {tokens} tokens): set data.row_length to '
    f'{round_up(tokens, packing.LENGTH_MULTIPLE)} or more, leave it unset, or remove these examples'
  )
