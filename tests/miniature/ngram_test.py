from __future__ import annotations

import collections

import numpy as np
import pytest

from polar_jax.miniature import cleanup, ngram, ngram_index, pool, vocabulary

VOCAB = 24


@pytest.fixture(scope='module')
def index():
  rng = np.random.default_rng(1)
  stream = rng.choice(np.r_[2, 5:VOCAB], 600, p=np.r_[0.05, rng.dirichlet(np.ones(VOCAB - 5) * 0.5) * 0.95])
  return ngram_index.CorpusIndex('toy', stream, VOCAB, 4)


def make(index, order=3, **changes):
  values = {'name': 'x', 'corpus': 'toy', 'start': 0.2, 'fraction': 0.6, 'order': order, 'weights': (0.9, 0.8, 0.7, 0.85)[:order]}
  values |= {'strength': 0.4, 'temperature': 0.7, 'top_p': 1.0} | changes
  return ngram.NgramPolicy(ngram.NgramParams(**values), index)


def logprob(p, prefixes, trajectories):
  """Return the natural-log probability of trajectory i after prefix i."""
  return p.score(p.index.queries(prefixes, trajectories))


def sample(p, prefix, count, *, temperature=1.0, top_p=1.0, top_k=None, max_tokens):
  """Return `count` samples after a prefix."""
  uniforms = np.random.default_rng(0).random((count, max_tokens))
  ids, lengths, _ = p.sample_ids([prefix] * count, uniforms, temperature, min(top_p, p.params.top_p), top_k)
  return [row[:n] for row, n in zip(ids, lengths, strict=True)]


def slow_distribution(p, history):
  """Evaluate the module's formula with dictionaries and dense vectors."""
  q, total = p.params, len(p.index.stream)
  begin = int(q.start * total)
  window = p.index.stream[begin : begin + round(q.fraction * total)].tolist()
  probs = np.full(VOCAB, 1 / VOCAB)
  for k in range(1, min(q.order, len(history) + 1) + 1):
    context = tuple(history[len(history) - k + 1 :])
    counts = collections.Counter(window[i] for i in range(k - 1, len(window)) if tuple(window[i - k + 1 : i]) == context)
    if counts:
      n = sum(counts.values())
      share = q.weights[k - 1] * n / (n + q.strength * len(counts))
      probs = (1 - share) * probs + share * np.array([counts[v] / n for v in range(VOCAB)])
  probs = probs ** (1 / q.temperature)
  return probs / probs.sum()


@pytest.mark.parametrize('order', [1, 2, 3, 4])
def test_score_against_slow_distribution(index, order):
  p, rng = make(index, order), np.random.default_rng(order)
  prefixes = [index.stream[i : i + n] for i, n in ((30, 1), (100, 4), (300, 6))] + [np.zeros(0, int), np.array([23, 23, 23])]
  trajectories = [rng.integers(0, VOCAB, 9) for _ in prefixes]
  expected = []
  for prefix, trajectory in zip(prefixes, trajectories, strict=True):
    history, total = list(prefix), 0.0
    for token in trajectory:
      total += np.log(slow_distribution(p, history)[token])
      history.append(token)
    expected.append(total)
  got = logprob(p, prefixes, trajectories)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 1.3])
def test_token_logprobs_sum_to_one_and_are_finite(index, temperature):
  p = make(index, 4, temperature=temperature)
  for prefix in (index.stream[200:204], index.stream[580:583], np.array([0, 1, 3])):
    logs = logprob(p, [prefix] * VOCAB, [np.array([v]) for v in range(VOCAB)])
    assert np.isfinite(logs).all()
    assert np.exp(logs).sum() == pytest.approx(1, abs=1e-12)


def first_token_frequencies(p, prefix, count, **options):
  return np.bincount([t[0] for t in sample(p, prefix, count, max_tokens=4, **options)], minlength=VOCAB) / count


@pytest.mark.parametrize('order', [1, 2, 4])
@pytest.mark.parametrize('options', [{}, {'top_p': 0.6}, {'top_k': 3}, {'temperature': 1.8, 'top_p': 0.8}])
def test_sample_ids_follow_the_truncated_distribution(index, order, options):
  p, prefix = make(index, order), index.stream[200:206]
  probs = slow_distribution(make(index, order, temperature=0.7 * options.get('temperature', 1.0)), list(prefix))
  probs[[0, 1, 2, 3, 4]] = 0  # special tokens are never sampled, and a document does not end immediately
  if 'top_k' in options:
    probs[probs < np.sort(probs)[-options['top_k']]] = 0
  above = np.array([probs[probs > x].sum() for x in probs])
  probs[above >= options.get('top_p', 1.1) * probs.sum()] = 0
  got = first_token_frequencies(p, prefix, 20_000, **options)
  assert set(np.flatnonzero(got)) <= set(np.flatnonzero(probs))
  np.testing.assert_allclose(got, probs / probs.sum(), atol=0.017)


def test_sample_ids_end_documents_but_not_early(index):
  drawn = sample(make(index, 2, temperature=1.3), index.stream[:5], 500, max_tokens=30)
  lengths = np.array([len(t) for t in drawn])
  assert lengths.min() >= 4 and lengths.max() == 30 and (lengths < 30).mean() > 0.3
  assert all(t.dtype == np.int32 and t.min() >= vocabulary.NUM_SPECIAL for t in drawn)


@pytest.mark.parametrize('options', [{'top_p': 1.0, 'top_k': None}, {'top_p': 0.7, 'top_k': None}, {'top_p': 0.8, 'top_k': 5}])
def test_a_policy_without_contexts_draws_all_tokens_at_once_as_it_would_one_by_one(index, options):
  p, rng = make(index, 1), np.random.default_rng(3)
  uniforms = rng.random((300, 40))
  ids, lengths, ended = p.sample_ids([index.stream[5:9]] * 300, uniforms, 1.3, **options)
  sampler = ngram._Sampler(p, p._fit(), 1 / (1.3 * p.params.temperature), options['top_p'], options['top_k'])
  several = lambda: ngram._Distributions(np.repeat(sampler.dense, 2, axis=0), options['top_p'], options['top_k'])  # the general path
  oracle, expected = several(), np.zeros((300, 40), np.int64)
  for t in range(40):
    if t == cleanup.MIN_TOKENS:
      sampler.allow_end()
      oracle = several()
    expected[:, t] = oracle.draw(np.ones(300, np.int64), uniforms[:, t])
  for row in range(300):
    stops = np.flatnonzero(expected[row] == vocabulary.EOS_ID)
    length = stops[0] if len(stops) else 40
    assert (lengths[row], ended[row]) == (length, bool(len(stops)))
    assert ids[row].tolist() == [*expected[row, :length], *[vocabulary.PAD_ID] * (40 - length)]
  assert options['top_p'] < 1 or 0 < ended.mean() < 1
  short = p.sample_ids([index.stream[5:9]] * 300, uniforms[:, :2], 1.3, **options)  # shorter than any document may be
  np.testing.assert_array_equal(short[0], expected[:, :2])


def test_sample_ids_is_independent_of_other_prefixes(index):
  p, rng = make(index, 4), np.random.default_rng(5)
  prefixes = [index.stream[i : i + 5] for i in rng.integers(0, 500, 700)]
  uniforms = rng.random((700, 12))
  ids, lengths, _ = p.sample_ids(prefixes, uniforms, 1.0, 0.9, None)
  some = [3, 350, 699]
  ids_some, lengths_some, _ = p.sample_ids([prefixes[i] for i in some], uniforms[some], 1.0, 0.9, None)
  assert np.array_equal(ids[some], ids_some) and np.array_equal(lengths[some], lengths_some)


@pytest.mark.parametrize(
  'changes, message', [({'weights': (0.9, 1.0, 0.7)}, 'strictly'), ({'order': 5}, 'order 5'), ({'corpus': 'y'}, "'y'")]
)
def test_policy_refuses_bad_parameters(index, changes, message):
  with pytest.raises(ValueError, match=message):
    make(index, **changes)


def test_sample_ids_refuses_low_temperature(index):
  with pytest.raises(ValueError, match=r'temperature 0\.07'):
    sample(make(index), index.stream[:5], 1, temperature=0.1, max_tokens=4)


def test_pool_logprobs_equal_those_of_each_policy(index):
  members = [make(index, k) for k in (1, 3, 4)]
  prefixes, trajectories = [index.stream[9:14], index.stream[40:42]], [index.stream[14:20], index.stream[50:59]]
  got = pool.pool_logprobs(members, prefixes, trajectories, workers=2)
  np.testing.assert_allclose(got, [logprob(p, prefixes, trajectories) for p in members], rtol=0, atol=0)
