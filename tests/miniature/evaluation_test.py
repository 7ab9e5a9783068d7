"""What the ceiling of the miniature knows: the policies that a split was drawn from, and no others."""

from __future__ import annotations

import types

import numpy as np
import pytest

from polar_jax.miniature import pool
from polar_jax.miniature.evaluation import BayesOptimal
from polar_jax.types import Triplet


@pytest.mark.parametrize(('split', 'known'), [('validation', ['a', 'c']), ('unseen_prompts', ['a', 'c']), ('unseen_policies', ['b', 'd'])])
def test_the_ceiling_knows_only_the_policies_of_its_split(monkeypatch, split, known):
  policies = [types.SimpleNamespace(name=name, params=types.SimpleNamespace(held_out=name in 'bd')) for name in 'abcd']
  calls = []

  def logprobs(drawn, prefixes, ids, workers):
    calls.append(([p.name for p in drawn], prefixes, ids, workers))
    return np.zeros((len(drawn), len(ids)))

  monkeypatch.setattr(pool, 'pool_logprobs', logprobs)
  ceiling = object.__new__(BayesOptimal)
  ceiling._pool, ceiling._workers, ceiling.loss = policies, 3, {}
  ids = {'prompt_ids': [1], 'reference_ids': [2], 'chosen_ids': [3], 'rejected_ids': [4]}
  assert ceiling([Triplet('p', 'r', 'c', 'd', metadata=ids)], split)['bayes'].shape == (1,)
  assert ceiling.loss == {split: pytest.approx(np.log(2))}  # it cannot tell them apart
  assert calls == [(known, [[1]], [[i]], 3) for i in (2, 3, 4)]
