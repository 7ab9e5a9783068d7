"""Text files of users. Text is UTF-8; for any other encoding the message says which one it seems to be."""

from __future__ import annotations

import codecs
import itertools
import pathlib

from polar_jax.types import UserError

_LOOKED_AT = 1 << 16  # bytes, enough to guess an encoding
_MARKS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
  (codecs.BOM_UTF32_LE, 'UTF-32'),
  (codecs.BOM_UTF32_BE, 'UTF-32'),
  (codecs.BOM_UTF16_LE, 'UTF-16'),
  (codecs.BOM_UTF16_BE, 'UTF-16'),
)
# Encoding, the first and the last of characters that are common in it alone, and the share of them that tells.
_EAST_ASIAN = (
  ('SHIFT-JIS', '\u3041', '\u30ff', 0.15),
  ('EUC-KR', '\uac00', '\ud7a3', 0.9),
  ('GB18030', '\u4e00', '\u9fff', 0.6),
)
_CONTROL = bytes({*range(32), 127} - set(b'\t\n\v\f\r\x1b'))


class TextError(UserError):
  """A file is not UTF-8. The message is one line for the user."""


def read_text(path: pathlib.Path) -> str:
  """Return the text of a UTF-8 file, without a byte order mark; newlines become `\\n`.

  Raises:
    TextError: the file has another encoding, or is not text; the message names the likely encoding and how to convert it.
    OSError: it cannot be read.
  """
  return decode(path.read_bytes(), str(path)).replace('\r\n', '\n').replace('\r', '\n')


def decode(content: bytes, where: str) -> str:
  """Return UTF-8 bytes as text, without a byte order mark.

  Args:
    content: the bytes.
    where: name of the file, for messages.

  Raises:
    TextError: as in `read_text`.
  """
  encoding = wide_encoding(content)
  if encoding is None:
    try:
      return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      raise TextError(f'{where}: not UTF-8 (byte {error.start}); {advice(content[error.start :])}') from error
  raise TextError(f'{where}: not UTF-8; {_advice(encoding)}')


def advice(content: bytes) -> str:
  """Return which encoding bytes that are not UTF-8 seem to have, and how to convert them."""
  return _advice(_guess(content[:_LOOKED_AT]))


def wide_encoding(content: bytes) -> str | None:
  """Return 'UTF-16' or so if bytes seem to be of two or four bytes a character, even where they happen to be valid UTF-8; else None."""
  for mark, name in _MARKS:
    if content.startswith(mark):
      return name
  head = content[:_LOOKED_AT]
  if b'\0' not in head or len(head) < 4:
    return None
  zeros = [head[i::4].count(0) / max(len(head[i::4]), 1) for i in range(4)]
  often, seldom = [share > 0.4 for share in zeros], [share < 0.05 for share in zeros]
  # Of ASCII, and of most of what is written with few other characters.
  patterns = {'UTF-32LE': (0, 1, 1, 1), 'UTF-32BE': (1, 1, 1, 0), 'UTF-16LE': (0, 1, 0, 1), 'UTF-16BE': (1, 0, 1, 0)}
  for name, pattern in patterns.items():
    if all(often[i] if zero else seldom[i] for i, zero in enumerate(pattern)):
      return name
  return None


def _guess(content: bytes) -> str | None:
  """Return the likely encoding of bytes that are not UTF-8, as `iconv` calls it; None if they are not text."""
  wide = wide_encoding(content)
  if wide is not None:
    return wide
  if len(content.translate(None, _CONTROL)) < 0.97 * len(content):
    return None
  high = [b for b in content if b >= 0x80]
  in_runs = sum(a >= 0x80 and b >= 0x80 for a, b in itertools.pairwise(content))
  if in_runs < 0.4 * len(high):  # single accents between ASCII letters
    return 'WINDOWS-1252'
  if sum(b >= 0xC0 for b in high) > 0.9 * len(high) and sum(b >= 0xE0 for b in high) > 0.6 * len(high):  # mostly small letters
    return 'WINDOWS-1251'
  for encoding, first, last, share in _EAST_ASIAN:
    text = ''.join(c for c in content.decode(encoding, 'ignore') if not c.isascii())
    if sum(first <= c <= last for c in text) > share * len(text) and len(text) > 0.4 * len(high):
      return encoding
  return 'WINDOWS-1252'


def _advice(encoding: str | None) -> str:
  if encoding is None:
    return 'it seems to be binary data rather than text'
  return f'it seems to be {encoding}: convert it to UTF-8, for example with iconv -f {encoding} -t UTF-8'
