"""The rows that a certificate compares: groups of candidates for one prompt and reference."""

from __future__ import annotations

import dataclasses
import pathlib

from polar_jax.data.template import join_messages
from polar_jax.scoring import files
from polar_jax.types import Group, Text, UserError

# Short and long, empty, with digits, code, line ends, and letters outside ASCII; the candidates of a group are of different lengths.
_FIXED = (
  ('What is two plus two?', 'Two plus two is four.', ('Four.', '4', 'It is five.', 'Two plus two makes four, as anyone can count.', '')),
  ('Hi', 'Hello! How can I help?', ('Hello!', 'Hi there, what can I do for you today?', 'No.')),
  ('Translate into German: the naïve façade', 'die naive Fassade', ('die naive Fassade', '素朴な外観 🦊', 'la façade naïve …')),
  (
    'Write a function that adds one.\n\n',
    'def f(x):\n  return x + 1\n',
    ('def f(x):\n\treturn x+1', 'lambda x: x + 1', "it's   spaced\r\nout", 'def f(x):\n  return 12345\n'),
  ),
  (
    'Explain why the sky is blue. ' * 12,
    'Air scatters blue light more than red light. ' * 10,
    ('Because blue light is scattered more. ' * 14, 'Because.', 'It reflects the sea, as people say. ' * 3),
  ),
  ('Count.', 'One, two, three.', tuple(f'One, two{", three" * n}.' for n in range(8))),
)


def fixed_rows() -> list[Group]:
  """Return the groups that are compared when the user names none."""
  return [Group(prompt, reference, list(candidates)) for prompt, reference, candidates in _FIXED]


def read_rows(path: pathlib.Path, on_bad_example: str, use_reference: bool) -> list[Group]:
  """Return the rows of a file of the score stage (`prompt`, `reference`, `output`); those with equal prompts and references are a group.

  Raises:
    UserError: the file or a row cannot be used, or there is none.
  """
  groups: dict[tuple[str, str, str], list[Group]] = {}
  for example in files.read_examples(path, on_bad_example, [], use_reference=use_reference):
    group = example.group
    groups.setdefault((repr(group.prompt), repr(group.reference), group.wrapper), []).append(group)
  if not groups:
    raise UserError(f'{path}: has no rows to compare')
  return [dataclasses.replace(members[0], candidates=[m.candidates[0] for m in members]) for members in groups.values()]


def plain(text: Text) -> str:
  """Return a text as the string that the template reads."""
  return text if isinstance(text, str) else join_messages(text, 'candidate')
