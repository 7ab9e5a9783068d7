"""Special tokens, read from the small files next to a tokenizer.

Hugging Face folders define them in up to three files of different ages: tokenizer_config.json, special_tokens_map.json and
added_tokens.json. A token is written as a string, as {'content': string, ...}, or as null.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from polar_jax.runtime import json_files
from polar_jax.types import UserError

NAMES = ('bos', 'eos', 'pad', 'unk')
FLAGS = ('lstrip', 'rstrip', 'single_word', 'normalized')  # how an added token is matched in a text


class TokenizerError(UserError):
  """A tokenizer file is missing, unreadable or of an unknown kind. The message is one line for the user."""


class AddedToken(NamedTuple):
  """A string that becomes one id anywhere in a text. Special ones are dropped in decoding."""

  id: int
  special: bool
  flags: Mapping[str, bool]


class SpecialTokens(NamedTuple):
  """The special tokens that the files of a folder define.

  Attributes:
    named: string of 'bos', 'eos', 'pad' and 'unk'; None where a file has null. A name that no file mentions is absent.
    marked: strings that a file lists as special without their id.
    added: id and flags by string, in the order of ids.
    adds_bos: `add_bos_token`: whether a text begins with BOS; None if no file says.
  """

  named: Mapping[str, str | None]
  marked: frozenset[str]
  added: Mapping[str, AddedToken]
  adds_bos: bool | None


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Read the object in a JSON file; {} if the file does not exist.

  Raises:
    TokenizerError: the file does not contain a JSON object.
  """
  if not path.is_file():
    return {}
  try:
    return json_files.read(path, 'download it again')
  except json_files.JsonError as error:
    raise TokenizerError(str(error)) from error


def read_special_tokens(folder: pathlib.Path) -> SpecialTokens:
  """Read the files of `folder` that exist. tokenizer_config.json has precedence over the two older ones.

  Raises:
    TokenizerError: an entry cannot be read; the message names it and its file.
  """
  files = [folder / 'tokenizer_config.json', folder / 'special_tokens_map.json']
  settings = [read_json(path) for path in files]
  named: dict[str, str | None] = {}
  marked: set[str] = set()
  for path, fields in zip(files, settings, strict=True):
    for name in NAMES:
      key = f'{name}_token'
      if key in fields and named.get(name) is None:
        named[name] = _content(fields[key], f'{path}: {key}')
    for key in ('additional_special_tokens', 'extra_special_tokens'):
      values = fields.get(key) or []
      values = list(values.values()) if isinstance(values, dict) else values
      if not isinstance(values, list):
        raise TokenizerError(f'{path}: {key} must be a list of tokens, not {json.dumps(values)[:60]}')
      marked.update(token for value in values if (token := _content(value, f'{path}: {key}')) is not None)
  special = marked | {token for token in named.values() if token is not None}
  added = {token: AddedToken(i, token in special, {}) for token, i in _added_tokens_json(folder / 'added_tokens.json').items()}
  decoder = settings[0].get('added_tokens_decoder') or {}
  if not isinstance(decoder, dict):
    raise TokenizerError(f'{files[0]}: added_tokens_decoder must be an object of tokens by id, not {json.dumps(decoder)[:60]}')
  for key, value in decoder.items():
    content = _content(value, f'{files[0]}: added_tokens_decoder {key[:40]}')
    if content is None or not re.fullmatch('[0-9]{1,10}', key):
      raise TokenizerError(f'{files[0]}: added_tokens_decoder {key[:40]!r} must give a token for an id')
    entry = value if isinstance(value, dict) else {}
    flags = {flag: bool(entry[flag]) for flag in FLAGS if flag in entry}
    added[content] = AddedToken(int(key), bool(entry.get('special')) or content in special, flags)
  adds_bos = settings[0].get('add_bos_token')
  if adds_bos is not None and not isinstance(adds_bos, bool):
    raise TokenizerError(f'{files[0]}: add_bos_token must be true, false or null, not {json.dumps(adds_bos)[:60]}')
  return SpecialTokens(named, frozenset(marked), dict(sorted(added.items(), key=lambda item: item[1].id)), adds_bos)


def _content(value: Any, where: str) -> str | None:
  content = value.get('content') if isinstance(value, dict) else value
  if content is not None and not isinstance(content, str):
    raise TokenizerError(f'{where}: a token must be a string, null or an object with a content, not {json.dumps(value)[:60]}')
  return content or None  # some files write the absence of a token as an empty string


def _added_tokens_json(path: pathlib.Path) -> dict[str, int]:
  tokens = read_json(path)
  for token, i in tokens.items():
    if type(i) is not int or not 0 <= i < 2**31:
      raise TokenizerError(f'{path}: {token[:60]!r} must have an id, not {json.dumps(i)[:60]}')
  return tokens
