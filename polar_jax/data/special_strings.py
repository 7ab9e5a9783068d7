"""Strings that become one id anywhere in a text, and their removal from texts that must not contain them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping


class SpecialStrings:
  """Strings that become one id anywhere in a text. The text between them is tokenized separately."""

  def __init__(self, ids: Mapping[str, int]):
    self.ids = {string: i for string, i in ids.items() if string}
    longest_first = sorted(self.ids, key=len, reverse=True)
    self._pattern = re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')') if self.ids else None
    self._by_last: dict[str, list[list[str]]] = {}
    for string in longest_first:
      self._by_last.setdefault(string[-1], []).append(list(string))

  def occur_in(self, text: str) -> bool:
    """Return whether the text contains one of the strings."""
    return self._pattern is not None and self._pattern.search(text) is not None

  def split(self, text: str) -> list[str]:
    """Return the parts of a text: ordinary text and, at odd indices, the strings."""
    return [text] if self._pattern is None else self._pattern.split(text)

  def encode(self, text: str, encode_plain: Callable[[str], Iterable[int]]) -> list[int]:
    """Convert a text to ids, using `encode_plain` for the text between the strings."""
    if self._pattern is None or not self._pattern.search(text):
      return list(encode_plain(text))
    out: list[int] = []
    for i, part in enumerate(self._pattern.split(text)):  # odd parts are the separators themselves
      if i % 2:
        out.append(self.ids[part])
      elif part:
        out.extend(encode_plain(part))
    return out

  def remove(self, text: str) -> str:
    """Return the text without the strings, nor those that their removal would join from its parts: `<|rew</s>ard|>` leaves nothing.

    The time is linear in the length of the text, however deeply the strings are nested in one another.
    """
    if self._pattern is None or not self._pattern.search(text):
      return text
    text = self._pattern.sub('', text)  # the longest first, as tokenizers match them
    if not self._pattern.search(text):
      return text
    kept: list[str] = []  # never contains one of the strings, because only its end is new
    for character in text:
      kept.append(character)
      for string in self._by_last.get(character, ()):
        if kept[-len(string) :] == string:
          del kept[-len(string) :]
          break
    return ''.join(kept)
