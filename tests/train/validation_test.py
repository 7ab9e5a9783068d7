"""Validation batches: which examples they hold, and when they read them."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.config import TemplateConfig
from polar_jax.data import pipeline
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.train import validation as validation_lib
from polar_jax.train.validation import PairValidation, text_validation
from polar_jax.types import Triplet, UserError


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


def test_means_are_over_all_terms_of_all_batches(monkeypatch):
  checks = []
  monkeypatch.setattr(validation_lib.sharding, 'put_local', lambda batch, mesh: (batch, mesh))
  monkeypatch.setattr(validation_lib.preemption, 'check', lambda: checks.append(1))
  outputs = {
    'a': {'count': np.int32(3), 'sums': {'loss': np.float32(6.0), 'accuracy': np.float32(1.5)}, 'rows': {}},
    'b': {'count': np.int32(1), 'sums': {'loss': np.float32(4.0), 'accuracy': np.float32(1.0)}, 'rows': {}},
  }

  def call(params, placed):
    assert (params, placed[1]) == ('params', 'mesh')
    return outputs[placed[0]]

  assert validation_lib.evaluate(call, 'params', ['a', 'b'], 'mesh') == {'loss': 2.5, 'accuracy': 0.625} and len(checks) == 2


def test_an_example_that_does_not_fit_is_reported_before_the_first_step():
  examples = Examples(9)
  tokens = pipeline.TripletSegments(examples, Template(TemplateConfig(), ByteTokenizer()))
  with pytest.raises(UserError, match='validation'):
    PairValidation(tokens, pipeline.BatchPlan(4), 8, 6).check(1)
  checked = PairValidation(tokens, pipeline.BatchPlan(4), None, 6).check(1)
  assert len(list(checked)) == 2 and examples.read == set(range(6))
