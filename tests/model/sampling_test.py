"""Drawn tokens follow the truncated distribution (chi-square); kept tokens and log-probabilities equal a numpy oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from polar_jax.model import sampling

VOCABULARY = 300  # three groups, the last one not full
DRAWS = 60_000


def law(logits: np.ndarray, temperature: float, top_p: float, top_k: int | None, barred: tuple[int, ...] = ()) -> np.ndarray:
  """Return the truncated distribution by sorting, in float64."""
  scaled = logits.astype(np.float64) / temperature
  scaled[list(barred)] = -np.inf
  p = np.exp(scaled - scaled.max())
  order = np.argsort(-p)
  kept, mass = [], 0.0
  if top_k is not None:
    order = order[:top_k]
  total = p[order].sum()
  for token in order:
    kept.append(token)
    mass += p[token]
    if mass >= top_p * total:
      break
  out = np.zeros_like(p)
  out[kept] = p[kept]
  return out / out.sum()


@functools.partial(jax.jit, static_argnames=('temperature', 'top_p', 'top_k', 'barred'))
def draws(logits, temperature, top_p, top_k, barred=()):
  index = jnp.arange(DRAWS, dtype=jnp.int32)
  noise = sampling.noise(jax.random.key(5), index // 100, index % 100, VOCABULARY)
  logits_BV = jnp.broadcast_to(logits[None], (DRAWS, VOCABULARY))
  mask = jnp.zeros((DRAWS, VOCABULARY), bool).at[:, list(barred)].set(True) if barred else None
  return sampling.draw(logits_BV, noise, temperature=temperature, top_p=top_p, top_k=top_k, barred_BV=mask)


@pytest.fixture(scope='module')
def logits() -> np.ndarray:
  return np.random.default_rng(1).normal(0, 2, VOCABULARY).astype(np.float32)


@pytest.mark.long
@pytest.mark.parametrize(
  ('temperature', 'top_p', 'top_k', 'barred'),
  [
    (1.3, 0.7, 40, ()),
    (1.0, 0.9, None, 'top'),
    *(
      pytest.param(*case, (), marks=pytest.mark.slow)  # parts of the first
      for case in ((1.0, 1.0, None), (0.6, 1.0, None), (1.0, 0.8, None), (1.0, 1.0, 12))
    ),
  ],
)
def test_draws_follow_the_distribution(logits, temperature, top_p, top_k, barred):
  barred = (int(logits.argmax()), 3) if barred else ()
  expected = law(logits, temperature, top_p, top_k, barred)
  token, logprob = jax.device_get(draws(logits, temperature, top_p, top_k, barred))
  counts = np.bincount(token, minlength=VOCABULARY)
  assert not counts[expected == 0].any()
  common = expected * DRAWS >= 5
  observed = np.append(counts[common], counts[~common].sum())
  wanted = np.append(expected[common], expected[~common].sum()) * DRAWS
  keep = wanted > 0
  # One in a thousand of correct samplers would fail at this seed; the seed is fixed.
  assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3
  scaled = logits.astype(np.float64) / temperature
  allowed = np.isin(np.arange(VOCABULARY), barred, invert=True)
  np.testing.assert_allclose(logprob, (scaled - np.log(np.exp(scaled[allowed]).sum()))[token], atol=2e-5)  # before truncation


def test_temperature_zero_takes_the_likeliest(logits):
  token, logprob = jax.device_get(draws(logits, 0.0, 1.0, None))
  assert (token == logits.argmax()).all()
  np.testing.assert_allclose(logprob[0], logits.max() - np.log(np.exp(logits.astype(np.float64)).sum()), atol=1e-5)


def test_equal_weights_are_kept_together():
  weight = jnp.asarray([[1.0, 0.5, 0.5, 0.25, 0.0]])
  assert sampling.kept(weight, top_k=2)[0].tolist() == [True, True, True, False, False]
  assert sampling.kept(weight, top_p=0.4)[0].tolist() == [True, False, False, False, False]
  assert sampling.kept(weight)[0].tolist() == [True, True, True, True, False]


def test_kept_includes_the_token_that_reaches_top_p_and_no_more():
  weight = jnp.array([[1.0, 0.5, 0.25, 0.25], [1.0, 1.0, 1.0, 1.0]])
  assert sampling.kept(weight, top_p=0.5).tolist() == [[True, False, False, False], [True] * 4]  # equal tokens stay together
  assert sampling.kept(weight, top_p=0.75).tolist() == [[True, True, False, False], [True] * 4]


def test_kept_separates_weights_that_are_nearly_equal():
  """Down to neighboring floats."""
  for heavy in (0.5, 0.37, 0.011):
    weight = np.array([[1.0, heavy, np.nextafter(np.float32(heavy), np.float32(0))]], np.float32)
    assert sampling.kept(jnp.asarray(weight), top_k=2).tolist() == [[True, True, False]]


@pytest.mark.parametrize('settings', [{}, {'top_k': 1}, {'top_p': 0.5}])
def test_draw_renormalizes_when_the_likeliest_token_is_excluded(settings):
  """The others are so light that their weights relative to it are 0 in float32."""
  logits, barred = jnp.array([[0.0, -200.0, -210.0]]), jnp.array([[True, False, False]])
  noise = jnp.zeros((1, sampling.num_noise(3)))
  token, logprob = sampling.draw(logits, noise, temperature=1.0, barred_BV=barred, **settings)
  assert token.tolist() == [1] and logprob[0] == pytest.approx(-np.log1p(np.exp(-10)), abs=2e-5)
