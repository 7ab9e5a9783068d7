"""Validation batches: which examples they hold, and when they read them."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.config import TemplateConfig
from polar_jax.data import pipeline
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.train.validation import PairValidation, text_validation
from polar_jax.types import Triplet


class Examples(list):
  """Examples that note which of them are read."""

  def __init__(self, count):
    super().__init__(Triplet(f'prompt {i}', 'a' * (1 + i % 4), 'a', 'b' * (1 + i % 3)) for i in range(count))
    self.read = set()

  def __getitem__(self, index):
    self.read.add(index)
    return super().__getitem__(index)


@pytest.mark.parametrize(('max_examples', 'expected'), [(7, 7), (100, 10)])
def test_pairs_are_the_first_examples_in_order_and_read_when_needed(max_examples, expected):
  examples = Examples(10)
  tokens = pipeline.TripletSegments(examples, Template(TemplateConfig(), ByteTokenizer()))
  validation = PairValidation(tokens, pipeline.BatchPlan(4), None, max_examples)
  assert examples.read == set()
  for _ in range(2):  # two passes
    batches = list(validation)
    assert len(batches) == -(-expected // 4)
    indices = [sorted(batch.index_BP[batch.index_BP >= 0].tolist()) for batch in batches]
    assert indices == [list(range(first, min(first + 4, expected))) for first in range(0, expected, 4)]
  assert examples.read == set(range(expected))


@pytest.mark.parametrize(('max_examples', 'expected'), [(5, 8), (100, 11)])
def test_windows_fill_whole_batches_once(max_examples, expected):
  windows = pipeline.TextWindows(np.arange(100, dtype=np.int32), 8, seed=0)
  assert len(windows) == 11
  batches = list(text_validation(windows, pipeline.BatchPlan(4), max_examples))
  indices = np.concatenate([batch.index_B for batch in batches])
  assert indices[indices >= 0].tolist() == list(range(expected))
