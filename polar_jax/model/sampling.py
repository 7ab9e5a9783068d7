"""Draws the next token: temperature, top-k, then top-p, with noise that depends on nothing but which token it is for.

Nothing is sorted: the smallest probability that top-k or top-p keeps is found by bisection over the bits of a float. The draw is
an exponential race (the Gumbel-max trick) in two rounds, first between groups of tokens, then within the winning group, so a
token costs a few hundred random numbers whatever the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

_GROUP = 128  # tokens of a group of the race

_ONE_BITS = 0x3F800000  # of 1.0; floats of [0, 1] are ordered as their bits are


def num_noise(vocab_size: int) -> int:
  """Random numbers that one token takes: one for each group, and one for each token of a group."""
  return -(-vocab_size // _GROUP) + _GROUP


def noise(key: jax.Array, rollout_B: jax.Array, place_B: jax.Array, vocab_size: int) -> jax.Array:
  """Standard Gumbel noise (B, `num_noise`) of token `place_B` of the answers `rollout_B`: a function of these and of `key` alone."""

  def one(rollout: jax.Array, place: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, rollout), place), (num_noise(vocab_size),))

  return jax.vmap(one)(rollout_B, place_B)


def kept(weight_BV: jax.Array, top_p: float = 1.0, top_k: int | None = None) -> jax.Array:
  """Which tokens (B, V) may be drawn: the `top_k` heaviest; of these the fewest heaviest that hold `top_p` of their weight.

  Tokens as heavy as the lightest one kept are kept too. `weight_BV` is relative to the heaviest token, which is 1.
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
  """The largest float (B, 1) of [0, 1] whose comparison is `enough`, which holds for 0 and, once it fails, for nothing larger."""

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
  """The token (B,) that the noise picks, and its log-probability (B,) under the law at `temperature` before top-k and top-p.

  Tokens of `barred_BV` are not drawn; top-k and top-p choose among the others, of which one must be left.
  Temperature 0 picks the likeliest token, the first of equals, and gives its log-probability at temperature 1.
  """
  scaled_BV = logits_BV / temperature if temperature > 0 else logits_BV
  peak_B1 = jnp.max(scaled_BV, axis=1, keepdims=True)
  weight_BV = jnp.exp(scaled_BV - peak_B1)
  log_total_B = jnp.log(jnp.sum(weight_BV, axis=1)) + peak_B1[:, 0]
  allowed_BV = scaled_BV if barred_BV is None else jnp.where(barred_BV, -jnp.inf, scaled_BV)
  if temperature > 0:
    if barred_BV is not None:  # anew, since the heaviest that is left may be much lighter
      weight_BV = jnp.exp(allowed_BV - jnp.max(allowed_BV, axis=1, keepdims=True))
    if top_p < 1 or top_k is not None:
      weight_BV = jnp.where(kept(weight_BV, top_p, top_k), weight_BV, 0.0)
    token_B = _race(weight_BV, noise_BM)
  else:
    token_B = jnp.argmax(allowed_BV, axis=1)
  chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=1)[:, 0]
  return token_B.astype(jnp.int32), chosen_B - log_total_B


def _race(weight_BV: jax.Array, noise_BM: jax.Array) -> jax.Array:
  """A token (B,) with a probability in proportion to its weight."""
  batch, vocab = weight_BV.shape
  weight_BgI = jnp.pad(weight_BV, [(0, 0), (0, -vocab % _GROUP)]).reshape(batch, -1, _GROUP)
  groups = weight_BgI.shape[1]
  group_B = jnp.argmax(jnp.log(jnp.sum(weight_BgI, axis=2)) + noise_BM[:, :groups], axis=1)
  weight_BI = jnp.take_along_axis(weight_BgI, group_B[:, None, None], axis=1)[:, 0]
  return group_B * _GROUP + jnp.argmax(jnp.log(weight_BI) + noise_BM[:, groups:], axis=1)
