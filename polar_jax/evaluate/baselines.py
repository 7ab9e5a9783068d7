"""What a reward model is shown beside: rules that learn nothing, and the discriminator that knows every policy.

A rule scores a candidate by its likeness to the reference; a row is right when chosen scores higher, and half right on a
tie. `bayes_correct` is the other end: no discriminator of the same texts can do better on average.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polar_jax.evaluate import statistics
from polar_jax.types import Text, Triplet

NGRAMS = (1, 2, 3)
NOT_RULES = ('bayes', 'random')  # shown beside the rules, but nothing to be beaten
_FIELDS = ('reference', 'chosen', 'rejected')
_WORD = re.compile(r'\w+')


def rule_correct(triplets: Sequence[Triplet], seed: int = 0) -> dict[str, np.ndarray]:
  """Applies every learning-free rule to every row.

  `length`: the length in characters closer to the reference's. `overlap_1`, `_2`, `_3`: Jaccard index of the sets of n-grams
  of token ids (metadata `reference_ids`, `chosen_ids`, `rejected_ids`), or of lower-cased words in rows without ids.
  `words`: Jaccard index of lower-cased words. `random`: a coin. Two empty sets have likeness 0.

  Args:
    triplets: the rows.
    seed: of `random`.

  Returns:
    rule name -> (rows,) float64: 1 right, .5 tie, 0 wrong.

  Raises:
    ValueError: naming the row and field, if a text is not text or only some of a row's ids are there.
  """
  texts = [[_plain(getattr(t, name), row, name) for name in _FIELDS] for row, t in enumerate(triplets)]
  words = [[_WORD.findall(text.lower()) for text in three] for three in texts]
  tokens = [_token_ids(t.metadata, row) or words[row] for row, t in enumerate(triplets)]
  coin = np.random.default_rng(seed).random((len(texts), 2))

  lengths = np.array([[len(text) for text in three] for three in texts], dtype=np.float64).reshape(-1, 3)
  scores = {'length': -np.abs(lengths[:, 1:] - lengths[:, :1])}
  for n in NGRAMS:
    scores[f'overlap_{n}'] = _likeness(tokens, functools.partial(_ngrams, n=n))
  scores['words'] = _likeness(words, set)
  scores['random'] = coin
  return {name: statistics.pair_correct(s[:, 0], s[:, 1]) for name, s in scores.items()}


def margin_over_best_rule(
  correct: np.ndarray, rules: Mapping[str, np.ndarray], groups: np.ndarray | None = None, resamples: int = 2_000, seed: int = 0
) -> dict[str, str | float]:
  """Paired comparison of a model with the most accurate rule on the same rows.

  The rule is picked with hindsight on these rows, which on average understates the model's margin.

  Args:
    correct: (rows,) of the model.
    rules: name -> (rows,); `bayes` and `random` are passed over.
    groups: as in `statistics.accuracy_interval`.
    resamples: bootstrap samples.
    seed: of the resampling.

  Returns:
    {baseline, difference, low, high}; differences are fractions, positive in favour of the model.

  Raises:
    ValueError: if no rule is given.
  """
  names = sorted(name for name in rules if name not in NOT_RULES)
  if not names:
    raise ValueError(f'no rule to compare with among {sorted(rules)}')
  best = max(names, key=lambda name: float(np.mean(rules[name])))
  d = statistics.paired_difference(correct, rules[best], groups, resamples, seed)
  return {'baseline': best, 'difference': d.difference, 'low': d.low, 'high': d.high}


def bayes_scores(logp_reference: np.ndarray, logp_candidate: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
  """How much more likely a candidate is as the reference's sibling than as a sample of another policy.

  With policy k of reference and chosen drawn from the prior p and policy j != k of rejected from p renormalised, the posterior
  odds that x rather than y is the sibling are, after the terms with k = j cancel,

    [sum_k w_k r_k x_k / sum_j p_j x_j] / [sum_k w_k r_k y_k / sum_j p_j y_j],   w_k = p_k / (1 - p_k),

  so each candidate has a score of its own. The numerator alone would prefer whatever text is likely under every policy, such
  as the shorter of the two, and is not optimal.

  Args:
    logp_reference: (policies, rows), log-likelihood of each row's reference under each policy, in nats; -inf: impossible.
    logp_candidate: (policies, rows), of the candidate.
    prior: (policies,) probabilities; None: uniform.

  Returns:
    (rows,) log odds in nats up to a constant; -inf if no policy could have written both texts.

  Raises:
    ValueError: on shapes, NaN or +inf, a text that no policy could have written, or a prior that is none.
  """
  reference, candidate = (_log_likelihoods(x, name) for x, name in ((logp_reference, 'reference'), (logp_candidate, 'candidate')))
  if reference.shape != candidate.shape:
    raise ValueError(f'log-likelihoods of reference {reference.shape} and candidate {candidate.shape} must have one shape')
  p = _checked_prior(prior, len(reference))
  with np.errstate(divide='ignore'):
    log_p, log_w = np.log(p)[:, None], np.log(p / (1 - p))[:, None]
  for x, name in ((reference, 'reference'), (candidate, 'candidate')):
    bad = np.flatnonzero(np.isneginf(x + log_p).all(axis=0))
    if bad.size:
      raise ValueError(f'row {bad[0]}: no policy of the pool could have written the {name} ({bad.size} such rows); is the pool complete?')
  return _logsumexp(log_w + reference + candidate) - _logsumexp(log_p + candidate)


def bayes_correct(
  logp_reference: np.ndarray, logp_chosen: np.ndarray, logp_rejected: np.ndarray, prior: np.ndarray | None = None
) -> np.ndarray:
  """The ceiling: which rows the discriminator that knows the pool gets right (`bayes_scores` has the arguments and errors).

  Returns:
    (rows,) float64: 1 right, .5 tie, 0 wrong.
  """
  return statistics.pair_correct(bayes_scores(logp_reference, logp_chosen, prior), bayes_scores(logp_reference, logp_rejected, prior))


def _plain(text: Text, row: int, name: str) -> str:
  if isinstance(text, str):
    return text
  contents = []
  for message in text:
    content = message.get('content')
    if not isinstance(content, str):
      raise ValueError(f'row {row}: {name} holds a message whose content is a {type(content).__name__}; rules compare plain text')
    contents.append(content)
  return '\n'.join(contents)


def _token_ids(metadata: Mapping, row: int) -> list[list[int]] | None:
  """Ids of reference, chosen, rejected; None when the row has none of them."""
  keys = [f'{name}_ids' for name in _FIELDS]
  missing = [key for key in keys if metadata.get(key) is None]
  if len(missing) == len(keys):
    return None
  if missing:
    raise ValueError(f'row {row}: metadata has token ids but no {missing[0]}; give all of {", ".join(keys)} or none')
  return [np.asarray(metadata[key]).tolist() for key in keys]


def _ngrams(sequence: Sequence, n: int) -> set[tuple]:
  return set(zip(*(sequence[i:] for i in range(n)), strict=False))


def _likeness(rows: Sequence[Sequence], features: Callable[[Sequence], set]) -> np.ndarray:
  """(rows, 2) Jaccard index of the reference's features with chosen's and rejected's."""
  out = np.zeros((len(rows), 2))
  for row, sequences in enumerate(rows):
    reference, *candidates = map(features, sequences)
    for column, candidate in enumerate(candidates):
      shared = len(reference & candidate)
      out[row, column] = shared / (len(reference) + len(candidate) - shared) if shared else 0.0
  return out


def _log_likelihoods(x: np.ndarray, name: str) -> np.ndarray:
  x = np.asarray(x, dtype=np.float64)
  if x.ndim != 2 or len(x) < 2:
    raise ValueError(f'log-likelihoods of the {name} have shape {x.shape}; they must be (policies, rows) with two policies or more')
  bad = np.argwhere(np.isnan(x) | np.isposinf(x))
  if bad.size:
    k, row = bad[0]
    raise ValueError(f'row {row}: the log-likelihood of the {name} under policy {k} is {x[k, row]} ({len(bad)} such entries)')
  return x


def _checked_prior(prior: np.ndarray | None, policies: int) -> np.ndarray:
  if prior is None:
    return np.full(policies, 1 / policies)
  p = np.asarray(prior, dtype=np.float64)
  if p.shape != (policies,) or not (p >= 0).all() or not (p < 1).all() or not np.isclose(p.sum(), 1.0):
    raise ValueError(f'the prior must be {policies} probabilities below 1 that sum to 1; shape {p.shape}, sum {p.sum()}')
  return p


def _logsumexp(x: np.ndarray) -> np.ndarray:
  """log sum exp over the first axis; a column of -inf stays -inf."""
  top = x.max(axis=0)
  safe = np.where(np.isneginf(top), 0.0, top)
  with np.errstate(divide='ignore'):
    return safe + np.log(np.exp(x - safe).sum(axis=0))
