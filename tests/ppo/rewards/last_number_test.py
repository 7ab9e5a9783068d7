"""Limits and tables of the numbers that are read; what is one number and what is not: rules_test.py."""

from __future__ import annotations

from fractions import Fraction

import pytest

from polar_jax.ppo.rewards.last_number import last_number


@pytest.mark.parametrize(
  ('word', 'scale'), [('dozen', 12), ('Hundred', 100), ('thousand', 1e3), ('million', 1e6), ('BILLION', 1e9), ('trillion', 1e12)]
)
def test_words_that_scale_a_number(word, scale):
  assert last_number(f'about 2.5 {word} of them') == Fraction(5, 2) * int(scale)
  assert last_number(f'-3-{word}') == -3 * int(scale)
  assert last_number(f'7 {word}th') == 7  # a part of another word


def test_every_fraction_of_unicode():
  written = {'½': '1/2', '⅓': '1/3', '⅔': '2/3', '¼': '1/4', '¾': '3/4', '⅕': '1/5', '⅖': '2/5', '⅗': '3/5', '⅘': '4/5', '⅙': '1/6'}
  written |= {'⅚': '5/6', '⅐': '1/7', '⅛': '1/8', '⅜': '3/8', '⅝': '5/8', '⅞': '7/8', '⅑': '1/9', '⅒': '1/10'}
  assert {c: last_number(f'it is {c}.') for c in written} == {c: Fraction(value) for c, value in written.items()}
  assert last_number('2⅜') == Fraction(19, 8)


def test_superscripts_are_digits():
  assert [last_number(f'2{c}') for c in '⁰¹²³⁴⁵⁶⁷⁸⁹'] == [2**i for i in range(10)]
  assert last_number('2⁻³') == Fraction(1, 8) and last_number('2¹⁰') == 1024


def test_at_most_400_digits_are_read():
  assert last_number('9' * 400) == 10**400 - 1 and last_number('9' * 401) is None
  # The digits of a power: those of its base times the exponent.
  assert last_number('10^{200}') == 10**200 and last_number('10^{201}') is None
  assert last_number('100^{-133}') == Fraction(1, 100**133) and last_number('100^{-134}') is None


def test_powers_of_zero():
  assert (
    last_number('0^{0}') == 1 and last_number('0^{2}') == 0 and last_number('0^{-1}') is None and last_number('5^{-1}') == Fraction(1, 5)
  )


def test_a_mixed_number_has_a_proper_fraction():
  assert last_number('2 \\frac{0}{3}') == 2 and last_number('2 \\frac{2}{3}') == Fraction(8, 3)
  assert last_number('2 \\frac{3}{3}') is None and last_number('2 \\frac{-1}{3}') is None and last_number('\\frac{1}{0}') is None


def test_what_stands_more_than_40_characters_before_does_not_matter():
  """So that the time is linear: the bracket makes the number the last part of a tuple."""
  near, far = (f'({"a" * padding}1, 2)' for padding in (36, 37))
  assert last_number(near) is None and last_number(far) == 2
