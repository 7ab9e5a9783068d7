"""Exact values of numbers as people, models and LaTeX write them.

A number may have several parts: groups of digits, a fraction, a power, a power of ten. It is found as a whole, with everything that is
joined to it, and then read as a whole or not at all. A part alone would be another number.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

_MAX_DIGITS = 400  # longer numbers come from a policy that repeats itself

_SUPERSCRIPTS = '⁰¹²³⁴⁵⁶⁷⁸⁹'
_TO_DIGITS = {ord(c): str(i) for i, c in enumerate(_SUPERSCRIPTS)}
_VULGAR = {'½': '1/2', '⅓': '1/3', '⅔': '2/3', '¼': '1/4', '¾': '3/4', '⅕': '1/5', '⅖': '2/5', '⅗': '3/5', '⅘': '4/5', '⅙': '1/6'}
_VULGAR |= {'⅚': '5/6', '⅐': '1/7', '⅛': '1/8', '⅜': '3/8', '⅝': '5/8', '⅞': '7/8', '⅑': '1/9', '⅒': '1/10'}
_THIN = '\u2009'  # stands for every space that is narrower than a word space or does not break
_TIMES = '\u00d7'

# One spelling for what has several, in this order.
_SPELLINGS: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
  (re.compile(r'\\left(?![a-z])|\\right(?![a-z])|\\!|\\displaystyle(?![a-z])'), ''),
  (re.compile(r'\{,\}'), ','),
  (re.compile(r'\\(?:text|textbf|textrm|mathrm|mathbf|mbox|operatorname)\s?\{([^{}]*+)\}'), r' \1'),
  (re.compile(r'\s?\^\s?(?:\\circ(?![a-z])|\{\s?\\circ\s?\})'), '°'),
  (re.compile(r'\\[,;: ]|~|[\u00a0\u2007\u2009\u202f]|\\(?:thinspace|enspace|quad)(?![a-z])'), _THIN),
  (re.compile(r'\\(?:times|cdot)(?![a-zA-Z])|[\u00b7\u22c5\u2219\u2715\u2716]'), _TIMES),
  (re.compile('[\u2044\u2215]'), '/'),
  (re.compile(r'\\[dtc]frac(?![a-zA-Z])'), r'\\frac'),
  (re.compile(r'\\frac\s?([0-9])\s?(?=[0-9{])'), r'\\frac{\1}'),
  (re.compile(r'(\\frac\{[^{}]*+\})\s?([0-9])'), r'\1{\2}'),
  (re.compile(r'(?<=[0-9])\*\*(?=[-+\u22120-9(])'), '^'),
  (
    re.compile(rf'(\u207b?)\u207a?([{_SUPERSCRIPTS}]++)'),
    lambda m: f'^{{{"-" if m[1] else ""}{m[2].translate(_TO_DIGITS)}}}',
  ),
  (re.compile(f'[{"".join(_VULGAR)}]'), lambda m: '\\frac{{{}}}{{{}}}'.format(*_VULGAR[m[0]].split('/'))),
]

_MINUS = '[-\u2212]'
# A minus is a sign unless a word, a number or a closing bracket comes before it.
_BEFORE = rf'(?:(?<![\w)\]}}%]){_MINUS})?+(?:\\?[$€£]{_MINUS}?+)?+'
_ARGUMENT = r'\s?\{(?:[^{}]|\{[^{}]*+\})*+\}'
_DIGITS = r"[0-9]++(?:[.,'\u2019_]?[0-9])*+"  # with single separators inside
_POWER = rf'(?:\s?\^\s?(?:\{{[^{{}}]*+\}}|\([^()]*+\)|{_MINUS}?[0-9]++|\\?\w++|(?=\W|$)))'
# The second line: dates, and what is a mixed number or a difference.
_PART = rf"""(?:
  \\(?:frac|[dt]?binom){_ARGUMENT}{_ARGUMENT} | \\sqrt(?:\[[^\[\]]*+\])?{_ARGUMENT}
  | [0-9]++(?:-[0-9]++){{2,}}+ | [0-9]++-[0-9]++/[0-9]++
  | (?:(?<![\w.])\.)?{_DIGITS}(?:[eE][+-]?[0-9]++)?+
){_POWER}*+"""
# Spaces before three digits, or after such a group; fractions of a mixed number; signs of an operation.
_JOIN = rf"""(?:
  {_THIN}(?=[0-9\\]) | (?<![0-9]{{4}})[ ](?=[0-9]{{3}}(?![0-9])) | (?<=[0-9][ ][0-9]{{3}})[ ](?=[0-9])
  | [ ]?(?=\\frac) | [ ](?=[0-9]{{1,9}}/[0-9])
  | (?::|[xX]|[ ][xX][ ])(?=[0-9]) | [ ]?(?:[/*+{_TIMES}±]|\\pm)[ ]?(?=[0-9]|\\frac|\\sqrt)
)"""
_CLUSTER = re.compile(rf'(?P<before>{_BEFORE})(?P<body>{_PART}(?:{_JOIN}{_PART})*+)', re.VERBOSE)

# What makes a cluster a part of something else: of a root, a fraction, a power, a sum with an error or an imaginary number, a multiple of
# pi, digits with a letter for thousands or more.
_PART_OF_BEFORE = re.compile(
  r'(?:√|\\sqrt|\\over|±|\\pm)[\s{(]*$|\\frac\s?\{?[^{}\s]{0,20}$|\\frac\s?\{[^{}]*\}\s?\{[^{}\s]{0,20}$|\^\s?[{(]?\s?$|[0-9] ?[eE] ?\+?$'
)
_PART_OF_AFTER = re.compile(rf'\s?(?:[{_TIMES}^±√π]|\\(?:pi|sqrt|pm|over|choose)(?![a-zA-Z]))|[ikKMB](?!\w)|[0-9]')
# Pairs of (before, after) that make it the last part of a measure such as `2 hours 30 minutes`, and of a tuple or an interval.
_LAST_PARTS = [
  (
    re.compile(
      r"[0-9] ?(?:\u00b0|'|(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|miles?|yards?|yd|feet|foot|ft|km|m|meters?|metres?"
      r'|pounds?|lbs?|kg|dollars?|gallons?|quarts?|degrees?),?(?: and)?) ?$'
    ),
    re.compile(
      r' ?(?:[\'\u2032"\u2033]|(?:months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|yards?|feet|ft|inch(?:es)?|in|ounces?'
      r'|oz|cents?|grams?|g|m|meters?|metres?|centimeters?|cm|quarts?|pints?|cups?)\b)'
    ),
  ),
  (re.compile(r'[(\[{][^()\[\]{}]*[0-9}],\s?$'), re.compile(r'\s?\\?[)\]}]')),
]
_SCALES = {'dozen': 12, 'hundred': 10**2, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12}
_SCALE = re.compile(rf'[ {_THIN}-]?({"|".join(_SCALES)})\b', re.IGNORECASE)
# Not numbers but powers of units and indices: `25 cm^2` is 25.
_UNIT = r'(?<![a-zA-Z])(?:[kcdm\u00b5]?m|in|ft|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|(?:[a-z]+)?met(?:er|re)s?|units?|s|sec(?:onds?)?)'
_OF_A_UNIT = re.compile(rf'{_UNIT}\s?\}}?\s?\^\s?\{{?$')
_GLUED_TO_A_UNIT = re.compile(r'(?<![a-zA-Z])(?:[kcdm]?m|in|ft|yd|mi)$')
_INDEX = re.compile(r'(?<=[a-zA-Z}])_\{?$')

_GROUPED = re.compile(rf"(?:[0-9]+|[0-9]{{1,3}}(?P<by>[,'\u2019_ {_THIN}])[0-9]{{3}}(?:(?P=by)[0-9]{{3}})*)?(?:\.[0-9]+)?")
_SCIENTIFIC = re.compile(r'(?P<factor>.+?)[eE](?P<ten>[+-]?[0-9]{1,3})')
_EXPONENT = rf'{_MINUS}?[0-9]{{1,4}}'
_POWER_OF = re.compile(rf'(?P<base>[^^]+?)\s?\^\s?(?:\{{\s?(?P<a>{_EXPONENT})\s?\}}|\((?P<b>{_EXPONENT})\)|(?P<c>{_EXPONENT}))')
_FRACTION = re.compile(r'\\frac\s?\{\s?(?P<top>[^{}]+?)\s?\}\s?\{\s?(?P<bottom>[^{}]+?)\s?\}')
_MIXED = re.compile(rf'(?P<whole>[0-9]+)(?:[ {_THIN}]?(?P<frac>\\frac.*)|[ {_THIN}](?P<slash>[0-9]+/[0-9]+))')
_PRODUCT = re.compile(rf'(?P<factor>[^*xX{_TIMES}]+?)\s?[*xX{_TIMES}]\s?(?P<power>10\s?\^.+)')


def last_number(text: str) -> Fraction | None:
  """Return the exact value of the last number in a text; None if there is none, or if it is written in a way that is not understood.

  Understood are `1,234.50`, with commas, LaTeX's `{,}`, spaces, apostrophes or underscores before every three digits, `.5`, `-3` (also
  with U+2212), `$5`, `-$5`, `$-5`, `3/4`, `\\frac{3}{4}`, `1 1/2`, `1.5e3`, `1.5 \\times 10^3`, `2^{10}` and `5 million`, with signs and
  superscripts of Unicode or LaTeX. A full stop does not belong to the number, and a unit or percent sign is ignored: `50%` is 50, `25 cm^2`
  is 25.

  A minus counts unless a word, a number or a closing bracket comes right before it: `10-5` ends in 5, `x = -5` in -5. `1,2`, `3:30`,
  `2024/05/03`, `3 * 4`, `(3, 4)`, `2 h 30 min`, `2\\sqrt{3}`, `x^2` and numbers of more than 400 digits are None: no part of them is the
  number.
  """
  for pattern, replacement in _SPELLINGS:
    text = pattern.sub(replacement, text)
  for match in reversed(list(_CLUSTER.finditer(text))):
    before = text[max(match.start() - 40, 0) : match.start()]
    if _INDEX.search(before) or _OF_A_UNIT.search(before) or (match['body'] in ('2', '3') and _GLUED_TO_A_UNIT.search(before)):
      continue
    if _PART_OF_BEFORE.search(before) or _PART_OF_AFTER.match(text, match.end()) or len(match.group()) > _MAX_DIGITS:
      return None
    if any(first.search(before) and second.match(text, match.end()) for first, second in _LAST_PARTS):
      return None
    value, scale = _read(match['body']), _SCALE.match(text, match.end())
    value = _times(value, Fraction(_SCALES[scale[1].lower()] if scale else 1))
    return -value if value is not None and re.search(_MINUS, match['before']) else value
  return None


def _read(body: str) -> Fraction | None:
  """Return the value of a number with all its parts; None if it is not one number."""
  if match := _PRODUCT.fullmatch(body):
    return _times(_plain(match['factor']), _power(match['power']))
  if match := _MIXED.fullmatch(body):
    part = _read(match['frac'] or match['slash'])
    return int(match['whole']) + part if part is not None and 0 <= part < 1 else None
  if match := _FRACTION.fullmatch(body):
    return _divide(_signed(match['top']), _signed(match['bottom']))
  if '/' in body:
    parts = re.split(' ?/ ?', body)
    return _divide(*map(_read, parts)) if len(parts) == 2 else None
  return _power(body) if '^' in body else _plain(body)


def _signed(text: str) -> Fraction | None:
  """Return the value of an argument of LaTeX."""
  value = _read(text[1:].lstrip() if re.match(_MINUS, text) else text)
  return -value if value is not None and re.match(_MINUS, text) else value


def _plain(body: str) -> Fraction | None:
  """Return the value of digits with separators, a point and an exponent of ten."""
  match = _SCIENTIFIC.fullmatch(body)
  digits = match['factor'] if match else body
  grouped = _GROUPED.fullmatch(digits)
  if not grouped or not digits:
    return None
  value = Fraction(digits.replace(grouped['by'], '') if grouped['by'] else digits)
  return value * Fraction(10) ** int(match['ten']) if match else value


def _power(body: str) -> Fraction | None:
  """Return the value of one number to the power of a whole one, if it has not too many digits."""
  match = _POWER_OF.fullmatch(body)
  base = _plain(match['base']) if match else None
  if match is None or base is None:
    return None
  exponent = int((match['a'] or match['b'] or match['c']).replace('\u2212', '-'))
  if (exponent < 0 and not base) or abs(exponent) * len(match['base']) > _MAX_DIGITS:
    return None
  return base**exponent


def _times(a: Fraction | None, b: Fraction | None) -> Fraction | None:
  return None if a is None or b is None else a * b


def _divide(a: Fraction | None, b: Fraction | None) -> Fraction | None:
  return None if a is None or not b else a / b
