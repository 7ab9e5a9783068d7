"""Digests of data and tokenizers, by which a resumed run notices that it reads something else.

A digest is `count:sample:content`. `content` covers every example and every field that decides tokens, loss or report. `count:sample`
(or `sample` alone) is all that earlier versions stored, so that their runs still resume; see `polar_jax.checkpoints.settings`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_jax.data.examples import examples_at
from polar_jax.data.special_tokens import read_json, read_special_tokens
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import Prompt, RankedList, Triplet

if TYPE_CHECKING:
  from polar_jax.data.chat import ChatTemplate

_READ_TOGETHER = 1_024  # examples
_CONTENT, _SAMPLE = 32, 16  # hexadecimal digits


def triplets_digest(examples: Sequence[Triplet], columns: Sequence[str] = ()) -> str:
  """Return the digest of ranked examples. Fields that are only kept as metadata do not count, but for `columns`, which a loss reads."""
  ranking = lambda e: (e.candidates, e.ranks) if isinstance(e, RankedList) else ()
  further = lambda e: (e.wrapper, e.category, *ranking(e), *(e.metadata.get(name) for name in columns))
  return _digest(examples, lambda e: (e.prompt, e.reference, e.chosen, e.rejected), further)


def prompts_digest(prompts: Sequence[Prompt], *, with_metadata: bool) -> str:
  """Return the digest of prompts. `with_metadata`: the reward is a function, which receives all fields."""
  further = lambda p: (p.category, dict(p.metadata) if with_metadata else None)
  return _digest(prompts, lambda p: (p.prompt, p.reference, p.answer, p.metadata.get('policy_prompt')), further)


def ids_digest(ids: np.ndarray) -> str:
  """Return the digest of a stream of tokens, which covers its text and its tokenizer."""
  return f'{len(ids)}:{hashlib.sha256(np.ascontiguousarray(ids, np.int32).data).hexdigest()[:_CONTENT]}'


def chat_digest(chat: ChatTemplate | None) -> str:
  """Return the digest of the chat template of a policy; 'none' if it reads plain text."""
  return 'none' if chat is None else _short(json.dumps([chat.source, chat.special_tokens], sort_keys=True))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
  """Return a digest of the tokenizer's file and of what files next to it add; 'byte' for the byte tokenizer."""
  path = getattr(tokenizer, 'path', None)
  if path is None:
    return 'byte'
  special = read_special_tokens(path.parent)
  added = [(token, i, is_special, dict(flags)) for token, (i, is_special, flags) in special.added.items()]
  ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.vocab_size)
  adds = [read_json(path.parent / 'tokenizer_config.json').get(f'add_{name}_token') for name in ('bos', 'eos')]
  facts = [dict(special.named), sorted(special.marked), added, ids, adds, tokenizer.encode('', add_bos=True)]
  return f'{hashlib.sha256(path.read_bytes()).hexdigest()[:_SAMPLE]}:{_short(json.dumps(facts, sort_keys=True))}'


def files_digest(files: Iterable[pathlib.Path]) -> str:
  """Return the digest of the bytes of a data set's files (shards), in order, which is faster than reading their examples."""
  digest = hashlib.sha256()
  for path in files:
    with path.open('rb') as file:
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:_CONTENT]


def _digest(examples: Sequence[Any], sampled: Callable[[Any], tuple], further: Callable[[Any], tuple]) -> str:
  """Return `count:sample:content`. A data set with an attribute `shards` or `content_files` is identified by the bytes of these files.

  Args:
    examples: triplets or prompts.
    sampled: the fields that earlier versions looked at.
    further: the other fields that count.
  """
  size = len(examples)
  if not size:
    return f'0:{_short("")}:{_short("")}'
  sample = [sampled(examples[i]) for i in sorted({0, size // 3, size // 2, size - 1})]
  # The rule of earlier versions, to the bit.
  start = f'{size}:{_short(repr(sample))}'
  shards = getattr(examples, 'shards', None) or getattr(examples, 'content_files', None)
  if shards:
    return f'{start}:{files_digest(shards)}'
  digest = hashlib.sha256()
  for first in range(0, size, _READ_TOGETHER):
    part = examples_at(examples, range(first, min(first + _READ_TOGETHER, size)))
    digest.update(_json([(*sampled(example), *further(example)) for example in part]).encode())
  return f'{start}:{digest.hexdigest()[:_CONTENT]}'


def _json(values: Any) -> str:
  try:
    return json.dumps(values, sort_keys=True, default=_plain)
  except (TypeError, ValueError):  # keys of several types, or an object in itself
    return str(_plain(values))


def _plain(value: Any) -> Any:
  """Return a value of a Python program in a form that is the same in the next process."""
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if hasattr(value, 'tolist'):
    return value.tolist()
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return _plain(dataclasses.asdict(value))
  shows_address = type(value).__repr__ is object.__repr__ and type(value).__str__ is object.__str__
  return type(value).__name__ if shows_address else str(value)


def _short(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:_SAMPLE]
