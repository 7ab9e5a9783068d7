"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen weight W acts as W + scale * A B, and only A and B are trained.

`scale` is alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). B starts at zero, so that training starts from the base itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import PROJECTIONS, QUANTIZED, LoraConfig
from polar_jax.model.layers import param, project
from polar_jax.model.quantized import expand, is_quantized, quantize

_NAME = 'lora'  # of the adapters among the parameters of the layers
_HEAD = 'v_head'  # trained along with the adapters: a reward model from a language model starts without one


def scale(config: LoraConfig) -> float:
  """Return the factor of the product A B.

  Raises:
    ValueError: there are no adapters.
  """
  if config.rank is None:
    raise ValueError('LoraConfig.rank is None: there are no adapters')
  return config.alpha / (math.sqrt(config.rank) if config.rank_stabilized else config.rank)


class Adapter(nnx.Module):
  """The adapter of one weight, in all layers: a (L, ..., R) and b (L, R, ...). `lax.scan` hands out one layer at a time."""

  def __init__(self, config: LoraConfig, weight: nnx.Param, inputs: int, *, rngs: nnx.Rngs):
    """Create an adapter with random A, of the variance that PEFT gives it, and B = 0.

    Args:
      config: rank and scale.
      weight: its weight, stacked over layers.
      inputs: number of leading axes that the weight contracts.
      rngs: source of random keys.
    """
    rank, shape, axes = config.rank, weight.shape, weight.get_metadata()['axes']
    assert rank is not None
    self.inputs, self.scale, self.dropout = inputs, scale(config), config.dropout
    fan_in = math.prod(shape[1 : 1 + inputs])
    self.a = param(rngs, (*shape[: 1 + inputs], rank), (*axes[: 1 + inputs], 'rank'), (3 * fan_in) ** -0.5)
    self.b = param(rngs, (shape[0], rank, *shape[1 + inputs :]), (axes[0], 'rank', *axes[1 + inputs :]), 0)
    self.dropout_key: jax.Array | None = nnx.data(None)  # of one layer; set by `start_dropout`

  def __call__(self, x: jax.Array) -> jax.Array:
    """Compute scale * x A B for activations x (B, T, ...)."""
    if self.dropout and self.dropout_key is not None:
      kept = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, x.shape)
      x = jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))
    return self.scale * project(project(x, self.a[...], self.inputs), self.b[...])


class Adapters(nnx.Module):
  """The adapters of a stack of layers, each an attribute with the name of its weight."""

  def __init__(self, config: LoraConfig, weights: Mapping[str, tuple[nnx.Param, int]], *, rngs: nnx.Rngs):
    """Create the adapters of `config.targets`.

    Args:
      config: which weights get one, and its rank.
      weights: those that can have one, and how many leading axes each contracts.
      rngs: source of random keys.
    """
    self.targets = config.targets
    for name in config.targets:
      setattr(self, name, Adapter(config, *weights[name], rngs=rngs))

  def get(self, name: str) -> Callable[[jax.Array], jax.Array] | None:
    """Return the adapter of a weight, or None."""
    return getattr(self, name) if name in self.targets else None


def start_dropout(model: Any, key: jax.Array) -> None:
  """Let the adapters of a model, if it has any, drop inputs at random, in each layer others."""
  adapters = model.decoder.layers.lora
  if adapters is None:
    return
  for name, own in zip(adapters.targets, jax.random.split(key, len(adapters.targets)), strict=True):
    adapter = getattr(adapters, name)
    if adapter.dropout:
      adapter.dropout_key = jax.random.split(own, adapter.a.shape[0])


def split(params: Mapping[str, Any], config: LoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """Divide a parameter tree into (trained, frozen): with adapters those and the scalar head are trained, without them everything."""
  if config.rank is None:
    return dict(params), {}
  flat = traverse_util.flatten_dict(params)
  trained = {path for path in flat if _NAME in path or path[0] == _HEAD}
  pick = lambda keep: traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if (path in trained) == keep})
  return pick(True), pick(False)


def join(trained: dict[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
  """Return the parameter tree of which `split` returned the two parts. No array is copied."""
  return traverse_util.unflatten_dict(traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)) if frozen else trained


def merge(params: Mapping[str, Any], config: LoraConfig, dtype: str | None = None) -> dict[str, Any]:
  """Return the parameters of a model without adapters that computes the same.

  Args:
    params: trained and frozen ones.
    config: of the adapters.
    dtype: of the result; None: float32 for the weights that had an adapter or were quantized, the others as they are.
  """
  flat = traverse_util.flatten_dict(params, is_leaf=lambda _, part: is_quantized(part))
  out = {}
  for path, weight in flat.items():
    if _NAME in path:
      continue
    *layers, name = path
    a, b = (flat.get((*layers, _NAME, name, factor)) for factor in 'ab')
    placed = weight['codes'] if is_quantized(weight) else weight
    merged = expand(**weight) if is_quantized(weight) else weight
    merged = merged if a is None else _merged(merged, a, b, scale(config), dtype or 'float32')
    merged = merged if dtype is None else merged.astype(dtype)
    is_placed = isinstance(placed, jax.Array) and not isinstance(placed, jax.core.Tracer)
    out[path] = jax.device_put(merged, placed.sharding) if is_placed else merged
  return traverse_util.unflatten_dict(out)


@functools.partial(jax.jit, static_argnames=('factor', 'dtype'))
def _merged(weight: jax.Array, a: jax.Array, b: jax.Array, factor: float, dtype: str) -> jax.Array:
  product = jnp.einsum('lir,lro->lio', a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1), precision='highest')
  return (weight.astype(jnp.float32) + factor * product.reshape(weight.shape)).astype(dtype)


def loaded_dtype(config: LoraConfig) -> str:
  """Return the dtype in which a base is read, before it is quantized."""
  return 'bfloat16' if config.base_dtype in QUANTIZED else config.base_dtype


def freeze(frozen: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
  """Return the frozen parameters as a run holds them: with int8 and nf4, the weights of the layers are quantized one by one."""
  if config.base_dtype not in QUANTIZED:
    return frozen
  layers = dict(frozen['decoder']['layers'])
  for name in PROJECTIONS:
    layers[name] = quantize(layers[name], config.base_dtype)
  return {**frozen, 'decoder': {**frozen['decoder'], 'layers': layers}}


def abstract_params(abstract_model: nnx.Module, mesh: Mesh, config: LoraConfig) -> dict[str, Any]:
  """Return shapes, dtypes and layouts of the parameters of a training run: the frozen ones have `config.base_dtype`."""
  trained, frozen = split(sharding.abstract_params(abstract_model, mesh), config)
  cast = lambda a: jax.ShapeDtypeStruct(a.shape, loaded_dtype(config), sharding=a.sharding)
  return join(trained, jax.tree.map(lambda part: part if is_quantized(part) else cast(part), frozen, is_leaf=is_quantized))
