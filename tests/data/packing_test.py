from __future__ import annotations

import gzip
import itertools
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polar_jax.config import TemplateConfig, TokenizerConfig
from polar_jax.data import packing, pipeline
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.types import Triplet

items = st.tuples(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30), st.integers(1, 5))


def first_fit_oracle(lengths, capacity, most):
  rows = []
  for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
    for row in rows:
      if sum(lengths[i] for i in row) + lengths[item] <= capacity and len(row) < most:
        row.append(item)
        break
    else:
      rows.append([item])
  return rows


@given(items)
def test_first_fit_against_the_slow_oracle(case):
  assert packing.first_fit(*case) == first_fit_oracle(*case)


@given(items)
def test_properties_of_first_fit(case):
  lengths, capacity, most = case
  rows = packing.first_fit(*case)
  assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
  assert all(0 < len(row) <= most and sum(lengths[i] for i in row) <= capacity for row in rows)
  turn = {item: place for place, item in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)))}
  for later, row in enumerate(rows):
    assert [turn[i] for i in row] == sorted(turn[i] for i in row)
    for item, earlier in itertools.product(row, rows[:later]):
      there = [i for i in earlier if turn[i] < turn[item]]  # at the item's turn
      assert len(there) == most or sum(lengths[i] for i in there) + lengths[item] > capacity


def test_an_item_longer_than_a_row_is_refused():
  assert packing.first_fit([5, 5], 5, 9) == [[0], [1]]
  with pytest.raises(ValueError, match='item of length 6 does not fit a row of 5'):
    packing.first_fit([5, 6], 5, 9)


def test_thousands_of_items_pack_at_once():
  lengths = np.random.default_rng(0).integers(50, 4_000, 4_096).tolist()
  started = time.perf_counter()
  rows = packing.first_fit(lengths, 8_192, 64)
  assert time.perf_counter() - started < 0.5
  assert sum(lengths) / (len(rows) * 8_192) > 0.98


def test_interleave_deals_rows_in_order_to_every_group():
  rows = [[n] for n in range(8)]
  order = {groups: [n for (n,) in packing.interleave(rows, groups)] for groups in (1, 2, 4)}
  assert order == {1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 2, 4, 6, 1, 3, 5, 7], 4: [0, 4, 1, 5, 2, 6, 3, 7]}


samples = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=15), min_size=1, max_size=4)


@given(samples, st.integers(1, 6), st.sampled_from([1, 100, 10_000]))
def test_no_other_number_of_rows_is_cheaper_for_the_sample(sample, multiple, steps):
  plan = packing.plan(sample, 20, multiple, steps)
  needed = [len(first_fit_oracle(lengths, 20, 99)) for lengths in sample]

  def cost(rows):  # up to 16 rows, steps that need more get as many as they need
    given_rows = [max(rows, -(-n // multiple) * multiple) for n in needed]
    return steps * sum(given_rows) / len(needed) + 50 * sum(set(given_rows))

  assert plan.rows % multiple == 0
  assert cost(plan.rows) == pytest.approx(min(cost(rows) for rows in range(multiple, 18 * multiple, multiple)))


@given(samples)
def test_no_row_of_the_sample_holds_more_triplets_than_planned(sample):
  rows = [row for lengths in sample for row in first_fit_oracle(lengths, 20, 99)]
  assert packing.plan(sample, 20, 1, 100).max_pairs == max(map(len, rows))


def test_steps_that_exceed_the_plan_must_be_worth_their_compilation():
  sample = [[10] * 8] * 15 + [[10] * 12]  # fifteen steps of four rows and one of six
  assert packing.plan(sample, 20, 1, steps=10_000).rows == 4
  assert packing.plan(sample, 20, 1, steps=100).rows == 6


@pytest.mark.parametrize(
  ('rows', 'multiple', 'needed', 'expected'),
  [(13, 1, 5, 13), (13, 1, 13, 13), (13, 1, 14, 14), (40, 1, 41, 42), (40, 8, 41, 48), (320, 16, 321, 352), (320, 8, 361, 384)],
)
def test_a_step_that_exceeds_the_plan_gets_more_rows(rows, multiple, needed, expected):
  got = packing.PackPlan(128, rows, 4, multiple).rows_for(needed)
  assert got == expected
  assert got >= needed and got % multiple == 0


def test_sizes_of_exceeding_steps_are_few():
  plan = packing.PackPlan(128, 640, 4, 8)
  assert len({plan.rows_for(needed) for needed in range(641, 1_281)}) == 16


@pytest.mark.parametrize(
  ('lengths', 'multiple', 'row_length', 'rows'),
  [
    ([65] * 4, 1, 384, 1),  # 4 rows of 128, 2 of 256, or 1 of 384
    ([50] * 3, 1, 128, 2),  # as many positions as one row of 256, so the shorter row wins
    ([50] * 3, 2, 128, 2),
    ([65] * 8, 2, 384, 2),
    ([129] + [20] * 3, 1, 256, 1),  # never shorter than the longest
    ([8], 4, 128, 4),
  ],
)
def test_the_row_length_that_packs_densest_is_chosen(lengths, multiple, row_length, rows):
  plan = packing.choose_plan([lengths], max(lengths), multiple, 100)
  assert (plan.row_length, plan.rows) == (row_length, rows)


def test_the_longest_triplet_need_not_be_in_the_sample():
  assert packing.choose_plan([[20] * 8], 700, 1, 100).row_length == 768


class _Kept(list):
  def take(self, indices):
    return [self[i] for i in indices]


@pytest.mark.slow  # a figure of docs/performance.md on real data; packing itself is tested above
@pytest.mark.data
@pytest.mark.filterwarnings('ignore:template.separator')
def test_real_responses_leave_less_than_five_percent_of_padding(data_folder):
  """Batches of 128 in rows of 10,240, and in rows of the length chosen for the data, in a run of 2,000 steps."""
  with gzip.open(data_folder / 'triplets/alpacaeval.jsonl.gz', 'rt') as lines:
    rows = [json.loads(line) for line in itertools.islice(lines, 0, None, 40)]
  settings = TokenizerConfig(kind='file', path=str(data_folder / 'tokenizers/internlm2/tokenizer.model'))
  template = Template(TemplateConfig(reward_token_id=92_527), load_tokenizer(settings, data_folder))
  encoded = pipeline.TripletSegments([Triplet(r['prompt'], r['a1'], r['a2'], r['b1']) for r in rows], template)
  tokens = _Kept(encoded[i] for i in range(len(encoded)))  # kept, because it is read many times below
  lengths = [len(t.tokens) for t in tokens]
  assert np.mean(lengths) > 1_000 and max(lengths) > 7 * np.mean(lengths)
  plan = pipeline.BatchPlan(128)
  for row_length in (10_240, None):
    pack = pipeline.plan_packing(tokens, plan, row_length, steps=2_000, seed=0)
    batches = pipeline.pair_batches(tokens, plan, pack, steps=30, seed=0)
    slots = [batches[s].end_BT > batches[s].start_BT for s in range(30)]
    assert 1 - sum(s.sum() for s in slots) / sum(s.size for s in slots) < 0.05
    assert len({s.shape for s in slots}) <= 6  # compilations


def test_items_may_count_for_several():
  lengths, counts = [5, 4, 3, 2, 1], [2, 2, 1, 1, 3]
  assert packing.first_fit(lengths, 10, 4, counts) == [[0, 1], [2, 3], [4]]
  with pytest.raises(ValueError, match='counts as 3'):
    packing.first_fit(lengths, 10, 2, counts)


def test_a_compilation_costs_as_much_as_fifty_steps():
  sample = [[10] * 8] * 15 + [[10] * 12]  # rows for four: 4.125 a step and 50 (4 + 6); rows for six: 6 a step and 50 x 6
  assert 4.125 * 106 + 500 > 6 * 106 + 300 and 4.125 * 107 + 500 < 6 * 107 + 300
  assert [packing.plan(sample, 20, 1, steps).rows for steps in (106, 107, 108)] == [6, 4, 4]


def test_cheap_compilations_give_rows_that_vary():
  sample = [[10] * 8] * 15 + [[10] * 12]  # as above: now 4.125 a step and 2 (4 + 6), or 6 a step and 2 x 6
  assert [packing.plan(sample, 20, 1, steps, 2.0).rows for steps in (4, 5)] == [6, 4]
  lengths = [[400] * count for count in (8, 9, 11, 7, 8)]
  plans = [packing.choose_plan(lengths, 500, 1, 20, cost) for cost in (50.0, 2.0)]
  padding = [
    sum(plan.row_length * plan.rows_for(len(packing.first_fit(step, plan.row_length, len(step)))) for step in lengths) for plan in plans
  ]
  assert padding[1] < 0.9 * padding[0]


@pytest.mark.parametrize(('rows', 'needed', 'expected'), [(32, 33, 34), (13, 15, 15), (16, 17, 17), (31, 33, 33)])
def test_rows_beyond_the_plan_come_in_sixteenths(rows, needed, expected):
  assert packing.PackPlan(128, rows, 4, 1).rows_for(needed) == expected


def test_sixteen_row_lengths_up_to_eight_mean_lengths_are_tried(monkeypatch):
  tried = []

  def cheapest(sample, row_length, multiple, steps, compilation_steps):
    tried.append(row_length)
    return 1.0, packing.PackPlan(row_length, 1, 1, multiple)

  monkeypatch.setattr(packing, '_cheapest', cheapest)
  plan = packing.choose_plan([[1_000] * 3, [1_000]], 4_000, 2, 10)
  # From 32 tiles of 128, which hold 4,000, to the 63 that hold 8,000.
  assert tried == [128 * round(32 + 31 * i / 15) for i in range(16)] and plan.row_length == 4_096  # the shorter wins a tie
  tried.clear()
  packing.choose_plan([[10]], 257, 1, 10)
  assert tried == [384]
