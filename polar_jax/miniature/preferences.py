"""Fine-tuning examples: reference from a target policy, chosen from a policy near to it, rejected from a far one (eq. 8 of the paper).

Near and far are by the exact Kullback-Leibler divergence from the target, in nats per token: an oracle that replaces human rankings.
The model never sees it.
"""

from __future__ import annotations

import numpy as np

from polar_jax import types
from polar_jax.miniature import triplets

NEAR_SHARE = 0.15  # near policies are drawn from this share of the others, by divergence
FAR_FROM = 0.25  # far policies are drawn from beyond this quantile
CATEGORIES = ('hard', 'medium', 'easy')  # by terciles of the gap between the two divergences
_GAP_DRAWS = 20_000


def make_preferences(world: triplets.World, kl: np.ndarray, split: str, count: int) -> list[types.Triplet]:
  """Make examples 0..count-1 of a split.

  Args:
    world: pool, seed and settings.
    kl: (P, P), KL(i || j) in nats per token.
    split: one of `triplets.SPLITS`.
    count: number of examples.

  Raises:
    UserError: fewer than three policies take part in the split.
  """
  uniforms = triplets.example_uniforms(world.seed, 'preferences', split, count, 6)
  policies = choose_policies(kl, world.members(split), uniforms[:, 3:])
  near, far = kl[policies[:, 0], policies[:, 1]], kl[policies[:, 0], policies[:, 2]]
  category = np.searchsorted(_gap_terciles(world, kl), far - near)
  extra = [{'kl_near': float(a), 'kl_far': float(b)} for a, b in zip(near, far, strict=True)]
  prefixes = world.prefixes[split].draw(uniforms[:, :3])
  return triplets.assemble(world, prefixes, policies, ('preferences', split), 'sft', [CATEGORIES[c] for c in category], extra)


def choose_policies(kl: np.ndarray, members: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
  """Return (target, near, far) of every example, int (R, 3), three different `members`, as determined by `uniforms` (R, 3).

  Raises:
    UserError: there are fewer than three members.
  """
  others = len(members) - 1
  if others < 2:
    raise types.UserError(
      f'preferences need three policies, but this split has {others + 1}; raise synthesize.unseen_policies or synthesize.policies'
    )
  among = kl[np.ix_(members, members)].copy()
  np.fill_diagonal(among, -np.inf)  # so that the target ranks first and is never drawn
  ranked = np.argsort(among, axis=1, kind='stable')
  band = max(1, int(NEAR_SHARE * others))
  far_from = max(band, int(FAR_FROM * others))
  target = (uniforms[:, 0] * len(members)).astype(np.int64)
  near = 1 + (uniforms[:, 1] * band).astype(np.int64)
  far = 1 + far_from + (uniforms[:, 2] * (others - far_from)).astype(np.int64)
  return members[np.stack([target, ranked[target, near], ranked[target, far]], axis=1)]


def _gap_terciles(world: triplets.World, kl: np.ndarray) -> np.ndarray:
  """Return the two gaps (nats per token) that divide the training policies' draws into thirds; they are the same for every split."""
  uniforms = triplets.example_uniforms(world.seed, 'gaps', 'train', _GAP_DRAWS, 3)
  t, near, far = choose_policies(kl, world.members('train'), uniforms).T
  return np.quantile(kl[t, far] - kl[t, near], [1 / 3, 2 / 3])
