from __future__ import annotations

import dataclasses

import numpy as np

from polar_jax.data import text as text_lib
from polar_jax.miniature import corpora, documents, triplets, vocabulary
from polar_jax.miniature import pool as pool_lib
from polar_jax.miniature import world as world_lib


def split_documents(stream):
  ends = np.flatnonzero(stream == vocabulary.EOS_ID)
  assert ends[-1] == len(stream) - 1
  return np.split(stream, ends + 1)[:-1]


def test_make_streams_are_stored_with_the_corpora(small_run, world, small_config):
  text = text_lib.load_streams(small_run[0] / 'data' / world_lib.TEXT)
  for split, count in (('train', 400), ('validation', 8)):
    written = split_documents(text[split]['documents'])
    assert len(written) == count and max(map(len, written)) <= small_config.document_tokens + 1
    np.testing.assert_array_equal(text[split]['documents'], documents.make_streams(world)[split])
    assert set(text[split]) == {*corpora.CORPUS_NAMES, 'documents'}


def test_make_streams_document_is_independent_of_count(world):
  few = dataclasses.replace(world, config=dataclasses.replace(world.config, documents=50, workers=1))
  some, all_of_them = (split_documents(documents.make_streams(w)['train']) for w in (few, world))
  assert len(some) == 50
  for one, other in zip(some, all_of_them[:50], strict=True):
    np.testing.assert_array_equal(one, other)


def test_make_streams_one_author_each_and_none_held_out(world, small_config, monkeypatch):
  authors = []
  sample = triplets.sample_by_policy

  def record(world, prefixes, policies, uniforms):
    authors.append(policies)
    return sample(world, prefixes, policies, uniforms)

  monkeypatch.setattr(triplets, 'sample_by_policy', record)
  long = dataclasses.replace(small_config, document_tokens=200)
  written = split_documents(documents.make_streams(dataclasses.replace(world, config=long))['train'])
  assert set(authors[0]) == {i for i, p in enumerate(world.pool) if not p.params.held_out}
  halves = [d[len(d) // 2 : -1] for d in written]  # the first half contains the prefix, which no policy wrote
  logprobs = pool_lib.pool_logprobs(world.pool, [d[: len(d) // 2] for d in written], halves)
  is_long = [len(h) > 40 for h in halves]
  own = logprobs[authors[0], np.arange(len(written))]
  other = logprobs[np.roll(authors[0], 1), np.arange(len(written))]
  differ = is_long & (authors[0] != np.roll(authors[0], 1))
  assert differ.sum() > 100 and np.mean(own[differ] > other[differ]) > 0.9
