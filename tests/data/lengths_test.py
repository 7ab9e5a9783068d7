"""Lengths of the examples of a run: which are read, and that none is longer than it was taken to be."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.config import DataConfig, TemplateConfig
from polar_jax.data import lengths, pipeline
from polar_jax.data.examples import read_triplets
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.types import Triplet, UserError


def triplets(size: int) -> list[Triplet]:
  rng = np.random.default_rng(0)
  text = lambda: ''.join(rng.choice(['a', 'é', '日', '🙂', ' ', '</s>'], rng.integers(0, 12), p=[0.3, 0.2, 0.2, 0.1, 0.19, 0.01]))
  messages = lambda: [{'role': 'user', 'content': text()}, {'role': 'user', 'content': text()}]
  return [Triplet(text() if i % 3 else messages(), text(), text(), text(), ('sft', 'pretrain')[i % 2]) for i in range(size)]


@pytest.mark.parametrize('settings', [{}, {'rule': 'client'}, {'use_reference': False}, {'separator': ' | '}, {'max_length': 110}])
def test_no_triplet_has_more_tokens_than_its_bound(settings):
  template = Template(TemplateConfig(**settings), ByteTokenizer())
  bounds = [(template.most_tokens(t), len(pipeline.pair_segment(*template.encode(t)).tokens)) for t in triplets(200)]
  known = [(bound, length) for bound, length in bounds if bound is not None]
  assert len(known) > 20 and all(length <= bound for bound, length in known)
  assert len(known) < 200  # a text with a special token, or one that may be cut, has no certain bound


@pytest.mark.parametrize('threads', [0, 3])
def test_examples_that_are_too_long_are_counted_with_the_length_that_they_need(threads, monkeypatch):
  monkeypatch.setattr(lengths, '_AT_ONCE', 7)
  source = pipeline.TripletSegments(triplets(60), Template(TemplateConfig(), ByteTokenizer()))
  exact = [len(source[i].tokens) for i in range(60)]
  limit = sorted(exact)[-8]
  long = [i for i, n in enumerate(exact) if n > limit]
  with pytest.raises(UserError) as error:
    lengths.check(source, range(60), limit, split='validation', threads=threads)
  named = ', '.join(map(str, long[:5]))
  message = f'{len(long)} of 60 validation examples have more tokens than data.row_length={limit} (counted from 0: {named}, ...; '
  assert str(error.value).startswith(message) and len(str(error.value)) <= 500
  assert f'example {exact.index(max(exact))} with {max(exact)} tokens' in str(error.value)
  remedy = int(str(error.value).partition('data.row_length to ')[2].split()[0])
  lengths.check(source, range(60), remedy, split='validation', threads=threads)
  lengths.check(source, [i for i in range(60) if i not in long], limit, split='validation', threads=threads)  # the other remedy


def test_only_examples_that_may_be_too_long_are_tokenized():
  class Counted(Template):
    def encode(self, triplet):
      encoded.append(triplet)
      return super().encode(triplet)

  encoded = []
  source = pipeline.TripletSegments(
    [Triplet('p', 'r', 'c', 'd'), Triplet('p', 'r', 'c' * 90, 'd')], Counted(TemplateConfig(), ByteTokenizer())
  )
  lengths.check(source, range(2), 250, split='training', threads=1)
  assert encoded == []
  lengths.check(source, range(2), 128, split='training', threads=1)
  assert encoded == [source.source[1]]


@pytest.mark.parametrize(('size', 'steps'), [(50, 3), (10, 3), (50, 6)])
def test_examples_of_a_run_are_those_of_its_batches(size, steps):
  source, plan = pipeline.TripletSegments(triplets(size), Template(TemplateConfig(), ByteTokenizer())), pipeline.BatchPlan(8)
  pack = pipeline.plan_packing(source, plan, None, steps=steps, seed=3)
  batches = pipeline.pair_batches(source, plan, pack, steps=steps, seed=3)
  read = {int(i) for step in range(steps) for i in batches[step].index_BP.ravel() if i >= 0}
  assert pipeline.examples_of_run(plan, size, steps=steps, seed=3) == sorted(read)


def test_a_row_is_chosen_for_what_a_run_reads_and_nothing_else_is_tokenized():
  examples, plan = triplets(40), pipeline.BatchPlan(4)
  read = set(pipeline.examples_of_run(plan, len(examples), steps=3, seed=1))
  examples = [example if i in read else Triplet('p', 'r', 'c' * 900, 'd') for i, example in enumerate(examples)]
  source, taken = pipeline.TripletSegments(examples, Template(TemplateConfig(), ByteTokenizer())), set()
  take = source.take
  source.take = lambda indices: (taken.update(indices), take(indices))[1]
  assert pipeline.plan_packing(source, plan, None, steps=3, seed=1).row_length < 900 and taken == read


def test_the_first_five_are_named_and_all_of_a_run_are_checked(tmp_path):
  def message(rows, row_length, **order):
    source = pipeline.TripletSegments(rows, Template(TemplateConfig(), ByteTokenizer()))
    with pytest.raises(UserError) as error:
      if order:
        lengths.check_run(source, pipeline.BatchPlan(2), DataConfig(row_length=row_length, read_threads=1), **order)
      else:
        lengths.check(source, range(len(rows)), row_length, split='test', threads=1)
    return str(error.value)

  long, short = Triplet('p', 'r', 'c' * 200, 'd'), Triplet('p', 'r', 'c', 'd')
  tokens = 1 + len('p\nr') + 1 + len('p\n') + (200 + 1) + (1 + 1)  # the prefix, stored once, and two tails with their reward tokens
  found = message([long] * 4 + [short, long], 128)
  assert found.startswith('5 of 6 test examples have more tokens than data.row_length=128 (counted from 0: 0, 1, 2, 3, 5; ')
  assert f'the longest is example 0 with {tokens} tokens' in found
  assert '(counted from 0: 0, 1, 2, 3, 4, ...; ' in message([long] * 6, 128)
  rows = [long, *[short] * 7]
  step = next(p for p in range(8) if pipeline.global_order(8, 5)(p)[0] == 0) // 2
  assert '1 of 8 training examples have more tokens than data.row_length=128 (counted from 0: 0; ' in message(rows, 128, steps=4, seed=5)
  assert f'1 of {2 * step + 2} training' in message(rows, 128, steps=step + 1, seed=5)
  source = pipeline.TripletSegments(rows, Template(TemplateConfig(), ByteTokenizer()))
  lengths.check_run(source, pipeline.BatchPlan(2), DataConfig(row_length=128), steps=step, seed=5)  # the long one is not read yet
  lengths.check_run(source, pipeline.BatchPlan(2), DataConfig(row_length=256), steps=4, seed=5)
  lengths.check_run(source, pipeline.BatchPlan(2), DataConfig(row_length=None), steps=4, seed=5)  # rows will be long enough


def test_the_file_of_examples_that_are_too_long_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"prompt": "p", "reference": "r", "chosen": "%s", "rejected": "d"}\n' % ('c' * 200))
  source = pipeline.TripletSegments(read_triplets(tmp_path / 'a.jsonl'), Template(TemplateConfig(), ByteTokenizer()))
  with pytest.raises(UserError, match=r'^\S*a\.jsonl: 1 of 1 test examples'):
    lengths.check(source, [0], 128, split='test', threads=1)
