"""Model FLOPs, counted from a config and from the contents of a batch.

The rule (`mfu_rule`): a multiply-add is 2 FLOPs; every weight matrix counts for the tokens that it has to be applied to, attention for
the query-key pairs inside the intervals and windows, and a training step for three times the forward pass (with adapters, twice; frozen
layers, once). Padding, rematerialization, the embedding lookup, norms and the optimizer are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax.config import LoraConfig, ModelConfig
from polar_jax.model.layer_inputs import layer_kinds
from polar_jax.runtime import chips
from polar_jax.types import RankedBatch, UserError


def passes(adapters: LoraConfig) -> float:
  """Return what a training step costs, in forward passes.

  The backward pass computes gradients of activations and of weights, each for the price of the forward pass; frozen weights have none.
  """
  return 3.0 if adapters.rank is None else 2.0


def mfu_rule(adapters: LoraConfig, frozen_layers: int = 0) -> str:
  """Return the rule by which FLOPs are counted, for people to read."""
  of_adapters = '' if adapters.rank is None else 'adapters, '
  of_frozen = f' (the first {frozen_layers} layers: 1 x)' if frozen_layers else ''
  return (
    f'{passes(adapters):g} x{of_frozen} forward matmul FLOPs of real tokens and seen query-key pairs; {of_adapters}padding, recomputation '
    'and optimizer excluded'
  )


def training_flops(forward: Callable[[ModelConfig, Any], float], c: ModelConfig, batch: Any, adapters: LoraConfig) -> float:
  """Count the FLOPs of a training step.

  Args:
    forward: `reward_model_flops` or `language_model_flops`.
    c: the model.
    batch: of that kind (host arrays).
    adapters: of the run.
  """
  return passes(adapters) * forward(c, batch) - (passes(adapters) - 1) * _frozen_flops(c, batch)


def _frozen_flops(c: ModelConfig, batch: Any) -> float:
  """Count the forward FLOPs of the frozen layers, none of which is the last one, for any batch."""
  if not c.frozen_layers:
    return 0.0
  span_BT = sum(end_BT - start_BT for start_BT, end_BT in batch.intervals)
  weights = float((span_BT > 0).sum()) * c.frozen_layers * sum(_layer_weights(c))
  pairs = sum(_pairs_by_layer(c, lambda window: np.minimum(span_BT, window).sum())[: c.frozen_layers])
  return 2.0 * weights + 4.0 * c.num_heads * c.head_dim * pairs


class Parameters(NamedTuple):
  """Parameter counts of a model. Scaling studies count them with or without the embedding table."""

  embedding: int
  layers: int
  head: int  # including the norm before it

  @property
  def total(self) -> int:
    """All parameters."""
    return sum(self)

  @property
  def without_embedding(self) -> int:
    """All parameters except the embedding table."""
    return self.layers + self.head


def reward_model_parameters(c: ModelConfig) -> Parameters:
  """Count the parameters of a `RewardModel` exactly."""
  return _parameters(c, c.d_model)


def language_model_parameters(c: ModelConfig) -> Parameters:
  """Count the parameters of a `LanguageModel` exactly; a head tied to the embedding table counts as embedding."""
  return _parameters(c, 0 if c.tie_embeddings else c.d_model * c.known_vocab_size)


def _parameters(c: ModelConfig, head: int) -> Parameters:
  biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim if c.qkv_bias else 0
  norms = (4 if c.post_norms else 2) * c.d_model + (2 * c.head_dim if c.qk_norm else 0)
  return Parameters(c.known_vocab_size * c.d_model, c.num_layers * (sum(_layer_weights(c)) + biases + norms), head + c.d_model)


def _layer_weights(c: ModelConfig) -> tuple[int, int]:
  """Count the (key and value projection weights, all other matmul weights) of one layer."""
  key_value = 2 * c.d_model * c.num_kv_heads * c.head_dim
  rest = 2 * c.d_model * c.num_heads * c.head_dim + 3 * c.d_model * c.d_ff
  return key_value, rest


def language_model_flops(c: ModelConfig, batch: Any) -> float:
  """Count the forward FLOPs of a TextBatch (host arrays)."""
  span = batch.end_BT - batch.start_BT
  per_token = c.num_layers * sum(_layer_weights(c)) + c.d_model * c.known_vocab_size
  pairs = sum(_pairs_by_layer(c, lambda window: np.minimum(span, window).sum()))
  return 2.0 * float((span > 0).sum()) * per_token + 4.0 * c.num_heads * c.head_dim * pairs


def reward_model_flops(c: ModelConfig, batch: Any) -> float:
  """Count the forward FLOPs of a PairBatch or RankedBatch (host arrays). The last layer computes only keys, values, reward tokens."""
  span_BT = sum(end_BT - start_BT for start_BT, end_BT in batch.intervals)
  tokens = float((span_BT > 0).sum())
  key_value, rest = _layer_weights(c)
  index = batch.reward_index_BPC.reshape(len(batch.tokens_BT), -1)
  # Padding points at token 0, which may be a real token.
  if isinstance(batch, RankedBatch):
    real = batch.rank_BPC.reshape(index.shape) >= 0
  else:
    real = np.repeat(batch.pair_mask_BP > 0, batch.reward_index_BPC.shape[-1], axis=1)
  reward_span = np.take_along_axis(span_BT, index, axis=1) * real
  rewards = float((reward_span > 0).sum())
  weights = tokens * ((c.num_layers - 1) * (key_value + rest) + key_value) + rewards * (rest + c.d_model)
  pairs = sum(_pairs_by_layer(c, lambda window: np.minimum(span_BT, window).sum())[:-1])
  pairs += _pairs_by_layer(c, lambda window: np.minimum(reward_span, window).sum())[-1]
  return 2.0 * weights + 4.0 * c.num_heads * c.head_dim * pairs


def two_sequences_flops(c: ModelConfig, batch: Any) -> float:
  """Count the forward FLOPs of the pairs of a PairBatch (host arrays) as if each candidate were a causal row of its own, in every layer.

  This is the work of a trainer without shared prefixes for the same loss.
  """
  index = batch.reward_index_BPC.reshape(len(batch.tokens_BT), -1)
  lengths = np.take_along_axis(batch.positions_BT, index, axis=1).reshape(batch.reward_index_BPC.shape) + 1.0
  lengths = lengths[batch.pair_mask_BP > 0]
  weights = lengths.sum() * c.num_layers * sum(_layer_weights(c)) + lengths.size * c.d_model
  triangle = lambda n: n * (n + 1) / 2
  pairs = _pairs_by_layer(c, lambda window: (triangle(lengths) - triangle(np.maximum(lengths - window, 0))).sum())
  return float(2.0 * weights + 4.0 * c.num_heads * c.head_dim * sum(pairs))


def _pairs_by_layer(c: ModelConfig, pairs: Callable[[float], float]) -> list[float]:
  """Return the number of query-key pairs in each layer. `pairs` counts those of a layer with a window of so many tokens."""
  window = c.sliding_window or math.inf
  counts = {kind: float(pairs(window if kind.has_window else math.inf)) for kind in set(layer_kinds(c))}
  return [counts[kind] for kind in layer_kinds(c)]


def peak_flops(device: jax.Device) -> tuple[float, str]:
  """Return (FLOP/s of one device, source of the number). A CPU is measured: the best of a few float32 matmuls.

  Raises:
    UserError: the device is a TPU without a known data sheet, whose bfloat16 peak a measurement of float32 would miss.
  """
  kind = device.device_kind
  chip = chips.find_chip(kind)
  if chip is not None:
    cores = getattr(device, 'num_cores', None) or chip.device_cores
    return chip.peak_flops * min(cores / chip.cores, 1), f'{kind} data sheet, dense bfloat16'
  if 'tpu' in kind.lower():
    known = [name for other in chips.CHIPS.values() for name in other.device_kinds if name.startswith('tpu')]
    raise UserError(
      f'the peak FLOP/s of a {kind!r}, over which MFU is computed, is not known (known: {", ".join(known)}); set profile.peak_flops to '
      'the dense bfloat16 FLOP/s of one device'
    )
  n = 1024
  a = jnp.ones((n, n), jnp.float32)
  matmul = jax.jit(lambda x: x @ x)
  matmul(a).block_until_ready()
  best = float('inf')
  for _ in range(8):
    start = time.perf_counter()
    matmul(a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  # Fake devices share one CPU, so the measured speed is divided among them.
  return 2.0 * n**3 / best / jax.local_device_count(), f'{kind} measured on a {n} x {n} float32 matmul'
