"""Rules that judge a response without a model, for prompts whose answer is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction

# A minus is a sign unless a word, a number or a closing bracket comes before it.
_BEFORE = r'(?:(?<![\w)\]}%])[-\u2212])?(?:\\?[$€£][-\u2212]?)?'
_RUN = r'[0-9](?:[.,]?[0-9])*+'  # digits with single separators inside
_NUMBER = re.compile(
  rf'(?P<before>{_BEFORE})(?:'
  r'\\[dt]?frac\{(?P<top>-?[0-9]+)\}\{(?P<bottom>-?[0-9]+)\}'
  rf'|(?P<chain>(?:(?<![\w.])\.)?{_RUN}(?:/{_RUN})*+)(?P<exponent>(?:[eE][+-]?[0-9]{{1,3}}(?!\w))?))'
)
_PLAIN = re.compile(r'(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?')
_MAX_DIGITS = 400  # longer numbers come from a policy that repeats itself


class NoAnswerError(ValueError):
  """The answer that a response is compared with has nothing that the rule can read."""


def last_number(text: str) -> Fraction | None:
  """Return the exact value of the last number in a text; None if there is none.

  One number: `1,234.50` (a comma, or LaTeX's `{,}`, before every three digits), `.5`, `-3` (also with U+2212), `$5`, `-$5`, `$-5`,
  `1.5e3`, `3/4` and `\\frac{3}{4}`. A full stop does not belong to the number, and a unit or percent sign is ignored: `50%` is 50.

  A minus counts unless a word, a number or a closing bracket comes right before it: `10-5` ends in 5, `x = -5` in -5. Digits with
  other separators are read from their last part: `1,2` is a list that ends in 2, `3:30` ends in 30, `2024/05/03` in 3, and `1 1/2` in
  the half. Numbers of more than 400 digits are None.
  """
  matches = list(_NUMBER.finditer(text.replace('{,}', ',').replace(',\\!', ',')))
  return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Fraction | None:
  if len(match.group()) > _MAX_DIGITS:
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
  """Return the value of a run of digits; if it is not one number, of the part after the last comma or else the last point."""
  for part in (run, run.rpartition(',')[2], re.split(r'[.,]', run)[-1]):
    if _PLAIN.fullmatch(part):
      return Fraction(part.replace(',', ''))
  raise AssertionError(run)  # unreachable: the last part is all digits


def same_last_number(response: str, answer: str) -> bool:
  """Return whether the last numbers of a response and of an answer are equal as exact values: `0.50` is `1/2`, not `0.5000001`.

  Raises:
    NoAnswerError: the answer has no number.
  """
  expected = last_number(answer)
  if expected is None:
    raise NoAnswerError('its answer has no number for the rule last_number to compare with')
  return last_number(response) == expected


RULES: Mapping[str, Callable[[str, str], bool]] = {'last_number': same_last_number}
