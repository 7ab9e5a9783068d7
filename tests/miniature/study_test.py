"""How near the responses of a policy are to the target's, apart from the runs themselves (tests/end_to_end_test.py has those)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import distance

from polar_jax.miniature import study


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
