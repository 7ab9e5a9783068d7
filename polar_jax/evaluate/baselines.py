"""Baselines of a reward model: heuristics that learn nothing, and the Bayes-optimal discriminator.

A heuristic scores a candidate by its similarity to the reference. An example is correct if chosen scores higher, and half correct on
a tie. `bayes_correct` is the upper bound: on average no discriminator of the same texts does better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from polar_jax.evaluate import statistics
from polar_jax.evaluate.clusters import Clusters
from polar_jax.evaluate.words import jaccard, ngrams, words_of
from polar_jax.types import Text, Triplet

NGRAMS = (1, 2, 3)
NOT_HEURISTICS = ('bayes', 'random')  # reported with the heuristics, but no model is compared with them
_FIELDS = ('reference', 'chosen', 'rejected')


def heuristic_correct(triplets: Sequence[Triplet], seed: int = 0) -> dict[str, np.ndarray]:
  """Apply every heuristic baseline to every example.

  `length`: the candidate whose length in characters is closer to that of the reference. `overlap_1`, `_2`, `_3`: Jaccard index of the
  sets of n-grams of token ids (metadata `reference_ids`, `chosen_ids`, `rejected_ids`), or of lower-cased words in examples without
  ids. `words`: Jaccard index of lower-cased words. `random`: a coin flip. Two empty sets have similarity 0.

  Args:
    triplets: the examples.
    seed: seed of `random`.

  Returns:
    Name of the heuristic -> (examples,) float64: 1 correct, .5 tie, 0 wrong.

  Raises:
    ValueError: naming the example and the field, if a text is not plain text or an example has only some of its token ids.
  """
  texts = [[_plain(getattr(t, name), example, name) for name in _FIELDS] for example, t in enumerate(triplets)]
  words = [[words_of(text) for text in three] for three in texts]
  tokens = [_token_ids(t.metadata, example) or words[example] for example, t in enumerate(triplets)]
  coin = np.random.default_rng(seed).random((len(texts), 2))

  lengths = np.array([[len(text) for text in three] for three in texts], dtype=np.float64).reshape(-1, 3)
  scores = {'length': -np.abs(lengths[:, 1:] - lengths[:, :1])}
  for n in NGRAMS:
    scores[f'overlap_{n}'] = _similarity(tokens, functools.partial(ngrams, n=n))
  scores['words'] = _similarity(words, set)
  scores['random'] = coin
  return {name: statistics.pair_correct(s[:, 0], s[:, 1]) for name, s in scores.items()}


def margin_over_best_baseline(
  correct: np.ndarray,
  baselines: Mapping[str, np.ndarray],
  clusters: Clusters | None = None,
  resamples: int = 2_000,
  seed: int = 0,
) -> dict[str, str | float | int]:
  """Compare a model with the most accurate heuristic baseline on the same examples.

  The baseline is chosen in hindsight on these examples, so on average the margin of the model is understated.

  Args:
    correct: (examples,) of the model.
    baselines: name -> (examples,); `bayes` and `random` are ignored.
    clusters: as in `statistics.accuracy_interval`.
    resamples: number of bootstrap samples.
    seed: seed of the resampling.

  Returns:
    {baseline, difference, low, high, clusters, clustered_by}; differences are fractions, positive in favor of the model.

  Raises:
    ValueError: if there is no heuristic to compare with.
  """
  names = sorted(name for name in baselines if name not in NOT_HEURISTICS)
  if not names:
    raise ValueError(f'no heuristic to compare with among {sorted(baselines)}')
  best = max(names, key=lambda name: float(np.mean(baselines[name])))
  difference = statistics.paired_difference(correct, baselines[best], clusters, resamples, seed).asdict()
  return {'baseline': best, **{key: difference[key] for key in ('difference', 'low', 'high', 'clusters', 'clustered_by')}}


def bayes_scores(logp_reference: np.ndarray, logp_candidate: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
  """Return the log odds that a candidate came from the policy of the reference rather than from another policy.

  With policy k of reference and chosen drawn from the prior p, and policy j != k of rejected from p renormalized, the posterior
  odds that x rather than y shares the reference's policy are, after the terms with k = j cancel,

    [sum_k w_k r_k x_k / sum_j p_j x_j] / [sum_k w_k r_k y_k / sum_j p_j y_j],   w_k = p_k / (1 - p_k),

  so each candidate has its own score. The numerator alone is not optimal: it prefers any text that is likely under every policy,
  such as the shorter of the two.

  Args:
    logp_reference: (policies, examples), log-likelihood of each reference under each policy, in nats; -inf: impossible.
    logp_candidate: (policies, examples), the same of the candidate.
    prior: (policies,) probabilities; None: uniform.

  Returns:
    (examples,) log odds in nats up to a constant; -inf if no policy could have written both texts.

  Raises:
    ValueError: if a shape or the prior is invalid, a likelihood is NaN or +inf, or no policy could have written a text.
  """
  reference, candidate = (_log_likelihoods(x, name) for x, name in ((logp_reference, 'reference'), (logp_candidate, 'candidate')))
  if reference.shape != candidate.shape:
    raise ValueError(f'log-likelihoods of reference {reference.shape} and candidate {candidate.shape} must have the same shape')
  log_p, log_w = _log_prior(prior, len(reference))
  for x, name in ((reference, 'reference'), (candidate, 'candidate')):
    bad = np.flatnonzero(np.isneginf(x + log_p).all(axis=0))
    if bad.size:
      raise ValueError(
        f'example {bad[0]}: no policy of the pool could have written the {name} ({bad.size} such examples); check that the pool is complete'
      )
  return _logsumexp(log_w + reference + candidate) - _logsumexp(log_p + candidate)


def bayes_correct(
  logp_reference: np.ndarray, logp_chosen: np.ndarray, logp_rejected: np.ndarray, prior: np.ndarray | None = None
) -> np.ndarray:
  """Return which examples the Bayes-optimal discriminator, which knows every policy of the pool, gets right.

  Args:
    logp_reference: as in `bayes_scores`.
    logp_chosen: (policies, examples), log-likelihood of chosen, in nats.
    logp_rejected: (policies, examples), log-likelihood of rejected, in nats.
    prior: as in `bayes_scores`.

  Returns:
    (examples,) float64: 1 correct, .5 tie, 0 wrong.

  Raises:
    ValueError: as `bayes_scores`.
  """
  return statistics.pair_correct(bayes_scores(logp_reference, logp_chosen, prior), bayes_scores(logp_reference, logp_rejected, prior))


def bayes_loss(
  logp_reference: np.ndarray, logp_chosen: np.ndarray, logp_rejected: np.ndarray, prior: np.ndarray | None = None
) -> np.ndarray:
  """Return the Bradley-Terry loss of the Bayes-optimal discriminator, (examples,) in nats: the floor of any scaling law of these examples.

  Arguments and errors are those of `bayes_correct`. The difference of two `bayes_scores` ranks alike, but is no log odds: what cancels for
  the sign does not cancel here.
  """
  for candidate in (logp_chosen, logp_rejected):
    bayes_scores(logp_reference, candidate, prior)  # checks the arguments
  reference, chosen, rejected = (np.asarray(x, np.float64) for x in (logp_reference, logp_chosen, logp_rejected))
  log_p, log_w = _log_prior(prior, len(reference))

  def log_joint(same: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the likelihood that `same` shares the policy of the reference and `other` has another one."""
    return _logsumexp(log_w + reference + same + _of_the_others(log_p + other))

  right, wrong = log_joint(chosen, rejected), log_joint(rejected, chosen)
  undecided = np.isneginf(right) & np.isneginf(wrong)  # no policy could have written the reference and either candidate: a tie
  return np.logaddexp(0.0, np.where(undecided, 0.0, wrong) - np.where(undecided, 0.0, right))


def _log_prior(prior: np.ndarray | None, policies: int) -> tuple[np.ndarray, np.ndarray]:
  """Return log p and log(p / (1 - p)) of the prior, (policies, 1) each."""
  p = _checked_prior(prior, policies)
  with np.errstate(divide='ignore'):
    return np.log(p)[:, None], np.log(p / (1 - p))[:, None]


def _of_the_others(x: np.ndarray) -> np.ndarray:
  """Return for each row the log of the sum of exp of all other rows, without a difference of nearly equal numbers."""
  nothing = np.full((1, x.shape[1]), -np.inf)
  before = np.concatenate([nothing, np.logaddexp.accumulate(x[:-1], axis=0)])
  after = np.concatenate([np.logaddexp.accumulate(x[:0:-1], axis=0)[::-1], nothing])
  return np.logaddexp(before, after)


def _plain(text: Text, example: int, name: str) -> str:
  if isinstance(text, str):
    return text
  contents = []
  for message in text:
    content = message.get('content')
    if not isinstance(content, str):
      kind = type(content).__name__
      raise ValueError(f'example {example}: {name} has a message whose content is a {kind}; heuristic baselines compare plain text')
    contents.append(content)
  return '\n'.join(contents)


def _token_ids(metadata: Mapping, example: int) -> list[list[int]] | None:
  """Return the token ids of reference, chosen and rejected; None if the example has none of them."""
  keys = [f'{name}_ids' for name in _FIELDS]
  missing = [key for key in keys if metadata.get(key) is None]
  if len(missing) == len(keys):
    return None
  if missing:
    raise ValueError(f'example {example}: metadata has token ids but no {missing[0]}; give all of {", ".join(keys)} or none')
  return [np.asarray(metadata[key]).tolist() for key in keys]


def _similarity(examples: Sequence[Sequence], features: Callable[[Sequence], set]) -> np.ndarray:
  """Return the (examples, 2) Jaccard index of the reference's features with those of chosen and of rejected."""
  out = np.zeros((len(examples), 2))
  for example, sequences in enumerate(examples):
    reference, *candidates = map(features, sequences)
    for column, candidate in enumerate(candidates):
      out[example, column] = jaccard(reference, candidate)
  return out


def _log_likelihoods(x: np.ndarray, name: str) -> np.ndarray:
  x = np.asarray(x, dtype=np.float64)
  if x.ndim != 2 or len(x) < 2:
    raise ValueError(f'log-likelihoods of the {name} have shape {x.shape}; it must be (policies, examples) with at least two policies')
  bad = np.argwhere(np.isnan(x) | np.isposinf(x))
  if bad.size:
    k, i = bad[0]
    raise ValueError(f'example {i}: the log-likelihood of the {name} under policy {k} is {x[k, i]} ({len(bad)} such entries)')
  return x


def _checked_prior(prior: np.ndarray | None, policies: int) -> np.ndarray:
  if prior is None:
    return np.full(policies, 1 / policies)
  p = np.asarray(prior, dtype=np.float64)
  if p.shape != (policies,) or not (p >= 0).all() or not (p < 1).all() or not np.isclose(p.sum(), 1.0):
    raise ValueError(f'the prior has shape {p.shape} and sum {p.sum()}; it must be {policies} probabilities below 1 that sum to 1')
  return p


def _logsumexp(x: np.ndarray) -> np.ndarray:
  """Return log sum exp over the first axis; a column of -inf stays -inf."""
  top = x.max(axis=0)
  safe = np.where(np.isneginf(top), 0.0, top)
  with np.errstate(divide='ignore'):
    return safe + np.log(np.exp(x - safe).sum(axis=0))
