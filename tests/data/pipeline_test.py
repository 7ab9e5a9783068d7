from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax.data import pipeline
from polar_jax.types import Triplet


class Digits:
  """A template whose sequences spell the triplet: ids of (prompt, answer, reward)."""

  def encode(self, triplet):
    head = [1] + [3 + ord(c) % 20 for c in triplet.prompt]
    return tuple(head + [30 + ord(c) % 20 for c in answer] + [2] for answer in (triplet.chosen, triplet.rejected))


def _tokens(size):
  return pipeline.PairTokens([Triplet(f'p{i}', '', 'a' * (i % 4) + 'x', f'b{i}') for i in range(size)], Digits())


def _equal(a, b):
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


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


def test_steps_read_the_stream_in_order():
  order = pipeline.global_order(23, 4)
  batches = pipeline.pair_batches(_tokens(23), pipeline.plan_batch(6, 1), 32, steps=9, seed=4)
  read = np.concatenate([batches[s].index_BP[:, 0] for s in range(9)])
  assert read.tolist() == [order(p)[0] for p in range(54)]


@pytest.mark.parametrize('parts', [[(0, 8)], [(0, 4), (4, 8)], [(0, 2), (2, 4), (4, 6), (6, 8)]])
def test_union_over_processes_is_the_whole_batch(parts):
  tokens, rows = _tokens(20), 7  # 7 rows on 8 devices: one is padding
  make = lambda plan: pipeline.pair_batches(tokens, plan, 32, steps=5, seed=1)
  whole = make(pipeline.plan_batch(rows, 8))
  each = [make(pipeline.plan_batch(rows, 8, part)) for part in parts]
  for step in range(5):
    _equal(whole[step], [np.concatenate(arrays) for arrays in zip(*(b[step] for b in each), strict=True)])


@pytest.mark.parametrize(('rows', 'multiple', 'padded'), [(1940, 320, 2240), (1940, 16, 1952), (8, 8, 8), (1, 8, 8), (9, 1, 9)])
def test_plan(rows, multiple, padded):
  assert pipeline.plan_batch(rows, multiple) == (rows, padded, 0, padded)


def test_a_batch_that_does_not_divide_is_padded_with_masked_rows():
  tokens = _tokens(300)
  batches = pipeline.pair_batches(tokens, pipeline.plan_batch(194, 16), 32, steps=2, seed=0)
  for step in range(2):
    batch = batches[step]
    assert len(batch.tokens_BT) == 208
    assert batch.pair_mask_BP.sum() == 194
    np.testing.assert_array_equal(batch.pair_mask_BP[194:], 0)
    np.testing.assert_array_equal(batch.index_BP[194:], -1)
    np.testing.assert_array_equal(batch.end_BT[194:], 0)
    assert (batch.index_BP[:194] >= 0).all()
  # Padding takes nothing from the stream: 300 rows, each read once before any is read again.
  read = np.concatenate([batches[s].index_BP[:194, 0] for s in range(2)])
  assert sorted(read[:300].tolist()) == list(range(300))


def test_rows_are_those_of_the_source():
  tokens = _tokens(9)
  batch = pipeline.pair_batches(tokens, pipeline.plan_batch(5, 1), 32, steps=1, seed=8)[0]
  for b, i in enumerate(batch.index_BP[:, 0]):
    row = tokens[int(i)]
    np.testing.assert_array_equal(batch.tokens_BT[b, : len(row.tokens)], row.tokens)


@pytest.mark.parametrize('threads', [0, 2])
@pytest.mark.parametrize('kind', ['pairs', 'text'])
def test_an_iterator_resumes_exactly(threads, kind):
  def fresh():
    if kind == 'pairs':
      batches = pipeline.pair_batches(_tokens(11), pipeline.plan_batch(3, 2), 32, steps=9, seed=5)
    else:
      windows = pipeline.TextWindows(np.arange(100), 8, seed=2)
      batches = pipeline.text_batches(windows, pipeline.plan_batch(3, 2), steps=9, seed=5)
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


@pytest.mark.parametrize('threads', [0, 2])
def test_threads_do_not_change_the_order(threads):
  batches = pipeline.pair_batches(_tokens(11), pipeline.plan_batch(4, 1), 32, steps=6, seed=5)
  for step, batch in enumerate(pipeline.iterate(batches, threads=threads, prefetch=2)):
    _equal(batch, batches[step])


def test_once_pads_the_tail():
  batches = pipeline.pair_batches(_tokens(10), pipeline.plan_batch(4, 4), 32, steps=4, seed=None, once=True)
  assert [b.index_BP[:, 0].tolist() for b in (batches[s] for s in range(4))] == [
    [0, 1, 2, 3],
    [4, 5, 6, 7],
    [8, 9, -1, -1],
    [-1, -1, -1, -1],
  ]
  np.testing.assert_array_equal(batches[2].pair_mask_BP[:, 0], [1, 1, 0, 0])
  text = pipeline.text_batches(pipeline.TextWindows(np.arange(50), 8, 0), pipeline.plan_batch(4, 4), steps=2, seed=None, once=True)
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
  batches = pipeline.text_batches(windows, pipeline.plan_batch(1, 1), steps=3 * size, seed=1)
  phases = []
  for step in range(3 * size):
    batch = batches[step]
    np.testing.assert_array_equal(batch.target_BT, batch.tokens_BT + 2)
    assert batch.tokens_BT[0, 0] // 16 in (batch.index_B[0], batch.index_B[0] + 1)
    phases.append(int(batch.tokens_BT[0, 0]) // 2 % 8)
  assert [len(set(phases[e * size : (e + 1) * size])) for e in range(3)] == [1, 1, 1]
  assert phases[0] == 0
  assert len(set(phases)) > 1


def test_longest_row():
  tokens = _tokens(13)
  longest = max(len(tokens[i].tokens) for i in range(13))
  assert pipeline.longest_row(tokens, 1) == longest
  assert pipeline.longest_row(tokens, 8) == -(-longest // 8) * 8
