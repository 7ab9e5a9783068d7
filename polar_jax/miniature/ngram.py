"""Interpolated n-gram policies over BPE ids: cheap to sample in bulk, with distributions that are known exactly.

Let c(h, v) be the count of token v after context h in the policy's window of its corpus, n(h) its sum and t(h) the number of
distinct v. Then
  p_k(v | h) = (1 - l_k(h)) c(h, v) / n(h) + l_k(h) p_{k-1}(v | h'),     l_k(h) = 1 - w_k n(h) / (n(h) + s t(h))
where h' drops the oldest token of h and p_0 is uniform. s = 0 is Jelinek-Mercer smoothing; w_k = 1 with s = 1 would be Witten-Bell.
The policy is p_K at temperature T: p_K^(1/T) / Z(h).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_jax.miniature import cleanup, ngram_index, vocabulary

MIN_TEMPERATURE = 0.1  # for sampling
_NEVER_SAMPLED = [i for i in range(vocabulary.NUM_SPECIAL) if i != vocabulary.EOS_ID]
_CHUNK = 256  # contexts whose distributions are expanded at a time: about 1 MB, which fits the cache
_GROUP = 32  # tokens summed together for the first step of the inversion


@dataclasses.dataclass(frozen=True)
class NgramParams:
  """Everything that defines an n-gram policy, given the training streams of the corpora."""

  name: str
  corpus: str
  start: float  # start of the window, as a fraction of the corpus' training tokens
  fraction: float  # size of the window, as a fraction of the same
  order: int
  weights: tuple[float, ...]  # w_1..w_order, each in (0, 1)
  strength: float  # s >= 0
  temperature: float
  top_p: float
  twin_of: str | None = None  # the policy that this one is a perturbed copy of
  held_out: bool = False  # kept for evaluation on unseen policies

  def to_json(self) -> dict[str, Any]:
    """Return JSON values for pool.json."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> NgramParams:
    """Return the parameters that `to_json` gave."""
    return cls(**{**values, 'weights': tuple(values['weights'])})


@dataclasses.dataclass(frozen=True)
class _Tables:
  """Probabilities of a fitted policy. Lists are indexed by order k; entry 0 (and 1 where noted) is unused.

  Arrays over contexts end with an extra element, the value for the unknown context -1.
  """

  probability: list[np.ndarray]  # [k]: p_k of every k-gram; [1]: (V,)
  backoff: list[np.ndarray]  # [k >= 2]: l_k of every context
  seen: list[np.ndarray]  # [k >= 2]: ids of the k-grams with a positive count
  first_seen: list[np.ndarray]  # [k >= 2]: CSR pointers of `seen` by context


class NgramPolicy:
  """One n-gram language model. Its tables are built for each call and then dropped: those of hundreds of policies would fill the memory."""

  def __init__(self, params: NgramParams, index: ngram_index.CorpusIndex):
    if params.corpus != index.name:
      raise ValueError(f'policy {params.name} learns from corpus {params.corpus!r}, not {index.name!r}')
    if not 1 <= params.order <= index.max_order or len(params.weights) != params.order:
      raise ValueError(f'policy {params.name}: order {params.order} needs {params.order} weights and an index of that order')
    if not all(0 < w < 1 for w in params.weights):
      raise ValueError(f'policy {params.name}: weights must be strictly between 0 and 1, got {params.weights}')
    self.params = params
    self.index = index

  @property
  def name(self) -> str:
    """The policy's name in pool.json and in the metadata of examples."""
    return self.params.name

  def _fit(self) -> _Tables:
    """Count the n-grams of the window and interpolate, from order 1 upwards."""
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

  def _normalizers(self, tables: _Tables, power: float) -> list[np.ndarray]:
    """Return [k]: Z of every context of order k, the sum of p_k^power over the vocabulary.

    Tokens that never followed a context keep their lower-order proportions, so their mass is l^power times the lower order's Z without
    the tokens that did follow. All Z together cost one pass over the n-grams.
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
    """Return the natural-log probability of every trajectory of `queries` (ids of this policy's corpus): float64 (R,)."""
    return np.bincount(queries.trajectory, self.token_logprobs(queries), queries.num_trajectories)

  def token_logprobs(self, queries: ngram_index.Queries) -> np.ndarray:
    """Return the natural-log probability of every token of `queries`: float64 (M,).

    The distribution is smoothed and temperature-scaled but not truncated, so every value is finite.
    """
    tables, power = self._fit(), 1 / self.params.temperature
    normalizers = self._normalizers(tables, power)
    log_p = np.log(tables.probability[1])[queries.grams[0]]
    log_z = np.full(len(log_p), np.log(normalizers[1][0]))
    for k in range(2, self.params.order + 1):
      gram, context = queries.grams[k - 1], queries.contexts[k - 1]
      log_p += np.log(tables.backoff[k])[context]
      known = np.flatnonzero(gram >= 0)
      log_p[known] = np.log(tables.probability[k])[gram[known]]
      known = np.flatnonzero(context >= 0)
      log_z[known] = np.log(normalizers[k])[context[known]]
    return power * log_p - log_z

  def sample_ids(
    self, prefixes: Sequence[np.ndarray], uniforms: np.ndarray, temperature: float, top_p: float, top_k: int | None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample one continuation per prefix by inverting the cumulative distribution at given uniforms, independently of other prefixes.

    Args:
      prefixes: R int arrays.
      uniforms: float (R, T) in [0, 1).
      temperature: multiplies the policy's own temperature.
      top_p: the effective value; the policy's own is not applied here.
      top_k: None keeps all tokens.

    Returns:
      ids int32 (R, T) padded with `<pad>`; lengths int64 (R,); ended bool (R,), whether the policy ended the document, which it may do
      from token MIN_TOKENS on.

    Raises:
      ValueError: the effective temperature is below MIN_TEMPERATURE.
    """
    count, width = uniforms.shape
    effective = self.params.temperature * temperature
    if effective < MIN_TEMPERATURE:
      raise ValueError(f'policy {self.name} at temperature {effective:.3g}: below {MIN_TEMPERATURE} single-precision sampling underflows')
    sampler = _Sampler(self, self._fit(), 1 / effective, top_p, top_k)
    if self.params.order == 1:
      return sampler.draw_all(uniforms)
    ids = np.full((count, width), vocabulary.PAD_ID, np.int32)
    lengths, ended = np.full(count, width), np.zeros(count, bool)
    active = np.arange(count)
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
  """Draws next tokens of a fitted policy at one temperature and truncation, expanding each distinct context once.

  Truncation to the nucleus is by rejection (a token is kept if more likely tokens have a total probability below top_p), which needs no
  sorting.
  """

  def __init__(self, policy: NgramPolicy, tables: _Tables, power: float, top_p: float, top_k: int | None):
    self.top_p, self.top_k = top_p, top_k
    self.order = policy.params.order
    self.tables, orders = tables, policy.index.orders
    dense = tables.probability[1][None, :]  # given one token of context (or none): higher orders are sparse changes to it
    if self.order >= 2:
      dense = tables.backoff[2][:-1, None] * dense
      seen = tables.seen[2]
      dense[orders[2].context[seen], orders[2].token[seen]] = tables.probability[2][seen]
    self.dense = np.pad(dense.astype(np.float32) ** np.float32(power), ((0, 0), (0, -dense.shape[1] % _GROUP)))
    self.dense[:, _NEVER_SAMPLED] = 0
    self.end_column = self.dense[:, vocabulary.EOS_ID].copy()
    self.dense[:, vocabulary.EOS_ID] = 0
    self.dense_distributions = _Distributions(self.dense, top_p, top_k)
    self.scale = {k: (tables.backoff[k] ** power).astype(np.float32) for k in range(3, self.order + 1)}
    self.value = {k: (tables.probability[k][tables.seen[k]] ** power).astype(np.float32) for k in self.scale}
    self.token = {k: orders[k].token[tables.seen[k]] for k in self.scale}
    self.may_end = False

  def allow_end(self) -> None:
    """Allow the document to end from the next token on."""
    self.may_end = True
    self.dense[:, vocabulary.EOS_ID] = self.end_column
    self.dense_distributions = _Distributions(self.dense, self.top_p, self.top_k)

  def draw_all(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw whole continuations of a policy of order 1, whose tokens do not depend on each other. Returns as `sample_ids` does."""
    count, width = uniforms.shape
    ids = np.zeros((count, width), np.int32)
    parts = [(0, min(cleanup.MIN_TOKENS, width)), (min(cleanup.MIN_TOKENS, width), width)]
    for low, high in parts:
      if low == cleanup.MIN_TOKENS:
        self.allow_end()
      flat = uniforms[:, low:high].ravel()
      ids[:, low:high] = self.dense_distributions.draw(np.zeros(len(flat), np.int64), flat).reshape(count, high - low)
    stop = ids == vocabulary.EOS_ID
    ended = stop.any(axis=1)
    lengths = np.where(ended, stop.argmax(axis=1), width)
    ids[np.arange(width) >= lengths[:, None]] = vocabulary.PAD_ID
    return ids, lengths, ended

  def draw(self, contexts: list[np.ndarray], uniforms: np.ndarray) -> np.ndarray:
    """Draw the next tokens, int64 (R,), after contexts [k - 2] of order k, int64 (R,) each; of a policy of order 2 or higher."""
    state, offset = contexts[0].copy(), len(self.dense)
    for k in range(3, self.order + 1):  # the longest context with a successor in the window determines the distribution
      first, context = self.tables.first_seen[k], contexts[k - 2]
      known = (context >= 0) & (first[context + 1] > first[context])
      state = np.where(known, offset + context, state)
      offset += len(first) - 1
    tokens = np.empty(len(uniforms), np.int64)
    sparse = state >= len(self.dense)
    tokens[~sparse] = self.dense_distributions.draw(state[~sparse], uniforms[~sparse])
    samples = np.flatnonzero(sparse)
    _, where, inverse = np.unique(state[samples], return_index=True, return_inverse=True)
    for low in range(0, len(where), _CHUNK):
      part = samples[where[low : low + _CHUNK]]
      distributions = _Distributions(self._expand([c[part] for c in contexts]), self.top_p, self.top_k)
      mine = np.flatnonzero((inverse >= low) & (inverse < low + _CHUNK))
      tokens[samples[mine]] = distributions.draw(inverse[mine] - low, uniforms[samples[mine]])
    return tokens

  def _expand(self, contexts: list[np.ndarray]) -> np.ndarray:
    """Return unnormalized probabilities float32 (U, V) after each context."""
    probs = self.dense[contexts[0]]
    for k in range(3, self.order + 1):
      context = contexts[k - 2]
      probs *= self.scale[k][context][:, None]
      first = self.tables.first_seen[k]
      begin, size = np.where(context >= 0, first[context], 0), np.where(context >= 0, first[context + 1] - first[context], 0)
      index = np.repeat(np.arange(len(context)), size)
      seen = np.arange(len(index)) + np.repeat(begin - (np.cumsum(size) - size), size)
      probs[index, self.token[k][seen]] = self.value[k][seen]
    if not self.may_end:
      probs[:, vocabulary.EOS_ID] = 0
    return probs


class _Distributions:
  """Unnormalized distributions over the vocabulary, float32 (U, V), sampled by inversion in two steps: group, then token."""

  def __init__(self, probs: np.ndarray, top_p: float, top_k: int | None):
    if top_k is not None and top_k < probs.shape[1]:
      probs = probs * (probs >= np.partition(probs, -top_k, axis=1)[:, -top_k, None])
    self.probs, self.top_p = probs, top_p
    self.groups = probs.reshape(len(probs), -1, _GROUP)
    self.running = np.cumsum(self.groups.sum(axis=2), axis=1)
    self._inside: np.ndarray | None = None  # of a single distribution: which tokens are in its nucleus

  def draw(self, index: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Draw tokens int64 (R,), one from each distribution in `index` (R,), with uniforms (R,) in [0, 1)."""
    tokens = np.zeros(len(index), np.int64)
    pending, uniforms = np.arange(len(index)), uniforms.copy()
    while len(pending):
      drawn = self._invert(index[pending], uniforms[pending])
      tokens[pending] = drawn
      pending = pending[~self._in_nucleus(index[pending], drawn)]
      uniforms[pending] = _next_uniform(uniforms[pending])
    return tokens

  def _invert(self, index: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    if len(self.running) == 1:
      running = self.running[0]
      target = uniforms * running[-1]
      group = np.minimum(np.searchsorted(running.astype(target.dtype), target, side='right'), len(running) - 1)
      before = np.where(group > 0, running[group - 1], 0)
    else:
      running = self.running[index]
      target = uniforms * running[:, -1]
      group = np.minimum(np.count_nonzero(running <= target[:, None], axis=1), running.shape[1] - 1)
      before = np.where(group > 0, running[np.arange(len(index)), group - 1], 0)
    inside = np.cumsum(self.groups[index, group], axis=1)
    return group * _GROUP + np.minimum(np.count_nonzero(inside <= (target - before)[:, None], axis=1), _GROUP - 1)

  def _in_nucleus(self, index: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    if len(self.probs) > 1:
      return self._are_inside(index, tokens)
    if self._inside is None:
      vocab_size = self.probs.shape[1]
      self._inside = self._are_inside(np.zeros(vocab_size, np.int64), np.arange(vocab_size))
    return self._inside[tokens]

  def _are_inside(self, index: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return whether each token is in the nucleus: more likely tokens have a total probability below top_p.

    A token of probability 0, which rounding may draw, is not.
    """
    own, total = self.probs[index, tokens], self.running[index, -1]
    is_inside = own > 0
    if self.top_p < 1:
      doubtful = np.flatnonzero(is_inside & (own <= (1 - self.top_p) * total))  # the others are certainly inside
      for low in range(0, len(doubtful), _CHUNK):
        part = doubtful[low : low + _CHUNK]
        probs = self.probs[index[part]]
        probs *= probs > own[part, None]
        is_inside[part] = probs.sum(axis=1) < self.top_p * total[part]
    return is_inside


def _next_uniform(uniforms: np.ndarray) -> np.ndarray:
  """Return the uniforms for the next attempt: SplitMix64 of the bits of the last ones, so that no trajectory needs its own stream."""
  z = (uniforms * 2.0**53).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
