from __future__ import annotations

import numpy as np
import pytest

from polar_jax.miniature import ngram, ngram_index, pool

CORPORA = ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('policies, held_out', [(8, 2), (8, 6), (16, 14), (64, 13), (256, 48), (256, 254)])
def test_draw_pool_params_copies_are_on_the_side_of_their_original(policies, held_out):
  params = pool.draw_pool_params(0, policies, held_out, 4, 0.15, CORPORA)
  assert sum(p.held_out for p in params) == held_out and len({p.name for p in params}) == policies
  side = {p.name: p.held_out for p in params}
  assert all(side[p.twin_of] == p.held_out for p in params if p.twin_of)
  assert sum(p.twin_of is not None for p in params) == policies // 8


def test_draw_pool_params_are_valid_and_vary():
  params = pool.draw_pool_params(1, 256, 48, 4, 0.15, CORPORA)
  assert {p.corpus for p in params} == set(CORPORA) and {p.order for p in params} == {1, 2, 3, 4}
  assert all(0 <= p.start <= 1 and p.start + p.fraction <= 1 + 1e-9 and all(0 < w < 1 for w in p.weights) for p in params)
  assert 0.1 < np.mean([p.top_p == 1 for p in params]) < 0.4
  assert 0.15 <= min(p.fraction for p in params) < 0.2 and max(p.fraction for p in params) > 0.9
  assert params == pool.draw_pool_params(1, 256, 48, 4, 0.15, CORPORA) != pool.draw_pool_params(2, 256, 48, 4, 0.15, CORPORA)
  narrow = pool.draw_pool_params(1, 256, 48, 4, 0.01, CORPORA)
  assert (
    0.008 < min(p.fraction for p in narrow) < 0.012 and max(p.fraction for p in narrow) > 0.9
  )  # a copy's window may be slightly smaller
  assert all(ngram.NgramParams.from_json(p.to_json()) == p for p in params)


def test_kl_matrix_of_unigram_policies_against_exact():
  rng = np.random.default_rng(0)
  stream = np.concatenate([rng.integers(5, 8, 500), rng.integers(5, 20, 500)])
  index = ngram_index.CorpusIndex('a', stream, 20, 1)
  common = {'corpus': 'a', 'fraction': 0.5, 'order': 1, 'weights': (0.9,), 'strength': 0.1, 'temperature': 1.0, 'top_p': 0.9}
  members = [ngram.NgramPolicy(ngram.NgramParams(name=str(i), start=s, **common), index) for i, s in enumerate((0.0, 0.5))]
  queries = index.queries([stream[:1]] * 20, [np.array([v]) for v in range(20)])
  distributions = [np.exp(p.score(queries)) for p in members]
  exact = [(p * np.log(p / q)).sum() for p, q in (distributions, distributions[::-1])]
  assert exact[1] > 1.25 * exact[0]  # far above the tolerance, so that a transposed matrix would be noticed
  kl = pool.kl_matrix(members, [stream[:4]], 0, 64, workers=1)
  assert kl.shape == (2, 2) and (np.diagonal(kl) == 0).all()
  assert [kl[0, 1], kl[1, 0]] == pytest.approx(exact, rel=0.08)
