"""What requests ask for, checked. Everything here is a pure function of the body of a request.

A request is a list of sources of sequences: parts (prompt, reference and candidates), which the template of the model joins; finished
texts, which some client has joined already; or token ids. Every source knows the names of its fields, for messages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from polar_jax.data.template import WRAPPERS
from polar_jax.runtime import json_files
from polar_jax.types import Text, one_line

_SURROGATES = re.compile('[\ud800-\udfff]')
_MAX_DEPTH = 64  # of a body: deeper than any client nests, and far from the limit of the parser
SHORTEST_TIMEOUT = 0.1  # seconds that X-Request-Timeout may ask for
_NAMED = 5  # unknown keys that a message lists


class RequestError(Exception):
  """A request that cannot be answered.

  Attributes:
    status: of HTTP.
    kind: name of the reason, for clients and metrics.
    param: the field that is wrong; None: no single one.
    retry_after: seconds after which a repetition makes sense; None: never.
  """

  def __init__(
    self, message: str, param: str | None = None, status: int = 400, kind: str = 'invalid_request', retry_after: float | None = None
  ):
    super().__init__(one_line(message))
    self.param, self.status, self.kind, self.retry_after = param, status, kind, retry_after


class Limits(NamedTuple):
  """Limits of one request.

  Attributes:
    sequences: candidates and texts.
    characters: of one text.
  """

  sequences: int
  characters: int


@dataclasses.dataclass(frozen=True)
class Parts:
  """Candidates for one prompt and reference.

  Attributes:
    prompt: a string or messages.
    reference: the same; '' for a model that reads none.
    candidates: any number.
    wrapper: of the template.
    fields: names of the prompt, the reference and each candidate in the request.
  """

  prompt: Text
  reference: Text
  candidates: Sequence[Text]
  wrapper: str
  fields: Sequence[str]

  @property
  def count(self) -> int:
    """Number of sequences."""
    return len(self.candidates)


@dataclasses.dataclass(frozen=True)
class Finished:
  """A text that ends in the reward token, or its token ids."""

  content: str | list[int]
  field: str
  count = 1


Source = Parts | Finished


class Result(NamedTuple):
  """What became of a sequence."""

  reward: float
  tokens: int
  truncated: bool


class Work(NamedTuple):
  """A checked request.

  Attributes:
    sources: of the sequences to score.
    render: turns their results, in order, into the JSON of the reply.
  """

  sources: Sequence[Source]
  render: Callable[[Sequence[Result]], Any]


def parse_json(body: bytes) -> Any:
  """Return the value of a body: strict JSON.

  Raises:
    RequestError: it is not.
  """
  try:
    value = json_files.parse(body, parse_constant=_refuse_constant)
  except json_files.JsonError as error:
    raise RequestError(f'the body is {error}' if str(error).startswith('not') else f'the body is not usable: {error}') from error
  _check_depth(value)
  return value


def _refuse_constant(name: str) -> None:
  raise ValueError(f'{name} is no number of JSON')


def _check_depth(value: Any) -> None:
  level: list[Any] = [value]
  for _ in range(_MAX_DEPTH):
    level = [item for v in level if isinstance(v, dict | list) for item in (v.values() if isinstance(v, dict) else v)]
    level = [item for item in level if isinstance(item, dict | list)]
    if not level:
      return
  raise RequestError(f'the body is nested more than {_MAX_DEPTH} levels deep')


def kind_of(value: Any) -> str:
  """Return the name of a JSON type with its article."""
  names = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean', type(None): 'null'}
  return names.get(type(value), 'a number')


def check_object(value: Any, field: str, known: Sequence[str] | None = None) -> dict[str, Any]:
  """Check that a value is an object.

  Args:
    value: from JSON.
    field: its name; '' for the body.
    known: keys that it may have; None: any.

  Raises:
    RequestError: it is not.
  """
  if not isinstance(value, dict):
    raise RequestError(f'{field or "the body"} must be an object, not {kind_of(value)}', field or None)
  unknown = [] if known is None else [key for key in value if key not in known]
  if unknown:
    named = ', '.join(_printable(key) for key in unknown[:_NAMED]) + (', ...' if len(unknown) > _NAMED else '')
    raise RequestError(
      f'{field or "the body"} has unknown keys: {named}; known are: {", ".join(known or ())}', join(field, _printable(unknown[0]))
    )
  return value


def _printable(key: str) -> str:
  return _SURROGATES.sub('?', key)[:60]


def join(field: str, key: str) -> str:
  """Return the name of a field in another one."""
  return f'{field}.{key}' if field else key


def required(value: dict[str, Any], key: str, field: str = '') -> Any:
  """Return the value of a key.

  Raises:
    RequestError: it is missing.
  """
  if key not in value:
    raise RequestError(f'{join(field, key)} is missing', join(field, key))
  return value[key]


def check_string(value: Any, field: str, limits: Limits) -> str:
  """Check that a value is a string of Unicode characters that is not too long.

  Raises:
    RequestError: it is not.
  """
  if not isinstance(value, str):
    raise RequestError(f'{field} must be a string, not {kind_of(value)}', field)
  if len(value) > limits.characters:
    raise RequestError(
      f'{field} has {len(value)} characters; at most {limits.characters} are allowed (serve.max_characters)', field, 413, 'too_large'
    )
  if not value.isascii() and _SURROGATES.search(value):
    raise RequestError(f'{field} has half of a surrogate pair, which is no character; send valid Unicode', field)
  return value


def check_text(value: Any, field: str, limits: Limits, strict: bool = False) -> Text:
  """Check that a value is a string or a list of messages.

  Args:
    value: from JSON.
    field: its name.
    limits: of the request.
    strict: refuse messages with other keys than role and content, which are otherwise ignored.

  Returns:
    The string, or messages of roles and contents only.

  Raises:
    RequestError: it is not.
  """
  if isinstance(value, str):
    return check_string(value, field, limits)
  if not isinstance(value, list):
    raise RequestError(f'{field} must be a string or a list of messages, not {kind_of(value)}', field)
  if not value:
    raise RequestError(f'{field} is an empty list of messages; send "" for an empty text', field)
  if len(value) > limits.sequences:
    raise RequestError(
      f'{field} has {len(value)} messages; at most {limits.sequences} are allowed (serve.max_sequences)', field, 413, 'too_large'
    )
  messages: list[dict[str, Any]] = []
  characters = 0
  for i, message in enumerate(value):
    at = f'{field}[{i}]'
    check_object(message, at, ('role', 'content') if strict else None)
    content = check_string(required(message, 'content', at), f'{at}.content', limits)
    messages.append({'content': content})
    if message.get('role') is not None:
      messages[-1]['role'] = check_string(message['role'], f'{at}.role', limits)
    characters += len(content)
  if characters > limits.characters:
    raise RequestError(
      f'{field} has {characters} characters; at most {limits.characters} are allowed (serve.max_characters)', field, 413, 'too_large'
    )
  return messages


def check_list(value: Any, field: str, limits: Limits) -> list[Any]:
  """Check that a value is a list that is not too long.

  Raises:
    RequestError: it is not.
  """
  if not isinstance(value, list):
    raise RequestError(f'{field} must be a list, not {kind_of(value)}', field)
  check_count(len(value), field, limits)
  return value


def check_count(count: int, field: str, limits: Limits) -> None:
  """Check the number of sequences of a request.

  Raises:
    RequestError: there are too many.
  """
  if count > limits.sequences:
    raise RequestError(
      f'{field or "the request"} has {count} items; at most {limits.sequences} are allowed (serve.max_sequences)',
      field or None,
      413,
      'too_large',
    )


def check_wrapper(value: Any, field: str) -> str:
  """Check the name of a wrapper.

  Raises:
    RequestError: there is no such wrapper.
  """
  if not isinstance(value, str) or value not in WRAPPERS:
    raise RequestError(f'{field} must be one of: {", ".join(WRAPPERS)}', field)
  return value


def parse_score(body: Any, limits: Limits, use_reference: bool, model: str, exact: bool) -> Work:
  """Check a request of the native endpoint, /score.

  Args:
    body: an object, or a list of objects, with prompt, reference, outputs and optionally wrapper.
    limits: of the request.
    use_reference: whether the model reads references.
    model: its name.
    exact: whether rewards are computed alone.

  Raises:
    RequestError: it is wrong.
  """
  single = not isinstance(body, list)
  groups = [body] if single else check_list(body, '', limits)
  sources = [_parse_group(group, '' if single else f'[{g}]', limits, use_reference) for g, group in enumerate(groups)]
  counts = [source.count for source in sources]
  check_count(sum(counts), '', limits)

  def render(results: Sequence[Result]) -> Any:
    replies, low = [], 0
    for count in counts:
      part = results[low : low + count]
      low += count
      reply = {'rewards': [r.reward for r in part], 'tokens': [r.tokens for r in part], 'truncated': [r.truncated for r in part]}
      replies.append({**reply, 'exact': exact, 'model': model})
    return replies[0] if single else replies

  return Work(sources, render)


def _parse_group(group: Any, field: str, limits: Limits, use_reference: bool) -> Parts:
  check_object(group, field, ('prompt', 'reference', 'outputs', 'wrapper'))
  at = lambda key: join(field, key)
  prompt = check_text(required(group, 'prompt', field), at('prompt'), limits, strict=True)
  reference: Text = ''
  if use_reference or 'reference' in group:
    reference = check_text(required(group, 'reference', field), at('reference'), limits, strict=True)
  outputs = check_list(required(group, 'outputs', field), at('outputs'), limits)
  candidates = [check_text(output, f'{at("outputs")}[{i}]', limits, strict=True) for i, output in enumerate(outputs)]
  wrapper = check_wrapper(group.get('wrapper', 'sft'), at('wrapper'))
  fields = [at('prompt'), at('reference'), *(f'{at("outputs")}[{i}]' for i in range(len(outputs)))]
  return Parts(prompt, reference, candidates, wrapper, fields)
