from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from polar_jax.data import text as text_lib
from polar_jax.miniature import corpora, documents, triplets, vocabulary
from polar_jax.miniature import pool as pool_lib
from polar_jax.miniature import world as engine


@pytest.fixture(scope='module')
def settings(small_config):
  return dataclasses.replace(small_config, documents=400, document_tokens=48, max_order=1)


@pytest.fixture(scope='module')
def run(tmp_path_factory, settings):
  workdir = tmp_path_factory.mktemp('documents')
  return workdir, engine.synthesize(settings, 3, workdir, lambda line: None)


@pytest.fixture(scope='module')
def world(run, settings):
  workdir, result = run
  text = text_lib.load_streams(workdir / 'data' / result.text)
  vocab = vocabulary.Vocabulary(workdir / 'data' / result.tokenizer)
  prompts, unseen = (vocabulary.part_streams(vocab, corpora.load_corpora(), part) for part in ('prompts', 'unseen'))
  assert set(text['validation']) == {*prompts, 'documents'}
  return triplets.World(engine.load_pool(workdir), triplets.prefix_sources(prompts, unseen, settings), vocab.pieces, settings, 3)


def _split(stream):
  ends = np.flatnonzero(stream == vocabulary.EOS_ID)
  assert ends[-1] == len(stream) - 1
  return np.split(stream, ends + 1)[:-1]


def test_documents_lie_beside_the_corpora(run, world, settings):
  workdir, result = run
  text = text_lib.load_streams(workdir / 'data' / result.text)
  for split, count in (('train', 400), ('validation', 8)):
    written = _split(text[split]['documents'])
    assert len(written) == count and max(map(len, written)) <= settings.document_tokens + 1
    np.testing.assert_array_equal(text[split]['documents'], documents.make_streams(world)[split])
  assert {*corpora.CORPUS_NAMES, 'documents'} == set(text['train'])


def test_a_document_does_not_depend_on_how_many_there_are(world):
  few = dataclasses.replace(world, config=dataclasses.replace(world.config, documents=50, workers=1))
  some, all_of_them = (_split(documents.make_streams(w)['train']) for w in (few, world))
  assert len(some) == 50
  for one, other in zip(some, all_of_them[:50], strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_document_has_one_author_and_none_is_held_out(world, settings, monkeypatch):
  authors = []
  sample = triplets.sample_by_policy

  def note(world, prefixes, policies, uniforms):
    authors.append(policies)
    return sample(world, prefixes, policies, uniforms)

  monkeypatch.setattr(triplets, 'sample_by_policy', note)
  long = dataclasses.replace(settings, document_tokens=200)
  written = _split(documents.make_streams(dataclasses.replace(world, config=long))['train'])
  assert set(authors[0]) == {i for i, p in enumerate(world.pool) if not p.params.held_out}
  halves = [d[len(d) // 2 : -1] for d in written]  # the first half holds the prefix, which is nobody's
  logprobs = pool_lib.pool_logprobs(world.pool, [d[: len(d) // 2] for d in written], halves)
  enough = [len(h) > 40 for h in halves]
  own = logprobs[authors[0], np.arange(len(written))]
  other = logprobs[np.roll(authors[0], 1), np.arange(len(written))]
  differ = enough & (authors[0] != np.roll(authors[0], 1))
  assert differ.sum() > 100 and np.mean(own[differ] > other[differ]) > 0.9
