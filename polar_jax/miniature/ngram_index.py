"""All n-grams of one corpus, numbered once, so that fitting and querying each of hundreds of n-gram policies is array indexing.

A k-gram has an id within its order, or -1 if it does not occur in the corpus. Ids of order 1 are token ids. Within an order, ids are
sorted by (context id, token), so the successors of a context are contiguous.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from polar_jax.miniature import vocabulary
from polar_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Order:
  """The G k-grams of one order k >= 2; C is the number of (k-1)-grams."""

  keys: np.ndarray  # int64 (G,), sorted: context id * V + token
  context: np.ndarray  # int64 (G,), id of the first k-1 tokens
  token: np.ndarray  # int64 (G,), the last token
  suffix: np.ndarray  # int64 (G,), id of the last k-1 tokens
  first: np.ndarray  # int64 (C + 1,): successors of context c are [first[c], first[c + 1])
  occurrence: np.ndarray  # int32 (N,): id of the k-gram that ends at each token of the stream; -1 for the first k-1


@dataclasses.dataclass(frozen=True)
class Queries:
  """Tokens to score, as n-gram ids of one corpus: M tokens of R trajectories."""

  grams: tuple[np.ndarray, ...]  # per order k = 1..K: int64 (M,), id of the k-gram ending at the token, or -1
  contexts: tuple[np.ndarray, ...]  # per order k = 1..K: int64 (M,), id of the k-1 preceding tokens; all -1 for k = 1
  trajectory: np.ndarray  # int64 (M,), index of the token's trajectory
  num_trajectories: int  # R


class CorpusIndex:
  """The n-grams of a token stream, of orders 1 to max_order."""

  def __init__(self, name: str, stream: np.ndarray, vocab_size: int, max_order: int):
    if len(stream) < 2 * max_order:
      raise UserError(f'corpus {name!r} has {len(stream)} training tokens; n-gram policies of order {max_order} need more text')
    self.name = name
    self.stream = np.asarray(stream, np.int64)
    self.vocab_size = vocab_size
    self.max_order = max_order
    self.orders: dict[int, Order] = {}
    previous, contexts = self.stream, vocab_size
    for k in range(2, max_order + 1):
      keys = previous[k - 2 : -1] * vocab_size + self.stream[k - 1 :]
      unique, where, inverse = np.unique(keys, return_index=True, return_inverse=True)
      occurrence = np.full(len(self.stream), -1, np.int64)
      occurrence[k - 1 :] = inverse
      context, token = np.divmod(unique, vocab_size)
      self.orders[k] = Order(
        keys=unique,
        context=context,
        token=token,
        suffix=previous[where + k - 1],
        first=np.searchsorted(context, np.arange(contexts + 1)),
        occurrence=occurrence.astype(np.int32),
      )
      previous, contexts = occurrence, len(unique)

  def find(self, k: int, context: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Return the ids of the k-grams (context, token), -1 where the context is -1 or the corpus does not have the k-gram."""
    keys = self.orders[k].keys
    wanted = context * self.vocab_size + token
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((context >= 0) & (keys[at] == wanted), at, -1)

  def last_contexts(self, prefixes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return, for each order k = 2..max_order, the id of the last k-1 tokens of every prefix: int64 (R,)."""
    tails = _tails(prefixes, self.max_order - 1)
    current = [tails[:, i] for i in range(tails.shape[1])]  # ids of the 1-grams that end at each position of the tail
    contexts = [current[-1]] if current else []
    for k in range(2, self.max_order):
      current = [self.find(k, current[i], tails[:, i + k - 1]) for i in range(len(current) - 1)]
      contexts.append(current[-1])
    return contexts

  def queries(self, prefixes: Sequence[np.ndarray], trajectories: Sequence[np.ndarray]) -> Queries:
    """Return the n-gram ids of every token of every trajectory; prefix i precedes trajectory i."""
    pad = self.max_order - 1
    tails = _tails(prefixes, pad)
    lengths = np.array([len(t) for t in trajectories], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths + pad)[:-1]]) if len(lengths) else np.zeros(0, np.int64)
    stream = np.zeros(int((lengths + pad).sum()), np.int64)
    is_scored = np.ones(len(stream), bool)
    positions = (starts[:, None] + np.arange(pad)[None, :]).ravel()
    stream[positions] = tails.ravel()
    is_scored[positions] = False
    if lengths.sum():
      stream[is_scored] = np.concatenate([np.asarray(t, np.int64) for t in trajectories])
    before = np.full(len(stream), -1, np.int64)
    current, grams, contexts = stream, [stream[is_scored]], [before[is_scored]]
    for k in range(2, self.max_order + 1):
      before = np.concatenate([[-1], current[:-1]])
      current = self.find(k, before, stream)
      grams.append(current[is_scored])
      contexts.append(before[is_scored])
    return Queries(tuple(grams), tuple(contexts), np.repeat(np.arange(len(lengths)), lengths), len(lengths))


def _tails(prefixes: Sequence[np.ndarray], width: int) -> np.ndarray:
  """Return the last `width` tokens of every prefix, int64 (R, width), padded on the left with `<pad>`, which no corpus contains."""
  tails = np.full((len(prefixes), width), vocabulary.PAD_ID, np.int64)
  for row, prefix in enumerate(prefixes):
    tail = prefix[max(0, len(prefix) - width) :]
    if len(tail):
      tails[row, width - len(tail) :] = tail
  return tails
