from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.data import pipeline
from polar_jax.types import Triplet


class Digits:
  """A template whose sequences spell the triplet: ids of (prompt, candidate, reward)."""

  def encode(self, triplet):
    head = [1] + [3 + ord(c) % 20 for c in triplet.prompt]
    return tuple(head + [30 + ord(c) % 20 for c in answer] + [2] for answer in (triplet.chosen, triplet.rejected))


def _tokens(size):
  return pipeline.TripletSegments([Triplet(f'p{i}', '', 'a' * (i % 4) + 'x', f'b{i}') for i in range(size)], Digits())


def _equal(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def _joined(batches):
  """Return the arrays of batches one after another; None where they have none."""
  return [None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


@pytest.mark.parametrize('size', [1, 7, 64])
def test_every_epoch_is_another_permutation(size):
  order = pipeline.global_order(size, seed=3)
  places = [order(p) for p in range(4 * size)]
  epochs = [[i for i, _ in places[e * size : (e + 1) * size]] for e in range(4)]
  assert [e for _, e in places] == [p // size for p in range(4 * size)]
  assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
  if size > 1:
    assert len({tuple(epoch) for epoch in epochs}) > 1
  if size == 64:
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(size))


def test_order_depends_on_the_seed_only():
  whole = lambda seed: [pipeline.global_order(50, seed)(p) for p in range(120)]
  assert whole(0) == whole(0)
  assert whole(0) != whole(1)
  order = pipeline.global_order(50, 0)
  backwards = [order(p) for p in reversed(range(120))][::-1]
  assert backwards == whole(0)


def test_without_a_seed_the_order_is_that_of_the_file():
  order = pipeline.global_order(5, None)
  assert [order(p) for p in range(12)] == [(p % 5, p // 5) for p in range(12)]


def _packed(size, plan, *, steps, seed, rows=None, once=False):
  """(plan, batches) in rows of 32 tokens, which hold three or four triplets; `rows`: a plan that many steps exceed."""
  tokens, order = _tokens(size), {'steps': steps, 'seed': seed, 'once': once}
  pack = pipeline.plan_packing(tokens, plan, 32, **order)
  pack = pack if rows is None else pack._replace(rows=rows)
  return pack, pipeline.pair_batches(tokens, plan, pack, **order)


def _indices(batch):
  np.testing.assert_array_equal(batch.index_BP >= 0, batch.pair_mask_BP > 0)
  return sorted(batch.index_BP[batch.index_BP >= 0].tolist())


@pytest.mark.parametrize('rows', [None, 1])
def test_steps_read_the_stream_in_order_whatever_their_number_of_rows(rows):
  order = pipeline.global_order(23, 4)
  _, batches = _packed(23, pipeline.BatchPlan(6), steps=9, seed=4, rows=rows)
  for step in range(9):
    assert _indices(batches[step]) == sorted(order(p)[0] for p in range(6 * step, 6 * step + 6))


@pytest.mark.parametrize('rows', [None, 4])
@pytest.mark.parametrize('parts', [1, 2, 4])
def test_union_over_processes_is_the_whole_batch(parts, rows):
  make = lambda *share: _packed(60, pipeline.BatchPlan(17, 4, sharding.Share(*share)), steps=5, seed=1, rows=rows)[1]
  whole = make(0, 1, 1)
  each = [make(4 * p // parts, 4 * (p + 1) // parts, 4) for p in range(parts)]
  for step in range(5):
    assert _indices(whole[step]) and len(whole[step].tokens_BT) % 4 == 0
    _equal(whole[step], _joined([b[step] for b in each]))


def test_union_over_processes_is_the_whole_batch_of_text():
  windows = pipeline.TextWindows(np.arange(200), 8, seed=2)
  make = lambda *share: pipeline.text_batches(windows, pipeline.BatchPlan(7, 4, sharding.Share(*share)), steps=5, seed=5)
  whole, each = make(0, 1, 1), [make(0, 1, 4), make(1, 3, 4), make(3, 4, 4)]
  for step in range(5):
    _equal(whole[step], _joined([b[step] for b in each]))


@pytest.mark.parametrize(('size', 'multiple', 'rows'), [(1940, 320, 2240), (1940, 16, 1952), (8, 8, 8), (1, 8, 8), (9, 1, 9)])
def test_rows_of_text(size, multiple, rows):
  assert pipeline.text_rows(pipeline.BatchPlan(size, multiple)) == rows


@pytest.mark.parametrize('rows', [None, 16])
def test_an_epoch_holds_every_triplet_once_and_padding_takes_nothing(rows):
  size, batch = 291, 97
  pack, batches = _packed(size, pipeline.BatchPlan(batch, 16), steps=6, seed=0, rows=rows)
  shapes = {len(batches[s].tokens_BT) for s in range(6)}
  assert all(n % 16 == 0 for n in shapes) and (shapes == {pack.rows}) == (rows is None)
  for epoch in range(2):
    read = [_indices(batches[s]) for s in range(3 * epoch, 3 * epoch + 3)]
    assert {len(some) for some in read} == {batch}
    assert sorted(np.concatenate(read).tolist()) == list(range(size))
  padding = batches[0].pair_mask_BP.sum(axis=1) == 0
  assert padding.any() and not batches[0].end_BT[padding].any()
  assert np.ptp(padding.reshape(16, -1).sum(axis=1)) <= 1  # devices hold about the same amount of padding


def test_rows_are_those_of_the_source():
  tokens = _tokens(9)
  _, batches = _packed(9, pipeline.BatchPlan(5), steps=1, seed=8)
  batch = batches[0]
  assert batch.pair_mask_BP.sum(axis=1).max() > 1
  for b, indices in enumerate(batch.index_BP):
    whole = np.concatenate([tokens[int(i)].tokens for i in indices if i >= 0])
    np.testing.assert_array_equal(batch.tokens_BT[b, : len(whole)], whole)
    assert not batch.end_BT[b, len(whole) :].any()


def test_a_triplet_longer_than_a_row_is_named_before_and_during_the_run():
  tokens, plan, order = _tokens(9), pipeline.BatchPlan(3), pipeline.global_order(9, 0)
  lengths = [len(tokens[order(p)[0]].tokens) for p in range(9)]
  longest = max(lengths)
  row = order(lengths.index(longest))[0]
  message = rf'example {row} has {longest} tokens, more than data.row_length={longest - 1}; raise it, or lower template.max_length'
  with pytest.raises(ValueError, match=message):
    pipeline.plan_packing(tokens, plan, longest - 1, steps=3, seed=0)
  batches = pipeline.pair_batches(tokens, plan, pipeline.PackPlan(longest - 1, 3, 3, 1), steps=3, seed=0)
  with pytest.raises(ValueError, match=message):
    list(batches)


def test_the_plan_is_made_from_the_steps_that_are_read():
  """The first 16 steps, but no more triplets than can be tokenized quickly."""

  class Counted(pipeline.TripletSegments):
    def take(self, indices):
      read.extend(indices)
      return super().take(indices)

  tokens = Counted(_tokens(2_500).source, Digits())
  order = pipeline.global_order(2_500, 3)
  for size, steps, sampled in [(2, 900, 16), (2, 5, 5), (600, 9, 3), (2_100, 9, 1)]:
    read = []
    pack = pipeline.plan_packing(tokens, pipeline.BatchPlan(size, 2), 64, steps=steps, seed=3)
    assert read == [order(p)[0] for p in range(sampled * size)]
    batches = pipeline.pair_batches(tokens, pipeline.BatchPlan(size, 2), pack, steps=steps, seed=3)
    assert {batches[s].tokens_BT.shape for s in range(sampled)} == {(pack.rows, 64)}


@pytest.mark.parametrize('together', [7, 60, 61, 1_024])
def test_without_a_row_length_every_triplet_of_the_data_fits(together, monkeypatch):
  monkeypatch.setattr(pipeline, '_READ_TOGETHER', together)
  triplets = [*_tokens(60).source, Triplet('p', '', 'a' * 300, 'b')]
  tokens = pipeline.TripletSegments(triplets, Digits())
  assert 60 not in [pipeline.global_order(61, 0)(p)[0] for p in range(8)]  # the long one is not in the sample
  monkeypatch.setattr(pipeline.packing, 'SAMPLE_STEPS', 1)
  rows = lambda source, steps: pipeline.plan_packing(source, pipeline.BatchPlan(8), None, steps=steps, seed=0).row_length
  assert rows(tokens, 8) == 384
  assert rows(tokens, 1) == rows(_tokens(60), 8) == 128  # a run of one step does not read the long one


@pytest.mark.long
@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize(('kind', 'rows'), [('pairs', None), ('pairs', 2), ('text', None)])
def test_an_iterator_resumes_exactly(threads, kind, rows):
  def fresh():
    if kind == 'pairs':
      _, batches = _packed(11, pipeline.BatchPlan(8, 2), steps=9, seed=5, rows=rows)
    else:
      windows = pipeline.TextWindows(np.arange(100), 8, seed=2)
      batches = pipeline.text_batches(windows, pipeline.BatchPlan(3, 2), steps=9, seed=5)
    return pipeline.iterate(batches, threads=threads, prefetch=3)

  uninterrupted = list(fresh())
  assert len(uninterrupted) == 9
  first = fresh()
  for step in range(4):
    _equal(next(first), uninterrupted[step])
  state = json.loads(json.dumps(first.get_state()))  # as a checkpoint stores it
  resumed = fresh()
  resumed.set_state(state)
  rest = list(resumed)
  assert len(rest) == 5
  for a, b in zip(rest, uninterrupted[4:], strict=True):
    _equal(a, b)


@pytest.mark.parametrize(('threads', 'prefetch'), [(0, 1), (1, 1), (2, 2), (4, 5)])
def test_threads_and_prefetching_change_nothing(threads, prefetch):
  _, batches = _packed(11, pipeline.BatchPlan(8), steps=6, seed=5)
  for step, batch in enumerate(pipeline.iterate(batches, threads=threads, prefetch=prefetch)):
    _equal(batch, batches[step])


def test_once_pads_the_tail():
  pack, batches = _packed(10, pipeline.BatchPlan(4, 4), steps=4, seed=None, once=True)
  assert [_indices(batches[s]) for s in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], []]
  assert {batches[s].tokens_BT.shape for s in range(4)} == {(pack.rows, 32)}
  text = pipeline.text_batches(pipeline.TextWindows(np.arange(50), 8, 0), pipeline.BatchPlan(4, 4), steps=2, seed=None, once=True)
  assert text[1].index_B.tolist() == [4, -1, -1, -1]
  assert text[1].target_mask_BT.sum() == 8


@pytest.mark.parametrize(('size', 'length'), [(17, 8), (24, 8), (25, 8), (26, 8), (100, 7), (3, 1)])
def test_text_windows_never_read_past_the_end(size, length):
  windows = pipeline.TextWindows(np.arange(size), length, seed=0)
  assert len(windows) >= 1
  offsets = set()
  for epoch in range(60):
    for index in range(len(windows)):
      window = windows.window(index, epoch)
      assert len(window) == length + 1  # a slice past the end would be shorter
      np.testing.assert_array_equal(np.diff(window), 1)
    offsets.add(int(windows.window(0, epoch)[0]))
  assert offsets == set(range(length))  # the largest offset was among them
  assert windows.window(0, 0)[0] == 0


def test_text_too_short_for_one_window():
  with pytest.raises(ValueError, match=r'16 tokens.*at least 17'):
    pipeline.TextWindows(np.arange(16), 8, 0)


def test_text_batches_change_offset_with_the_epoch_and_shift_targets():
  windows = pipeline.TextWindows(np.arange(100) * 2, 8, seed=0)
  size = len(windows)
  batches = pipeline.text_batches(windows, pipeline.BatchPlan(1), steps=3 * size, seed=1)
  phases = []
  for step in range(3 * size):
    batch = batches[step]
    np.testing.assert_array_equal(batch.target_BT, batch.tokens_BT + 2)
    assert batch.tokens_BT[0, 0] // 16 in (batch.index_B[0], batch.index_B[0] + 1)
    phases.append(int(batch.tokens_BT[0, 0]) // 2 % 8)
  assert [len(set(phases[e * size : (e + 1) * size])) for e in range(3)] == [1, 1, 1]
  assert phases[0] == 0
  assert len(set(phases)) > 1


def test_a_batch_is_not_divided_unless_asked():
  assert pipeline.BatchPlan(8) == (8, 1, sharding.Share(0, 1, 1))


def test_the_sample_of_a_short_data_set_goes_on_with_the_next_epoch():
  class Counted(pipeline.TripletSegments):
    def take(self, indices):
      read.append(list(indices))
      return super().take(indices)

  tokens, order, read = Counted(_tokens(5).source, Digits()), pipeline.global_order(5, 3), []
  pipeline.plan_packing(tokens, pipeline.BatchPlan(4), 64, steps=3, seed=3)
  assert read == [[order(p)[0] for p in range(4 * step, 4 * step + 4)] for step in range(3)]
  read.clear()
  pipeline.plan_packing(tokens, pipeline.BatchPlan(4), 64, steps=3, seed=3, once=True)
  assert read == [[order(p)[0] for p in range(4)], [order(4)[0]], []]
  read.clear()
  pipeline.plan_packing(Counted(_tokens(2_048).source, Digits()), pipeline.BatchPlan(683), 64, steps=9, seed=3)
  assert [len(some) for some in read] == [683, 683]  # a third step would be one triplet too many


def test_a_triplet_may_fill_a_row():
  tokens = _tokens(9)
  longest = max(len(tokens[i].tokens) for i in range(9))
  pack = pipeline.plan_packing(tokens, pipeline.BatchPlan(9), longest, steps=1, seed=0)
  batch = pipeline.pair_batches(tokens, pipeline.BatchPlan(9), pack, steps=1, seed=0)[0]
  assert batch.tokens_BT.shape[1] == longest and _indices(batch) == list(range(9))


def test_batches_are_prefetched_only_by_threads(monkeypatch):
  _, batches = _packed(11, pipeline.BatchPlan(8), steps=2, seed=5)
  made, options = [], pipeline.grain.ReadOptions
  monkeypatch.setattr(pipeline.grain, 'ReadOptions', lambda **values: made.append(values) or options(**values))
  for threads in (0, 2):
    pipeline.iterate(batches, threads=threads, prefetch=5)
  assert made == [{'num_threads': 0, 'prefetch_buffer_size': 0}, {'num_threads': 2, 'prefetch_buffer_size': 5}]


def test_only_what_may_exceed_enough_is_counted():
  class Bounds(Digits):
    def most_tokens(self, triplet):
      return None if triplet.prompt == 'p3' else 20 + int(triplet.prompt[1:])

    def encode(self, triplet):
      encoded.append(triplet.prompt)
      return super().encode(triplet)

  encoded = []
  tokens = pipeline.TripletSegments(_tokens(5).source, Bounds())
  exact = [len(_tokens(5)[i].tokens) for i in range(5)]
  assert tokens.most_tokens([4, 2, 0, 3, 1], 21) == [exact[4], exact[2], 20, exact[3], 21] and encoded == ['p4', 'p2', 'p3']
