"""Interpolated n-gram policies over BPE ids: cheap to sample in bulk, and with a law that is known exactly.

With c(h, v) the count of token v after context h in the policy's window of its corpus, n(h) its sum and t(h) the number of distinct v,
  p_k(v | h) = (1 - l_k(h)) c(h, v) / n(h) + l_k(h) p_{k-1}(v | h'),     l_k(h) = 1 - w_k n(h) / (n(h) + s t(h))
where h' drops the oldest token of h and p_0 is uniform. s = 0 is Jelinek-Mercer smoothing; w_k = 1 with s = 1 would be Witten-Bell.
The policy is p_K at a temperature T: p_K^(1/T) / Z(h).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.miniature import cleanup, ngram_index, vocabulary

MIN_TEMPERATURE = 0.1  # of sampling
_NEVER_SAMPLED = [i for i in range(vocabulary.NUM_SPECIAL) if i != vocabulary.EOS_ID]
_CHUNK = 256  # contexts whose distributions are expanded at a time: about 1 MB, which stays in cache
_GROUP = 32  # tokens summed together for the first step of inversion


@dataclasses.dataclass(frozen=True)
class NgramParams:
  """Everything that defines an n-gram policy, given the training streams of the corpora."""

  name: str
  corpus: str
  start: float  # of the window, as a fraction of the corpus' training tokens
  fraction: float  # size of the window, likewise
  order: int
  weights: tuple[float, ...]  # w_1..w_order, each in (0, 1)
  strength: float  # s >= 0
  temperature: float
  top_p: float
  twin_of: str | None = None  # the policy that this one is a nudged copy of
  held_out: bool = False  # kept for evaluation on unseen policies

  def to_json(self) -> dict[str, Any]:
    """Plain values for pool.json."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> NgramParams:
    """The inverse of `to_json`."""
    return cls(**{**values, 'weights': tuple(values['weights'])})


@dataclasses.dataclass(frozen=True)
class _Tables:
  """Probabilities of a fitted policy. Lists are indexed by order k; entries 0 (and 1 where noted) are unused.

  Arrays over contexts end with one extra slot, the answer for the unknown context -1.
  """

  probability: list[np.ndarray]  # [k]: p_k of every k-gram; [1]: (V,)
  backoff: list[np.ndarray]  # [k >= 2]: l_k of every context
  seen: list[np.ndarray]  # [k >= 2]: ids of the k-grams with a positive count
  first_seen: list[np.ndarray]  # [k >= 2]: CSR pointers of `seen` by context


class NgramPolicy:
  """One n-gram language model. Tables are built when asked for and dropped: hundreds of them would fill the memory."""

  def __init__(self, params: NgramParams, index: ngram_index.CorpusIndex):
    if params.corpus != index.name:
      raise ValueError(f'policy {params.name} learns from corpus {params.corpus!r}, not {index.name!r}')
    if not 1 <= params.order <= index.max_order or len(params.weights) != params.order:
      raise ValueError(f'policy {params.name}: order {params.order} needs {params.order} weights and an index of that order')
    if not all(0 < w < 1 for w in params.weights):
      raise ValueError(f'policy {params.name}: weights must lie strictly between 0 and 1, got {params.weights}')
    self.params = params
    self.index = index

  @property
  def name(self) -> str:
    """The policy's name in pool.json and in the rows' metadata."""
    return self.params.name

  def _fit(self) -> _Tables:
    """Counts the window and interpolates, from order 1 upwards."""
    params, index = self.params, self.index
    total = len(index.stream)
    begin = int(params.start * total)
    end = min(total, max(begin + index.max_order, begin + round(params.fraction * total)))
    counts = np.bincount(index.stream[begin:end], minlength=index.vocab_size)
    share = params.weights[0] * counts.sum() / (counts.sum() + params.strength * np.count_nonzero(counts))
    unigram = share * counts / counts.sum() + (1 - share) / index.vocab_size
    tables = _Tables([np.zeros(0), unigram], [np.zeros(0)] * 2, [np.zeros(0)] * 2, [np.zeros(0)] * 2)
    for k in range(2, params.order + 1):
      order = index.orders[k]
      counts = np.bincount(order.occurrence[begin + k - 1 : end], minlength=len(order.keys))
      sums = np.diff(np.concatenate([[0], np.cumsum(counts)])[order.first])
      first_seen = np.concatenate([[0], np.cumsum(counts > 0)])[order.first]
      share = params.weights[k - 1] * sums / np.maximum(sums + params.strength * np.diff(first_seen), 1e-300)
      backoff = np.append(1 - share, 1.0)
      observed = (share / np.maximum(sums, 1))[order.context] * counts
      tables.probability.append(observed + backoff[order.context] * tables.probability[-1][order.suffix])
      tables.backoff.append(backoff)
      tables.seen.append(np.flatnonzero(counts))
      tables.first_seen.append(first_seen)
    return tables

  def _normalisers(self, tables: _Tables, power: float) -> list[np.ndarray]:
    """[k]: Z of every context of order k, the sum over the vocabulary of p_k^power.

    Tokens that never followed a context keep their lower-order proportions, so their mass is l^power times what the lower order's
    Z leaves once the followers are taken out: all Z cost one pass over the n-grams.
    """
    z = [np.zeros(0), (tables.probability[1] ** power).sum(keepdims=True)]
    for k in range(2, self.params.order + 1):
      order, seen = self.index.orders[k], tables.seen[k]
      context, contexts = order.context[seen], len(order.first) - 1
      lower_probability = tables.probability[k - 1][order.suffix[seen]] ** power
      own = np.bincount(context, tables.probability[k][seen] ** power, contexts)
      taken = np.bincount(context, lower_probability, contexts)
      suffix = self.index.orders[k - 1].suffix if k > 2 else np.zeros(contexts, np.int64)
      lower = z[k - 1][suffix]
      z.append(own + tables.backoff[k][:-1] ** power * np.maximum(lower - taken, 0))
    return z

  def score(self, queries: ngram_index.Queries) -> np.ndarray:
    """Natural-log probability of every row of `queries` (ids of this policy's corpus): float64 (R,)."""
    return np.bincount(queries.row, self.token_logprobs(queries), queries.rows)

  def token_logprobs(self, queries: ngram_index.Queries) -> np.ndarray:
    """Natural-log probability of every token of `queries` under the temperature-scaled, untruncated law: float64 (M,)."""
    tables, power = self._fit(), 1 / self.params.temperature
    normalisers = self._normalisers(tables, power)
    log_p = np.log(tables.probability[1])[queries.grams[0]]
    log_z = np.full(len(log_p), np.log(normalisers[1][0]))
    for k in range(2, self.params.order + 1):
      gram, context = queries.grams[k - 1], queries.contexts[k - 1]
      log_p += np.log(tables.backoff[k])[context]
      known = np.flatnonzero(gram >= 0)
      log_p[known] = np.log(tables.probability[k])[gram[known]]
      known = np.flatnonzero(context >= 0)
      log_z[known] = np.log(normalisers[k])[context[known]]
    return power * log_p - log_z

  def logprob(self, prefixes: Sequence[np.ndarray], trajectories: Sequence[np.ndarray]) -> np.ndarray:
    """See `policy.ExactPolicy`. The law is smoothed and temperature-scaled but not truncated, so every value is finite."""
    return self.score(self.index.queries(prefixes, trajectories))

  def sample(
    self,
    prefixes: Sequence[np.ndarray],
    n: int,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    max_tokens: int = 32,
  ) -> list[list[np.ndarray]]:
    """See `policy.Policy`. A continuation stops early where the policy ends a document, but not before MIN_TOKENS."""
    uniforms = rng.random((len(prefixes) * n, max_tokens))
    rows = [p for p in prefixes for _ in range(n)]
    ids, lengths, _ = self.sample_ids(rows, uniforms, temperature, min(top_p, self.params.top_p), top_k)
    flat = [ids[i, : lengths[i]] for i in range(len(rows))]
    return [flat[i * n : (i + 1) * n] for i in range(len(prefixes))]

  def sample_ids(
    self, prefixes: Sequence[np.ndarray], uniforms: np.ndarray, temperature: float, top_p: float, top_k: int | None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One continuation per prefix by inverting the cumulative law at given uniforms, so a row never depends on its neighbours.

    Args:
      prefixes: R int arrays.
      uniforms: float (R, T) in [0, 1).
      temperature: multiplies the policy's own.
      top_p: the effective one; the policy's own is not applied here.
      top_k: None keeps all tokens.

    Returns:
      ids int32 (R, T) padded with `<pad>`, lengths int64 (R,), and bool (R,): the policy ended the document.
    """
    rows, width = uniforms.shape
    effective = self.params.temperature * temperature
    if effective < MIN_TEMPERATURE:
      raise ValueError(f'policy {self.name} at temperature {effective:.3g}: below {MIN_TEMPERATURE} single-precision sampling underflows')
    sampler = _Sampler(self, self._fit(), 1 / effective, top_p, top_k)
    ids = np.full((rows, width), vocabulary.PAD_ID, np.int32)
    lengths, ended = np.full(rows, width), np.zeros(rows, bool)
    active = np.arange(rows)
    contexts = self.index.last_contexts(prefixes)[: self.params.order - 1]
    for step in range(width):
      if step == cleanup.MIN_TOKENS:
        sampler.allow_end()
      tokens = sampler.draw(contexts, uniforms[active, step])
      stop = tokens == vocabulary.EOS_ID
      lengths[active[stop]], ended[active[stop]] = step, True
      active, tokens = active[~stop], tokens[~stop]
      if not len(active):
        break
      ids[active, step] = tokens
      contexts = [c[~stop] for c in contexts]
      longer = [self.index.find(k, contexts[k - 2], tokens) for k in range(2, self.params.order)]
      contexts = [tokens, *longer][: self.params.order - 1]
    return ids, lengths, ended


class _Sampler:
  """Draws next tokens of a fitted policy at one temperature and truncation, each distinct context expanded once.

  Truncation to the nucleus is by rejection (a token stays if the tokens likelier than it hold less than top_p), which spares sorting.
  """

  def __init__(self, policy: NgramPolicy, tables: _Tables, power: float, top_p: float, top_k: int | None):
    self.top_p, self.top_k = top_p, top_k
    self.order = policy.params.order
    self.tables, orders = tables, policy.index.orders
    dense = tables.probability[1][None, :]  # law after the last one token (or none): higher orders are sparse changes to it
    if self.order >= 2:
      dense = tables.backoff[2][:-1, None] * dense
      seen = tables.seen[2]
      dense[orders[2].context[seen], orders[2].token[seen]] = tables.probability[2][seen]
    vocab = dense.shape[1]
    self.dense = np.zeros((len(dense), -(-vocab // _GROUP) * _GROUP), np.float32)
    self.dense[:, :vocab] = dense.astype(np.float32) ** np.float32(power)
    self.dense[:, _NEVER_SAMPLED] = 0
    self.end_column = self.dense[:, vocabulary.EOS_ID].copy()
    self.dense[:, vocabulary.EOS_ID] = 0
    self.dense_law = _Law(self.dense, top_p, top_k)
    self.scale = {k: (tables.backoff[k] ** power).astype(np.float32) for k in range(3, self.order + 1)}
    self.value = {k: (tables.probability[k][tables.seen[k]] ** power).astype(np.float32) for k in self.scale}
    self.token = {k: orders[k].token[tables.seen[k]] for k in self.scale}
    self.may_end = False

  def allow_end(self) -> None:
    """From now on the document may end."""
    self.may_end = True
    self.dense[:, vocabulary.EOS_ID] = self.end_column
    self.dense_law = _Law(self.dense, self.top_p, self.top_k)

  def draw(self, contexts: list[np.ndarray], uniforms: np.ndarray) -> np.ndarray:
    """Next tokens int64 (R,), after contexts [k - 2] of order k, int64 (R,) each."""
    if self.order == 1:
      return self.dense_law.draw(np.zeros(len(uniforms), np.int64), uniforms)
    state, offset = contexts[0].copy(), len(self.dense)
    for k in range(3, self.order + 1):  # the longest context with a successor in the window decides the law
      first, context = self.tables.first_seen[k], contexts[k - 2]
      known = (context >= 0) & (first[context + 1] > first[context])
      state = np.where(known, offset + context, state)
      offset += len(first) - 1
    tokens = np.empty(len(uniforms), np.int64)
    sparse = state >= len(self.dense)
    tokens[~sparse] = self.dense_law.draw(state[~sparse], uniforms[~sparse])
    samples = np.flatnonzero(sparse)
    _, where, inverse = np.unique(state[samples], return_index=True, return_inverse=True)
    for low in range(0, len(where), _CHUNK):
      part = samples[where[low : low + _CHUNK]]
      law = _Law(self._expand([c[part] for c in contexts]), self.top_p, self.top_k)
      mine = np.flatnonzero((inverse >= low) & (inverse < low + _CHUNK))
      tokens[samples[mine]] = law.draw(inverse[mine] - low, uniforms[samples[mine]])
    return tokens

  def _expand(self, contexts: list[np.ndarray]) -> np.ndarray:
    """Unnormalised probabilities float32 (U, V) after each context."""
    law = self.dense[contexts[0]]
    for k in range(3, self.order + 1):
      context = contexts[k - 2]
      law *= self.scale[k][context][:, None]
      first = self.tables.first_seen[k]
      begin, size = np.where(context >= 0, first[context], 0), np.where(context >= 0, first[context + 1] - first[context], 0)
      rows = np.repeat(np.arange(len(context)), size)
      seen = np.arange(len(rows)) + np.repeat(begin - (np.cumsum(size) - size), size)
      law[rows, self.token[k][seen]] = self.value[k][seen]
    if not self.may_end:
      law[:, vocabulary.EOS_ID] = 0
    return law


class _Law:
  """Distributions over the vocabulary, float32 (U, V) unnormalised, that are drawn from by inversion in two steps: group, then token."""

  def __init__(self, law: np.ndarray, top_p: float, top_k: int | None):
    if top_k is not None and top_k < law.shape[1]:
      law = law * (law >= np.partition(law, -top_k, axis=1)[:, -top_k, None])
    self.law, self.top_p = law, top_p
    self.groups = law.reshape(len(law), -1, _GROUP)
    self.running = np.cumsum(self.groups.sum(axis=2), axis=1)

  def draw(self, row: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Tokens int64 (R,) of distributions `row`, from uniforms (R,) in [0, 1)."""
    tokens = np.zeros(len(row), np.int64)
    pending, uniforms = np.arange(len(row)), uniforms.copy()
    while len(pending):
      drawn = self._invert(row[pending], uniforms[pending])
      tokens[pending] = drawn
      pending = pending[~self._stays(row[pending], drawn)]
      uniforms[pending] = _next_uniform(uniforms[pending])
    return tokens

  def _invert(self, row: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    running = self.running[row]
    target = uniforms * running[:, -1]
    group = np.minimum(np.count_nonzero(running <= target[:, None], axis=1), running.shape[1] - 1)
    before = np.where(group > 0, running[np.arange(len(row)), group - 1], 0)
    inside = np.cumsum(self.groups[row, group], axis=1)
    return group * _GROUP + np.minimum(np.count_nonzero(inside <= (target - before)[:, None], axis=1), _GROUP - 1)

  def _stays(self, row: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Whether each token is in the nucleus: those likelier than it hold less than top_p. Rounding may offer an impossible one: no."""
    own, total = self.law[row, tokens], self.running[row, -1]
    stays = own > 0
    if self.top_p < 1:
      doubtful = np.flatnonzero(stays & (own <= (1 - self.top_p) * total))  # the others cannot lie outside
      for low in range(0, len(doubtful), _CHUNK):
        part = doubtful[low : low + _CHUNK]
        law = self.law[row[part]]
        law *= law > own[part, None]
        stays[part] = law.sum(axis=1) < self.top_p * total[part]
    return stays


def _next_uniform(uniforms: np.ndarray) -> np.ndarray:
  """The uniforms to retry with: SplitMix64 of the bits of the last ones, so that a row needs no stream of its own."""
  z = (uniforms * 2.0**53).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
