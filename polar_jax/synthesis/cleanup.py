"""Clean-up of sampled texts, as in the data recipe of the paper (arXiv 2507.05197): cut repetition loops, trim unfinished endings.

Both only shorten a text, so the result is a prefix of it. `polar_jax.miniature.cleanup` has the same rules for token ids.

Loops. A passage of words (of characters, where a script does not separate words) that occurs more than three times back to back stops
after three copies. In the middle of a text the fourth copy must be whole; at the end of the text any part of it will do, and the passage
may have any length. What is not prose repeats for good reasons, so it must repeat for longer:

  passage                                                    copies together
  words, one of which begins with a letter                   any length
  characters, one of them of a script without spaces         16 characters (laughter and thanks are shorter)
  others: words of symbols and digits, such as the rules     128 characters
  and zeros of a table, or part of a single long word

Endings. A text that did not end by itself is cut after its last sentence, else its last line, else its last word, as long as half of it
stays. Enumerators ('2.' at the start of a line) and initials ('J.') end no sentence. A text that ends in an open block of code stays.
"""

# ruff: noqa: RUF001  (the punctuation of many scripts)

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.evaluate.words import UNSPACED

LOOP_PERIODS = 3  # copies of a repeated passage that are kept, enough to show that the policy loops
MAX_WORDS, MAX_CHARACTERS = 64, 128  # of the longest passage whose repetition in the middle of a text counts as a loop
MIN_UNSPACED, MIN_SYMBOLS = 16, 128  # characters of all copies of passages that are not words
_AT_ONCE = 1 << 15  # characters whose words are hashed together: larger arrays are mapped anew each time, which takes three times as long
_GRAM, _MIN_REPEATED = 4, 8  # a loop of at least MIN_UNSPACED characters has this many 4-grams that occurred before

_IS_UNSPACED = re.compile(f'[{UNSPACED}]')
_WORD, _SPACE = re.compile(r'\S+'), re.compile(r'\s')

_CLOSERS = r'"\'”’»›)\]}*_`」』）】》〉］｝＂＇'
_ENDS = '.!?…‼⁇⁈⁉؟۔।॥։።፧'  # before white space, the end of the text, or a letter of a script without spaces
_WIDE_ENDS = '。！？｡．။។៕'  # anywhere
_MARKS = re.compile(rf'[{_ENDS}{_WIDE_ENDS}]++[{_CLOSERS}]*+')
_IS_MARK = frozenset(_ENDS + _WIDE_ENDS + _CLOSERS.replace('\\', ''))
_IS_WIDE = re.compile(f'[{_WIDE_ENDS}]')
_NO_SENTENCE = re.compile(r'(?:(?:\A|\n)[ \t>*#-]*\d{1,3}|(?:\A|[\s.(])[^\W\d_])\Z')  # before a full stop: enumerators, initials
_CONTEXT = 12  # characters that _NO_SENTENCE looks at
_FENCE = re.compile(r'^[ \t]*```', re.MULTILINE)
# By character; what is beyond the tables is no space, and shares its number with another character.
_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3002)])
_NUMBERS = np.random.default_rng(0).integers(2**64, size=1 << 12, dtype=np.uint64)


def clean(texts: Sequence[str], ended: Sequence[bool]) -> list[str]:
  """Return the texts after both rules. Texts that ended by themselves, or were cut in a loop, keep their ending.

  Args:
    texts: samples, in any language.
    ended: whether the policy ended each of them.
  """
  out: list[str] = []
  for start, end in _batches(texts):
    part, done = texts[start:end], ended[start:end]
    suspects = _suspects(_hash_words(part))
    for i, (text, is_whole) in enumerate(zip(part, done, strict=True)):
      # Most texts are neither, and this is all that is done for them.
      kept = _cut_loop(text, is_whole, i in suspects) if i in suspects or not text.isascii() else None
      out.append(kept if kept is not None else text if is_whole else trim_ending(text))
  return out


def trim_ending(text: str) -> str:
  """Return an unfinished text up to its last sentence, else line, else word, if that is half of it or more; else without trailing space."""
  body = text.rstrip()
  if '```' in body and len(_FENCE.findall(body)) % 2:
    return body
  half = (len(body) + 1) // 2
  start = half
  while start and body[start - 1] in _IS_MARK:  # a run of marks is found from its start
    start -= 1
  for match in reversed(list(_MARKS.finditer(body, start))):
    if match.end() >= half and _ends_sentence(body, match.start(), match.end()):
      return body[: match.end()]
  line = len(body) if '\n' in text[len(body) :] else len(body[: max(body.rfind('\n'), 0)].rstrip())
  if line >= half:
    return body[:line]
  parts = [body] if len(body) < len(text) else body.rsplit(None, 1)  # white space ends the last word
  word = len(parts[0]) if len(parts) == 2 else len(body)
  return body[:word] if word >= half else body


def _ends_sentence(text: str, start: int, end: int) -> bool:
  """Return whether the marks at start..end, closing quotes included, are the end of a sentence."""
  if end < len(text) and not text[end].isspace() and not _IS_UNSPACED.match(text, end) and not _IS_WIDE.search(text, start, end):
    return False
  return not (text[start] == '.' and _no_sentence(text, start))


def _no_sentence(text: str, stop: int) -> bool:
  """Return whether the full stop at `stop` belongs to an enumerator or an initial."""
  start = max(stop - _CONTEXT, 0)
  before = text[start:stop]
  return _NO_SENTENCE.search(before if start == 0 else f'x{before}') is not None  # the x: the context begins within a line


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
  """Yield (start, end) of runs of texts that together are about as long as is looked at together."""
  start, size = 0, 0
  for i, text in enumerate(texts):
    size += len(text)
    if size >= _AT_ONCE:
      yield start, i + 1
      start, size = i + 1, 0
  if start < len(texts):
    yield start, len(texts)


class _Words(NamedTuple):
  """All words of several texts, one after the other.

  Attributes:
    hashes: (n,) uint64: words of different texts differ, equal words of a text are equal, and so are its anagrams.
    sizes: (n,) in characters.
    counts: (texts,) number of words of each text.
  """

  hashes: np.ndarray
  sizes: np.ndarray
  counts: np.ndarray


def _hash_words(texts: Sequence[str]) -> _Words:
  """Return the words of some texts, which are told apart as `str.split` does it. No object is made for any of them."""
  joined = '\n'.join(texts)
  if joined.isascii():
    codes = np.frombuffer(joined.encode(), np.uint8)
  else:
    codes = np.frombuffer(joined.encode('utf-32-le', 'surrogatepass'), np.uint32)
  is_space = np.ones(len(codes) + 2, bool)
  _IS_SPACE.take(codes, mode='clip', out=is_space[1:-1])
  edges = np.flatnonzero(is_space[1:] != is_space[:-1])
  starts, ends = edges[::2], edges[1::2]
  sums = np.zeros(len(codes) + 1, np.uint64)
  np.cumsum(_NUMBERS.take(codes, mode='wrap'), out=sums[1:])
  limits = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)) + 1)
  counts = np.diff(np.searchsorted(starts, limits), prepend=0)
  of_text = np.arange(len(texts), dtype=np.uint64) * _NUMBERS[1]
  return _Words(sums[ends] - sums[starts] + np.repeat(of_text, counts), ends - starts, counts)


def _suspects(words: _Words) -> set[int]:
  """Return the texts whose words must be searched for loops: all that have one, or a very long word, and few others.

  Of 2 p + 1 words in a row that equal those p words later, which a loop has, two are at multiples of p (three, if p is 1), and those
  between them are equal too.
  """
  hashes, sizes, counts = words
  found = [np.flatnonzero(sizes >= MIN_SYMBOLS)]
  for period in range(1, min(MAX_WORDS, int(counts.max(initial=0)) // LOOP_PERIODS) + 1):
    sampled = hashes[period::period] == hashes[:-period:period]
    both = sampled[1:] & sampled[:-1]
    hits = np.flatnonzero(both[1:] & both[:-1] if period == 1 else both) * period
    for between in (1, period // 2, period - 1) if len(hits) else ():
      hits = hits[hashes[hits + between] == hashes[hits + between + period]]
    found.append(hits)
  ends = np.cumsum(counts)
  suspects = set(np.unique(np.searchsorted(ends, np.concatenate(found), 'right')).tolist())
  long = np.flatnonzero(counts > LOOP_PERIODS * MAX_WORDS).tolist()
  return suspects.union(i for i in long if _may_end_in_loop(hashes[ends[i] - counts[i] : ends[i]]))


def _may_end_in_loop(words: np.ndarray) -> bool:
  """Return False only if a text does not end in a loop of more than MAX_WORDS words: its last three words occur less than three times.

  Args:
    words: hashes of the words of a text.
  """
  for last in (len(words), len(words) - 1):  # the last word may be incomplete
    first, second, third = words[last - 3 : last]
    at = np.flatnonzero(words[: last - 2] == first)
    if len(at) >= LOOP_PERIODS and np.count_nonzero((words[at + 1] == second) & (words[at + 2] == third)) >= LOOP_PERIODS:
      return True
  return False


def _cut_loop(text: str, ended: bool, is_suspect: bool) -> str | None:
  """Return the text up to the third copy of the first passage that loops; None if none does.

  Args:
    text: a sample.
    ended: whether it ended by itself; else its last word may be incomplete, and does not show that a loop was left.
    is_suspect: whether its words may loop, or one of them is long.
  """
  cuts = []
  words = text.split() if is_suspect else []
  if len(words) > LOOP_PERIODS:
    cuts.append(_cut_words(text, words, ended))
  if max(map(len, words), default=0) >= MIN_SYMBOLS or (not text.isascii() and _IS_UNSPACED.search(text)):
    cuts.append(_cut_characters(text))
  cut = min(cuts, default=len(text))
  return text[:cut].rstrip() if cut < len(text) else None


def _cut_words(text: str, words: list[str], ended: bool) -> int:
  """Return where the first loop of words is to be cut; the length of the text if there is none."""
  table: dict[str, int] = {}
  ids = np.array([table.setdefault(word, len(table)) for word in words])
  spans: list[tuple[int, int]] = []  # of the words; most suspects do without

  def span(word: int) -> tuple[int, int]:
    if not spans:
      spans.extend(match.span() for match in _WORD.finditer(text))
    return spans[word]

  def counts(start: int, period: int, end: int) -> bool:
    return any(word[0].isalpha() for word in words[start : start + period]) or span(end - 1)[1] - span(start)[0] >= MIN_SYMBOLS

  whole = len(words) if ended or text[-1].isspace() else len(words) - 1
  cut = _first_cut(ids, whole, MAX_WORDS, counts)
  return len(text) if cut is None else span(cut - 1)[1]


def _cut_characters(text: str) -> int:
  """Return where the first loop of characters is to be cut; the length of the text if there is none."""
  if not _may_loop(text):
    return len(text)

  def counts(start: int, period: int, end: int) -> bool:
    if end - start >= MIN_SYMBOLS and not _SPACE.search(text, start, start + period):
      return True
    return end - start >= MIN_UNSPACED and _IS_UNSPACED.search(text, start, start + period) is not None

  ids = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
  cut = _first_cut(ids, len(text), MAX_CHARACTERS, counts)
  return len(text) if cut is None else cut


def _may_loop(text: str) -> bool:
  """Return False only if no passage of characters loops: hardly any 4-gram occurs again.

  Of L characters in a loop with a period of p, L - 3 - p 4-grams or more occurred before. L is at least 3 p + 1 and 16.
  """
  codes = memoryview(text.encode('utf-16-le', 'surrogatepass'))
  grams: list[int] = []
  for start in range(0, 2 * _GRAM, 2):
    grams += codes[start : start + (len(codes) - start) // 8 * 8].cast('Q').tolist()
  return len(grams) - len(set(grams)) >= _MIN_REPEATED


def _first_cut(ids: np.ndarray, whole: int, longest: int, counts: Callable[[int, int, int], bool]) -> int | None:
  """Return how many elements stay if everything after the third copy of the first passage that loops is cut; None if none loops.

  Args:
    ids: equal elements have equal numbers.
    whole: number of elements, without a last one that may be incomplete.
    longest: elements of the longest passage that loops in the middle.
    counts: (start, period, end) of a run -> whether it is a loop.
  """
  cut = _cut_at_end(ids[:whole], counts)
  for period in range(1, min(longest, len(ids) // (LOOP_PERIODS + 1)) + 1):
    limit = len(ids) if cut is None else cut
    if LOOP_PERIODS * period >= limit:
      break
    part = ids[: limit + period]  # no loop that is cut earlier ends later with its fourth copy
    # Of every 3 p neighbors in a row that equal those one period later, three are at multiples of p.
    sampled = part[period::period] == part[:-period:period]
    if not (sampled[:-2] & sampled[1:-1] & sampled[2:]).any():
      continue
    breaks = np.flatnonzero(ids[period:] != ids[:-period])
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(ids) - period)
    for i in np.flatnonzero((ends - starts >= LOOP_PERIODS * period) & (starts + LOOP_PERIODS * period < limit)):
      if counts(int(starts[i]), period, int(ends[i]) + period):
        cut = int(starts[i]) + LOOP_PERIODS * period
        break
  return cut


def _cut_at_end(ids: np.ndarray, counts: Callable[[int, int, int], bool]) -> int | None:
  """Return where the loop that the sequence ends in is to be cut, whatever its period; None if there is none."""
  n = len(ids)
  if n <= LOOP_PERIODS or np.count_nonzero(ids == ids[-1]) < LOOP_PERIODS:
    return None
  periods = np.arange(1, (n - 1) // LOOP_PERIODS + 1)
  # A polynomial hash, modulo 2^64, of every prefix of the reversed sequence finds all periods of its first 3 p + 1 elements. It may find
  # too many, so that they are verified below.
  powers = np.cumprod(np.append(np.uint64(1), np.full(n, 0x9E3779B97F4A7C15, np.uint64)), dtype=np.uint64)
  hashes = np.append(np.uint64(0), np.cumsum((ids[::-1].astype(np.uint64) + np.uint64(1)) * powers[:-1], dtype=np.uint64))
  head, tail = hashes[2 * periods + 1], hashes[3 * periods + 1] - hashes[periods]
  candidates = periods[head * powers[periods] == tail]
  cut, known = None, 0
  for period in map(int, candidates):
    # Within a run of period q and length L, a period up to L - q is a multiple of q with the same start, and would be cut later.
    if period <= known:
      continue
    same = ids[period:] == ids[:-period]
    start = n - period - (n - period if same.all() else int(same[::-1].argmin()))
    if n - start <= LOOP_PERIODS * period:
      continue
    known = n - start - period
    if counts(start, period, n) and (cut is None or start + LOOP_PERIODS * period < cut):
      cut = start + LOOP_PERIODS * period
  return cut
