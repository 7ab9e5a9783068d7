"""The policy pool: hundreds of n-gram policies with random parameters, exact likelihoods under all of them, and their divergences."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from polar_jax.miniature import ngram, ngram_index, vocabulary
from polar_jax.types import UserError

_In = TypeVar('_In')
_Out = TypeVar('_Out')

COPY_SHARE = 1 / 8  # share of the pool that are perturbed copies of another policy, the hardest to tell apart
_KL_PREFIXES = 24  # Monte Carlo samples per policy; at 32 tokens each the standard error of a KL is a few percent
_STREAM_POOL, _STREAM_HELD_OUT, _STREAM_KL = 1, 2, 3  # independent random streams of one seed


def parallel_map(function: Callable[[_In], _Out], items: Iterable[_In], workers: int) -> list[_Out]:
  """Return `[function(x) for x in items]`, computed on `workers` threads (numpy releases the interpreter lock in its loops)."""
  if workers == 1:
    return [function(x) for x in items]
  with concurrent.futures.ThreadPoolExecutor(workers) as executor:
    return list(executor.map(function, items))


def draw_pool_params(
  seed: int, policies: int, held_out: int, max_order: int, min_window: float, corpora: Sequence[str]
) -> list[ngram.NgramParams]:
  """Draw the parameters of every policy.

  Windows are log-uniform in size ("intermediate checkpoints"), from `min_window` of a corpus to all of it, and one policy in eight is
  a perturbed copy of an earlier one. A policy and its copies are either all held out or all used in training, so that no held-out
  policy has a near-copy in training.

  Args:
    seed: seed of every policy's random stream.
    policies: number of policies.
    held_out: number of policies kept for evaluation.
    max_order: largest n-gram order.
    min_window: smallest window, as a fraction of a corpus.
    corpora: names of the corpora.

  Raises:
    UserError: `held_out` policies cannot be chosen without separating copies.
  """
  copies = int(policies * COPY_SHARE)
  drawn = []
  for i in range(policies):
    rng = np.random.default_rng([seed, _STREAM_POOL, i])
    if i < policies - copies:
      drawn.append(_draw_params(rng, f'p{i:03d}', max_order, min_window, corpora))
    else:
      drawn.append(_perturb(rng, drawn[int(rng.integers(policies - copies))], f'p{i:03d}'))
  families: dict[str, list[int]] = {}
  for i, params in enumerate(drawn):
    families.setdefault(params.twin_of or params.name, []).append(i)
  order = np.random.default_rng([seed, _STREAM_HELD_OUT]).permutation(len(families))
  chosen: set[int] = set()
  for family in sorted((list(families.values())[i] for i in order), key=lambda f: len(f) == 1):  # families first, then singles
    is_copy_share_full = len(family) > 1 and len(chosen) >= held_out * 2 * COPY_SHARE
    if len(chosen) + len(family) <= held_out and not is_copy_share_full:
      chosen.update(family)
  if len(chosen) != held_out:
    raise UserError(
      f'cannot hold out {held_out} of {policies} policies without separating a policy from its copies ({len(chosen)} fit); '
      'lower synthesize.unseen_policies'
    )
  return [dataclasses.replace(p, held_out=i in chosen) for i, p in enumerate(drawn)]


def _draw_params(rng: np.random.Generator, name: str, max_order: int, min_window: float, corpora: Sequence[str]) -> ngram.NgramParams:
  fraction = float(min_window ** rng.random())
  order = 1 + int(rng.integers(max_order))
  return ngram.NgramParams(
    name=name,
    corpus=corpora[int(rng.integers(len(corpora)))],
    start=float(rng.random() * (1 - fraction)),
    fraction=fraction,
    order=order,
    weights=tuple(float(w) for w in 1 - 10 ** rng.uniform(-2.5, -0.5, order)),
    strength=float(10 ** rng.uniform(-2, 0.6)),
    temperature=float(rng.uniform(0.7, 1.5)),
    top_p=1.0 if rng.random() < 0.25 else float(rng.uniform(0.8, 1.0)),
  )


def _perturb(rng: np.random.Generator, original: ngram.NgramParams, name: str) -> ngram.NgramParams:
  """Return a copy with one parameter changed slightly: the window, the temperature, the strength or the weights."""
  changes: dict[str, Any] = {}
  match int(rng.integers(4)):
    case 0:
      shift = original.fraction * rng.uniform(-0.3, 0.3)
      changes['start'] = float(np.clip(original.start + shift, 0, 1 - original.fraction))
      changes['fraction'] = float(original.fraction * rng.uniform(0.85, 1.0))
    case 1:
      changes['temperature'] = float(original.temperature * rng.uniform(0.88, 1.13))
    case 2:
      changes['strength'] = float(original.strength * 2 ** rng.uniform(-1, 1))
    case _:
      changes['weights'] = tuple(1 - (1 - w) * float(2 ** rng.uniform(-1, 1)) for w in original.weights)
  return dataclasses.replace(original, name=name, twin_of=original.name, **changes)


def build_pool(params: Sequence[ngram.NgramParams], streams: Mapping[str, np.ndarray], vocab_size: int) -> list[ngram.NgramPolicy]:
  """Return policies over the training streams (int32 ids, by corpus name); policies of one corpus share its n-gram index.

  Raises:
    UserError: a policy's corpus has no stream.
  """
  orders: dict[str, int] = {}
  for p in params:
    orders[p.corpus] = max(orders.get(p.corpus, 1), p.order)
  if missing := sorted(set(orders) - set(streams)):
    raise UserError(f'text.npz has no training text of {", ".join(missing)}, which the pool learns from; run the synthesize stage again')
  indices = {name: ngram_index.CorpusIndex(name, streams[name], vocab_size, order) for name, order in orders.items()}
  return [ngram.NgramPolicy(p, indices[p.corpus]) for p in params]


def pool_logprobs(
  pool: Sequence[ngram.NgramPolicy], prefixes: Sequence[np.ndarray], trajectories: Sequence[np.ndarray], workers: int = 2
) -> np.ndarray:
  """Return the natural-log probability of trajectory i after prefix i under every policy: float64 (policies, trajectories).

  Args:
    pool: the policies.
    prefixes: int arrays.
    trajectories: int arrays, one for each prefix.
    workers: number of threads.
  """
  indices = {id(p.index): p.index for p in pool}
  queries = dict(zip(indices, parallel_map(lambda x: x.queries(prefixes, trajectories), indices.values(), workers), strict=True))
  return np.array(parallel_map(lambda p: p.score(queries[id(p.index)]), pool, workers)).reshape(len(pool), len(trajectories))


def kl_matrix(
  pool: Sequence[ngram.NgramPolicy], prefixes: Sequence[np.ndarray], seed: int, max_tokens: int, workers: int = 2
) -> np.ndarray:
  """Estimate KL(i || j) of the untruncated distributions in nats per token by Monte Carlo.

  Args:
    pool: the policies.
    prefixes: text that the policies continue; `_KL_PREFIXES` of them, the same for every policy, are used.
    seed: seed of the samples.
    max_tokens: length limit of a sample.
    workers: number of threads.

  Returns:
    float64 (policies, policies) with a zero diagonal.
  """
  chosen = [prefixes[i % len(prefixes)] for i in range(_KL_PREFIXES)]
  uniforms = np.random.default_rng([seed, _STREAM_KL]).random((len(pool), len(chosen), max_tokens))

  def sample(i: int) -> list[np.ndarray]:
    ids, lengths, ended = pool[i].sample_ids(chosen, uniforms[i], 1.0, 1.0, None)
    return [np.append(row[:n], [vocabulary.EOS_ID] * bool(end)) for row, n, end in zip(ids, lengths, ended, strict=True)]

  samples = [t for part in parallel_map(sample, range(len(pool)), workers) for t in part]
  logprobs = pool_logprobs(pool, chosen * len(pool), samples, workers).reshape(len(pool), len(pool), len(chosen)).sum(axis=2)
  tokens = np.array([len(t) for t in samples], np.float64).reshape(len(pool), len(chosen)).sum(axis=1)
  own = np.diagonal(logprobs)
  return ((own[None, :] - logprobs) / tokens[None, :]).T
