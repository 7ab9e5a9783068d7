"""Which texts a tokenizer.json can spell.

The library drops a character without a token silently if the model is a BPE without an unknown token. Other models give their unknown
token, or an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.data.special_strings import SpecialStrings


def byte_symbols() -> list[str]:
  """Return the printable character that a byte-level BPE writes for each byte: itself if printable, else one from U+0100 on."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def byte_alphabet(spec: Mapping[str, Any]) -> bytes | None:
  """Return the bytes that a plain byte-level BPE can represent; None for a tokenizer.json that normalizes, adds or drops anything.

  A text of these bytes is reproduced exactly.
  """
  model, steps = spec['model'], spec['pre_tokenizer'] or {}
  steps = steps['pretokenizers'] if steps.get('type') == 'Sequence' else [steps]
  keeps_text = all(step.get('type') == 'Digits' or (step.get('type') == 'Split' and step['behavior'] != 'Removed') for step in steps[:-1])
  bytes_last = steps[-1].get('type') == 'ByteLevel' and not steps[-1]['add_prefix_space']
  plain_bpe = model['type'] == 'BPE' and not any(model.get(key) for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'))
  if spec['normalizer'] is not None or (spec['decoder'] or {}).get('type') != 'ByteLevel' or not (keeps_text and bytes_last and plain_bpe):
    return None
  return bytes(b for b, symbol in enumerate(byte_symbols()) if symbol in model['vocab'])


class Speller:
  """Finds the characters that a BPE without an unknown token would drop.

  Args:
    library: the `tokenizers.Tokenizer`.
    spec: its tokenizer.json.
  """

  def __init__(self, library: Any, spec: Mapping[str, Any]):
    model = spec['model']
    self._library = library
    self._vocab: Mapping[str, int] = model['vocab']
    self._prefix, self._suffix = model.get('continuing_subword_prefix') or '', model.get('end_of_word_suffix') or ''
    self._by_bytes = bool(model.get('byte_fallback'))
    self._whole_words = bool(model.get('ignore_merges'))
    self._added = SpecialStrings({token['content']: token['id'] for token in spec['added_tokens']})

  def missing(self, text: str) -> str | None:
    """Return the first character of a text that would be dropped, or the whole text if only its context drops it; None if none would."""
    if not self._drops(text):
      return None
    return next((character for character in text if self._drops(character)), text)

  def _drops(self, text: str) -> bool:
    for part in self._added.split(text)[::2]:
      normalizer, splitter = self._library.normalizer, self._library.pre_tokenizer
      normalized = part if normalizer is None else normalizer.normalize_str(part)
      words = [normalized] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(normalized)]
      if not all(map(self._spells, words)):
        return True
    return False

  def _spells(self, word: str) -> bool:
    if self._whole_words and word in self._vocab:
      return True
    last = len(word) - 1
    return all(self._has(character, i > 0, i == last) for i, character in enumerate(word))

  def _has(self, character: str, continues: bool, ends: bool) -> bool:
    symbol = (self._prefix if continues else '') + character + (self._suffix if ends else '')
    if symbol in self._vocab:
      return True
    return self._by_bytes and all(f'<0x{byte:02X}>' in self._vocab for byte in symbol.encode('utf-8'))


def speller(library: Any, spec: Mapping[str, Any]) -> Speller | None:
  """Return the `Speller` of a tokenizer.json; None if its model never drops text silently."""
  model = spec['model']
  if model.get('type') != 'BPE' or model.get('unk_token'):
    return None
  steps = [*_steps(spec['normalizer'], 'normalizers'), *_steps(spec['pre_tokenizer'], 'pretokenizers')]
  plain = not (model.get('continuing_subword_prefix') or model.get('end_of_word_suffix'))
  if plain and any(step.get('type') == 'ByteLevel' for step in steps) and all(symbol in model['vocab'] for symbol in byte_symbols()):
    return None
  if model.get('byte_fallback') and all(f'<0x{byte:02X}>' in model['vocab'] for byte in range(256)):
    return None
  return Speller(library, spec)


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
  """Return a step of a tokenizer.json, or those that a sequence consists of."""
  if step is None:
    return []
  return [inner for part in step[key] for inner in _steps(part, key)] if step.get('type') == 'Sequence' else [step]
