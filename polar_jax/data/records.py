"""Triplets as bytes: the records of a data set on disk, and the fingerprint of what they hold.

A record is a serialized tf.train.Example. Its features are sorted by name, so that equal triplets have equal bytes. It is put together from
headers that are a function of a field's name and length alone, which are kept: protocol buffers would build some thirty objects for it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax import types

TEXTS = ('prompt', 'reference', 'chosen', 'rejected')
LABELS = ('wrapper', 'category')
IDS = tuple(f'{name}_ids' for name in TEXTS)  # optional: empty on disk where absent
RANKED = 'ranked_list'  # in the metadata of a ranked list: `others`, its candidates between the best and the worst one, and `ranks` of all

Fields = tuple[Sequence[bytes], Sequence[np.ndarray]]  # texts, labels and metadata as UTF-8; then one int32 array for each of IDS, or none

_RANKED_KEY = json.dumps(RANKED).encode()
_IDS_SET = frozenset(IDS)
_BYTES, _INT64 = b'\x0a', b'\x1a'  # tags of the two kinds of lists in a tf.train.Feature
_KEPT = 1 << 13  # bytes: headers of longer fields are made anew, so that what is kept stays below 12 MB
# The text is that of json.dumps with sorted keys. Without the search for circles, which end in a RecursionError, it takes a quarter less.
_to_json = json.JSONEncoder(sort_keys=True, check_circular=False).encode
_length = struct.Struct('<Q').pack


def fields_of(triplet: types.Triplet) -> Fields:
  """Return what is stored of a triplet.

  Raises:
    ValueError: a field is not plain text, or the metadata is not JSON or has ids that are not lists of int32.
  """
  metadata = _metadata(triplet)
  plain = _IDS_SET.isdisjoint(metadata)
  try:
    texts = (
      str.encode(triplet.prompt),  # type: ignore[arg-type]  # messages are refused below
      str.encode(triplet.reference),  # type: ignore[arg-type]
      str.encode(triplet.chosen),  # type: ignore[arg-type]
      str.encode(triplet.rejected),  # type: ignore[arg-type]
      str.encode(triplet.wrapper),
      str.encode(triplet.category),
      str.encode(_to_json(dict(metadata) if plain else {k: v for k, v in metadata.items() if k not in _IDS_SET})),
    )
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(_reason(triplet, error)) from error
  return texts, () if plain else [_int32(metadata, name) for name in IDS]


def _metadata(triplet: types.Triplet) -> Mapping[str, Any]:
  """Return the metadata as they are stored.

  Raises:
    ValueError: a ranked list has candidates that are not texts, or a triplet has metadata of a ranked list.
  """
  if RANKED in triplet.metadata:
    raise ValueError(f'metadata {RANKED} is a name of this format; rename the field')
  if not isinstance(triplet, types.RankedList):
    return triplet.metadata
  others = [*triplet.candidates[1:-1]]
  if not all(isinstance(text, str) for text in others):
    raise ValueError('candidates must be texts in a TFDS data set; join messages first')
  return {**triplet.metadata, RANKED: {'others': others, 'ranks': [int(rank) for rank in triplet.ranks]}}


def candidates_of(fields: Fields) -> int:
  """Return how many candidates an example has, by what is stored of it."""
  metadata = fields[0][-1]
  ranked = json.loads(metadata).get(RANKED) if _RANKED_KEY in metadata else None
  return len(ranked['ranks']) if ranked else 2


def record_of(fields: Fields) -> bytes:
  """Return the serialized tf.train.Example of a triplet."""
  (prompt, reference, chosen, rejected, wrapper, category, metadata), ids = fields
  prompt_ids, reference_ids, chosen_ids, rejected_ids = map(_int64_list, IDS, ids) if ids else _NO_IDS
  # fmt: off
  content = b''.join((
    _CATEGORY[len(category)], category,
    _CHOSEN[len(chosen)], chosen, chosen_ids,
    _METADATA[len(metadata)], metadata,
    _PROMPT[len(prompt)], prompt, prompt_ids,
    _REFERENCE[len(reference)], reference, reference_ids,
    _REJECTED[len(rejected)], rejected, rejected_ids,
    _WRAPPER[len(wrapper)], wrapper,
  ))
  # fmt: on
  return _TOTAL[len(content)] + content


class Fingerprint:
  """SHA-256 of triplets in order, as a reader gets them: texts, labels, ids and metadata.

  Attributes:
    rows: how many triplets it is of.
    max_candidates: most candidates of one of them: more than two if some are ranked lists.
  """

  def __init__(self) -> None:
    self._digest, self.rows, self.max_candidates = hashlib.sha256(), 0, 2

  def update(self, triplet: types.Triplet) -> None:
    """Add a triplet.

    Raises:
      ValueError: it cannot be stored; the message names it by its number.
    """
    try:
      self.add(fields_of(triplet))
    except ValueError as error:
      raise ValueError(f'example {self.rows}: {error}') from error

  def add(self, fields: Fields) -> None:
    """Add a triplet by what is stored of it."""
    (prompt, reference, chosen, rejected, wrapper, category, metadata), ids = fields
    # fmt: off
    parts = (
      _length(len(prompt)), prompt, _length(len(reference)), reference, _length(len(chosen)), chosen, _length(len(rejected)), rejected,
      _length(len(wrapper)), wrapper, _length(len(category)), category, _length(len(metadata)), metadata,
      b''.join([_length(len(array)) + array.tobytes() for array in ids]) if ids else _ZEROS,
    )
    # fmt: on
    self._digest.update(b''.join(parts))
    self.rows += 1
    self.max_candidates = max(self.max_candidates, candidates_of(fields))

  def hexdigest(self) -> str:
    """Return the SHA-256 of the triplets so far."""
    return self._digest.hexdigest()


class _Headers(dict[int, bytes]):
  """The bytes before a value of bytes, by its length: that of a field, or of all features if no field is named."""

  def __init__(self, name: str = ''):
    self._name = name.encode()

  def __missing__(self, size: int) -> bytes:
    header = _header(self._name, _BYTES, size) if self._name else b'\x0a' + _varint(size)
    if size < _KEPT:
      self[size] = header
    return header


def _header(name: bytes, kind: bytes, size: int) -> bytes:
  """Return what precedes a value of `size` bytes: an entry of the map, its key, a feature, a list of a kind, and the only value in it."""
  header = b'\x0a' + _varint(size)
  header = kind + _varint(len(header) + size) + header
  header = b'\x0a' + _varint(len(name)) + name + b'\x12' + _varint(len(header) + size) + header
  return b'\x0a' + _varint(len(header) + size) + header


def _varint(value: int) -> bytes:
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  out.append(value)
  return bytes(out)


def _varints(values: np.ndarray) -> bytes:
  """Return the varints of int32 values, which are stored as int64: a negative one takes ten bytes."""
  wide = values.astype(np.int64).view(np.uint64)[:, None]
  shifts = np.arange(0, max(int(wide.max()).bit_length(), 1), 7, dtype=np.uint64)
  rest = wide >> shifts
  used = rest != 0
  used[:, 0] = True
  groups = (rest & np.uint64(127)).astype(np.uint8)
  groups[:, :-1] |= used[:, 1:].astype(np.uint8) << 7  # more bytes follow
  return groups[used].tobytes()


def _int64_list(name: str, values: np.ndarray) -> bytes:
  """Return the entry of a field of ids."""
  key = name.encode()
  if not len(values):  # a list without a value, which is not the same as a value of no bytes
    entry = b'\x0a' + _varint(len(key)) + key + b'\x12\x02' + _INT64 + b'\x00'
    return b'\x0a' + _varint(len(entry)) + entry
  content = _varints(values)
  return _header(key, _INT64, len(content)) + content


_PROMPT, _REFERENCE, _CHOSEN, _REJECTED, _WRAPPER, _CATEGORY, _METADATA = map(_Headers, (*TEXTS, *LABELS, 'metadata'))
_TOTAL = _Headers()
_NO_IDS = tuple(_int64_list(name, np.zeros(0, np.int32)) for name in IDS)
_ZEROS = bytes(8 * len(IDS))


def _int32(metadata: Mapping[str, Any], name: str) -> np.ndarray:
  try:
    values = np.asarray(metadata.get(name, ()), np.int32)
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(f'metadata {name} must be a list of int32 ({error})') from error
  if values.ndim != 1:
    raise ValueError(f'metadata {name} must be a list of int32, not an array of {values.ndim} dimensions')
  return values


def _reason(triplet: types.Triplet, error: Exception) -> str:
  for name in (*TEXTS, *LABELS):
    value = getattr(triplet, name)
    if not isinstance(value, str):
      return f'field {name} must be text in a TFDS data set, not {type(value).__name__}; join messages first'
    try:
      value.encode()
    except UnicodeEncodeError as problem:
      return f'field {name} is not valid Unicode ({problem.reason} at character {problem.start}); replace or remove it'
  return f'metadata must be JSON ({error})'
