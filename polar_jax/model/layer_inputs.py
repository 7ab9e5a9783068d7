"""The inputs of a layer other than activations, which differ between the layers of some families.

A window narrows the intervals of attention, rotary embeddings have another base in layers with a window, or a layer has none. Layers that
agree in all of this are of one kind. The inputs of every kind are computed once, and the scan over layers selects among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax.config import ModelConfig
from polar_jax.model.layers import rope_tables
from polar_jax.types import Interval

_NO_WINDOW = 2**30  # tokens; beyond every position, and sums with positions do not overflow


class LayerKind(NamedTuple):
  """What tells the layers of one decoder apart."""

  has_window: bool
  has_rope: bool


def layer_kinds(config: ModelConfig) -> list[LayerKind]:
  """Return the kind of every layer."""
  c = config
  every = lambda n, layer: n is not None and (layer + 1) % n == 0
  return [
    LayerKind(c.sliding_window is not None and not every(c.global_every, layer), not every(c.nope_every, layer))
    for layer in range(c.num_layers)
  ]


class AttentionInputs(NamedTuple):
  """The inputs of one layer: rotary tables, and the keys that each token attends to."""

  cos_BTh: jax.Array
  sin_BTh: jax.Array
  intervals: tuple[Interval, ...]
  window: jax.Array | int | None  # number of latest tokens that decoding sees, the newest included; None: all of them, in every layer

  def at(self, index_BQ: jax.Array) -> AttentionInputs:
    """Return the inputs of the tokens at `index_BQ`."""
    pick = lambda a: jnp.take_along_axis(a, index_BQ.reshape(index_BQ.shape + (1,) * (a.ndim - 2)), axis=1)
    cos_BQh, sin_BQh, intervals = jax.tree.map(pick, (self.cos_BTh, self.sin_BTh, self.intervals))
    return self._replace(cos_BTh=cos_BQh, sin_BTh=sin_BQh, intervals=intervals)


class LayerInputs:
  """The inputs of all layers.

  Attributes:
    kind_L: int32, the kind of each layer, for `of`.
  """

  def __init__(self, positions_BT: jax.Array, intervals: Sequence[Interval], config: ModelConfig):
    kinds = layer_kinds(config)
    distinct = sorted(set(kinds))
    self.kind_L = np.array([distinct.index(kind) for kind in kinds], np.int32)
    self._of_kind = [_inputs(positions_BT, intervals, config, kind) for kind in distinct]

  def of(self, kind: jax.Array | np.integer) -> AttentionInputs:
    """Return the inputs of layers of a kind."""
    if len(self._of_kind) == 1:
      return self._of_kind[0]
    if isinstance(kind, np.integer):
      return self._of_kind[kind]
    return jax.tree.map(lambda *of_kind: jax.lax.select_n(kind, *map(jnp.asarray, of_kind)), *self._of_kind)


def _inputs(positions_BT: jax.Array, intervals: Sequence[Interval], config: ModelConfig, kind: LayerKind) -> AttentionInputs:
  c = config
  if kind.has_window and c.rope_local_theta is not None:
    c = dataclasses.replace(c, rope_theta=c.rope_local_theta, rope_scaling='none')
  cos_BTh, sin_BTh = rope_tables(c, positions_BT)
  if not kind.has_rope:
    cos_BTh, sin_BTh = jnp.ones_like(cos_BTh), jnp.zeros_like(sin_BTh)
  if c.sliding_window is None:
    return AttentionInputs(cos_BTh, sin_BTh, tuple(intervals), None)
  window = c.sliding_window if kind.has_window else _NO_WINDOW
  # No sequence of a row is longer than the row.
  if positions_BT.shape[1] > c.sliding_window:
    intervals = [part for interval in intervals for part in narrow(interval, positions_BT, window)]
  return AttentionInputs(cos_BTh, sin_BTh, tuple(intervals), window)


def narrow(interval: Interval, positions_BT: jax.Array, window: int) -> tuple[Interval, Interval]:
  """Restrict an interval to keys less than `window` positions before the query, in two disjoint intervals.

  The positions of the keys of an interval of `polar_jax.data.layout` rise by one, or first fall by one from that of the query, which is the
  first key (the tail of a chosen candidate, stored right to left), and then rise from 0 (its prefix). So the position of the last key
  tells where the rising part starts.

  Args:
    interval: the keys that each token sees.
    positions_BT: positions in the original sequences.
    window: number of latest tokens that a token sees, itself included.

  Returns:
    The keys that remain of the falling part, and those that remain of the rising part.
  """
  start_BT, end_BT = interval
  last_BT = jnp.take_along_axis(positions_BT, jnp.maximum(end_BT - 1, 0), axis=1)
  rising_BT = jnp.maximum(start_BT, end_BT - 1 - last_BT)
  falling = (start_BT, jnp.minimum(rising_BT, start_BT + window))
  return falling, (jnp.maximum(rising_BT, end_BT - last_BT + positions_BT - window), end_BT)
