"""GGUF files of the Llama architecture. Quantized tensors need the package `gguf`, which dequantizes them."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from polar_jax.checkpoints.formats.gguf_header import Tensor, read_header
from polar_jax.checkpoints.formats.storage import (
  CheckpointFileError,
  Entry,
  LazyTensors,
  TensorInfo,
  damaged,
  halves_from_pairs,
  read_array,
)
from polar_jax.config import ModelConfig
from polar_jax.types import UserError

_OUTER = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
}
_OF_LAYER = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_ROPE_FACTORS = 'rope_freqs.weight'
_PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}  # by ggml's numbers
_FLOAT32 = np.dtype(np.float32)

# Keys that, unless 0, request something that the decoder does not compute.
_REFUSED = (
  'split.count',
  'llama.expert_count',
  'llama.attention.sliding_window',
  'llama.attention.scale',
  'llama.attention.clamp_kqv',
  'llama.attention.max_alibi_bias',
  'llama.logit_scale',
  'llama.residual_scale',
  'llama.embedding_scale',
)
_LARGEST = float(np.finfo(np.float32).max)
_CHUNK = 2**22  # values dequantized at a time: the package's temporaries are several times the result

# Constants that llama.cpp's converter assumes for Llama 3, as in all of Meta's releases. It writes the factors computed from them.
_LLAMA3: dict[str, Any] = {'rope_low_freq_factor': 1.0, 'rope_high_freq_factor': 4.0, 'rope_original_length': 8_192}


class GgufSource(LazyTensors):
  """A TensorSource with Hugging Face's llama names, the shape of its model and the file's metadata.

  Quantized tensors are read as float32; float32, float16 and bfloat16 ones unchanged.
  """

  def __init__(self, path: pathlib.Path, entries: Mapping[str, Entry], model: ModelConfig, metadata: Mapping[str, Any]):
    super().__init__(path, entries)
    self.model = model
    self._metadata = dict(metadata)

  def metadata(self) -> dict[str, Any]:
    """Return all fields by GGUF name, including the lists of the tokenizer, as plain Python values."""
    return dict(self._metadata)


def open_gguf(path: str | pathlib.Path) -> GgufSource:
  """Open a GGUF file. Query and key projections are reordered to our order of rotary dimensions.

  Raises:
    CheckpointFileError: the file is damaged, has another architecture, or needs something our decoder does not compute.
    UserError: a tensor is quantized, and the package gguf is not installed.
  """
  file = pathlib.Path(path)
  header = read_header(file)
  shapes = {t.name: t.shape for t in header.tensors}
  model = _model(file, header.metadata, shapes)
  entries: dict[str, Entry] = {}
  for tensor in header.tensors:
    if tensor.name == _ROPE_FACTORS:
      model = _with_rope_factors(file, model, _entry(file, tensor, header.size).read())
    else:
      name = _hugging_face_name(file, tensor.name)
      heads = {'q_proj': model.num_heads, 'k_proj': model.num_kv_heads}.get(name.split('.')[-2], 0)
      entries[name] = _entry(file, tensor, header.size, heads, model.head_dim)
  return GgufSource(file, entries, model, header.metadata)


def _package() -> Any:
  try:
    import gguf
  except ImportError as error:
    raise UserError("reading quantized .gguf files needs the package gguf: pip install 'polar_jax[gguf]'") from error
  return gguf


def _hugging_face_name(file: pathlib.Path, name: str) -> str:
  if name in _OUTER:
    return _OUTER[name]
  part = re.fullmatch(r'blk\.(\d+)\.(\w+)\.weight', name)
  if part is None or part[2] not in _OF_LAYER:
    raise CheckpointFileError(f'{file}: tensor {name!r} does not belong to the supported Llama decoder (no biases, no experts)')
  return f'model.layers.{int(part[1])}.{_OF_LAYER[part[2]]}.weight'


def _entry(file: pathlib.Path, tensor: Tensor, size: int, heads: int = 0, head_dim: int = 0) -> Entry:
  """Return the entry of a tensor; with `heads` > 0, a query or key projection to be reordered. `size`: of the file."""
  shape, dtype = tensor.shape, _PLAIN.get(tensor.kind)
  kind = None if dtype else _quantization(file, tensor)
  count = math.prod(shape)
  if kind is None:
    num_bytes = count * (dtype or _FLOAT32).itemsize
  else:
    block_values, block_bytes = _package().GGML_QUANT_SIZES[kind]
    if shape[-1] % block_values:
      raise damaged(file, f'tensor {tensor.name!r} has rows of {shape[-1]}, no multiple of the {block_values} of a block of {kind.name}')
    num_bytes = count // block_values * block_bytes
  if tensor.offset + num_bytes > size:
    raise damaged(file, f'tensor {tensor.name!r} ends at {tensor.offset + num_bytes}, the file at {size}')
  if heads and (len(shape) != 2 or shape[0] != heads * head_dim):
    raise CheckpointFileError(f'{file}: tensor {tensor.name!r} has shape {shape}, expected {heads} heads of {head_dim}')
  return Entry(TensorInfo(shape, dtype or _FLOAT32, file), functools.partial(_read, file, tensor.offset, kind, dtype, shape, heads))


def _quantization(file: pathlib.Path, tensor: Tensor) -> Any:
  """Return the package's constant for the type of a quantized tensor, if the package can read it."""
  gguf = _package()
  try:
    kind = gguf.GGMLQuantizationType(tensor.kind)
  except ValueError as error:
    raise damaged(file, f'tensor {tensor.name!r} is of the unknown type {tensor.kind}') from error
  try:  # the package has no list of what it can dequantize, so try one block
    gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError as error:
    raise CheckpointFileError(
      f'{file}: tensor {tensor.name!r} is stored as {kind.name}, which the package gguf cannot read; quantize to another type'
    ) from error
  return kind


def _read(file: pathlib.Path, offset: int, kind: Any, dtype: np.dtype | None, shape: tuple[int, ...], heads: int) -> np.ndarray:
  array = _dequantize(file, offset, kind, shape) if dtype is None else read_array(file, offset, dtype, shape)
  return halves_from_pairs(array, heads) if heads else array


def _dequantize(file: pathlib.Path, offset: int, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
  """Read and dequantize a tensor, some matrix rows at a time; quantization blocks do not cross rows."""
  gguf = _package()
  block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  row_bytes = shape[-1] // block_values * block_bytes
  array = np.empty(shape, np.float32)
  rows = array.reshape(-1, shape[-1])
  step = max(1, _CHUNK // shape[-1])
  for first in range(0, len(rows), step):
    some = rows[first : first + step]
    raw = read_array(file, offset + first * row_bytes, np.dtype(np.uint8), (len(some), row_bytes))
    some[:] = gguf.dequantize(raw, kind)
  return array


# ---- metadata to ModelConfig ----


def _model(file: pathlib.Path, metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
  """Return the model that the metadata describes, without the scaling in the tensor of rope factors."""
  architecture = metadata.get('general.architecture')
  if architecture != 'llama':
    raise CheckpointFileError(f'{file}: has architecture {str(architecture)[:60]!r}; only llama can be read from GGUF')
  for key in _REFUSED:
    if metadata.get(key):
      raise CheckpointFileError(f'{file}: {key} is {str(metadata[key])[:60]}, which is not supported')

  if metadata.get('llama.attention.causal') is False:
    raise CheckpointFileError(f'{file}: llama.attention.causal is False; only causal models are supported')
  number = functools.partial(_number, file, metadata)
  width, heads = number('embedding_length'), number('attention.head_count')
  head_dim = number('attention.key_length', width // heads)
  for key in ('rope.dimension_count', 'attention.value_length'):
    if number(key, head_dim) != head_dim:
      raise CheckpointFileError(f'{file}: llama.{key} is {number(key)}, but the head dimension is {head_dim}; they must be equal')
  kv_heads = number('attention.head_count_kv', heads)
  if heads % kv_heads or head_dim % 2:
    raise CheckpointFileError(f'{file}: {heads} heads of dimension {head_dim} with {kv_heads} key/value heads are not possible')
  if len(shapes.get('token_embd.weight', ())) != 2:
    raise CheckpointFileError(f'{file}: has no embedding table (token_embd.weight)')
  layers = number('block_count')
  if layers > len(shapes):  # before a loop over the layers
    raise damaged(file, f'llama.block_count is {layers}, but there are only {len(shapes)} tensors')
  return ModelConfig(
    family='llama',
    vocab_size=shapes['token_embd.weight'][0],
    num_layers=layers,
    d_model=width,
    d_ff=number('feed_forward_length'),
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=head_dim,
    rope_theta=_shortest(number('rope.freq_base', 10_000.0, float)),
    **_linear_scaling(file, metadata),
    norm_eps=_shortest(number('attention.layer_norm_rms_epsilon', kind=float)),
    max_position=number('context_length'),
    tie_embeddings='output.weight' not in shapes,
  )


def _number(file: pathlib.Path, metadata: Mapping[str, Any], key: str, default: float | None = None, kind: type = int) -> Any:
  """Return a positive number from the metadata, which JAX can hold."""
  value = metadata.get(f'llama.{key}', default)
  if type(value) not in (int, kind) or not 0 < value < (2**31 if kind is int else _LARGEST):
    raise CheckpointFileError(f'{file}: llama.{key} is {str(value)[:60]}, expected one positive {kind.__name__}')
  return value


def _shortest(value: float) -> float:
  """Return the shortest decimal that is the same float32: GGUF stores 1e-5 as float32, which Python reads as 9.999999747378752e-06."""
  return float(str(np.float32(value)))


def _linear_scaling(file: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Return our settings for linear rope scaling; `scale_linear` is an older key."""
  key = 'rope.scaling.factor' if 'llama.rope.scaling.factor' in metadata else 'rope.scale_linear'
  factor = metadata.get(f'llama.{key}', 1.0)
  kind = metadata.get('llama.rope.scaling.type', 'linear')
  if kind == 'none' or (kind == 'linear' and factor in (0, 1)):
    return {}
  if kind != 'linear':
    raise CheckpointFileError(f'{file}: llama.rope.scaling.type is {str(kind)[:60]!r}; only none and linear are supported')
  return {'rope_scaling': 'linear', 'rope_factor': _shortest(_number(file, metadata, key, kind=float))}


def _with_rope_factors(file: pathlib.Path, model: ModelConfig, factors_h: np.ndarray) -> ModelConfig:
  """Return the model with Llama 3's scaling, inferred from the divisors of the frequencies.

  The file does not store the parameters: the largest divisor is the factor, the others are assumed to be Llama 3's constants, and the
  divisors computed from them must equal the stored ones.
  """
  factor = float(factors_h.max())
  fits = model.rope_scaling == 'none' and factors_h.shape == (model.head_dim // 2,) and 1 <= factor < _LARGEST
  if not fits or not np.allclose(factors_h, _llama3_divisors(model, factor), rtol=1e-4, atol=0):
    raise CheckpointFileError(
      f'{file}: {_ROPE_FACTORS!r} does not scale rotary embeddings as Llama 3 does; other scalings are not supported'
    )
  if factor == 1:
    return model
  return dataclasses.replace(model, rope_scaling='llama3', rope_factor=_shortest(factor), **_LLAMA3)


def _llama3_divisors(model: ModelConfig, factor: float) -> np.ndarray:
  """Return (H / 2,): 1 for short wavelengths, `factor` for long ones, and between them the inverse of a blend of 1 and 1 / factor."""
  wave_length_h = 2 * math.pi * model.rope_theta ** (np.arange(0, model.head_dim, 2) / model.head_dim)
  turns_h = _LLAMA3['rope_original_length'] / wave_length_h
  low, high = _LLAMA3['rope_low_freq_factor'], _LLAMA3['rope_high_freq_factor']
  blend_h = np.clip((turns_h - low) / (high - low), 0, 1)
  return 1 / ((1 - blend_h) / factor + blend_h)
