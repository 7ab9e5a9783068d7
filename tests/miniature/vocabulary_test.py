from __future__ import annotations

import numpy as np
import pytest

from polar_jax.miniature import vocabulary


@pytest.fixture(scope='module')
def vocab(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json'
  vocabulary.train_tokenizer(['the cat sat on the mat.\n    def f(x): return x\n'] * 20, 300).save(str(path))
  return vocabulary.Vocabulary(path)


def decode(vocab, ids):
  return ''.join(vocab.pieces[ids])


def test_train_tokenizer_special_tokens_come_first(vocab):
  assert [vocab.tokenizer.token_to_id(t) for t in vocabulary.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_encode_documents_round_trip_of_ascii_and_quoted_special_tokens(vocab):
  for text in (vocabulary._ASCII, 'quoting <s>, </s> and <|reward|>', '  two  spaces\n\n'):
    ids = vocab.encode_documents([text])[0]
    assert ids.min() >= vocabulary.NUM_SPECIAL and decode(vocab, ids) == text == vocab.tokenizer.decode(ids)


def test_pieces_of_any_ids_are_ascii(vocab):
  ids = np.random.default_rng(0).integers(0, vocab.size, 2_000)
  assert decode(vocab, ids).isascii() and decode(vocab, ids) == vocab.tokenizer.decode(ids, skip_special_tokens=True)


def test_token_stream_ends_every_document():
  assert vocabulary.token_stream([np.array([7, 8]), np.array([9])]).tolist() == [7, 8, 2, 9, 2]
