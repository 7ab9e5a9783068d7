"""The small byte-level BPE of the miniature, and the token streams that policies and the initial language model learn from."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polar_jax.data.tokenizer import EOS, PAD, SPECIAL_TOKENS
from polar_jax.miniature import corpora as corpora_lib

NUM_SPECIAL = len(SPECIAL_TOKENS)  # special tokens have the first ids, in the order of SPECIAL_TOKENS
PAD_ID, EOS_ID = map(SPECIAL_TOKENS.index, (PAD, EOS))
_ASCII = ''.join(map(chr, [ord('\n'), *range(ord(' '), ord('~') + 1)]))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Train a byte-level BPE of at most `vocab_size` tokens over printable ASCII and newline.

  With an ASCII alphabet a policy may emit any token after any other and still decode to valid text.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = [character for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(_ASCII) for character in piece]
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIAL_TOKENS),
      initial_alphabet=alphabet,
      limit_alphabet=len(_ASCII),
      show_progress=False,
    ),
  )
  return tokenizer


class Vocabulary:
  """A trained tokenizer with the text of every id, and an encoder that never produces special tokens."""

  def __init__(self, path: pathlib.Path):
    self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
    self.tokenizer.encode_special_tokens = True  # a corpus may quote '<s>', which is text there
    self.size = self.tokenizer.get_vocab_size()
    pieces = [self.tokenizer.decode([i], skip_special_tokens=True) for i in range(self.size)]
    self.pieces = np.array(pieces, dtype=object)  # (V,), special tokens are ''

  def encode_documents(self, documents: Sequence[str]) -> list[np.ndarray]:
    """Return the int32 ids of each document."""
    return [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(list(documents), add_special_tokens=False)]


def token_stream(documents: Sequence[np.ndarray]) -> np.ndarray:
  """Return one int32 stream: the documents in order, each ending with `</s>`."""
  end = np.array([EOS_ID], np.int32)
  return np.concatenate([part for d in documents for part in (d, end)]) if documents else np.zeros(0, np.int32)


def part_streams(vocabulary: Vocabulary, corpora: Sequence[corpora_lib.Corpus], part: str) -> dict[str, np.ndarray]:
  """Return the token stream of one part of every corpus, by corpus name."""
  return {c.name: token_stream(vocabulary.encode_documents(c.part(part))) for c in corpora}
