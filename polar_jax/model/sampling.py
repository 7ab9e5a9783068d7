"""Sampling of the next token: temperature, top-k, then top-p, with noise that depends only on which token it is for.

Nothing is sorted: the smallest probability that top-k or top-p keeps is found by bisection over the bits of a float. A token is drawn
by the Gumbel-max trick in two rounds, first between groups of tokens, then within the winning group, so it costs a few hundred random
numbers whatever the size of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_GROUP = 128  # number of tokens of a group

_ONE_BITS = 0x3F800000  # the bits of 1.0; floats in [0, 1] have the same order as their bits


def num_noise(vocab_size: int) -> int:
  """Return the number of random numbers per drawn token: one for each group, and one for each token of a group."""
  return -(-vocab_size // _GROUP) + _GROUP


def noise(key: jax.Array, rollout_B: jax.Array, index_B: jax.Array, vocab_size: int) -> jax.Array:
  """Return standard Gumbel noise (B, `num_noise`), a function of its arguments alone.

  Args:
    key: of the whole step.
    rollout_B: which rollout each token belongs to.
    index_B: index of the token in its response.
    vocab_size: decides how much noise a token needs.
  """

  def one(rollout: jax.Array, index: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, rollout), index), (num_noise(vocab_size),))

  return jax.vmap(one)(rollout_B, index_B)


def kept(weight_BV: jax.Array, top_p: float = 1.0, top_k: int | None = None) -> jax.Array:
  """Return a mask (B, V) of the tokens that may be drawn: of the `top_k` heaviest, the fewest that hold `top_p` of their weight.

  Ties with the lightest kept token are kept too. `weight_BV` is relative to the heaviest token, whose weight is 1.
  """
  keep_BV = weight_BV > 0
  if top_k is not None and top_k < weight_BV.shape[1]:
    keep_BV &= weight_BV >= _threshold(lambda t_B1: jnp.sum(weight_BV >= t_B1, axis=1) >= top_k, len(weight_BV))
  if top_p < 1:
    left_BV = jnp.where(keep_BV, weight_BV, 0.0)
    mass_B = lambda t_B1: jnp.sum(jnp.where(left_BV >= t_B1, left_BV, 0.0), axis=1)
    wanted_B = top_p * mass_B(jnp.zeros((len(weight_BV), 1)))
    keep_BV &= weight_BV >= _threshold(lambda t_B1: mass_B(t_B1) >= wanted_B, len(weight_BV))
  return keep_BV


def _threshold(enough: Callable[[jax.Array], jax.Array], batch: int) -> jax.Array:
  """Return the largest float (B, 1) in [0, 1] for which `enough` holds. It must hold for 0 and be monotonic."""

  def halve(_, bounds):
    low_B, high_B = bounds
    middle_B = low_B + (high_B - low_B) // 2
    holds_B = enough(jax.lax.bitcast_convert_type(middle_B, jnp.float32)[:, None])
    return jnp.where(holds_B, middle_B, low_B), jnp.where(holds_B, high_B, middle_B)

  start = (jnp.zeros(batch, jnp.int32), jnp.full(batch, _ONE_BITS + 1, jnp.int32))
  low_B, _ = jax.lax.fori_loop(0, 30, halve, start)  # 2 ** 30 > _ONE_BITS + 1
  return jax.lax.bitcast_convert_type(low_B, jnp.float32)[:, None]


def draw(
  logits_BV: jax.Array,
  noise_BM: jax.Array,
  *,
  temperature: float,
  top_p: float = 1.0,
  top_k: int | None = None,
  barred_BV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draw a token (B,) and return it with its log-probability (B,) at `temperature`, given that it is not barred, before top-k and top-p.

  Args:
    logits_BV: logits of the next token.
    noise_BM: the result of `noise`.
    temperature: 0 picks the most likely token, the first of equals, and returns its log-probability at temperature 1.
    top_p: see `kept`.
    top_k: see `kept`.
    barred_BV: tokens of probability 0. There must be at least one other.
  """
  scaled_BV = logits_BV / temperature if temperature > 0 else logits_BV
  if barred_BV is not None:
    scaled_BV = jnp.where(barred_BV, -jnp.inf, scaled_BV)
  peak_B1 = jnp.max(scaled_BV, axis=1, keepdims=True)
  weight_BV = jnp.exp(scaled_BV - peak_B1)
  log_total_B = jnp.log(jnp.sum(weight_BV, axis=1)) + peak_B1[:, 0]
  if temperature > 0:
    if top_p < 1 or top_k is not None:
      weight_BV = jnp.where(kept(weight_BV, top_p, top_k), weight_BV, 0.0)
    token_B = _race(weight_BV, noise_BM)
  else:
    token_B = jnp.argmax(scaled_BV, axis=1)
  chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=1)[:, 0]
  return token_B.astype(jnp.int32), chosen_B - log_total_B


def _race(weight_BV: jax.Array, noise_BM: jax.Array) -> jax.Array:
  """Draw a token (B,) with a probability proportional to its weight."""
  batch, vocab = weight_BV.shape
  weight_BgI = jnp.pad(weight_BV, [(0, 0), (0, -vocab % _GROUP)]).reshape(batch, -1, _GROUP)
  groups = weight_BgI.shape[1]
  group_B = jnp.argmax(jnp.log(jnp.sum(weight_BgI, axis=2)) + noise_BM[:, :groups], axis=1)
  weight_BI = jnp.take_along_axis(weight_BgI, group_B[:, None, None], axis=1)[:, 0]
  return group_B * _GROUP + jnp.argmax(jnp.log(weight_BI) + noise_BM[:, groups:], axis=1)
