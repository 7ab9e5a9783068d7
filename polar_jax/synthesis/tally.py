"""Counts of triplets as they pass, in memory that does not grow with their number: what a data card says of them."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from polar_jax.synthesis.pairing import Triple

ROLES = ('reference', 'chosen', 'rejected')
TEXTS = ('prompt', *ROLES)
OTHER = 'other'  # neither of SCRIPTS: digits, signs and emoji, or another script
_LOOKED_AT = 200  # characters of a prompt
_LETTER = re.compile('[A-Za-z]')
_BINS = 64
# First and last character of ranges that Unicode assigns to a script; signs between the letters are counted with them.
SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
  'Latin': ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
  'Greek': ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
  'Cyrillic': ((0x400, 0x52F), (0x1C80, 0x1C88)),
  'Armenian': ((0x531, 0x58A),),
  'Hebrew': ((0x591, 0x5F4),),
  'Arabic': ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF)),
  'Devanagari': ((0x900, 0x97F),),
  'Bengali': ((0x980, 0x9FE),),
  'Gurmukhi': ((0xA01, 0xA76),),
  'Gujarati': ((0xA81, 0xAFF),),
  'Tamil': ((0xB82, 0xBFA),),
  'Telugu': ((0xC00, 0xC7F),),
  'Kannada': ((0xC80, 0xCF3),),
  'Malayalam': ((0xD00, 0xD7F),),
  'Sinhala': ((0xD81, 0xDF4),),
  'Thai': ((0xE01, 0xE3A), (0xE40, 0xE5B)),
  'Lao': ((0xE81, 0xEDF),),
  'Myanmar': ((0x1000, 0x109F),),
  'Georgian': ((0x10A0, 0x10FF), (0x1C90, 0x1CBF)),
  'Hangul': ((0x1100, 0x11FF), (0x3131, 0x318E), (0xAC00, 0xD7A3)),
  'Ethiopic': ((0x1200, 0x137C),),
  'Khmer': ((0x1780, 0x17F9),),
  'Kana': ((0x3041, 0x309F), (0x30A1, 0x30FF), (0xFF66, 0xFF9F)),
  'Han': ((0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAD9), (0x20000, 0x323AF)),
}
_NAMES = (OTHER, *SCRIPTS)


def _table() -> np.ndarray:
  table = np.zeros(0x110000, np.uint8)
  for number, ranges in enumerate(SCRIPTS.values(), 1):
    for first, last in ranges:
      table[first : last + 1] = number
  return table


_SCRIPT_OF = _table()


class Lengths:
  """Lengths of texts: their number, sum, maximum, and how many have each number of binary digits."""

  def __init__(self) -> None:
    self.count, self.total, self.longest, self.bins = 0, 0, 0, [0] * _BINS

  def add(self, length: int, times: int = 1) -> None:
    self.count += times
    self.total += times * length
    self.bins[length.bit_length()] += times
    if length > self.longest:
      self.longest = length

  def add_all(self, lengths: Sequence[int]) -> None:
    self.count += len(lengths)
    self.total += sum(lengths)
    self.longest = max(self.longest, *lengths)
    for length in lengths:
      self.bins[length.bit_length()] += 1

  def to_json(self) -> dict[str, Any]:
    """Return count, mean, maximum, and a histogram: from the least length of a bin (0, 1, 2, 4, 8, ...) to the texts in it."""
    histogram = {str(1 << i >> 1): count for i, count in enumerate(self.bins) if count}
    return {'count': self.count, 'mean': self.total / self.count if self.count else None, 'max': self.longest, 'histogram': histogram}


@dataclasses.dataclass
class PolicyCount:
  """What a policy of the pool gave.

  Attributes:
    kind: of policy, as the settings name it.
    samples: answers that were kept.
    dropped: answers that were not, because the rules for texts left nothing of them.
    failed: requests without an answer.
    requests: all of them; those of retries too.
    tokens: of all answers, as far as the policy counts them.
    prompt_tokens: of all requests.
    quarantined: why the policy was given up; None if it was not.
    family: of models that it belongs to.
    size: number of parameters, as its makers give it.
    date: when it was published, or sampled.
    held_out: whether it is in no triplet to train on.
    lengths: of its answers in characters.
  """

  kind: str
  samples: int = 0
  dropped: int = 0
  failed: int = 0
  requests: int = 0
  tokens: int = 0
  prompt_tokens: int = 0
  quarantined: str | None = None
  family: str = ''
  size: str | int = ''
  date: str = ''
  held_out: bool = False
  lengths: Lengths = dataclasses.field(default_factory=Lengths)

  def to_json(self) -> dict[str, Any]:
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return {**values, 'lengths': self.lengths.to_json()}


class Tally:
  """Counts of triplets and of samples that were dropped.

  Attributes:
    rows: triplets by split.
    roles: role -> triplets by the policy of this sample.
    lengths: in characters, by text of a triplet.
    scripts: triplets by the script of most letters in the first 200 characters of the prompt; `OTHER` if it has none of SCRIPTS.
    difficulty: triplets by what their policies have in common.
    dropped: samples by the reason why they were dropped.
  """

  def __init__(self) -> None:
    self.rows: collections.Counter[str] = collections.Counter()
    self.roles: dict[str, collections.Counter[str]] = {role: collections.Counter() for role in ROLES}
    self.lengths = {name: Lengths() for name in TEXTS}
    self.scripts: collections.Counter[str] = collections.Counter()
    self.difficulty: collections.Counter[str] = collections.Counter()
    self.dropped: collections.Counter[str] = collections.Counter()

  def update(self, split: str, prompt: str, triples: Sequence[Triple], difficulties: Iterable[str]) -> None:
    """Count the triplets of a prompt in one split, of which there is at least one, with the difficulty of each."""
    count = len(triples)
    self.rows[split] += count
    self.scripts[script_of(prompt)] += count
    self.difficulty.update(difficulties)
    self.lengths['prompt'].add(len(prompt), count)
    references, chosen = [triple[0] for triple in triples], [triple[1] for triple in triples]
    for role, samples in zip(ROLES, (references, chosen, [sample for triple in triples for sample in triple[2:]]), strict=True):
      self.roles[role].update([sample.policy for sample in samples])
      self.lengths[role].add_all([len(sample.text) for sample in samples])

  def to_json(self) -> dict[str, Any]:
    """Return all counts but those by policy, which belong to the policies, with sorted keys."""
    counts = {name: dict(sorted(getattr(self, name).items())) for name in ('rows', 'scripts', 'difficulty', 'dropped')}
    return {**counts, 'lengths': {name: lengths.to_json() for name, lengths in self.lengths.items()}}


def script_of(text: str) -> str:
  """Return the script that most letters in the first 200 characters of a text are of, and `OTHER` if none is of SCRIPTS."""
  start = text[:_LOOKED_AT]
  if start.isascii():
    return 'Latin' if _LETTER.search(start) else OTHER
  characters = np.frombuffer(start.encode('utf-32-le', 'surrogatepass'), np.uint32)
  scripts = np.bincount(_SCRIPT_OF.take(characters))  # an index in brackets takes six times as long
  scripts[0] = 0
  return _NAMES[int(scripts.argmax())]  # the first of equals, which is OTHER if there are no letters
