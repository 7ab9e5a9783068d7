"""Pre-training examples (eq. 7 of the paper): one prefix, two policies; the first gives reference and chosen, the second rejected.

With several negatives, each of a further policy, an example for training is a ranked list.

Example i of a split is a function of (seed, split, i): its random draws are row i of tables of uniforms, whatever the number of workers
and of examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax import config as config_lib
from polar_jax import types
from polar_jax.miniature import cleanup, ngram, vocabulary
from polar_jax.miniature import pool as pool_lib

SPLITS = ('train', 'validation', 'unseen_prompts', 'unseen_policies')
ROLES = ('reference', 'chosen', 'rejected')
_VALIDATION_EVERY = 5  # every fifth document of the part 'prompts' is for validation
_STREAM_EXAMPLES, _STREAM_TOKENS = 10, 20


class PrefixSource:
  """Random segments of held-out text within one document."""

  def __init__(self, streams: Mapping[str, np.ndarray], min_tokens: int, max_tokens: int):
    """Index every start of every length.

    Raises:
      UserError: a corpus has no document of `max_tokens` tokens.
    """
    self.streams = {name: streams[name] for name in sorted(streams)}
    self.min_tokens, self.max_tokens = min_tokens, max_tokens
    self._starts: list[list[np.ndarray]] = []
    for name, stream in self.streams.items():
      ends = np.flatnonzero(stream == vocabulary.EOS_ID)
      ahead = ends[np.searchsorted(ends, np.arange(len(stream)))] - np.arange(len(stream)) if len(ends) else np.zeros(0, int)
      starts = [np.flatnonzero(ahead >= length) for length in range(min_tokens, max_tokens + 1)]
      if not len(starts[-1]):
        raise types.UserError(f'corpus {name!r} has no held-out document of {max_tokens} tokens; lower synthesize.prefix_max_tokens')
      self._starts.append(starts)

  def draw(self, uniforms: np.ndarray) -> list[np.ndarray]:
    """Return one int32 segment per row of `uniforms` (R, 3), which determine corpus, length and start."""
    streams = list(self.streams.values())
    corpus = pick(uniforms[:, 0], len(streams))
    length = self.min_tokens + pick(uniforms[:, 1], self.max_tokens - self.min_tokens + 1)
    segments = []
    for c, size, u in zip(corpus, length, uniforms[:, 2], strict=True):
      starts = self._starts[c][size - self.min_tokens]
      start = starts[int(u * len(starts))]
      segments.append(streams[c][start : start + size])
    return segments


@dataclasses.dataclass(frozen=True)
class World:
  """Everything that examples are sampled from."""

  pool: Sequence[ngram.NgramPolicy]
  prefixes: Mapping[str, PrefixSource]  # by split
  pieces: np.ndarray  # object (V,), the text of every token
  config: config_lib.SynthesizeConfig
  seed: int

  def members(self, split: str) -> np.ndarray:
    """Return the indices into the pool of the policies that take part in a split."""
    held_out = np.array([p.params.held_out for p in self.pool])
    return np.flatnonzero(held_out == (split == 'unseen_policies'))


def prefix_sources(
  prompts: Mapping[str, np.ndarray], unseen: Mapping[str, np.ndarray], config: config_lib.SynthesizeConfig
) -> dict[str, PrefixSource]:
  """Return the prefix source of every split, from the token streams of the corpus parts 'prompts' and 'unseen'."""
  low, high = config.prefix_min_tokens, config.prefix_max_tokens
  document = {name: np.cumsum(s == vocabulary.EOS_ID) - (s == vocabulary.EOS_ID) for name, s in prompts.items()}
  validation = {name: document[name] % _VALIDATION_EVERY == _VALIDATION_EVERY - 1 for name in prompts}
  elsewhere = PrefixSource(unseen, low, high)
  return {
    'train': PrefixSource({name: s[~validation[name]] for name, s in prompts.items()}, low, high),
    'validation': PrefixSource({name: s[validation[name]] for name, s in prompts.items()}, low, high),
    'unseen_prompts': elsewhere,
    'unseen_policies': elsewhere,
  }


def make_triplets(world: World, split: str, count: int) -> list[types.Triplet]:
  """Make examples 0..count-1 of a split. The category is the corpus that the first policy learned from."""
  members = world.members(split)
  uniforms = example_uniforms(world.seed, 'triplets', split, count, 5)
  first = pick(uniforms[:, 3], len(members))
  second = (first + 1 + pick(uniforms[:, 4], len(members) - 1)) % len(members)
  policies = members[np.stack([first, first, second], axis=1)]
  prefixes = world.prefixes[split].draw(uniforms[:, :3])
  categories = [world.pool[p].params.corpus for p in policies[:, 0]]
  made = assemble(world, prefixes, policies, ('triplets', split), 'pretrain', categories, [{}] * count)
  more = world.config.negatives - 1
  if split != 'train' or not more:
    return made
  if more > len(members) - 2:
    raise types.UserError(f'synthesize.negatives is {more + 1}, but only {len(members) - 1} policies can be rejected; lower it')
  draws = example_uniforms(world.seed, 'negatives', split, count, more)
  others = members[(first[:, None] + 1 + _other_places((second - first - 1) % len(members), draws, len(members) - 1)) % len(members)]
  return _ranked_lists(world, made, prefixes, others, split)


def _other_places(taken: np.ndarray, uniforms: np.ndarray, n: int) -> np.ndarray:
  """Draw places in [0, n) that differ from each other and from one that is taken.

  Args:
    taken: int (R,), the place that is taken in each row.
    uniforms: (R, K) in [0, 1).
    n: number of places, at least K + 1.

  Returns:
    int (R, K).
  """
  excluded = taken[:, None]
  for k in range(uniforms.shape[1]):
    place = pick(uniforms[:, k], n - excluded.shape[1])
    for column in np.sort(excluded, axis=1).T:  # ascending, so that each shift counts the places before it
      place = place + (place >= column)
    excluded = np.concatenate([excluded, place[:, None]], axis=1)
  return excluded[:, 1:]


def _ranked_lists(
  world: World, made: Sequence[types.Triplet], prefixes: Sequence[np.ndarray], others: np.ndarray, split: str
) -> list[types.Triplet]:
  """Add rejected samples of further policies to triplets.

  Args:
    world: pool, seed and settings.
    made: R triplets.
    prefixes: R int arrays.
    others: int (R, K), indices of the policies.
    split: of the triplets.
  """
  rng = np.random.default_rng([world.seed, _STREAM_TOKENS, *map(ord, 'negatives'), SPLITS.index(split)])
  ids, lengths = sample_clean(world, prefixes, others, rng.random((*others.shape, world.config.max_tokens)))
  out: list[types.Triplet] = []
  for i, triplet in enumerate(made):
    further = [''.join(world.pieces[ids[i, k, : lengths[i, k]]]) for k in range(others.shape[1])]
    metadata = {name: value for name, value in triplet.metadata.items() if name != 'rejected_ids'}
    metadata['rejected_policies'] = [metadata.pop('rejected_policy'), *(world.pool[p].name for p in others[i])]
    candidates = (triplet.chosen, triplet.rejected, *further)
    texts = (triplet.prompt, triplet.reference, candidates[0], candidates[-1], triplet.wrapper, triplet.category)
    out.append(types.RankedList(*texts, metadata, candidates, (0,) + (1,) * (len(candidates) - 1)))
  return out


def example_uniforms(seed: int, kind: str, split: str, count: int, columns: int) -> np.ndarray:
  """Return uniforms (count, columns) in [0, 1); row i does not depend on `count`.

  Args:
    seed: the world's seed.
    kind: name of the random stream; different kinds are independent.
    split: one of SPLITS.
    count: number of examples.
    columns: draws per example.
  """
  return np.random.default_rng([seed, _STREAM_EXAMPLES, *map(ord, kind), SPLITS.index(split)]).random((count, columns))


def assemble(
  world: World,
  prefixes: Sequence[np.ndarray],
  policies: np.ndarray,
  stream: tuple[str, str],
  wrapper: str,
  categories: Sequence[str],
  extra: Sequence[Mapping[str, Any]],
) -> list[types.Triplet]:
  """Sample reference, chosen and rejected of R examples, and build the examples.

  Args:
    world: pool, seed and settings.
    prefixes: R int arrays.
    policies: int (R, 3), the policies that give reference, chosen and rejected.
    stream: (kind, split), the name of the random stream.
    wrapper: `wrapper` of the examples.
    categories: `category` of each example.
    extra: metadata of each example in addition to its provenance.
  """
  kind, split = stream
  shape = (len(prefixes), len(ROLES), world.config.max_tokens)
  rng = np.random.default_rng([world.seed, _STREAM_TOKENS, *map(ord, kind), SPLITS.index(split)])
  ids, lengths = sample_clean(world, prefixes, policies, rng.random(shape))
  names = [p.name for p in world.pool]
  out = []
  for i, prefix in enumerate(prefixes):
    sampled = [ids[i, r, : lengths[i, r]] for r in range(len(ROLES))]
    metadata: dict[str, Any] = {'prompt_ids': prefix, 'seed': world.seed, **extra[i]}
    for role, values, policy in zip(ROLES, sampled, policies[i], strict=True):
      metadata[f'{role}_ids'] = values
      metadata[f'{role}_policy'] = names[policy]
    prompt, reference, chosen, rejected = (''.join(world.pieces[values]) for values in (prefix, *sampled))
    out.append(types.Triplet(prompt, reference, chosen, rejected, wrapper, categories[i], metadata))
  return out


def sample_clean(world: World, prefixes: Sequence[np.ndarray], policies: np.ndarray, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Sample and clean up the trajectory of every (example, role), policy by policy.

  Args:
    world: pool and settings.
    prefixes: R int arrays.
    policies: int (R, roles).
    uniforms: (R, roles, T) in [0, 1).

  Returns:
    ids int32 (R, roles, T) and lengths int64 (R, roles).
  """
  flat, noise = policies.ravel(), uniforms.reshape(-1, uniforms.shape[-1])
  repeated = [prefix for prefix in prefixes for _ in range(policies.shape[1])]
  ids, lengths = sample_by_policy(world, repeated, flat, noise, functools.partial(cleanup.clean, bounds=cleanup.boundaries(world.pieces)))
  return ids.reshape(uniforms.shape), lengths.reshape(policies.shape)


def sample_by_policy(
  world: World,
  prefixes: Sequence[np.ndarray],
  policies: np.ndarray,
  uniforms: np.ndarray,
  clean: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Sample one continuation of every prefix from its policy.

  Args:
    world: pool and settings.
    prefixes: R int arrays.
    policies: int (R,), indices into the pool.
    uniforms: (R, T) in [0, 1).
    clean: (ids, lengths, ended) of one policy -> lengths to keep; None keeps everything.

  Returns:
    ids int32 (R, T) and lengths int64 (R,).
  """
  c = world.config
  groups = [(p, np.flatnonzero(policies == p)) for p in np.unique(policies)]

  def sample(group: tuple[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    policy, where = world.pool[group[0]], group[1]
    some = [prefixes[w] for w in where]
    ids, lengths, ended = policy.sample_ids(some, uniforms[where], c.temperature, min(c.top_p, policy.params.top_p), c.top_k)
    return ids, clean(ids, lengths, ended) if clean else lengths

  ids, lengths = np.zeros(uniforms.shape, np.int32), np.zeros(len(policies), np.int64)
  for (_, where), (part, kept) in zip(groups, pool_lib.parallel_map(sample, groups, c.workers), strict=True):
    ids[where], lengths[where] = part, kept
  return ids, lengths


def pick(uniforms: np.ndarray, n: int) -> np.ndarray:
  """Return integers in [0, n) from uniforms in [0, 1)."""
  return np.minimum((uniforms * n).astype(np.int64), n - 1)
