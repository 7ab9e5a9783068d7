from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from polar_jax.ppo.rewards import rules


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('She has 12.', '12'),
    ('12', '12'),
    ('#### 1,234.50', '1234.5'),
    ('1,234,567 people', '1234567'),
    ('1{,}000 or $1,\\!000$', '1000'),
    ('from 3 to 4 apples', '4'),
    ('costs $5', '5'),
    ('loses -$5', '-5'),
    ('loses $-5.25.', '-5.25'),
    ('\\$18', '18'),
    ('x = -5', '-5'),
    ('x=-5', '-5'),
    ('(-5)', '-5'),
    ('\u22127 degrees', '-7'),
    ('10-5', '5'),
    ('5% of 10-20%', '20'),
    ('f(2)-3', '3'),
    ('a well-2', '2'),
    ('.5', '1/2'),
    ('-.5', '-1/2'),
    ('so...5', '5'),
    ('he ran.5', '5'),
    ('007', '7'),
    ('50%', '50'),
    ('5km', '5'),
    ('1.5e3', '1500'),
    ('2E-2', '1/50'),
    ('2e', '2'),
    ('3/4', '3/4'),
    ('-3/4 cup', '-3/4'),
    ('it is 6/3.', '2'),
    ('4/0', '0'),
    ('\\boxed{\\frac{3}{4}}', '3/4'),
    ('-\\dfrac{-3}{4}', '3/4'),
    ('1 1/2', '1/2'),
    ('2024/05/03', '3'),
    ('3:30', '30'),
    ('1,2', '2'),
    ('1, 2 and 3', '3'),
    ('1,2345', '2345'),
    ('10,20,300', '300'),
    ('version 1.2.3', '3'),
    ('12,345.67,8.5', '8.5'),
    ('\\boxed{72}. Done!', '72'),
    ('answer: **72**', '72'),
  ],
)
def test_last_number(text, expected):
  assert rules.last_number(text) == Fraction(expected)


@pytest.mark.parametrize('text', ['', 'none', '-', '$', '...', '1/', '٣', '\\frac{1}{0}', '\\frac{a}{b}', '9' * 401])
def test_no_number(text):
  assert rules.last_number(text) == (Fraction(1) if text == '1/' else None)


def written(rng, value):
  """Return a decimal number (whole, hundredths) in one of its spellings."""
  whole, hundredths = value
  digits = f'{whole:,}' if rng.random() < 0.5 else '0' * rng.randrange(2) + str(whole)
  if hundredths or rng.random() < 0.3:
    digits += f'.{hundredths:02d}' + '0' * rng.randrange(3)
  return rng.choice(['', '$', '\\$']) + digits + rng.choice(['', '.', '%', ' km', ')', '**', '\n'])


def test_same_last_number_of_all_spellings():
  rng = random.Random(0)
  for _ in range(2_000):
    value, other = [(rng.choice([0, 7, 999, 1_000, rng.randrange(10**9)]), rng.choice([0, 5, 50, 99])) for _ in range(2)]
    output = rng.choice(['', 'First 3, then ', 'Is it 4.5? No: ', '1/2 = ']) + written(rng, value)
    assert rules.same_last_number(output, written(rng, value)), output
    assert rules.same_last_number(output, written(rng, other)) == (value == other)
    assert not rules.same_last_number(output, '-' + written(rng, value)) or value == (0, 0)


def test_values_are_compared_exactly():
  assert rules.same_last_number('0.50', '1/2')
  assert not rules.same_last_number('0.1', '0.1000000000000000055511151231257827')  # the same double
  assert not rules.same_last_number('0.3333333333333333', '1/3')
  assert not rules.same_last_number('no idea', '3')


def test_same_last_number_refuses_an_answer_without_a_number():
  with pytest.raises(rules.NoAnswerError, match='its answer has no number for the rule last_number'):
    rules.same_last_number('3', 'three')


@pytest.mark.parametrize(
  'text', ['1,11' * 8_000, '1' * 30_000, '1/' * 15_000, '-$' * 15_000, '\\frac{1' * 5_000, '1e1' * 10_000, '.,' * 15_000]
)
def test_noise_of_a_policy_is_read_in_linear_time(text):
  started = time.perf_counter()
  rules.last_number(text)
  assert time.perf_counter() - started < 2
