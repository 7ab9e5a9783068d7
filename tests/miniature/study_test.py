"""The policies that are tuned towards, and how near responses are to theirs (tests/end_to_end_test.py has the runs themselves)."""

from __future__ import annotations

import types

import numpy as np
import pytest
from scipy.spatial import distance

from polar_jax.config import ConfigError
from polar_jax.miniature import ngram, study


def policy(name, corpus, order, temperature, **changes):
  params = ngram.NgramParams(name, corpus, 0.0, 1.0, order, (0.9,) * order, 1.0, temperature, 0.9, **changes)
  return types.SimpleNamespace(name=name, params=params)


POOL = [
  policy('warm', 'source', 1, 1.2),
  policy('cold', 'source', 1, 0.7),
  policy('held_out', 'source', 2, 0.7, held_out=True),
  policy('twin', 'source', 2, 0.7, twin_of='cold'),
  policy('comment', 'comments', 1, 1.4),
  policy('second_order', 'docstrings', 2, 1.4),
  policy('first_order', 'docstrings', 1, 0.7),
]


def test_every_seed_has_another_target_from_another_corpus():
  names = lambda count: [p.name for p in study.choose_targets(POOL, count)]
  assert names(5) == ['comment', 'second_order', 'cold', 'first_order', 'warm']
  assert names(2) == names(5)[:2]  # more seeds do not change those before
  with pytest.raises(ConfigError, match=r'study\.seeds is 6, but the pool has 5 policies to tune towards'):
    study.choose_targets(POOL, 6)


def test_divergence_is_that_of_jensen_and_shannon():
  rng = np.random.default_rng(0)
  for _ in range(20):
    a, b = rng.integers(0, 5, (2, 30))
    assert study.divergence(a, b) == pytest.approx(distance.jensenshannon(a, b) ** 2, abs=1e-12)
    assert study.divergence(a, b) == pytest.approx(study.divergence(b, a))
  assert study.divergence(a, 7 * a) == pytest.approx(0, abs=1e-15)
  assert study.divergence(np.array([1, 0]), np.array([0, 3])) == pytest.approx(np.log(2))


def test_tokens_are_counted():
  assert study.token_counts([np.array([1, 1]), np.array([3, 0, 1])], 6).tolist() == [1, 3, 0, 1, 0, 0]
