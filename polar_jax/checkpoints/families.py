"""The tensors of each family's Hugging Face checkpoints, and their conversion to our parameters and back.

Theirs are linear layers of (out, in); ours are (in, *out), so that heads are an axis of their own, and one array stacks all layers. Every
conversion is a reshape, a transpose or a concatenation: bit-exact both ways, for numpy and jax arrays of any dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from polar_jax.config import ModelConfig
from polar_jax.types import UserError

Array = Any  # numpy or jax


class Part(NamedTuple):
  """One layer of an array of the parameter tree, or the whole array if `layer` is None."""

  path: tuple[str, ...]
  layer: int | None


class Stored(NamedTuple):
  """One tensor of a Hugging Face checkpoint, and the parameters (or layers of them) that it contains.

  `split` converts it to one array per part, in our layout without the layer axis; `join(*arrays)` is the inverse. Both may return views.
  A tensor without parts is a constant zero of the architecture: `split` raises UserError for anything else, `join()` gives float32.
  """

  name: str
  shape: tuple[int, ...]
  parts: tuple[Part, ...]
  split: Callable[[Array], tuple[Array, ...]]
  join: Callable[..., Array]


class _Layout(NamedTuple):
  """The arrangement of our arrays in one stored tensor."""

  shape: tuple[int, ...]
  split: Callable[[Array], tuple[Array, ...]]
  join: Callable[..., Array]


# Fields of ModelConfig that tell the decoders of families apart.
FLAGS = (
  'qkv_bias',
  'qk_norm',
  'post_norms',
  'zero_centered_norms',
  'embedding_scale',
  'activation',
  'query_pre_attn_scalar',
  'sliding_window',
  'global_every',
  'rope_local_theta',
  'nope_every',
)


class Family(NamedTuple):
  """Tensor names of a family. `layer` maps each stored tensor of a layer to our arrays in it, in export order."""

  prefixes: tuple[str, ...]  # of the architectures' names; the first is the one we write
  heads: dict[str, tuple[str, ...]]  # architecture suffix -> heads it can store; it is read as the first
  embedding: str
  lm_head: str
  scalar_head: str  # head of reward and value models
  layer: dict[str, tuple[str, ...]]
  fixed: Mapping[str, Any] = MappingProxyType({})  # the values of FLAGS that are not ModelConfig's defaults
  free: tuple[str, ...] = ()  # the FLAGS for which its config.json has a key


_INTERNLM2 = Family(
  prefixes=('InternLM2',),
  heads={'ForCausalLM': ('lm',), 'ForRewardModel': ('reward', 'value')},
  embedding='model.tok_embeddings.weight',
  lm_head='output.weight',
  scalar_head='v_head',
  layer={
    'attention.wqkv.weight': ('wq', 'wk', 'wv'),
    'attention.wo.weight': ('wo',),
    'feed_forward.w1.weight': ('w_gate',),
    'feed_forward.w3.weight': ('w_up',),
    'feed_forward.w2.weight': ('w_down',),
    'attention_norm.weight': ('attention_norm',),
    'ffn_norm.weight': ('mlp_norm',),
  },
)

_LLAMA = Family(
  prefixes=('Llama',),
  heads={'ForCausalLM': ('lm',), 'ForSequenceClassification': ('reward',), 'ForTokenClassification': ('value',)},
  embedding='model.embed_tokens.weight',
  lm_head='lm_head.weight',
  scalar_head='score',
  layer={
    'self_attn.q_proj.weight': ('wq',),
    'self_attn.q_proj.bias': ('bq',),
    'self_attn.k_proj.weight': ('wk',),
    'self_attn.k_proj.bias': ('bk',),
    'self_attn.v_proj.weight': ('wv',),
    'self_attn.v_proj.bias': ('bv',),
    'self_attn.o_proj.weight': ('wo',),
    'self_attn.q_norm.weight': ('q_norm',),
    'self_attn.k_norm.weight': ('k_norm',),
    'mlp.gate_proj.weight': ('w_gate',),
    'mlp.up_proj.weight': ('w_up',),
    'mlp.down_proj.weight': ('w_down',),
    'input_layernorm.weight': ('attention_norm',),
    'post_attention_layernorm.weight': ('mlp_norm',),
  },
)

_GEMMA3 = _LLAMA._replace(
  prefixes=('Gemma3',),
  heads={'ForCausalLM': ('lm',), 'TextForSequenceClassification': ('reward', 'value')},
  layer={
    **{name: arrays for name, arrays in _LLAMA.layer.items() if 'bias' not in name and 'layernorm' not in name},
    'input_layernorm.weight': ('attention_norm',),
    'post_attention_layernorm.weight': ('post_attention_norm',),
    'pre_feedforward_layernorm.weight': ('mlp_norm',),
    'post_feedforward_layernorm.weight': ('post_mlp_norm',),
  },
  fixed={'qk_norm': True, 'post_norms': True, 'zero_centered_norms': True, 'embedding_scale': True, 'activation': 'gelu_tanh'},
  free=('query_pre_attn_scalar', 'sliding_window', 'global_every', 'rope_local_theta'),
)

FAMILIES = {
  'gemma3_text': _GEMMA3,
  'internlm2': _INTERNLM2,
  # transformers 5 runs internlm3 as a Llama and names it so.
  'internlm3': _LLAMA._replace(prefixes=('InternLM3', 'Llama'), free=('qkv_bias',)),
  'llama': _LLAMA,
  'mistral': _LLAMA._replace(prefixes=('Mistral',), free=('sliding_window',)),
  'qwen2': _LLAMA._replace(prefixes=('Qwen2',), fixed={'qkv_bias': True}),
  'qwen3': _LLAMA._replace(prefixes=('Qwen3',), fixed={'qk_norm': True}),
  'smollm3': _LLAMA._replace(prefixes=('SmolLM3',), free=('nope_every',)),
}

# Output projections that some checkpoints of tied models store a second time -> the embeddings they are tied to.
TIED_HEADS = {f.lm_head: f.embedding for f in FAMILIES.values()}


def architectures(family: str) -> dict[str, str]:
  """Return {architecture: head} of a family."""
  f = FAMILIES[family]
  return {prefix + suffix: heads[0] for prefix in f.prefixes for suffix, heads in f.heads.items()}


def architecture_of(family: str, head: str, architecture: str | None = None) -> str:
  """Return the architecture to store a checkpoint as: `architecture`, or the default for the head if it is None.

  Raises:
    UserError: `architecture` does not belong to the family, or has the wrong kind of head (vocabulary or scalar).
  """
  if architecture is None:
    f = FAMILIES[family]
    return f.prefixes[0] + next(suffix for suffix, heads in f.heads.items() if head in heads)
  known = architectures(family)
  fitting = [a for a, h in known.items() if (h == 'lm') == (head == 'lm')]
  if architecture not in fitting:
    raise UserError(f'a {head} model of family {family} cannot be stored as {architecture!r}, only as: {", ".join(fitting)}')
  return architecture


def fixed_flags(family: str) -> dict[str, Any]:
  """Return the FLAGS that all models of a family have in common, as fields of ModelConfig."""
  f = FAMILIES[family]
  return {flag: f.fixed.get(flag, getattr(ModelConfig, flag)) for flag in FLAGS if flag not in f.free}


def check_flags(model: ModelConfig) -> None:
  """Raise UserError unless the family can express the model's FLAGS."""
  for flag, value in fixed_flags(model.family).items():
    if getattr(model, flag) != value:
      raise UserError(
        f'checkpoints of family {model.family} cannot have model.{flag} {getattr(model, flag)}, only {value}; change it or choose another '
        'model.family'
      )


def stored_tensors(model: ModelConfig, head: str, architecture: str | None = None) -> list[Stored]:
  """Return every tensor of a checkpoint with that head ('lm', 'reward' or 'value'), in the order of Hugging Face's models.

  Raises:
    UserError: the family cannot express the model (such as biases in internlm2), the architecture does not fit, or `vocab_size` is not set.
  """
  m, family = model, FAMILIES[model.family]
  architecture = architecture_of(m.family, head, architecture)
  if m.vocab_size is None:
    raise UserError('model.vocab_size must be set to name the tensors of a checkpoint')
  check_flags(m)
  table, vector = _same((m.vocab_size, m.d_model)), _same((m.d_model,))
  layouts = _layer_layouts(m)
  out = [_stored(family.embedding, table, ('decoder', 'embedding'))]
  for layer in range(m.num_layers):
    for name, arrays in family.layer.items():
      if arrays in layouts:
        parts = tuple(Part(('decoder', 'layers', a), layer) for a in arrays)
        layout = layouts[arrays]
        out.append(Stored(f'model.layers.{layer}.{name}', layout.shape, parts, layout.split, layout.join))
  out.append(_stored('model.norm.weight', vector, ('decoder', 'norm')))
  if head != 'lm':
    out.append(_stored(f'{family.scalar_head}.weight', _same((1, m.d_model), (m.d_model,)), ('v_head',)))
  elif not m.tie_embeddings:
    out.append(_stored(family.lm_head, table, ('lm_head',)))
  if architecture.endswith('ForTokenClassification'):
    name = f'{family.scalar_head}.bias'  # our heads have no bias
    out.append(Stored(name, (1,), (), functools.partial(_expect_zero, name), lambda: np.zeros(1, np.float32)))
  return out


def _stored(name: str, layout: _Layout, path: tuple[str, ...]) -> Stored:
  return Stored(name, layout.shape, (Part(path, None),), layout.split, layout.join)


def _layer_layouts(m: ModelConfig) -> dict[tuple[str, ...], _Layout]:
  """Return the layouts of one layer's stored tensors by the arrays in them; those of biases and norms only for models that have them."""
  d, f, n, k, h = m.d_model, m.d_ff, m.num_heads, m.num_kv_heads, m.head_dim
  layouts = {
    ('wq', 'wk', 'wv'): _fused(d, n, k, h),
    ('wq',): _linear((d,), (n, h)),
    ('wk',): _linear((d,), (k, h)),
    ('wv',): _linear((d,), (k, h)),
    ('wo',): _linear((n, h), (d,)),
    ('w_gate',): _linear((d,), (f,)),
    ('w_up',): _linear((d,), (f,)),
    ('w_down',): _linear((f,), (d,)),
    ('attention_norm',): _same((d,)),
    ('mlp_norm',): _same((d,)),
  }
  biases = {('bq',): _same((n * h,), (n, h)), ('bk',): _same((k * h,), (k, h)), ('bv',): _same((k * h,), (k, h))}
  head_norms = {('q_norm',): _same((h,)), ('k_norm',): _same((h,))}
  post_norms = {('post_attention_norm',): _same((d,)), ('post_mlp_norm',): _same((d,))}
  return layouts | (biases if m.qkv_bias else {}) | (head_norms if m.qk_norm else {}) | (post_norms if m.post_norms else {})


def _same(stored: tuple[int, ...], ours: tuple[int, ...] | None = None) -> _Layout:
  """Return the layout of a tensor with the same elements in the same order."""
  ours = stored if ours is None else ours
  return _Layout(stored, lambda a: (a.reshape(ours),), lambda w: w.reshape(stored))


def _linear(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> _Layout:
  """Return the layout of a linear layer: stored (out, in), ours (*inputs, *outputs)."""
  n_in, n_out = math.prod(inputs), math.prod(outputs)
  return _Layout((n_out, n_in), lambda a: (a.T.reshape(inputs + outputs),), lambda w: w.reshape(n_in, n_out).T)


def _fused(d: int, n: int, k: int, h: int) -> _Layout:
  """Return the layout of InternLM2's wqkv: for each key/value head its query heads, its key, and its value, as in its own code."""
  g = n // k

  def split(a: Array) -> tuple[Array, ...]:
    a_KGHD = a.reshape(k, g + 2, h, d)
    heads = (a_KGHD[:, :g].reshape(n, h, d), a_KGHD[:, g], a_KGHD[:, g + 1])
    return tuple(w.transpose(2, 0, 1) for w in heads)

  def join(*weights: Array) -> Array:
    xp = np if all(isinstance(w, np.ndarray) for w in weights) else jnp
    q_KGHD, k_KGHD, v_KGHD = (w.transpose(1, 2, 0).reshape(k, -1, h, d) for w in weights)
    return xp.concatenate([q_KGHD, k_KGHD, v_KGHD], axis=1).reshape(-1, d)

  return _Layout(((n + 2 * k) * h, d), split, join)


def _expect_zero(name: str, a: Array) -> tuple[Array, ...]:
  if np.any(np.asarray(a) != 0):
    raise UserError(f'tensor {name!r} is {np.asarray(a).tolist()}; our heads have no bias, so it must be 0')
  return ()
