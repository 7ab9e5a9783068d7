from __future__ import annotations

import random
from fractions import Fraction

import pytest

from polar_jax.ppo.rewards import rules
from polar_jax.ppo.rewards.last_number import last_number


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
    ('\\boxed{\\frac{3}{4}}', '3/4'),
    ('-\\dfrac{-3}{4}', '3/4'),
    ('1 1/2', '3/2'),
    ('1, 2 and 3', '3'),
    ('\\boxed{72}. Done!', '72'),
    ('answer: **72**', '72'),
    ('3 \\times 10^5', '300000'),
    ('3\xd710^{5}', '300000'),
    ('3 x 10^5', '300000'),
    ('3x10^5', '300000'),
    ('3*10^5', '300000'),
    ('3\xb710\u2075', '300000'),
    ('1.5 \\cdot 10^{-3}', '0.0015'),
    ('10^5', '100000'),
    ('10\u207b\xb3', '0.001'),
    ('2^{10}', '1024'),
    ('2^10 bytes', '1024'),
    ('2**10', '1024'),
    ('$2^{10}$', '1024'),
    ('-2^2', '-4'),
    ('2^{-3}', '1/8'),
    ('1 234 567', '1234567'),
    ('1\xa0234\u202f567', '1234567'),
    ('1\u202f234\u202f567', '1234567'),
    ('1\\,234\\,567', '1234567'),
    ("1'234'567.5", '1234567.5'),
    ('1\u2019234', '1234'),
    ('1_000_000', '1000000'),
    ('1 234.5', '1234.5'),
    ('12 15 18', '18'),
    ('In 2020 150 people', '150'),
    ('1\\frac{1}{2}', '3/2'),
    ('-1 1/2', '-3/2'),
    ('1\xbd cups', '3/2'),
    ('\xbd', '1/2'),
    ('33 1/3%', '100/3'),
    ('\\frac34', '3/4'),
    ('\\frac 3 4', '3/4'),
    ('\\frac{1,000}{3}', '1000/3'),
    ('\\frac{3}{-4}', '-3/4'),
    ('-\\frac{3}{4}', '-3/4'),
    ('\\frac{1.5}{2}', '3/4'),
    ('3 / 4', '3/4'),
    ('3\u20444', '3/4'),
    ('\\frac{2^3}{5}', '8/5'),
    ('\\frac{1}{2}=5', '5'),
    ('3 + 4 = 7', '7'),
    ('3 \\times 4 = 12', '12'),
    ('25 cm^2', '25'),
    ('25\\text{ cm}^2', '25'),
    ('25 m\xb2', '25'),
    ('25 cm2', '25'),
    ('25\\,\\mathrm{cm}^{3}', '25'),
    ('x_1 = 5', '5'),
    ('90^\\circ', '90'),
    ('90\xb0', '90'),
    ('50\\%', '50'),
    ('12.5 %', '12.5'),
    ('\\text{The answer is } 7', '7'),
    ('\\textbf{72}', '72'),
    ('\\left(-\\frac{1}{2}\\right)', '-1/2'),
    ('the answer is _5_.', '5'),
    ('+5', '5'),
    ('5!', '5'),
    ('6.02e23', '602000000000000000000000'),
    ('1,5 and 7 000', '7000'),
    ('\\log_2 8', '8'),
    ('\\boxed{1\\,000}', '1000'),
    ('$1,234$', '1234'),
    ('\\(x=\\frac{7}{2}\\)', '7/2'),
    ('3.5 million', '3500000'),
    ('5 Million people', '5000000'),
    ('2 dozen', '24'),
    ('-3 hundred', '-300'),
    ('5-thousand', '5000'),
    ('In 5 days 3 workers', '3'),
    ('lasts 2 hours, then 5 more', '5'),
    ('f(2)', '2'),
    ('(12)', '12'),
    ('{5}', '5'),
    ('5 m', '5'),
    ('It has 30 minutes', '30'),
    ('\\boxed{12}', '12'),
    ('for 3 people (4)', '4'),
    ('3 km and 20 people', '20'),
    ('$1{,}234{,}567$', '1234567'),
    ('1.2e+5', '120000'),
    ('10 ^ {5}', '100000'),
  ],
)
def test_last_number(text, expected):
  assert last_number(text) == Fraction(expected)


@pytest.mark.parametrize(
  'text',
  [
    '4/0',
    '2024/05/03',
    '3:30',
    '1,2',
    '1,2345',
    '10,20,300',
    'version 1.2.3',
    '12,345.67,8.5',
    '',
    'none',
    '-',
    '$',
    '...',
    '\u0663',
    '\\frac{1}{0}',
    '\\frac{a}{b}',
    '2^{n}',
    '2^n',
    '2^{1/2}',
    '2^3^2',
    '10^{10^{10}}',
    '1 234 56',
    '1.234.567',
    "1'23",
    '1,234 567',
    '1-1/2',
    '2 3/2',
    '\\frac{\\pi}{2}',
    '\\frac{x+1}{2}',
    '\\frac{\\frac{1}{2}}{3}',
    '\\frac{3}{',
    '\\frac{3',
    '{3 \\over 4}',
    '2\\sqrt{3}',
    '\\sqrt{16}',
    '\u221a2',
    '2\\pi',
    '2\u03c0',
    '3 + 4i',
    '3+4',
    '3 \xd7 4',
    '3 x 4',
    '5 \\pm 0.1',
    'x^2',
    'x_1',
    '1e5000',
    '2024-05-03',
    '(1/2)^3',
    '\\binom{5}{2}',
    '2 \\times 3 \\times 10^4',
    '10 000,5',
    '1.2 E 5',
    '1.2 E5',
    '5k',
    '$5M',
    '2 hours 30 minutes',
    '2 h 30 min',
    '5 ft 3 in',
    '5\xb0 30\u2032',
    '3 pounds, 4 ounces',
    '5 dollars and 25 cents',
    '(3, 4)',
    '[1, 2]',
    '\\{1, 2\\}',
    '1.000.000',
    '1,00,000',
    '10^{+5}',
    '9' * 401,
    '10^{400}',
  ],
)
def test_what_is_not_one_number_is_not_judged_by_its_last_part(text):
  assert last_number(text) is None


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


@pytest.fixture
def no_math_verify(monkeypatch):
  monkeypatch.setattr(rules, '_math_verify', lambda: None)


def test_a_number_of_several_parts_earns_only_what_it_is_worth(no_math_verify):
  """Its last part would often be right by chance, and would be another number."""
  assert rules.same_last_number('It is 3 \\times 10^5.', '300,000') and not rules.same_last_number('It is 3 \\times 10^5.', '5')
  assert rules.same_last_number("1'234'567", '1234567') and not rules.same_last_number("1'234'567", '567')
  for response in ('2\\sqrt{3}', 'x^3', '1,3', '2:03', '2024/12/3', '3 x 3'):
    assert not rules.same_last_number(response, '3')


def test_same_last_number_refuses_an_answer_without_a_number(no_math_verify):
  for answer in ('three', '2\\sqrt{3}'):
    with pytest.raises(rules.NoAnswerError, match=r'its answer has no number that the rule last_number reads.*math-verify'):
      rules.same_last_number('3', answer)


class FakeMathVerify:
  """Reads what stands between dollars, and compares it as text."""

  def parse(self, text, parsing_timeout):
    assert parsing_timeout == 5
    return text.split('$')[1:2]

  def verify(self, gold, target, timeout_seconds):
    assert timeout_seconds == 5
    return bool(target) and gold == target


def test_math_verify_judges_only_what_last_number_does_not_read(monkeypatch):
  monkeypatch.setattr(rules, '_math_verify', FakeMathVerify)
  assert rules.same_last_number('0.5', '1/2') and not rules.same_last_number('$3$', '4')
  assert rules.same_last_number('$2\\sqrt{3}$', '2\\sqrt{3}') and not rules.same_last_number('$2\\sqrt{5}$', '2\\sqrt{3}')
  monkeypatch.setattr(FakeMathVerify, 'parse', lambda self, text, parsing_timeout: [])
  with pytest.raises(rules.NoAnswerError, match='nothing that the rule last_number or math-verify can read'):
    rules.same_last_number('3', 'three')


@pytest.mark.needs('math_verify')
def test_math_verify_judges_formulas():
  for response, answer, right in (
    ('So $\\sqrt{12}$.', '2\\sqrt{3}', True),
    ('So $\\sqrt{13}$.', '2\\sqrt{3}', False),
    ('The set is $\\{1,2\\}$.', '\\{1,2\\}', True),
    ('$\\frac{\\pi}{2}$', '\\frac{\\pi}{2}', True),
    ('$x^2+1$', '1+x^2', True),
    ('3', '2\\sqrt{3}', False),
    ('no idea', '2\\sqrt{3}', False),
    ('I get $5\\pi$.', 'The area is $5\\pi$.', True),
  ):
    assert rules.same_last_number(response, answer) == right, response


NOISE = [
  '1,11',
  '1',
  '1/',
  '-$',
  '\\frac{1',
  '1e1',
  '.,',
  '1 000',
  '1^2',
  '\\frac{1}{2}',
  '1 1/2 ',
  '10^{',
  '{',
  '\\frac{',
  '2^(',
  'cm^2',
  'x_1',
]
NOISE += ['1 h ', '(1, ', '1 million ', '1 ', '1 234 ', '\\text{', '1-', '{}', '\\sqrt[', '1e', '\u00b2', '1:', '\u00bd', '~']


@pytest.mark.parametrize('text', NOISE)
def test_noise_of_a_policy_is_read_in_linear_time(text):
  """Milliseconds; a quadratic search would take minutes."""
  last_number(text * 20_000)
