"""Weight files of llama2.c (github.com/karpathy/llama2.c, `legacy` export): seven int32, then float32 weights in a fixed order."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import struct

import numpy as np

from polar_jax.checkpoints.formats.storage import (
  CheckpointFileError,
  Entry,
  LazyTensors,
  TensorInfo,
  first_bytes,
  halves_from_pairs,
  read_array,
)
from polar_jax.config import ModelConfig

_HEADER = struct.Struct('<7i')
_FLOAT32 = np.dtype(np.float32)
_MAGIC = int.from_bytes(b'24ka', 'little')  # 'ak42', the magic number of later versions, which have another header


class Llama2cSource(LazyTensors):
  """A TensorSource with Hugging Face's llama names, and the shape of its model."""

  def __init__(self, path: pathlib.Path, entries: dict[str, Entry], model: ModelConfig):
    super().__init__(path, entries)
    self.model = model


def open_llama2c(path: str | pathlib.Path) -> Llama2cSource:
  """Open a llama2.c .bin file. Query and key projections are reordered to our order of rotary dimensions.

  Raises:
    CheckpointFileError: the header is invalid, or the file does not have the size that it implies.
  """
  file = pathlib.Path(path)
  model = _model(file, first_bytes(file, _HEADER.size))
  size, expected = file.stat().st_size, _HEADER.size + _FLOAT32.itemsize * _count(model)
  if size != expected:  # before a loop over as many layers as a damaged header claims
    raise CheckpointFileError(
      f'{file}: has {size} bytes, but its header implies {expected}; it is truncated or not a llama2.c file, download it again'
    )
  entries: dict[str, Entry] = {}
  offset = _HEADER.size
  for name, shape, heads in _tensors(model):
    if name:
      info = TensorInfo(shape, _FLOAT32, file)
      entries[name] = Entry(info, functools.partial(_read, file, offset, shape, heads))
    offset += math.prod(shape) * _FLOAT32.itemsize
  return Llama2cSource(file, entries, model)


def _model(file: pathlib.Path, header: bytes) -> ModelConfig:
  if len(header) < _HEADER.size:
    raise CheckpointFileError(f'{file}: has {len(header)} bytes, fewer than the {_HEADER.size} of a llama2.c header; name a llama2.c file')
  width, d_ff, layers, heads, kv_heads, vocab, length = fields = _HEADER.unpack(header)
  if width == _MAGIC:
    raise CheckpointFileError(f"{file}: is a llama2.c file of version 1 or later; export it with llama2.c's `--version 0`")
  if min(width, d_ff, layers, heads, kv_heads, abs(vocab), length) < 1 or width % (2 * heads) or heads % kv_heads:
    raise CheckpointFileError(
      f'{file}: is not a llama2.c file: its header (dim, hidden, layers, heads, kv heads, vocab, seq) reads {fields}'
    )
  return ModelConfig(
    family='llama',
    vocab_size=abs(vocab),
    num_layers=layers,
    d_model=width,
    d_ff=d_ff,
    num_heads=heads,
    num_kv_heads=kv_heads,
    head_dim=width // heads,
    rope_theta=10_000.0,  # this and the epsilon are constants of llama2.c
    norm_eps=1e-5,
    max_position=length,
    tie_embeddings=vocab > 0,  # a negative vocabulary size means a separate output matrix
  )


def _count(m: ModelConfig) -> int:
  """Return the number of values in the file."""
  of_layers = {layers: sum(math.prod(shape) for _, shape, _ in _tensors(dataclasses.replace(m, num_layers=layers))) for layers in (1, 2)}
  return of_layers[1] + (of_layers[2] - of_layers[1]) * (m.num_layers - 1)


def _tensors(m: ModelConfig) -> list[tuple[str, tuple[int, ...], int]]:
  """Return (name, shape, number of heads to reorder or 0) in the order of the file; tensors without a name are skipped."""
  assert m.vocab_size is not None
  q_rows, kv_rows = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
  tensors: list[tuple[str, tuple[int, ...], int]] = [('model.embed_tokens.weight', (m.vocab_size, m.d_model), 0)]
  per_layer: list[tuple[str, tuple[int, ...], int]] = [
    ('input_layernorm', (m.d_model,), 0),
    ('self_attn.q_proj', (q_rows, m.d_model), m.num_heads),
    ('self_attn.k_proj', (kv_rows, m.d_model), m.num_kv_heads),
    ('self_attn.v_proj', (kv_rows, m.d_model), 0),
    ('self_attn.o_proj', (m.d_model, q_rows), 0),
    ('post_attention_layernorm', (m.d_model,), 0),
    ('mlp.gate_proj', (m.d_ff, m.d_model), 0),
    ('mlp.down_proj', (m.d_model, m.d_ff), 0),
    ('mlp.up_proj', (m.d_ff, m.d_model), 0),
  ]
  for part, shape, heads in per_layer:
    tensors += [(f'model.layers.{layer}.{part}.weight', shape, heads) for layer in range(m.num_layers)]
  tensors.append(('model.norm.weight', (m.d_model,), 0))
  tensors.append(('', (2, m.max_position, m.head_dim // 2), 0))  # cosines and sines, which we compute ourselves
  if not m.tie_embeddings:
    tensors.append(('lm_head.weight', (m.vocab_size, m.d_model), 0))
  return tensors


def _read(file: pathlib.Path, offset: int, shape: tuple[int, ...], heads: int) -> np.ndarray:
  array = read_array(file, offset, _FLOAT32, shape)
  return halves_from_pairs(array, heads) if heads else array
