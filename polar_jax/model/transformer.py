"""One decoder for every model of the package: RMSNorm, rotary embeddings, grouped-query attention, gated feed-forward layers.

Layers are stacked along a leading axis and applied with `lax.scan`, so compile time does not grow with depth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from polar_jax.config import QUANTIZED, LoraConfig, ModelConfig
from polar_jax.model import attention
from polar_jax.model.attention import Interval
from polar_jax.model.attention.reference import SAVED
from polar_jax.model.kv_cache import DecodeBuffer, KVCache
from polar_jax.model.layer_inputs import AttentionInputs, LayerInputs
from polar_jax.model.layers import GATED, apply_rope, param, project, project_few, rms_norm, scale_embeddings
from polar_jax.model.lora import Adapters
from polar_jax.model.quantized import QuantizedWeight
from polar_jax.sharding import constrain

_LAYER_INPUT = 'layer_input'
_REMAT = {
  'full': None,  # keep only the layer's input
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(SAVED)
  ),
  'dots_no_batch': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT], offload_src='device', offload_dst='pinned_host'
  ),
}


_INPUT_AXES = {'wq': 1, 'wk': 1, 'wv': 1, 'wo': 2, 'w_gate': 1, 'w_up': 1, 'w_down': 1}  # number of leading axes that a weight contracts


class Block(nnx.Module):
  """Pre-norm attention and feed-forward. Created with `num_layers` stacked layers; `lax.scan` hands out one at a time."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()):
    c, layers, std = config, config.num_layers, config.init_std
    self.config = config
    self.transposed = False  # whether the input axes of the weights come last
    norm = lambda size, axis: param(rngs, (layers, size), ('layers', axis), _norm_init(c))
    self.attention_norm = norm(c.d_model, 'act_embed')
    self.wq = param(rngs, (layers, c.d_model, c.num_heads, c.head_dim), ('layers', 'embed', 'heads', 'head_dim'), std)
    self.wk = param(rngs, (layers, c.d_model, c.num_kv_heads, c.head_dim), ('layers', 'embed', 'kv_heads', 'head_dim'), std)
    self.wv = param(rngs, (layers, c.d_model, c.num_kv_heads, c.head_dim), ('layers', 'embed', 'kv_heads', 'head_dim'), std)
    self.wo = param(rngs, (layers, c.num_heads, c.head_dim, c.d_model), ('layers', 'heads', 'head_dim', 'embed'), std)
    bias = lambda heads, axis: param(rngs, (layers, heads, c.head_dim), ('layers', axis, 'head_dim'), 0) if c.qkv_bias else None
    self.bq, self.bk, self.bv = bias(c.num_heads, 'heads'), bias(c.num_kv_heads, 'kv_heads'), bias(c.num_kv_heads, 'kv_heads')
    self.q_norm, self.k_norm = (norm(c.head_dim, 'head_dim') if c.qk_norm else None for _ in range(2))
    self.mlp_norm = norm(c.d_model, 'act_embed')
    self.post_attention_norm, self.post_mlp_norm = (norm(c.d_model, 'act_embed') if c.post_norms else None for _ in range(2))
    self.w_gate = param(rngs, (layers, c.d_model, c.d_ff), ('layers', 'embed', 'mlp'), std)
    self.w_up = param(rngs, (layers, c.d_model, c.d_ff), ('layers', 'embed', 'mlp'), std)
    self.w_down = param(rngs, (layers, c.d_ff, c.d_model), ('layers', 'mlp', 'embed'), std)
    weights = {name: (getattr(self, name), inputs) for name, inputs in _INPUT_AXES.items()}
    self.lora = None if lora.rank is None else Adapters(lora, weights, rngs=rngs)
    if lora.base_dtype in QUANTIZED:
      for name, (weight, _) in weights.items():
        setattr(self, name, QuantizedWeight(weight, lora.base_dtype))

  def __call__(self, x_BTD: jax.Array, inputs: AttentionInputs, index_BQ: jax.Array | None = None) -> jax.Array:
    """Compute the block's output at every token, or (B, Q, D) at the tokens `index_BQ` only."""
    h_BTD = self._norm(x_BTD, self.attention_norm)
    k_BSKH, v_BSKH = self._keys_and_values(h_BTD, inputs)
    if index_BQ is not None:
      inputs = inputs.at(index_BQ)
      x_BTD, h_BTD = (jnp.take_along_axis(a, index_BQ[..., None], axis=1) for a in (x_BTD, h_BTD))
    return self._attend_and_feed(x_BTD, h_BTD, k_BSKH, v_BSKH, inputs)

  def prefill(self, x_BTD: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the block's output, keys and values at every token."""
    h_BTD = self._norm(x_BTD, self.attention_norm)
    k_BTKH, v_BTKH = self._keys_and_values(h_BTD, inputs)
    return self._attend_and_feed(x_BTD, h_BTD, k_BTKH, v_BTKH, inputs), k_BTKH, v_BTKH

  def keys_and_values(self, x_BTD: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """Compute keys and values only: all that the last layer contributes where nothing is predicted."""
    return self._keys_and_values(self._norm(x_BTD, self.attention_norm), inputs)

  def decode(
    self, x_B1D: jax.Array, inputs: AttentionInputs, kv_cache: KVCache, buffer: DecodeBuffer, step: jax.Array, layer: jax.Array
  ) -> tuple[jax.Array, DecodeBuffer]:
    """Compute the output (B, 1, D) of this block for `Decoder.decode`, and the buffer with the token's keys and values.

    Args:
      x_B1D: activations of the newest token of each row.
      inputs: its rotary tables and window.
      kv_cache: keys and values of the earlier tokens.
      buffer: keys and values of the tokens since the cache was last written.
      step: index of the token in the buffer.
      layer: index of the block.
    """
    h_B1D = self._norm(x_B1D, self.attention_norm)
    k_B1KH, v_B1KH = self._keys_and_values(h_B1D, inputs)
    buffer = buffer.write(layer, step, k_B1KH[:, 0], v_B1KH[:, 0])
    mixed_BNH = kv_cache.attend(layer, buffer, step, self._queries(h_B1D, inputs)[:, 0], inputs.window)
    return self._mix_and_feed(x_B1D, mixed_BNH[:, None]), buffer

  def _keys_and_values(self, h_BTD: jax.Array, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    k_BTKH, v_BTKH = self._project(h_BTD, 'wk', self.bk), self._project(h_BTD, 'wv', self.bv)
    return apply_rope(self._norm(k_BTKH, self.k_norm), inputs.cos_BTh, inputs.sin_BTh), v_BTKH

  def _attend_and_feed(
    self, x_BTD: jax.Array, h_BTD: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, inputs: AttentionInputs
  ) -> jax.Array:
    return self._mix_and_feed(
      x_BTD, attention.attend(self.config.attention, self._queries(h_BTD, inputs), k_BSKH, v_BSKH, inputs.intervals)
    )

  def _queries(self, h_BTD: jax.Array, inputs: AttentionInputs) -> jax.Array:
    c = self.config
    q_BTNH = self._norm(self._project(h_BTD, 'wq', self.bq), self.q_norm)
    if c.query_pre_attn_scalar is not None:  # attention divides by the square root of head_dim
      q_BTNH *= (c.head_dim / c.query_pre_attn_scalar) ** 0.5
    return constrain(apply_rope(q_BTNH, inputs.cos_BTh, inputs.sin_BTh), 'batch', 'length', 'heads', 'head_dim')

  def _norm(self, x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    """Apply RMSNorm, if the family has this one."""
    return x if scale is None else rms_norm(x, scale[...], self.config.norm_eps, self.config.zero_centered_norms)

  def _mix_and_feed(self, x_BTD: jax.Array, mixed_BTNH: jax.Array) -> jax.Array:
    x_BTD = x_BTD + self._norm(self._project(mixed_BTNH, 'wo'), self.post_attention_norm)
    x_BTD = constrain(x_BTD, 'batch', 'length', 'act_embed')
    h_BTD = self._norm(x_BTD, self.mlp_norm)
    hidden_BTF = GATED[self.config.activation](self._project(h_BTD, 'w_gate'), self._project(h_BTD, 'w_up'))
    x_BTD = x_BTD + self._norm(self._project(hidden_BTF, 'w_down'), self.post_mlp_norm)
    return constrain(x_BTD, 'batch', 'length', 'act_embed')

  def _project(self, x: jax.Array, name: str, bias: nnx.Param | None = None) -> jax.Array:
    weight, inputs = getattr(self, name), _INPUT_AXES[name]
    if isinstance(weight, QuantizedWeight):
      out = weight.project(x, inputs, bias)
    else:
      out = (project_few if self.transposed else project)(x, weight[...], inputs, bias)
    adapter = self.lora.get(name) if self.lora else None
    return out + adapter(x) if adapter else out

  def transpose(self) -> Block:
    """Return this layer with its weights in the layout of `project_few`. The layer must not be stacked."""
    transposed = jax.tree.map(lambda p: p, self)
    for name, inputs in _INPUT_AXES.items():
      weight = getattr(transposed, name)[...]
      setattr(transposed, name, nnx.Param(jnp.moveaxis(weight, range(inputs), range(-inputs, 0))))
    transposed.transposed = True
    return transposed


class Decoder(nnx.Module):
  """Embedding, stacked blocks and final norm. Produces hidden states, never logits."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, lora: LoraConfig = LoraConfig()):
    self.config = config
    self.embedding = param(rngs, (config.known_vocab_size, config.d_model), ('vocab', 'embed'), config.init_std)
    self.layers = Block(config, rngs=rngs, lora=lora)
    self.norm = param(rngs, (config.d_model,), ('act_embed',), _norm_init(config))

  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval], index_BQ: jax.Array | None = None
  ) -> jax.Array:
    """Compute normed hidden states (B, T, D), or (B, Q, D) at the tokens `index_BQ` only.

    With `index_BQ` the last block computes queries, output projection and feed-forward at those tokens alone, which depend on other
    tokens of the last layer only through keys and values.

    Args:
      tokens_BT: token ids.
      positions_BT: positions in the original sequences.
      intervals: the keys that each token sees: those of all intervals.
      index_BQ: indices of tokens in their rows; None: every token.
    """
    c = self.config
    inputs = LayerInputs(positions_BT, intervals, c)
    x_BTD = self._embed(tokens_BT)
    body = _remat(lambda x, block, kind: block(x, inputs.of(kind)), c.remat)
    scanned = self.layers, inputs.kind_L
    if index_BQ is not None:
      scanned = jax.tree.map(lambda p: p[:-1], scanned)
    if c.frozen_layers:  # no derivative passes through them, so that a training step costs their forward pass alone
      frozen = jax.tree.map(lambda p: jax.lax.stop_gradient(p[: c.frozen_layers]), scanned)
      scanned = jax.tree.map(lambda p: p[c.frozen_layers :], scanned)
      run = lambda x, layer: (layer[0](x, inputs.of(layer[1])), None)
      x_BTD, _ = jax.lax.scan(run, jax.lax.stop_gradient(x_BTD), frozen, unroll=c.scan_unroll)
    x_BTD, _ = jax.lax.scan(lambda x, layer: (body(x, *layer), None), x_BTD, scanned, unroll=c.scan_unroll)
    if index_BQ is not None:
      last = jax.tree.map(lambda p: p[-1], self.layers)
      x_BTD = _remat(lambda x, block: block(x, inputs.of(inputs.kind_L[-1]), index_BQ), c.remat)(x_BTD, last)
    return self._norm(x_BTD)

  def prefill(self, tokens_BT: jax.Array, positions_BT: jax.Array, intervals: Sequence[Interval]) -> tuple[jax.Array, jax.Array]:
    """Compute keys and values (L, B, T, K, H), for `KVCache.insert`, of tokens from which nothing is predicted."""
    c = self.config
    inputs = LayerInputs(positions_BT, intervals, c)

    def body(x_BTD, layer):
      block, kind = layer
      x_BTD, *cached = block.prefill(x_BTD, inputs.of(kind))
      return x_BTD, cached

    scanned = jax.tree.map(lambda p: p[:-1], (self.layers, inputs.kind_L))
    x_BTD, cached = jax.lax.scan(body, self._embed(tokens_BT), scanned, unroll=c.scan_unroll)
    last = jax.tree.map(lambda p: p[-1], self.layers).keys_and_values(x_BTD, inputs.of(inputs.kind_L[-1]))
    k_LBTKH, v_LBTKH = (jnp.concatenate([before, new[None]]) for before, new in zip(cached, last, strict=True))
    return k_LBTKH, v_LBTKH

  def transposed_blocks(self) -> list[Block] | None:
    """Return the layers unstacked and transposed, for `decode` to read at every token; None unless the scan is unrolled."""
    c = self.config
    if c.scan_unroll < c.num_layers:
      return None
    return [jax.tree.map(operator.itemgetter(i), self.layers).transpose() for i in range(c.num_layers)]

  def decode(
    self, token_B: jax.Array, kv_cache: KVCache, buffer: DecodeBuffer, step: jax.Array, blocks: Sequence[Block] | None = None
  ) -> tuple[jax.Array, DecodeBuffer]:
    """Compute the normed hidden states (B, D) of one more token of each row, and the buffer with its keys and values.

    Args:
      token_B: token ids.
      kv_cache: earlier tokens.
      buffer: tokens after those in the cache; its first `step` tokens are filled.
      step: index of the token in the buffer.
      blocks: the result of `transposed_blocks`.
    """
    c = self.config
    inputs = LayerInputs((kv_cache.length_B + step)[:, None], (), c)
    state = self._embed(token_B[:, None]), buffer

    def body(state, indexed):
      block, kind, layer = indexed
      x_B1D, buffer = state
      return block.decode(x_B1D, inputs.of(kind), kv_cache, buffer, step, layer), None

    if blocks is None:
      state, _ = jax.lax.scan(body, state, (self.layers, inputs.kind_L, jnp.arange(c.num_layers)), unroll=c.scan_unroll)
    else:
      for layer, block in enumerate(blocks):
        state, _ = body(state, (block, inputs.kind_L[layer], jnp.int32(layer)))
    x_B1D, buffer = state
    return self._norm(x_B1D)[:, 0], buffer

  def _embed(self, tokens_BT: jax.Array) -> jax.Array:
    # Gathered over fsdp before the lookup; otherwise the partitioner replicates the activations of the whole batch.
    table_VD = constrain(self.embedding[...].astype(self.config.compute_dtype), 'vocab', 'act_embed')
    return constrain(scale_embeddings(jnp.take(table_VD, tokens_BT, axis=0), self.config), 'batch', 'length', 'act_embed')

  def _norm(self, x_BTD: jax.Array) -> jax.Array:
    return rms_norm(x_BTD, self.norm[...], self.config.norm_eps, self.config.zero_centered_norms)


def _norm_init(config: ModelConfig) -> int | None:
  """Return the `std` of `param` for the scales of norms, which start at 1."""
  return 0 if config.zero_centered_norms else None


def _remat(layer: Callable, policy: str) -> Callable:
  if policy == 'none':
    return layer
  if policy == 'offload':  # with its input by name, nothing else is kept
    return jax.checkpoint(lambda x, *more: layer(checkpoint_name(x, _LAYER_INPUT), *more), policy=_REMAT[policy])
  return jax.checkpoint(layer, policy=_REMAT[policy])


def num_parameters(model: nnx.Module) -> int:
  """Count the parameters of a model, abstract (`nnx.eval_shape`) or real."""
  return sum(p.size for p in jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
