"""The header of a GGUF file: metadata and the list of tensors. Every count, type and offset is checked before it is used.

A file is the magic number, version, number of tensors and of metadata pairs; the pairs (name, type, value); the tensors (name, dimensions,
type, offset); and, aligned, the tensors' bytes. The reader of the package `gguf` trusts all of them: it loops over counts that a damaged
file claims, and reads past the end.
"""

from __future__ import annotations

import math
import os
import pathlib
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from polar_jax.checkpoints.formats.storage import CheckpointFileError, damaged, first_bytes

_SCALARS: dict[int, np.dtype] = {
  0: np.dtype('<u1'),
  1: np.dtype('<i1'),
  2: np.dtype('<u2'),
  3: np.dtype('<i2'),
  4: np.dtype('<u4'),
  5: np.dtype('<i4'),
  6: np.dtype('<f4'),
  7: np.dtype('?'),
  10: np.dtype('<u8'),
  11: np.dtype('<i8'),
  12: np.dtype('<f8'),
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_PAIR_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 4 + 8  # the fewest that a pair and a tensor take
_ALIGNMENT = 'general.alignment'


class Tensor(NamedTuple):
  """A tensor of the header. `kind`: number of its type in ggml; `offset`: of its bytes in the file."""

  name: str
  shape: tuple[int, ...]
  kind: int
  offset: int


class Header(NamedTuple):
  """The header of a file. `size`: of the file, in bytes."""

  metadata: dict[str, Any]
  tensors: list[Tensor]
  size: int


def read_header(file: pathlib.Path) -> Header:
  """Read the header of a GGUF file of version 2 or 3.

  Raises:
    CheckpointFileError: the file cannot be read, is damaged, or was written for big-endian machines.
  """
  magic = first_bytes(file, 4)
  if magic != b'GGUF':
    raise damaged(file, f'begins with {magic!r}, not GGUF')
  try:
    with file.open('rb') as f:
      return _Reader(file, f).header()
  except OSError as error:
    raise CheckpointFileError(f'{file}: cannot be read ({error.strerror}); check the disk and try again') from error


class _Reader:
  """Reads an open file from its start. No read is larger than what is left of the file."""

  def __init__(self, file: pathlib.Path, opened: BinaryIO):
    self._file, self._opened = file, opened
    self._size = os.fstat(opened.fileno()).st_size
    self._where = 'its header'

  def header(self) -> Header:
    """Read everything up to the tensors' bytes."""
    self._bytes(4)
    version = self._integer('<I')
    if version & 0xFFFF == 0:
      raise CheckpointFileError(f'{self._file}: is a big-endian GGUF; convert it to this machine with gguf-convert-endian')
    if version not in _VERSIONS:
      raise self._error(f'version {version}, expected {" or ".join(map(str, _VERSIONS))}')
    num_tensors, num_pairs = self._integer('<Q'), self._integer('<Q')
    self._check_count(num_pairs, _PAIR_BYTES, 'metadata pairs')
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
      self._where = 'the name of a field'
      name = self._string()
      self._where = f'field {name[:80]!r}'
      if name in metadata:
        raise self._error('is there twice')
      metadata[name] = self._value(self._integer('<I'))
    self._where = 'the list of tensors'
    self._check_count(num_tensors, _TENSOR_BYTES, 'tensors')
    tensors: dict[str, Tensor] = {}
    for _ in range(num_tensors):
      tensor = self._tensor()
      if tensor.name in tensors:
        raise self._error('is there twice')
      tensors[tensor.name] = tensor
    alignment = metadata.get(_ALIGNMENT, 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
      raise damaged(self._file, f'{_ALIGNMENT} is {str(alignment)[:40]}, expected a power of two')
    start = -(-self._opened.tell() // alignment) * alignment
    return Header(metadata, [t._replace(offset=start + t.offset) for t in tensors.values()], self._size)

  def _tensor(self) -> Tensor:
    self._where = 'the name of a tensor'
    name = self._string()
    self._where = f'tensor {name[:80]!r}'
    dimensions = self._integer('<I')
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
      raise self._error(f'has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}')
    shape = tuple(self._integer('<Q') for _ in range(dimensions))[::-1]
    if not 0 < math.prod(shape) <= 8 * self._size:  # no type has less than a bit for a value
      raise self._error(f'has shape {shape}')
    return Tensor(name, shape, self._integer('<I'), self._integer('<Q'))

  def _value(self, kind: int) -> Any:
    """Return a value of the metadata as a plain Python value."""
    if kind == _STRING:
      return self._string()
    if kind in _SCALARS:
      return self._scalars(_SCALARS[kind], 1)[0]
    if kind != _ARRAY:
      raise self._error(f'is of the unknown type {kind}')
    of, count = self._integer('<I'), self._integer('<Q')
    if of == _STRING:
      self._check_count(count, 8, 'strings')
      return [self._string() for _ in range(count)]
    if of not in _SCALARS:
      raise self._error(f'is an array of type {of}, expected numbers or strings')
    self._check_count(count, _SCALARS[of].itemsize, 'numbers')
    return self._scalars(_SCALARS[of], count)

  def _scalars(self, dtype: np.dtype, count: int) -> list[Any]:
    return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()

  def _integer(self, code: str) -> int:
    return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

  def _string(self) -> str:
    try:
      return self._bytes(self._integer('<Q')).decode('utf-8')
    except UnicodeDecodeError as error:
      raise self._error('contains a text that is not UTF-8') from error

  def _bytes(self, count: int) -> bytes:
    left = self._size - self._opened.tell()
    content = self._opened.read(count) if count <= left else b''
    if len(content) != count:
      raise self._error(f'needs {count} bytes at {self._size - left}, of {self._size} in the file')
    return content

  def _check_count(self, count: int, least: int, what: str) -> None:
    """Check a number of things, each of `least` bytes or more, against the rest of the file."""
    if count * least > self._size - self._opened.tell():
      raise self._error(f'has {count} {what}, more than the file can hold')

  def _error(self, reason: str) -> CheckpointFileError:
    return damaged(self._file, f'{self._where}: {reason}')
