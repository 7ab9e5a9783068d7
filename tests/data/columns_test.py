"""Ranked lists, margins and weights in files: what is read of them, and the lines that refuse bad ones."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polar_jax.data import columns, identity, tfds
from polar_jax.data.examples import BadExampleError, max_candidates, open_triplets, read_triplets
from polar_jax.data.readers import DataError
from polar_jax.types import RankedList, Triplet, UserError

PAIR = {'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd'}
LIST = {'prompt': 'p', 'reference': 'r'}
MESSAGES = [{'role': 'assistant', 'content': 'a'}]


@pytest.fixture
def write(tmp_path):
  def write(*examples):
    path = tmp_path / 'data.jsonl'
    path.write_text('\n'.join(map(json.dumps, examples)))
    return path

  return write


@pytest.mark.parametrize(
  ('fields', 'candidates', 'ranks'),
  [
    ({'ranked': ['a', 'b', 'c']}, ['a', 'b', 'c'], [0, 1, 2]),
    ({'ranked': ['a', MESSAGES, 'c'], 'category': 'x', 'other': 1}, ['a', MESSAGES, 'c'], [0, 1, 2]),
    ({'chosen': 'a', 'rejected': ['b', 'c', 'd']}, ['a', 'b', 'c', 'd'], [0, 1, 1, 1]),
    ({'chosen': ['a', MESSAGES], 'rejected': ['b', 'c'], 'ranked': 'x'}, ['a', MESSAGES, 'b', 'c'], [0, 0, 1, 1]),
    ({'chosen': [MESSAGES, MESSAGES], 'rejected': MESSAGES}, [MESSAGES, MESSAGES, MESSAGES], [0, 0, 1]),
  ],
)
def test_ranked_lists_are_read(write, fields, candidates, ranks):
  examples = read_triplets(write(PAIR, LIST | fields))
  assert max_candidates(examples) > 2 and type(examples[0]) is Triplet
  found = examples[1]
  assert isinstance(found, RankedList) and [*found.candidates] == candidates and [*found.ranks] == ranks
  assert (found.chosen, found.rejected, found.category) == (candidates[0], candidates[-1], fields.get('category', ''))
  expected = {name: value for name, value in fields.items() if name == 'other' or (name == 'ranked' and 'chosen' in fields)}
  assert dict(found.metadata) == expected


@pytest.mark.parametrize('fields', [{'ranked': ['c', 'd']}, {'chosen': ['c'], 'rejected': ['d']}, {'chosen': 'c', 'rejected': ['d']}])
def test_a_list_of_two_is_a_triplet(write, fields):
  examples = read_triplets(write(LIST | fields))
  assert type(examples[0]) is Triplet and examples[0] == Triplet('p', 'r', 'c', 'd') and max_candidates(examples) == 2


def test_ranked_lists_of_parquet(tmp_path):
  pq.write_table(pa.Table.from_pylist([LIST | {'ranked': ['a', 'b', 'c']}, LIST | {'ranked': ['d', 'e']}]), tmp_path / 'a.parquet')
  examples = read_triplets(tmp_path / 'a.parquet')
  assert [*examples[0].candidates] == ['a', 'b', 'c'] and type(examples[1]) is Triplet


@pytest.mark.parametrize(
  ('fields', 'reason'),
  [
    ({'ranked': ['a']}, r"field 'ranked' has 1 candidate\(s\); it must be a list of at least two, best first"),
    ({'ranked': []}, r"field 'ranked' has 0 candidate\(s\)"),
    ({'ranked': 'abc'}, "field 'ranked' is not a list but str"),
    ({'ranked': ['a', 3, 'c']}, 'candidate 1 must be a string or a list of messages, not'),
    ({'ranked': ['a', [{'role': 'user'}], 'c']}, r'candidate 1\[0\] is a message without content'),
    ({'ranked': ['a', 'b'], 'chosen': 'c'}, "field 'rejected' is missing"),
    ({'chosen': ['a', 'b']}, r'chosen\[0\] must be a message with a content, not str'),
    ({'chosen': 'a', 'rejected': ['b', 3]}, r'rejected\[0\] must be a message'),
    ({'chosen': 'a', 'rejected': []}, 'rejected is an empty list'),
  ],
)
def test_bad_lists_are_refused_by_example(write, fields, reason):
  with pytest.raises(BadExampleError, match=rf'data\.jsonl, example 2: {reason}'):
    read_triplets(write(PAIR, LIST | fields))
  examples = read_triplets(write(PAIR, LIST | fields), 'skip')
  assert len(examples) == 1 and examples.skipped[0][0] == 2


@pytest.mark.parametrize(
  ('fields', 'name', 'reason'),
  [
    ({}, 'margin', "field 'margin' is missing; correct it, or set loss.margin to False"),
    ({'margin': None}, 'margin', "field 'margin' is missing"),
    ({'margin': '1'}, 'margin', "margin must be a number, not '1'"),
    ({'margin': True}, 'margin', "margin must be a number, not 'True'"),
    ({'margin': -0.5}, 'margin', r'margin is -0\.5; it must be a finite number >= 0'),
    ({'weight': -1}, 'weight', r'weight is -1; it must be a finite number > 0'),
    ({'weight': 0}, 'weight', r'weight is 0; it must be a finite number > 0 \(leave out .*; correct it, or set loss.weights to False'),
    ({'weight': [1]}, 'weight', r"weight must be a number, not '\[1\]'"),
  ],
)
def test_bad_numbers_are_refused_by_file_and_example(write, fields, name, reason):
  examples = read_triplets(write(PAIR | {'margin': 1, 'weight': 2.5}, PAIR | fields))
  columns.check(examples, ())
  with pytest.raises(DataError, match=rf'data\.jsonl, example 2: {reason}'):
    columns.check(examples, (name,))


def test_numbers_that_json_cannot_hold():
  for value in (float('nan'), float('inf')):
    with pytest.raises(DataError, match=r'^example 1: weight is (nan|inf); it must be a finite number'):
      columns.check([Triplet('p', 'r', 'c', 'd', metadata={'weight': value})], ('weight',))


def test_columns_are_read_by_index_and_from_tfds(tmp_path, write):
  triplets = [Triplet('p', 'r', 'c', 'd', metadata={'margin': i / 4, 'weight': np.float64(i + 1)}) for i in range(4)]
  assert columns.read(triplets, [2, 0], ()) == {}
  found = columns.read(triplets, [3, 0, 3], ('margin', 'weight'))
  assert {name: values.tolist() for name, values in found.items()} == {'margin': [0.75, 0, 0.75], 'weight': [4, 1, 4]}
  stored = [Triplet('p', 'r', 'c', 'd', metadata={'margin': i - 1}) for i in range(3)]
  folder = tfds.write_triplets(tmp_path, 'name', {'train': stored}, 'text', {})
  examples = open_triplets(folder, 'train')
  assert columns.read(examples, [2, 1], ('margin',))['margin'].tolist() == [1, 0]
  with pytest.raises(DataError, match=rf'{folder.name}, example 1: margin is -1'):
    columns.check(examples, ('margin',))


@pytest.mark.parametrize('ranks', [(0, 1), (1, 2, 3), (0, 0, 0), (0, 2, 1), ()])
def test_ranks_of_a_program_are_checked(ranks):
  with pytest.raises(UserError, match=r'3 candidates and ranks .*; ranks must be one per candidate, from 0 up, best candidate first'):
    RankedList('p', 'r', 'c', 'd', candidates=('c', 'x', 'd'), ranks=ranks)


def test_the_digest_covers_rankings_and_the_columns_that_a_loss_reads():
  one = [Triplet('p', 'r', 'c', 'd', metadata={'margin': 1})]
  other = [Triplet('p', 'r', 'c', 'd', metadata={'margin': 2})]
  assert identity.triplets_digest(one) == identity.triplets_digest(other)
  assert identity.triplets_digest(one, ('margin',)) != identity.triplets_digest(other, ('margin',))
  ranked = lambda *candidates, ranks=(0, 1, 2): [RankedList('p', 'r', 'c', 'd', candidates=candidates, ranks=ranks)]
  digests = {
    identity.triplets_digest(e) for e in (one, ranked('c', 'x', 'd'), ranked('c', 'y', 'd'), ranked('c', 'x', 'd', ranks=(0, 1, 1)))
  }
  assert len(digests) == 4
