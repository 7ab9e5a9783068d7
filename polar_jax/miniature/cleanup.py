"""Clean-up of sampled trajectories, as in the data recipe of the paper (arXiv 2507.05197): cut repetition loops, trim unfinished endings.

Both only shorten a sequence, so the result is a prefix of the sampled ids. Arrays are padded: ids (n, T), lengths (n,).
"""

from __future__ import annotations

import dataclasses

import numpy as np

LOOP_PERIODS = 3  # copies of a repeated passage that are kept, enough to show that the policy loops
MAX_PERIOD = 8  # tokens of the longest passage whose repetition counts as a loop
MIN_TOKENS = 4  # a trajectory is never cut below this


@dataclasses.dataclass(frozen=True)
class Boundaries:
  """For every token id, whether its text ends a sentence, or starts a line or a word."""

  ends_sentence: np.ndarray  # bool (V,): last visible character is . ! or ?
  starts_line: np.ndarray  # bool (V,): begins with a newline
  starts_word: np.ndarray  # bool (V,): begins with white space


def boundaries(pieces: np.ndarray) -> Boundaries:
  """Return the boundary flags of the token texts `pieces` (object (V,))."""
  texts = list(pieces)
  return Boundaries(
    ends_sentence=np.array([t.rstrip().endswith(('.', '!', '?')) for t in texts]),
    starts_line=np.array([t.startswith('\n') for t in texts]),
    starts_word=np.array([t[:1].isspace() for t in texts]),
  )


def cut_loops(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Return new lengths (n,): a passage of 1..MAX_PERIOD tokens repeated back to back stops after LOOP_PERIODS copies."""
  width = ids.shape[1]
  kept = lengths.copy()
  for period in range(1, min(MAX_PERIOD, (width - 1) // LOOP_PERIODS) + 1):
    same = ids[:, period:] == ids[:, :-period]
    # run: number of consecutive tokens, up to this one, that equal the token one period earlier
    index = np.arange(same.shape[1])
    last_break = np.maximum.accumulate(np.where(same, -1, index), axis=1)
    run = index - last_break
    looped = run > (LOOP_PERIODS - 1) * period
    first = np.where(looped.any(axis=1), looped.argmax(axis=1) + period, width)
    kept = np.minimum(kept, first)
  return np.maximum(kept, np.minimum(lengths, MIN_TOKENS))


def trim_endings(ids: np.ndarray, lengths: np.ndarray, bounds: Boundaries) -> np.ndarray:
  """Return new lengths (n,): cut to the last end of a sentence, else of a line, else of a word, that keeps at least half of the tokens."""
  width = ids.shape[1]
  if width < 2:
    return lengths
  inside = np.arange(1, width)[None, :] < lengths[:, None]  # a cut before token j, for j in 1..length-1
  word = bounds.starts_word[ids[:, 1:]] & inside
  line = bounds.starts_line[ids[:, 1:]] & inside
  sentence = bounds.ends_sentence[ids[:, :-1]] & word
  min_length = np.maximum((lengths + 1) // 2, np.minimum(lengths, MIN_TOKENS))
  trimmed = lengths.copy()
  for flags in (word, line, sentence):  # the last that applies wins
    cut = np.where(flags, np.arange(1, width)[None, :], 0).max(axis=1)
    trimmed = np.where(cut >= min_length, cut, trimmed)
  return trimmed


def clean(ids: np.ndarray, lengths: np.ndarray, ended: np.ndarray, bounds: Boundaries) -> np.ndarray:
  """Return lengths (n,) after both rules. Trajectories that ended by themselves, or were cut in a loop, keep their ending.

  Args:
    ids: int (n, T), padded.
    lengths: int (n,).
    ended: bool (n,), whether the policy ended the trajectory.
    bounds: flags of the vocabulary.
  """
  cut = cut_loops(ids, lengths)
  unfinished = ~ended & (cut == lengths)
  return np.where(unfinished, trim_endings(ids, cut, bounds), cut)
