"""Word problems with one or two steps of arithmetic, whose answers a rule can check: data for fine-tuning a real language model.

Example i of a split is a function of (settings, seed, split, i) alone. The split of a problem is a hash of its template and its
numbers, so that no problem of one split occurs in another under other names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.config import SynthesizeConfig, current_name
from polar_jax.runtime import json_files, paths

SPLITS = ('train', 'validation', 'test')
_FORMAT = 1  # bumped whenever the same settings give other examples
_MARKER = 'arithmetic.json'  # written last: its presence means that the files are complete
INSTRUCTION = 'Answer in one short sentence.'
_MAX_FACTOR = 12  # for both factors of a product, the divisor and the quotient


class Template(NamedTuple):
  """A question with placeholders, its steps, and the claim of its answer.

  Placeholders: {n}, {m}, {o} names, {t} things of `kind`, {p} a place, {a}, {b}, {c} numbers, {x} the result. A step is two operands
  and an operator; `_` is the result of the previous step.
  """

  steps: tuple[str, ...]
  kind: str
  question: str
  claim: str


# fmt: off
NAMES = (
  'Ada', 'Ben', 'Cleo', 'Dan', 'Eva', 'Finn', 'Gita', 'Hugo', 'Ines', 'Jon', 'Kira', 'Leo', 'Mina', 'Nils', 'Olga', 'Paul', 'Rosa',
  'Sam', 'Tara', 'Umar', 'Vera', 'Will', 'Yara', 'Zoe', 'Anna', 'Omar', 'Lena', 'Igor', 'Maya', 'Noah', 'Lucy', 'Ivan', 'Emma', 'Karl',
  'Nora', 'Erik', 'Lily', 'Max', 'Ruth', 'Tom',
)
# fmt: on
PLACES = ('school', 'park', 'museum', 'station', 'library', 'market', 'zoo', 'harbor', 'theater', 'stadium', 'town hall', 'beach')
THINGS = {
  'small': ('marbles', 'stickers', 'coins', 'shells', 'cards', 'beads', 'buttons', 'stamps', 'pencils', 'toy cars', 'postcards', 'keys'),
  'food': ('apples', 'cookies', 'plums', 'nuts', 'eggs', 'rolls', 'pears', 'candies', 'muffins', 'lemons', 'carrots', 'cherries'),
  'big': ('chairs', 'boxes', 'bicycles', 'lamps', 'books', 'plants', 'tents', 'balls', 'plates', 'blankets', 'baskets', 'bottles'),
  'animals': ('birds', 'ducks', 'sheep', 'goats', 'cows', 'frogs', 'rabbits', 'horses', 'pigeons', 'turtles', 'fish', 'geese'),
  'none': ('',),
}


def _t(steps: str, kind: str, question: str, claim: str) -> Template:
  return Template(tuple(steps.split()), kind, question, claim)


TEMPLATES = (
  # One step: sums.
  _t('a+b', 'small', '{n} has {a} {t}. {m} gives {n} {b} more. How many {t} does {n} have now?', '{n} has {x} {t}'),
  _t('a+b', 'food', 'There are {a} {t} in a bowl and {b} {t} in a bag. How many {t} are there in all?', 'there are {x} {t} in all'),
  _t('a+b', 'none', '{n} read {a} pages on Monday and {b} pages on Tuesday. How many pages did {n} read?', '{n} read {x} pages'),
  _t(
    'a+b',
    'none',
    'A bus carries {a} people. At the {p} {b} more people get on. How many people are on the bus?',
    '{x} people are on the bus',
  ),
  _t('a+b', 'none', '{n} scored {a} points in the first game and {b} in the second. How many points is that?', '{n} scored {x} points'),
  _t('a+b', 'animals', '{a} {t} stood by the {p}, and {b} {t} joined them. How many {t} are by the {p} now?', '{x} {t} are by the {p}'),
  _t('a+b', 'none', '{n} drove {a} miles to the {p} and then {b} miles to see {m}. How many miles did {n} drive?', '{n} drove {x} miles'),
  _t('a+b', 'none', 'The {p} sold {a} tickets before noon and {b} after noon. How many tickets were sold?', '{x} tickets were sold'),
  _t('a+b', 'none', '{n} is {a} years old. {m} is {b} years older than {n}. How old is {m}?', '{m} is {x} years old'),
  _t('a+b', 'small', '{n} has {a} {t}, which is {b} fewer than {m} has. How many {t} does {m} have?', '{m} has {x} {t}'),
  _t('a+b', 'none', 'A coat costs {a} dollars and a hat costs {b} dollars. How much do they cost together?', 'they cost {x} dollars'),
  # One step: differences.
  _t('a-b', 'small', '{n} had {a} {t} and lost {b} of them at the {p}. How many {t} does {n} have left?', '{n} has {x} {t} left'),
  _t('a-b', 'food', 'A shop had {a} {t} and sold {b}. How many {t} are left?', '{x} {t} are left'),
  _t('a-b', 'small', '{n} has {a} {t} and {m} has {b}. How many more {t} does {n} have than {m}?', '{n} has {x} more {t}'),
  _t('a-b', 'none', 'There are {a} seats in the {p}, and {b} of them are taken. How many seats are free?', '{x} seats are free'),
  _t('a-b', 'none', 'A rope is {a} feet long. {n} cuts off {b} feet. How long is the rest?', 'the rest is {x} feet long'),
  _t('a-b', 'big', 'There were {a} {t} in the {p}. {n} carried {b} of them away. How many {t} are still there?', '{x} {t} are still there'),
  _t('a-b', 'none', '{n} needs {a} dollars and has saved {b} dollars. How many dollars are missing?', '{x} dollars are missing'),
  _t(
    'a-b',
    'none',
    '{a} children came to the {p}. {b} of them walked and the others took the bus. How many took the bus?',
    '{x} took the bus',
  ),
  _t('a-b', 'food', '{n} and {m} picked {a} {t} together. {n} picked {b} of them. How many did {m} pick?', '{m} picked {x} {t}'),
  _t('a-b', 'none', 'A film lasts {a} minutes. {n} has watched {b} minutes. How many minutes are left?', '{x} minutes are left'),
  # One step: products.
  _t('a*b', 'small', 'One box holds {a} {t}. How many {t} are in {b} boxes?', '{b} boxes hold {x} {t}'),
  _t('a*b', 'none', '{n} walks {a} miles every day. How many miles does {n} walk in {b} days?', '{n} walks {x} miles'),
  _t('a*b', 'big', 'The {p} has {b} rooms with {a} {t} in each. How many {t} does it have?', 'it has {x} {t}'),
  _t('a*b', 'none', 'One ticket to the {p} costs {a} dollars. How much do {b} tickets cost?', '{b} tickets cost {x} dollars'),
  _t('a*b', 'none', '{n} plants {b} rows of {a} trees. How many trees does {n} plant?', '{n} plants {x} trees'),
  _t('a*b', 'none', '{n} earns {a} dollars an hour at the {p}. How much does {n} earn in {b} hours?', '{n} earns {x} dollars'),
  _t('a*b', 'small', '{n} has {a} {t}. {m} has {b} times as many. How many {t} does {m} have?', '{m} has {x} {t}'),
  # One step: quotients.
  _t('a/b', 'food', '{n} shares {a} {t} equally among {b} friends. How many {t} does each friend get?', 'each friend gets {x} {t}'),
  _t('a/b', 'none', '{a} children at the {p} form teams of {b}. How many teams are there?', 'there are {x} teams'),
  _t('a/b', 'none', '{n} cuts a ribbon of {a} inches into {b} equal pieces. How long is each piece?', 'each piece is {x} inches long'),
  _t('a/b', 'small', '{n} puts {a} {t} into bags of {b}. How many bags does {n} fill?', '{n} fills {x} bags'),
  _t('a/b', 'none', 'At the {p} {b} notebooks cost {a} dollars. How much does one notebook cost?', 'one notebook costs {x} dollars'),
  _t('a/b', 'none', 'A book has {a} pages. {n} reads {b} pages a day. How many days does {n} need?', '{n} needs {x} days'),
  # Two steps.
  _t('a+b _-c', 'small', '{n} has {a} {t}, finds {b} more and gives {c} to {m}. How many {t} does {n} have now?', '{n} has {x} {t}'),
  _t(
    'a-b _+c', 'none', 'A train has {a} passengers. At the {p} {b} get off and {c} get on. How many are on it now?', '{x} are on the train'
  ),
  _t('a-b _-c', 'none', '{n} had {a} dollars and spent {b} on lunch and {c} on a book. How many dollars are left?', '{x} dollars are left'),
  _t('a+b _+c', 'food', '{n} picked {a} {t}, {m} picked {b} and {o} picked {c}. How many {t} is that?', 'they picked {x} {t}'),
  _t('a*b _+c', 'small', '{n} had {c} {t} and buys {b} boxes of {a} {t}. How many {t} does {n} have now?', '{n} has {x} {t}'),
  _t('a*b _-c', 'food', 'There are {b} bags with {a} {t} each, and {c} of the {t} are bad. How many {t} are good?', '{x} {t} are good'),
  _t(
    'a*b c-_',
    'none',
    '{n} buys {b} tickets for {a} dollars each and pays with {c} dollars. How much change is due?',
    'the change is {x} dollars',
  ),
  _t('a/b _+c', 'small', '{n} gives {a} {t} in equal shares to {b} children who had {c} each. How many has each now?', 'each has {x} {t}'),
  _t(
    'a/b _-c', 'food', '{n} gets {a} {t} into {b} equal bags and eats {c} from one bag. How many are left in it?', '{x} {t} are left in it'
  ),
  _t('a+b _/c', 'small', '{n} sorts {a} red and {b} blue {t} into {c} equal piles. How many {t} are in a pile?', 'a pile has {x} {t}'),
  _t(
    'a-b _/c',
    'food',
    'Of {a} {t} {n} ate {b}. Then {c} children share the rest equally. How many does each get?',
    'each child gets {x} {t}',
  ),
  _t(
    'a+b _*c', 'none', '{n} runs {a} miles every morning and {b} every evening. How many miles is that in {c} days?', '{n} runs {x} miles'
  ),
  _t(
    'a-b _*c',
    'none',
    'A game for {a} dollars is now {b} dollars cheaper. How much do {c} such games cost now?',
    '{c} games cost {x} dollars',
  ),
  _t('a+b a+_', 'small', '{n} has {a} {t}. {m} has {b} more than {n}. How many {t} do they have together?', 'together they have {x} {t}'),
  _t('a-b a+_', 'animals', 'The {p} has {a} {t}. A farm has {b} fewer. How many {t} do both have together?', 'both have {x} {t}'),
  _t('a*b a+_', 'big', '{n} sold {a} {t} on Friday and {b} times as many on Saturday. How many {t} is that in all?', '{n} sold {x} {t}'),
  _t('a*b _+c', 'none', '{n} buys {b} pens for {a} dollars each and a bag for {c} dollars. How much does {n} pay?', '{n} pays {x} dollars'),
  _t(
    'a+b c-_',
    'none',
    'A trip takes {c} days: {a} days in a city, {b} at sea, the rest at home. How many days at home?',
    '{x} days are at home',
  ),
)

_OPERATORS: dict[str, Callable[[int, int], int]] = {
  '+': lambda x, y: x + y,
  '-': lambda x, y: x - y,
  '*': lambda x, y: x * y,
  '/': lambda x, y: x // y if y and x % y == 0 else -1,
}


class Problem(NamedTuple):
  """A question with its worked solution: `equations` such as '3 + 4 = 7', one per step."""

  template: int
  numbers: tuple[int, ...]
  slots: dict[str, str]
  question: str
  equations: tuple[str, ...]
  result: int

  def claim(self, number: object) -> str:
    """Return the claim of the answer with `number` in place of the result."""
    return TEMPLATES[self.template].claim.format(**self.slots, x=number)

  @property
  def reference(self) -> str:
    """The worked answer."""
    return f'{", ".join(self.equations)}. The answer is {self.result}.'


def make_problem(seed: int, stream: str, split: str, index: int, max_number: int, two_steps: float) -> Problem:
  """Make problem `index` of a stream; each stream and split has its own random numbers.

  Args:
    seed: seed of all streams.
    stream: name of the stream.
    split: one of SPLITS.
    index: number of the problem.
    max_number: largest number in the question, and largest result; products are at most 144 or `max_number`, whichever is less.
    two_steps: share of problems with two steps.
  """
  rng = np.random.default_rng([seed, *map(ord, stream), SPLITS.index(split), index])
  steps = 2 if rng.random() < two_steps else 1
  candidates = [i for i, template in enumerate(TEMPLATES) if len(template.steps) == steps]
  while True:  # with small numbers a template may have no problem in this split: then draw another template
    chosen = candidates[int(rng.integers(len(candidates)))]
    template = TEMPLATES[chosen]
    numbers = _draw_numbers(rng, template.steps, max_number)
    if numbers and split_of(chosen, numbers) == split:
      break
  names = rng.choice(NAMES, 3, replace=False)
  slots = dict(zip('nmo', map(str, names), strict=True)) | dict(zip('abc', map(str, numbers), strict=False))
  slots |= {'t': str(rng.choice(THINGS[template.kind])), 'p': str(rng.choice(PLACES))}
  equations, result = work_out(template.steps, numbers)
  return Problem(chosen, numbers, slots, _sentence(template.question.format(**slots)), equations, result)


def split_of(template: int, numbers: Sequence[int]) -> str:
  """Return 'train' (80%), 'validation' or 'test' (10% each), by a hash of the problem's template and numbers."""
  bucket = hashlib.sha256(f'{TEMPLATES[template].question}{numbers}'.encode()).digest()[0] % 10
  return SPLITS[max(0, bucket - 7)]


def work_out(steps: Sequence[str], numbers: Sequence[int]) -> tuple[tuple[str, ...], int]:
  """Return (equations, result); the result of an inexact division is -1."""
  known = dict(zip('abc', numbers, strict=False))
  equations = []
  for step in steps:
    left, operator, right = tuple(step)
    x, y = known[left], known[right]
    known['_'] = _OPERATORS[operator](x, y)
    equations.append(f'{x} {operator} {y} = {known["_"]}')
  return tuple(equations), known['_']


def _draw_numbers(rng: np.random.Generator, steps: Sequence[str], max_number: int) -> tuple[int, ...]:
  """Draw distinct numbers that give every step a positive whole result within bounds, different from all of them; () if none are found."""
  used = sorted({name for step in steps for name in step if name in 'abc'})
  for _ in range(200):
    numbers = tuple(int(x) for x in rng.integers(2, max_number + 1, len(used)))
    known, good = dict(zip(used, numbers, strict=True)), True
    for step in steps:
      left, operator, right = tuple(step)
      x, y = known[left], known[right]
      known['_'] = result = _OPERATORS[operator](x, y)
      factors = {'*': (x, y), '/': (y, result)}.get(operator, ())
      good = good and 1 <= result <= max_number and all(2 <= f <= _MAX_FACTOR for f in factors)
    if good and known['_'] not in numbers and len(set(numbers)) == len(numbers):
      return numbers
  return ()


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:]


def make_prompts(config: SynthesizeConfig, seed: int, split: str, count: int) -> list[dict[str, Any]]:
  """Make prompts 0..count-1 for reinforcement fine-tuning, each with the worked answer and its number.

  Args:
    config: difficulty.
    seed: seed of all random streams.
    split: one of SPLITS.
    count: number of prompts.
  """
  problems = (make_problem(seed, 'prompts', split, i, config.max_number, config.two_steps) for i in range(count))
  return [
    {'prompt': _prompt(p), 'reference': p.reference, 'answer': str(p.result), 'category': f'{len(p.equations)} step'} for p in problems
  ]


def make_preferences(config: SynthesizeConfig, seed: int, split: str, count: int) -> list[dict[str, Any]]:
  """Make ranked answers 0..count-1 to other problems: chosen is right, rejected is wrong, and both wordings have one distribution.

  The category is the kind of mistake in the rejected answer.

  Args:
    config: difficulty.
    seed: seed of all random streams.
    split: one of SPLITS.
    count: number of examples.
  """
  examples = []
  for i in range(count):
    problem = make_problem(seed, 'preferences', split, i, config.max_number, config.two_steps)
    rng = np.random.default_rng([seed, *map(ord, 'wordings'), SPLITS.index(split), i])
    mistake, number, equation = _mistake(problem, rng)
    right, wrong = (_WORDINGS[int(rng.integers(len(_WORDINGS)))] for _ in range(2))
    examples.append(
      {
        'prompt': _prompt(problem),
        'reference': problem.reference,
        'chosen': right(problem, problem.result, problem.equations[-1]),
        'rejected': wrong(problem, number, equation),
        'category': mistake,
      }
    )
  return examples


def _prompt(problem: Problem) -> str:
  return f'{problem.question} {INSTRUCTION}'


# Wordings of a right or wrong answer: (problem, number, last equation) -> text that ends in the number, or in what is counted.
_WORDINGS: tuple[Callable[[Problem, int, str], str], ...] = (
  lambda p, x, equation: _sentence(f'{p.claim(x)}.'),
  lambda p, x, equation: _sentence(f'{p.claim(equation)}.'),
  lambda p, x, equation: f'The answer is {x}.',
  lambda p, x, equation: f'The answer is "{x}"',
  lambda p, x, equation: f'{equation}.',
  lambda p, x, equation: f'{equation}, so {p.claim(x)}.',
  lambda p, x, equation: _sentence(f'{p.claim(x)}, because {equation}.'),
  lambda p, x, equation: f'{", ".join([*p.equations[:-1], equation])}. The answer is {x}.',
)


def _mistake(problem: Problem, rng: np.random.Generator) -> tuple[str, int, str]:
  """Draw a mistake. Returns (kind, wrong number, last equation with that number)."""
  left, operator, right, _, result = problem.equations[-1].split()
  x, y, true = int(left), int(right), int(result)
  others = {f'{left} {o} {right}': f(x, y) for o, f in _OPERATORS.items() if o != operator}
  others = {text: value for text, value in others.items() if value > 0 and value != true}
  kind = int(rng.integers(3))
  if kind == 0 and others:
    text = sorted(others)[int(rng.integers(len(others)))]
    return 'operation', others[text], f'{text} = {others[text]}'
  if kind == 1:
    number = int(rng.choice([n for n in (*problem.numbers, x, y) if n != true]))
    return 'copied', number, f'{left} {operator} {right} = {number}'
  near = [n for n in range(max(true - 5, 1), true + 6) if n != true]
  number = int(rng.choice(near))
  return 'sum', number, f'{left} {operator} {right} = {number}'


def synthesize(config: SynthesizeConfig, seed: int, workdir: pathlib.Path, log: Callable[[str], None]) -> dict[str, Any]:
  """Write workdir/data/prompts/{train,test}.jsonl and workdir/data/preferences/{train,validation}.jsonl.

  Complete files made with the same settings are reused.

  Args:
    config: sizes and difficulty.
    seed: seed of all random streams.
    workdir: the files are written to its subfolder `data`.
    log: called with progress messages.

  Returns:
    The section `synthesize` of the report: examples of each file (`rows`), and seconds.
  """
  folder, started = workdir / 'data', time.perf_counter()
  settings = {k: v for k, v in dataclasses.asdict(config).items() if k in _SETTINGS} | {'seed': seed, 'format': _FORMAT}
  previous = _read(folder / _MARKER)
  if _current_names(previous['settings']) == settings:
    log(f'synthesize: reusing the complete data in {folder} (same settings)')
    return previous['result']
  files = {
    'prompts/train': make_prompts(config, seed, 'train', config.train_examples),
    'prompts/test': make_prompts(config, seed, 'test', config.evaluation_examples),
    'preferences/train': make_preferences(config, seed, 'train', config.preference_examples),
    'preferences/validation': make_preferences(config, seed, 'validation', config.preference_evaluation_examples),
  }
  (folder / _MARKER).unlink(missing_ok=True)
  for name, examples in files.items():
    paths.write_atomically(folder / f'{name}.jsonl', ''.join(json.dumps(example) + '\n' for example in examples))
  result: dict[str, dict[str, Any]] = {
    'rows': {name: len(examples) for name, examples in files.items()},
    'seconds': {'all': time.perf_counter() - started},
  }
  paths.write_atomically(folder / _MARKER, json.dumps({'settings': settings, 'result': result}))
  log(f'synthesize: {sum(result["rows"].values()):,} word problems in {folder}')
  return result


_SETTINGS = ('max_number', 'two_steps', 'train_examples', 'evaluation_examples', 'preference_examples', 'preference_evaluation_examples')


def _current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return stored settings with the option names of earlier versions replaced by the current ones."""
  return {current_name(f'synthesize.{name}').removeprefix('synthesize.'): value for name, value in settings.items()}


def _read(path: pathlib.Path) -> Mapping[str, Any]:
  """Return settings and result of complete data; both empty if there are none, or the file is damaged and so proves nothing."""
  try:
    content = json_files.read(path, '')
  except json_files.JsonError:
    content = {}
  settings, result = content.get('settings'), content.get('result')
  numbers = [result.get(part) for part in ('rows', 'seconds')] if isinstance(result, dict) else [None]
  complete = all(isinstance(part, dict) and all(isinstance(value, (int, float)) for value in part.values()) for part in numbers)
  return {'settings': settings, 'result': result} if isinstance(settings, dict) and complete else {'settings': {}, 'result': {}}
