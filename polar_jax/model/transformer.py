"""One decoder for every model of the package: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Layers are stored stacked along a leading axis and applied with `lax.scan`, so compile time does not grow with depth.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model import attention
from polar_jax.model.attention import Interval
from polar_jax.model.attention.reference import SAVED
from polar_jax.model.cache import KVCache, Recent
from polar_jax.model.layers import apply_rope, param, project, project_few, rms_norm, rope_tables, swiglu
from polar_jax.sharding import constrain

_REMAT = {
  'full': None,  # keep nothing but the layer's input
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
  ),
  'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Rows:
  """What the decoder must know of a batch beside its tokens: rotary tables, and the intervals of keys that each token sees."""

  def __init__(self, positions_BT: jax.Array, intervals: Sequence[Interval], config: ModelConfig):
    self.cos_BTh, self.sin_BTh = rope_tables(config, positions_BT)
    self.intervals = tuple(intervals)

  def at(self, index_BQ: jax.Array) -> Rows:
    """The same of the tokens at `index_BQ`."""
    pick = lambda a: jnp.take_along_axis(a, index_BQ.reshape(index_BQ.shape + (1,) * (a.ndim - 2)), axis=1)
    picked = copy.copy(self)
    picked.cos_BTh, picked.sin_BTh, picked.intervals = jax.tree.map(pick, (self.cos_BTh, self.sin_BTh, self.intervals))
    return picked


_INPUTS = {'wq': 1, 'wk': 1, 'wv': 1, 'wo': 2, 'w_gate': 1, 'w_up': 1, 'w_down': 1}  # axes that a weight contracts, its first


class Block(nnx.Module):
  """Pre-norm attention and feed-forward. Created with `num_layers` stacked layers; `lax.scan` hands out one at a time."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    c, layers, std = config, config.num_layers, config.init_std
    self.config = config
    self.turned = False  # whether the input axes of the weights are their last
    self.attention_norm = param(rngs, (layers, c.d_model), ('layers', 'act_embed'), None)
    self.wq = param(rngs, (layers, c.d_model, c.num_heads, c.head_dim), ('layers', 'embed', 'heads', 'head_dim'), std)
    self.wk = param(rngs, (layers, c.d_model, c.num_kv_heads, c.head_dim), ('layers', 'embed', 'kv_heads', 'head_dim'), std)
    self.wv = param(rngs, (layers, c.d_model, c.num_kv_heads, c.head_dim), ('layers', 'embed', 'kv_heads', 'head_dim'), std)
    self.wo = param(rngs, (layers, c.num_heads, c.head_dim, c.d_model), ('layers', 'heads', 'head_dim', 'embed'), std)
    bias = lambda heads, axis: param(rngs, (layers, heads, c.head_dim), ('layers', axis, 'head_dim'), 0) if c.qkv_bias else None
    self.bq, self.bk, self.bv = bias(c.num_heads, 'heads'), bias(c.num_kv_heads, 'kv_heads'), bias(c.num_kv_heads, 'kv_heads')
    self.mlp_norm = param(rngs, (layers, c.d_model), ('layers', 'act_embed'), None)
    self.w_gate = param(rngs, (layers, c.d_model, c.d_ff), ('layers', 'embed', 'mlp'), std)
    self.w_up = param(rngs, (layers, c.d_model, c.d_ff), ('layers', 'embed', 'mlp'), std)
    self.w_down = param(rngs, (layers, c.d_ff, c.d_model), ('layers', 'mlp', 'embed'), std)

  def __call__(self, x_BTD: jax.Array, rows: Rows, index_BQ: jax.Array | None = None) -> jax.Array:
    """The block's output at every token, or only at the tokens `index_BQ`: then (B, Q, D)."""
    h_BTD = rms_norm(x_BTD, self.attention_norm[...], self.config.norm_eps)
    k_BSKH, v_BSKH = self._keys_and_values(h_BTD, rows)
    if index_BQ is not None:
      rows = rows.at(index_BQ)
      x_BTD, h_BTD = (jnp.take_along_axis(a, index_BQ[..., None], axis=1) for a in (x_BTD, h_BTD))
    return self._attend_and_feed(x_BTD, h_BTD, k_BSKH, v_BSKH, rows)

  def read(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The block's output, keys and values at every token."""
    h_BTD = rms_norm(x_BTD, self.attention_norm[...], self.config.norm_eps)
    k_BTKH, v_BTKH = self._keys_and_values(h_BTD, rows)
    return self._attend_and_feed(x_BTD, h_BTD, k_BTKH, v_BTKH, rows), k_BTKH, v_BTKH

  def keys_and_values(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Those alone: all that is needed of the last layer, where nothing is predicted."""
    return self._keys_and_values(rms_norm(x_BTD, self.attention_norm[...], self.config.norm_eps), rows)

  def next(
    self, x_B1D: jax.Array, rows: Rows, cache: KVCache, recent: Recent, step: jax.Array, layer: jax.Array
  ) -> tuple[jax.Array, Recent]:
    """As `Decoder.next`, of layer `layer` alone: the output (B, 1, D), and `recent`."""
    h_B1D = rms_norm(x_B1D, self.attention_norm[...], self.config.norm_eps)
    k_B1KH, v_B1KH = self._keys_and_values(h_B1D, rows)
    recent = recent.put(layer, step, k_B1KH[:, 0], v_B1KH[:, 0])
    mixed_BNH = cache.attend(layer, recent, step, self._queries(h_B1D, rows)[:, 0])
    return self._mix_and_feed(x_B1D, mixed_BNH[:, None]), recent

  def _keys_and_values(self, h_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    k_BTKH, v_BTKH = self._project(h_BTD, 'wk', self.bk), self._project(h_BTD, 'wv', self.bv)
    return apply_rope(k_BTKH, rows.cos_BTh, rows.sin_BTh), v_BTKH

  def _attend_and_feed(self, x_BTD: jax.Array, h_BTD: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, rows: Rows) -> jax.Array:
    return self._mix_and_feed(x_BTD, attention.attend(self.config.attention, self._queries(h_BTD, rows), k_BSKH, v_BSKH, rows.intervals))

  def _queries(self, h_BTD: jax.Array, rows: Rows) -> jax.Array:
    q_BTNH = apply_rope(self._project(h_BTD, 'wq', self.bq), rows.cos_BTh, rows.sin_BTh)
    return constrain(q_BTNH, 'batch', 'length', 'heads', 'head_dim')

  def _mix_and_feed(self, x_BTD: jax.Array, mixed_BTNH: jax.Array) -> jax.Array:
    x_BTD = x_BTD + self._project(mixed_BTNH, 'wo')
    x_BTD = constrain(x_BTD, 'batch', 'length', 'act_embed')
    h_BTD = rms_norm(x_BTD, self.mlp_norm[...], self.config.norm_eps)
    hidden_BTF = swiglu(self._project(h_BTD, 'w_gate'), self._project(h_BTD, 'w_up'))
    x_BTD = x_BTD + self._project(hidden_BTF, 'w_down')
    return constrain(x_BTD, 'batch', 'length', 'act_embed')

  def _project(self, x: jax.Array, name: str, bias: nnx.Param | None = None) -> jax.Array:
    weight = getattr(self, name)[...]
    return (project_few if self.turned else project)(x, weight, _INPUTS[name], bias)

  def turn(self) -> Block:
    """One layer, with its weights as `project_few` takes them."""
    turned = jax.tree.map(lambda p: p, self)
    for name, inputs in _INPUTS.items():
      weight = getattr(turned, name)[...]
      setattr(turned, name, nnx.Param(jnp.moveaxis(weight, range(inputs), range(-inputs, 0))))
    turned.turned = True
    return turned


class Decoder(nnx.Module):
  """Embedding, stacked blocks and final norm: hidden states, never logits."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    if config.vocab_size is None:
      raise ValueError('ModelConfig.vocab_size must be set (it comes from the tokenizer)')
    self.config = config
    self.embedding = param(rngs, (config.vocab_size, config.d_model), ('vocab', 'embed'), config.init_std)
    self.layers = Block(config, rngs=rngs)
    self.norm = param(rngs, (config.d_model,), ('act_embed',), None)

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval], index_BQ: jax.Array | None = None
  ) -> jax.Array:
    """Normed hidden states (B, T, D), or (B, Q, D) at the tokens `index_BQ` only. A token sees the keys of all its `intervals`.

    With `index_BQ` the last block computes queries, output projection and feed-forward at those tokens alone: nothing else of
    the last layer reaches them but its keys and values.
    """
    c = self.config
    rows = Rows(positions_BT, intervals, c)
    x_BTD = self._embed(tokens_BT)
    body = _remat(lambda x, block: block(x, rows), c.remat)
    scanned = self.layers if index_BQ is None else jax.tree.map(lambda p: p[:-1], self.layers)
    x_BTD, _ = jax.lax.scan(lambda x, block: (body(x, block), None), x_BTD, scanned, unroll=c.scan_unroll)
    if index_BQ is not None:
      last = jax.tree.map(lambda p: p[-1], self.layers)
      x_BTD = _remat(lambda x, block: block(x, rows, index_BQ), c.remat)(x_BTD, last)
    return rms_norm(x_BTD, self.norm[...], c.norm_eps)

  def read(self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval]) -> tuple[jax.Array, jax.Array]:
    """Keys and values (L, B, T, K, H) of tokens that nothing is predicted from, for `KVCache.fill`."""
    c = self.config
    rows = Rows(positions_BT, intervals, c)

    def body(x_BTD, block):
      x_BTD, *cached = block.read(x_BTD, rows)
      return x_BTD, cached

    x_BTD, cached = jax.lax.scan(body, self._embed(tokens_BT), jax.tree.map(lambda p: p[:-1], self.layers), unroll=c.scan_unroll)
    last = jax.tree.map(lambda p: p[-1], self.layers).keys_and_values(x_BTD, rows)
    k_LBTKH, v_LBTKH = (jnp.concatenate([before, new[None]]) for before, new in zip(cached, last, strict=True))
    return k_LBTKH, v_LBTKH

  def blocks(self) -> list[Block] | None:
    """The layers apart and turned, for `next`, where the scan is unrolled: made once, they are read at every token."""
    c = self.config
    if c.scan_unroll < c.num_layers:
      return None
    return [jax.tree.map(operator.itemgetter(i), self.layers).turn() for i in range(c.num_layers)]

  def next(
    self, token_B: jax.Array, cache: KVCache, recent: Recent, step: jax.Array, blocks: Sequence[Block] | None = None
  ) -> tuple[jax.Array, Recent]:
    """Normed hidden states (B, D) of one token behind those in `cache` and the first `step` of `recent`, and `recent` with it.

    `blocks`: what that method gave.
    """
    c = self.config
    rows = Rows((cache.length_B + step)[:, None], (), c)
    state = self._embed(token_B[:, None]), recent

    def body(state, indexed):
      block, layer = indexed
      x_B1D, recent = state
      return block.next(x_B1D, rows, cache, recent, step, layer), None

    if blocks is None:
      state, _ = jax.lax.scan(body, state, (self.layers, jnp.arange(c.num_layers)), unroll=c.scan_unroll)
    else:
      for layer, block in enumerate(blocks):
        state, _ = body(state, (block, jnp.int32(layer)))
    x_B1D, recent = state
    return rms_norm(x_B1D, self.norm[...], c.norm_eps)[:, 0], recent

  def _embed(self, tokens_BT: jax.Array) -> jax.Array:
    # Gathered over fsdp before the look-up: else the partitioner replicates the activations of the whole batch.
    table_VD = constrain(self.embedding[...].astype(self.config.compute_dtype), 'vocab', 'act_embed')
    return constrain(jnp.take(table_VD, tokens_BT, axis=0), 'batch', 'length', 'act_embed')


def _remat(layer: Callable, policy: str) -> Callable:
  return layer if policy == 'none' else jax.checkpoint(layer, policy=_REMAT[policy])


def num_parameters(model: nnx.Module) -> int:
  """Parameters of a model, abstract (`nnx.eval_shape`) or real."""
  return sum(p.size for p in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
