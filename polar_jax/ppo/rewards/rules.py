"""Rules that judge an answer without a model, for prompts whose answer is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction

# A minus is a sign where no word, number or closing bracket stands before it.
_BEFORE = r'(?:(?<![\w)\]}%])[-\u2212])?(?:\\?[$€£][-\u2212]?)?'
_RUN = r'[0-9](?:[.,]?[0-9])*+'  # digits with single separators inside
_NUMBER = re.compile(
  rf'(?P<before>{_BEFORE})(?:'
  r'\\[dt]?frac\{(?P<top>-?[0-9]+)\}\{(?P<bottom>-?[0-9]+)\}'
  rf'|(?P<chain>(?:(?<![\w.])\.)?{_RUN}(?:/{_RUN})*+)(?P<exponent>(?:[eE][+-]?[0-9]{{1,3}}(?!\w))?))'
)
_PLAIN = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
_MOST_DIGITS = 400  # a longer number is the noise of a policy that repeats itself


class NoAnswerError(ValueError):
  """What an output is to be compared with holds nothing that the rule can read."""


def last_number(text: str) -> Fraction | None:
  """The exact value of the last number in a text; None if there is none.

  Read as one number: `1,234.50` (a comma, or LaTeX's `{,}`, before every three digits), `.5`, `-3` (also with U+2212), `$5`, `-$5`,
  `$-5`, `1.5e3`, `3/4` and `\\frac{3}{4}`. A point that ends a sentence is none of the number's, and a unit or a percent sign
  changes nothing: `50%` is 50.

  A minus counts where neither a word, a number nor a closing bracket stands right before it: `10-5` ends in 5, `x = -5` in -5. Of
  digits with other separators the last part is read: `1,2` is a list that ends in 2, `3:30` ends in 30, `2024/05/03` in 3, and of
  `1 1/2` the half is read. Numbers of more than 400 digits are None.
  """
  found = list(_NUMBER.finditer(text.replace('{,}', ',').replace(',\\!', ',')))
  return _value(found[-1]) if found else None


def _value(match: re.Match[str]) -> Fraction | None:
  if len(match.group()) > _MOST_DIGITS:
    return None
  sign = -1 if re.search('[-\u2212]', match['before']) else 1
  if match['top']:
    top, bottom = int(match['top']), int(match['bottom'])
    return sign * Fraction(top, bottom) if bottom else None
  parts = match['chain'].split('/')
  exponent = Fraction(10) ** int(match['exponent'][1:] or 0) if match['exponent'] else 1
  numbers = [_read(part) for part in parts]
  if len(parts) == 1:
    return sign * numbers[0] * exponent
  return sign * numbers[0] / numbers[1] if len(parts) == 2 and numbers[1] else numbers[-1]


def _read(run: str) -> Fraction:
  """A run of digits; of one that is no single number the part behind the last comma, or else behind the last point."""
  for part in (run, run.rpartition(',')[2], re.split(r'[.,]', run)[-1]):
    if _PLAIN.fullmatch(part):
      return Fraction(part.replace(',', ''))
  raise AssertionError(run)  # the last part is digits


def same_last_number(output: str, answer: str) -> bool:
  """Whether the last number of an output is that of the answer, as exact values: `0.50` is `1/2`, and `0.1` is not `0.1000001`.

  Raises:
    NoAnswerError: there is no number in the answer.
  """
  expected = last_number(answer)
  if expected is None:
    raise NoAnswerError('there is no number in its answer, which the rule last_number compares with')
  return last_number(output) == expected


RULES: Mapping[str, Callable[[str, str], bool]] = {'last_number': same_last_number}
