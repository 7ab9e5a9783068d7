"""Conversion between the config.json of a Hugging Face checkpoint and `ModelConfig`.

A setting that our decoder does not compute is refused, because a model that is nearly right is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from polar_jax.checkpoints import families
from polar_jax.config import FAMILIES, STORED_DTYPES, ModelConfig
from polar_jax.model.layer_inputs import layer_kinds
from polar_jax.types import UserError


class HfConfig(NamedTuple):
  """A parsed config.json: shape of the model, head ('lm', 'reward' or 'value'), and how it is stored."""

  model: ModelConfig
  head: str
  architecture: str
  reward_token_id: int | None


class _Rope(NamedTuple):
  """A rope type: our name for it, and its parameters as {their key: our field}, of which some may be absent."""

  scaling: str
  fields: dict[str, str]
  optional: tuple[str, ...] = ()


_FACTOR = {'factor': 'rope_factor'}
_LLAMA3 = _FACTOR | {
  'low_freq_factor': 'rope_low_freq_factor',
  'high_freq_factor': 'rope_high_freq_factor',
  'original_max_position_embeddings': 'rope_original_length',
}
_YARN = _FACTOR | {
  'original_max_position_embeddings': 'rope_original_length',
  'attention_factor': 'rope_attention_factor',
  'beta_fast': 'rope_beta_fast',
  'beta_slow': 'rope_beta_slow',
}
_ROPES = {
  'default': _Rope('none', {}),
  'linear': _Rope('linear', _FACTOR),
  'dynamic': _Rope('dynamic', _FACTOR),
  'llama3': _Rope('llama3', _LLAMA3),
  'yarn': _Rope('yarn', _YARN, optional=tuple(_YARN)[1:]),
}
# The rope types of families that do not have all.
_SOME_ROPES = {'gemma3_text': ('default', 'linear'), 'internlm2': ('default', 'linear', 'dynamic')}

# Biases that our decoder does not have: anything but false is refused.
_NO_BIAS = {
  'gemma3_text': ('attention_bias',),
  'internlm2': ('bias',),
  'internlm3': ('bias', 'attention_bias', 'mlp_bias'),  # bias: InternLM's own code; the others: transformers 5
  'llama': ('attention_bias', 'mlp_bias'),  # attention_bias also adds one to the output projection
  'mistral': ('attention_bias', 'mlp_bias'),
  'qwen2': (),
  'qwen3': ('attention_bias',),
  'smollm3': ('attention_bias', 'mlp_bias'),
}
# The key and value of the activation.
_ACTIVATION = {'gemma3_text': ('hidden_activation', 'gelu_pytorch_tanh')}
_SILU = ('hidden_act', 'silu')
# Values of absent keys. A head_dim that is not listed follows from the width.
_HEAD_DIM = {'gemma3_text': 256, 'qwen3': 128}
_THETA = {'gemma3_text': 1e6, 'smollm3': 2e6}
_LOCAL_THETA = 1e4
_TIED = ('gemma3_text', 'smollm3')
# The window of a config.json without the key; null is no window.
_WINDOW = 4_096
# Keys written for one family only.
_WRITTEN: dict[str, dict[str, Any]] = {
  'gemma3_text': {'attention_bias': False, 'attn_logit_softcapping': None, 'final_logit_softcapping': None},
  'internlm2': {'bias': False},
  'internlm3': {'bias': False},
  'llama': {'attention_bias': False, 'mlp_bias': False},
  'mistral': {},
  'qwen2': {'use_sliding_window': False},
  'qwen3': {'attention_bias': False, 'use_sliding_window': False},
  'smollm3': {'attention_bias': False, 'mlp_bias': False, 'use_sliding_window': False},
}
_INTEGERS = {
  'vocab_size': 'vocab_size',
  'num_hidden_layers': 'num_layers',
  'hidden_size': 'd_model',
  'intermediate_size': 'd_ff',
  'num_attention_heads': 'num_heads',
  'max_position_embeddings': 'max_position',
}


# Largest values of integers; of those not listed, that of 32 bits.
_MOST = {'num_hidden_layers': 10_000, 'num_attention_heads': 65_536, 'num_key_value_heads': 65_536}
_FLOATS = (1e-30, 1e30)  # bounds of numbers


def _shown(value: Any) -> str:
  """Return a value as text short enough for a message."""
  # The digits of a huge integer take long, and Python refuses to print some.
  text = f'an integer of {value.bit_length()} bits' if isinstance(value, int) and value.bit_length() > 64 else repr(value)
  return text if len(text) <= 80 else f'{text[:80]}...'


class _Reader:
  """Typed access to a config.json, with errors that name file and key."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values, self._where = values, where

  def error(self, key: str, value: Any, supported: str) -> UserError:
    """Return the error for an unsupported value."""
    return UserError(f'{self._where}{key} is {_shown(value)}; supported: {supported}')

  def get(self, key: str, default: Any = None) -> Any:
    """Return a value or the default; like transformers, treat null as absent."""
    value = self.values.get(key)
    return default if value is None else value

  def need(self, key: str, default: Any = None) -> Any:
    """Return a value that must exist, or the default."""
    value = self.get(key, default)
    if value is None:
      raise UserError(f'{self._where}{key} is missing; the model cannot be built without it')
    return value

  def integer(self, key: str, default: int | None = None) -> int:
    """Return a positive integer. What is larger than any model would take forever to describe."""
    value = self.need(key, default)
    most = _MOST.get(key, 2**31 - 1)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
      raise self.error(key, value, f'a positive integer up to {most:,}')
    return value

  def number(self, key: str, default: float | None = None) -> float:
    """Return a positive number that is neither 0 nor infinite in float32."""
    value = self.need(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not _FLOATS[0] <= value <= _FLOATS[1]:
      raise self.error(key, value, f'a positive number from {_FLOATS[0]:.0e} to {_FLOATS[1]:.0e}')
    return float(value)

  def flag(self, key: str, default: bool = False) -> bool:
    """Return a boolean, or the default if absent."""
    value = self.get(key, default)
    if not isinstance(value, bool):
      raise self.error(key, value, 'true or false')
    return value

  def section(self, key: str) -> _Reader:
    """Return the reader of a nested object, empty if absent."""
    value = self.get(key, {})
    if not isinstance(value, Mapping):
      raise self.error(key, value, 'an object or null')
    return _Reader(value, f'{self._where}{key}.')

  def only(self, key: str, allowed: tuple, default: Any) -> None:
    """Raise unless the value is one of `allowed`."""
    value = self.get(key, default)
    if value not in allowed:
      raise self.error(key, value, ' or '.join(str(a).lower() if isinstance(a, bool) else str(a) for a in allowed))


def from_json(config: Mapping[str, Any], where: str) -> HfConfig:
  """Convert a parsed config.json; `where` names the file in errors.

  The keys of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) are both read. An InternLM2ForRewardModel may also
  be a value model; it is read as 'reward'.

  Raises:
    UserError: a key is missing or of the wrong type, or requests something that the decoder does not compute.
  """
  read = _Reader(config, f'{where}: ')
  family, architecture = _family(read)
  head = families.architectures(family)[architecture]
  _refuse(read, family)
  if architecture.endswith('Classification'):
    _one_label(read)
  fields: dict[str, Any] = {ours: read.integer(theirs) for theirs, ours in _INTEGERS.items()}
  # The two implementations of internlm3 have different defaults for these, so they must be given.
  has_default = family in ('internlm2', 'llama', 'qwen2')
  fields['num_kv_heads'] = read.integer('num_key_value_heads', fields['num_heads'] if has_default else None)
  fields['norm_eps'] = read.number('rms_norm_eps', 1e-6 if has_default else None)
  if fields['num_heads'] % fields['num_kv_heads']:
    raise read.error('num_key_value_heads', fields['num_kv_heads'], f'a divisor of num_attention_heads ({fields["num_heads"]})')
  fields['head_dim'] = _head_dim(read, family, fields['d_model'], fields['num_heads'])
  fields['tie_embeddings'] = read.flag('tie_word_embeddings', family in _TIED)
  fields |= families.fixed_flags(family) | _free_flags(read, family, fields['num_layers'], fields['head_dim'])
  reward_token, vocab_size = read.get('reward_token_id'), fields['vocab_size']
  if reward_token is not None and (type(reward_token) is not int or not 0 <= reward_token < vocab_size):
    raise read.error('reward_token_id', reward_token, f'a token id or null; ids are below vocab_size ({vocab_size})')
  model = ModelConfig(family=family, **fields, **_rope(read, family, fields.get('sliding_window') is not None))
  return HfConfig(model, head, architecture, reward_token)


def _family(read: _Reader) -> tuple[str, str]:
  """Return (family, architecture). The first InternLM2 files have model_type 'internlm'; then, or without one, the architecture decides."""
  named = read.need('architectures')
  if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
    raise read.error('architectures', named, 'a list of one architecture')
  kind = read.get('model_type')
  if read.get('vision_config') is not None:
    raise read.error('vision_config', read.get('vision_config'), 'no such key: models of text alone, such as Gemma3ForCausalLM')
  if kind in (None, 'internlm'):
    kind = next((f for f, names in families.FAMILIES.items() if named[0].startswith(names.prefixes[0])), kind)
  if kind not in FAMILIES:
    raise read.error('model_type', kind, ', '.join(FAMILIES))
  if named[0] not in families.architectures(kind):
    raise read.error('architectures', named, ', '.join(families.architectures(kind)))
  return kind, named[0]


def _refuse(read: _Reader, family: str) -> None:
  """Raise for settings that our decoder does not compute."""
  key, activation = _ACTIVATION.get(family, _SILU)
  read.only(key, (activation,), activation)
  for key in _NO_BIAS[family]:
    read.only(key, (False,), False)
  read.only('partial_rotary_factor', (1,), 1)
  read.only('use_bidirectional_attention', (False,), False)
  for key in ('attn_logit_softcapping', 'final_logit_softcapping'):
    if read.get(key) is not None:
      raise read.error(key, read.get(key), 'null: logits without a soft cap')
  if read.get('quantization_config') is not None:
    raise read.error('quantization_config', read.get('quantization_config'), 'null: weights that are not quantized')


def _free_flags(read: _Reader, family: str, num_layers: int, head_dim: int) -> dict[str, Any]:
  """Return the flags for which the family has a key, except `rope_local_theta`."""
  free = families.FAMILIES[family].free
  flags: dict[str, Any] = {}
  if 'qkv_bias' in free:
    flags['qkv_bias'] = read.flag('qkv_bias')
  if 'query_pre_attn_scalar' in free:
    scalar = read.number('query_pre_attn_scalar', 256)
    flags['query_pre_attn_scalar'] = None if scalar == head_dim else scalar
  if 'nope_every' in free:
    flags['nope_every'] = _every(read, 'no_rope_layers', (0, 1), read.integer('no_rope_layer_interval', 4), num_layers)
  if 'global_every' in free:
    kinds = ('full_attention', 'sliding_attention')
    every = _every(read, 'layer_types', kinds, read.integer('sliding_window_pattern', 6), num_layers)
    return flags if every == 1 else flags | {'global_every': every, 'sliding_window': read.integer('sliding_window', _WINDOW)}
  if 'sliding_window' not in free:
    read.only('use_sliding_window', (False,), False)  # Qwen's configs set a sliding_window that they do not use
    _same_in_every_layer(read, 'full_attention')
    return flags
  has_window = read.values.get('sliding_window', _WINDOW) is not None
  _same_in_every_layer(read, 'sliding_attention' if has_window else 'full_attention')
  return flags | {'sliding_window': read.integer('sliding_window', _WINDOW) if has_window else None}


def _every(read: _Reader, key: str, kinds: tuple[Any, Any], default: int, num_layers: int) -> int | None:
  """Return n if every n-th layer is of the first of two kinds and all others are of the second, or None if all layers are.

  Args:
    read: the config.json.
    key: of the list of the kinds of all layers, which may be absent.
    kinds: the two kinds.
    default: n if the list is absent.
    num_layers: number of layers.
  """
  listed, every = read.get(key), default
  if listed is not None:
    every = listed.index(kinds[0]) + 1 if isinstance(listed, list) and kinds[0] in listed else num_layers + 1
    if not isinstance(listed, list) or listed[:num_layers] != [kinds[bool((i + 1) % every)] for i in range(num_layers)]:
      raise read.error(key, listed, f'{kinds[0]} for every n-th layer and {kinds[1]} for all others')
  return every if every <= num_layers else None


def _same_in_every_layer(read: _Reader, kind: str) -> None:
  """Raise if the layers are said to be of other kinds of attention."""
  layer_types = read.get('layer_types', [])
  if not isinstance(layer_types, list) or any(k != kind for k in layer_types):
    raise read.error('layer_types', layer_types, f'{kind} in every layer')


def _one_label(read: _Reader) -> None:
  """Raise unless a classifier has one label. The number is that of `id2label`, which transformers writes, else `num_labels`, else 2."""
  labels = read.section('id2label').values
  if labels and len(labels) != 1:
    raise read.error('id2label', labels, 'one label, the reward or value')
  if not labels and read.get('num_labels', 2) != 1:
    raise read.error('num_labels', read.get('num_labels', 2), '1, the reward or value (absent means 2)')


def _head_dim(read: _Reader, family: str, d_model: int, num_heads: int) -> int:
  default = _HEAD_DIM.get(family)
  if read.get('head_dim', default) is None and d_model % num_heads:
    raise read.error('hidden_size', d_model, f'a multiple of num_attention_heads ({num_heads}), unless head_dim is given')
  head_dim = read.integer('head_dim', default or d_model // num_heads)
  if head_dim % 2:
    raise read.error('head_dim', head_dim, 'an even number')
  return head_dim


def _rope_types(family: str) -> dict[str, _Rope]:
  """Return the rope types of a family by name."""
  return {name: _ROPES[name] for name in _SOME_ROPES.get(family, _ROPES)}


def unused_rope_fields(model: ModelConfig) -> set[str]:
  """Return the fields of rope scaling that the scaling of a model does not depend on."""
  ropes = {rope.scaling: set(rope.fields.values()) for rope in _ROPES.values()}
  return set().union(*ropes.values()) - ropes[model.rope_scaling]


def _local_theta(read: _Reader) -> float:
  """Return the base of Gemma's layers with a window. The sections of `rope_parameters` are those of the two kinds of layers."""
  sections = read.section('rope_parameters')
  for key, value in sections.values.items():
    if key not in ('full_attention', 'sliding_attention'):
      raise sections.error(key, value, 'full_attention and sliding_attention')
  if sections.values and read.get('rope_scaling'):
    raise read.error('rope_scaling', read.get('rope_scaling'), 'null next to rope_parameters')
  local = sections.section('sliding_attention')
  local.only('rope_type', ('default',), 'default')
  return local.number('rope_theta', read.number('rope_local_base_freq', _LOCAL_THETA))


def _rope(read: _Reader, family: str, has_windows: bool) -> dict[str, Any]:
  """Return our rope_* fields.

  As in transformers 5, `rope_scaling` takes precedence over `rope_parameters`, and a theta inside them over one at the top level.
  """
  inside = read.section('rope_scaling' if read.get('rope_scaling') else 'rope_parameters')
  local: dict[str, Any] = {}
  if 'rope_local_theta' in families.FAMILIES[family].free:
    theta = _local_theta(read)
    local = {'rope_local_theta': theta if has_windows else None}
    inside = inside if read.get('rope_scaling') else inside.section('full_attention')
  theta = (read if inside.get('rope_theta') is None else inside).number('rope_theta', _THETA.get(family, 10_000.0))
  key = 'type' if inside.get('rope_type') is None else 'rope_type'
  kind = inside.get(key, 'default')
  known = _rope_types(family)
  if kind not in tuple(known):
    raise inside.error(key, kind, ', '.join(known))
  rope = known[kind]
  if kind == 'yarn':
    inside.only('truncate', (True,), True)
  known_keys = {'rope_type', 'type', 'rope_theta', *rope.fields, *(('truncate',) if kind == 'yarn' else ())}
  extra = {k for k, v in inside.values.items() if v is not None} - known_keys
  if extra:
    key = min(extra)
    raise inside.error(key, inside.values[key], f'{", ".join(rope.fields) or "no parameters"} for rope type {kind!r}')
  fields: dict[str, Any] = {}
  for theirs, ours in rope.fields.items():
    if theirs not in rope.optional or inside.get(theirs) is not None:
      fields[ours] = inside.integer(theirs) if ours == 'rope_original_length' else inside.number(theirs)
  if kind == 'yarn':
    fields.setdefault('rope_original_length', read.integer('max_position_embeddings'))
    _check_yarn(inside, ModelConfig(**fields, rope_theta=theta))
  if kind == 'llama3' and fields['rope_low_freq_factor'] >= fields['rope_high_freq_factor']:
    raise inside.error('low_freq_factor', fields['rope_low_freq_factor'], f'less than high_freq_factor ({fields["rope_high_freq_factor"]})')
  return {'rope_theta': theta, 'rope_scaling': rope.scaling, **fields, **local}


def _check_yarn(inside: _Reader, m: ModelConfig) -> None:
  if m.rope_factor < 1:
    raise inside.error('factor', m.rope_factor, 'at least 1')
  if m.rope_theta <= 1:
    raise inside.error('rope_theta', m.rope_theta, 'more than 1')
  if m.rope_beta_slow >= m.rope_beta_fast:
    raise inside.error('beta_slow', m.rope_beta_slow, f'less than beta_fast ({m.rope_beta_fast})')


def to_json(
  model: ModelConfig,
  head: str,
  *,
  dtype: str,
  reward_token_id: int | None = None,
  architecture: str | None = None,
  special_ids: Mapping[str, int | None] = {},
) -> dict[str, Any]:
  """Return the config.json of a checkpoint, with the keys of transformers 4, which transformers 5, vLLM and SGLang read as well.

  Args:
    model: shape of the model.
    head: 'reward', 'lm' or 'value'.
    dtype: dtype of the stored tensors.
    reward_token_id: id of the reward token; None: no such key.
    architecture: see `families.architecture_of`.
    special_ids: 'pad_token_id', 'bos_token_id' and 'eos_token_id'. Missing ones are written as null, because the family's defaults
      belong to another tokenizer.

  Raises:
    UserError: the family cannot express the model.
  """
  architecture = families.architecture_of(model.family, head, architecture)
  _check_expressible(model, dtype)
  out: dict[str, Any] = {'architectures': [architecture], 'model_type': model.family}
  out |= {theirs: getattr(model, ours) for theirs, ours in _INTEGERS.items()}
  out |= {
    'num_key_value_heads': model.num_kv_heads,
    'initializer_range': model.init_std,
    'rms_norm_eps': model.norm_eps,
    'rope_theta': model.rope_theta,
    'rope_scaling': _rope_scaling(model),
    'tie_word_embeddings': model.tie_embeddings,
    'torch_dtype': dtype,
  }
  out |= {key: special_ids.get(key) for key in ('pad_token_id', 'bos_token_id', 'eos_token_id')}
  key, activation = _ACTIVATION.get(model.family, _SILU)
  out[key] = activation
  out |= _WRITTEN[model.family] | _free_keys(model)
  if model.family == 'internlm2':
    classes = {'AutoModel': architecture} | ({'AutoModelForCausalLM': architecture} if head == 'lm' else {})
    out['auto_map'] = {'AutoConfig': 'configuration_internlm2.InternLM2Config'}
    out['auto_map'] |= {auto: f'modeling_internlm2.{name}' for auto, name in classes.items()}
  else:
    out['head_dim'] = model.head_dim
  if architecture.endswith('Classification'):
    out |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  out |= problem_type(head)
  if reward_token_id is not None:
    out['reward_token_id'] = reward_token_id
  return out


def _free_keys(m: ModelConfig) -> dict[str, Any]:
  """Return the keys of the flags that the family leaves to its models: the inverse of `_free_flags`."""
  free = families.FAMILIES[m.family].free
  out: dict[str, Any] = {flag: getattr(m, flag) for flag in ('qkv_bias', 'sliding_window') if flag in free}
  never = m.num_layers + 1  # an interval that no layer is at
  if 'query_pre_attn_scalar' in free:
    scalar = m.query_pre_attn_scalar or m.head_dim
    out['query_pre_attn_scalar'] = int(scalar) if scalar == int(scalar) else scalar
  if 'nope_every' in free:
    out['no_rope_layers'] = [int(kind.has_rope) for kind in layer_kinds(m)]
    out['no_rope_layer_interval'] = m.nope_every or never
  if 'global_every' in free:
    out['layer_types'] = ['sliding_attention' if kind.has_window else 'full_attention' for kind in layer_kinds(m)]
    out['sliding_window_pattern'] = 1 if m.sliding_window is None else m.global_every or never
    out['rope_local_base_freq'] = m.rope_local_theta or _LOCAL_THETA
  return out


def problem_type(head: str) -> dict[str, str]:
  """Return the key of a config.json that keeps servers from applying a sigmoid to rewards and values, which vLLM does by default.

  Classes of every name need it: vLLM also applies one to those that end in `RewardModel`.
  """
  return {} if head == 'lm' else {'problem_type': 'regression'}


def _check_expressible(m: ModelConfig, dtype: str) -> None:
  if dtype not in STORED_DTYPES:
    raise UserError(f'a checkpoint cannot be stored as {dtype!r}, only as: {", ".join(STORED_DTYPES)}')
  if m.vocab_size is None:
    raise UserError('model.vocab_size must be set to write a config.json')
  families.check_flags(m)
  if m.family == 'internlm2' and m.head_dim * m.num_heads != m.d_model:
    raise UserError(
      f'checkpoints of family internlm2 have a head_dim of d_model / num_heads ({m.d_model} / {m.num_heads}), not {m.head_dim}; '
      'choose another model.family'
    )
  if m.family == 'gemma3_text' and m.sliding_window is not None and m.rope_local_theta is None:
    raise UserError('checkpoints of family gemma3_text with model.sliding_window also have model.rope_local_theta; set it')
  known = [rope.scaling for rope in _rope_types(m.family).values()]
  if m.rope_scaling not in known:
    raise UserError(f'checkpoints of family {m.family} cannot have model.rope_scaling {m.rope_scaling!r}, only: {", ".join(known)}')


def _rope_scaling(m: ModelConfig) -> dict[str, Any] | None:
  if m.rope_scaling == 'none':
    return None
  # InternLM2's own code accepts only `type` and the factor.
  key = 'type' if m.family == 'internlm2' else 'rope_type'
  values = {theirs: getattr(m, ours) for theirs, ours in _ROPES[m.rope_scaling].fields.items()}
  return {key: m.rope_scaling} | {theirs: value for theirs, value in values.items() if value is not None}
