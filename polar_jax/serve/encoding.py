"""Token ids of what requests ask for. It takes most of the processor time of a request, and runs in threads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.data.template import Template
from polar_jax.serve.engine import Item
from polar_jax.serve.requests import Finished, Parts, RequestError, Source
from polar_jax.types import UserError

_CANDIDATES_AT_ONCE = 64  # of one call, so that threads share a large group and notice a client that hung up


class EncodedItem(NamedTuple):
  """A sequence with what the reply says about it."""

  item: Item
  truncated: bool


class Encoder:
  """Turns sources into token ids.

  Args:
    template: of the model.
    vocab_size: of the model.
    max_length: tokens of the longest sequence.
    share: whether sequences of one group share their beginning.
  """

  def __init__(self, template: Template, vocab_size: int, max_length: int, share: bool):
    self._template, self._vocab_size, self._max_length, self._share = template, vocab_size, max_length, share

  @property
  def template(self) -> Template:
    """Of the model."""
    return self._template

  def divide(self, sources: Sequence[Source]) -> list[list[Source]]:
    """Return the same sources in parts of similar size, a large group in several pieces, in order."""
    parts: list[list[Source]] = [[]]
    room = _CANDIDATES_AT_ONCE
    for source in sources:
      for piece in _pieces(source):
        if room < piece.count and parts[-1]:
          parts.append([])
          room = _CANDIDATES_AT_ONCE
        parts[-1].append(piece)
        room -= piece.count
    return [part for part in parts if part]

  def encode(self, sources: Sequence[Source]) -> list[EncodedItem]:
    """Return the sequences of sources in order.

    Raises:
      RequestError: one cannot be encoded, or is too long.
    """
    return [item for source in sources for item in (self._parts(source) if isinstance(source, Parts) else [self._finished(source)])]

  def _parts(self, source: Parts) -> list[EncodedItem]:
    if not source.candidates:
      return []
    arguments = (source.prompt, source.reference, source.candidates, source.wrapper)
    try:
      encoded = self._template.encode_with_truncation(*arguments, alone=True)
    except UserError as error:
      raise _named(error, source) from error
    known = hashlib.sha256(json.dumps((*arguments[:2], source.wrapper)).encode()).digest()
    out = []
    for i, (ids, truncated) in enumerate(encoded):
      item = self._item(ids, source.fields[2 + i], known)
      out.append(EncodedItem(item, truncated.responses or truncated.prompt))
    return out

  def _finished(self, source: Finished) -> EncodedItem:
    template, field = self._template, source.field
    if isinstance(source.content, str):
      try:
        ids = template.encode_finished(source.content)
      except UserError as error:
        raise RequestError(f'{field}: {error}', field) from error
    else:
      ids = source.content
    if template.reward_token_id is not None and (not ids or ids[-1] != template.reward_token_id):
      raise RequestError(
        f'{field} does not end in the reward token {template.config.reward_token} ({template.reward_token_id}), at which the model reads '
        "the reward: send prompt, reference and output to /score instead, or build the text as POLAR's client does",
        field,
      )
    return EncodedItem(self._item(ids, field, None), False)

  def _item(self, ids: list[int], field: str, group: bytes | None) -> Item:
    """Return a sequence with the key of its group: what precedes its separator, or else `group`."""
    if not ids:
      raise RequestError(f'{field} has no tokens', field)
    if len(ids) > self._max_length:
      raise RequestError(
        f'{field} has {len(ids)} tokens with its prompt and reference; at most {self._max_length} are allowed (serve.max_length)',
        field,
        413,
        'too_large',
      )
    if not 0 <= min(ids) <= max(ids) < self._vocab_size:
      raise RequestError(f'{field} has a token outside 0 to {self._vocab_size - 1}, those of the model', field)
    array = np.asarray(ids, np.int32)
    separator = self._template.separator_id
    if not self._share:
      return Item(array, array.tobytes())
    if separator is not None and separator in ids[:-1]:
      head = ids.index(separator) + 1
      return Item(array, array[:head].tobytes(), head)
    return Item(array, group or array.tobytes())


def _pieces(source: Source) -> list[Source]:
  if not isinstance(source, Parts) or source.count <= _CANDIDATES_AT_ONCE:
    return [source]
  out: list[Source] = []
  for low in range(0, source.count, _CANDIDATES_AT_ONCE):
    high = low + _CANDIDATES_AT_ONCE
    fields = [*source.fields[:2], *source.fields[2 + low : 2 + high]]
    out.append(Parts(source.prompt, source.reference, source.candidates[low:high], source.wrapper, fields))
  return out


def _named(error: UserError, source: Parts) -> RequestError:
  """Return the error of a template, which calls the fields by its own names, with those of the request."""
  message, param = str(error), source.fields[0].removesuffix('.prompt') or None
  names = {'prompt': source.fields[0], 'reference': source.fields[1]}
  names |= {f'candidates[{i}]': field for i, field in enumerate(source.fields[2:])}
  for own, field in names.items():
    if message.startswith((f'{own} ', f'{own}:', f'{own}[', f'{own}.')):
      return RequestError(field + message[len(own) :], field)
  where = f'{param}: ' if param and param != 'prompt' else ''
  return RequestError(where + message, None if param == 'prompt' else param)
