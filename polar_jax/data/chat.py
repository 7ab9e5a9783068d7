"""Chat templates of policies: messages to the text that a policy was trained on.

A checkpoint carries its template as a Jinja source. It is somebody else's program, so it runs in Jinja's immutable sandbox, with the
filters, functions and settings that the Hugging Face tokenizers give it. The reward model itself uses none (template.py).
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from polar_jax.data.special_tokens import read_json, read_special_tokens
from polar_jax.types import UserError


class ChatTemplateError(UserError):
  """A chat template cannot be read, or does not accept the messages. The message is one line for the user."""


class NoChatTemplateError(ChatTemplateError):
  """The folder has no chat template: its model is a base model, which continues plain text."""


class ChatTemplate:
  """A compiled chat template. Can be pickled.

  Args:
    source: the Jinja source.
    special_tokens: strings of 'bos_token', 'eos_token' and so on, which templates write.
    where: what error messages call it.
  """

  def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, where: str = 'chat template'):
    self.source = source
    self.special_tokens = dict(special_tokens or {})
    self.where = where
    try:
      self._template = _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise ChatTemplateError(f'{where}: not a Jinja template: line {error.lineno}: {_one_line(error)}') from error

  def __reduce__(self) -> tuple:
    return type(self), (self.source, self.special_tokens, self.where)

  @classmethod
  def from_folder(cls, folder: str | pathlib.Path) -> ChatTemplate:
    """The template in chat_template.jinja, else the one (or the one named 'default') in tokenizer_config.json.

    Raises:
      NoChatTemplateError: the folder has none.
      ChatTemplateError: it is no text, or no Jinja.
    """
    folder = pathlib.Path(folder)
    tokens = {f'{name}_token': token for name, token in read_special_tokens(folder).named.items() if token is not None}
    path = folder / 'chat_template.jinja'
    if path.is_file():
      return cls(path.read_text('utf-8'), tokens, str(path))
    path = folder / 'tokenizer_config.json'
    where = f'{path}: chat_template'
    value = read_json(path).get('chat_template')
    if isinstance(value, list):
      named = {entry.get('name'): entry.get('template') for entry in value if isinstance(entry, dict)}
      if 'default' not in named:
        raise ChatTemplateError(f"{where} has no template named 'default', only: {', '.join(map(str, named))}")
      value = named['default']
    if value is None:
      raise NoChatTemplateError(f'{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)')
    if not isinstance(value, str):
      raise ChatTemplateError(f'{where} must be a string or a list of named templates, not {type(value).__name__}')
    return cls(value, tokens, where)

  def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
    """The text of a conversation. It holds its own BOS, if the model wants one: tokenise it without adding another.

    Args:
      messages: each with a 'role' and a 'content'; keys whose value is null count as absent.
      add_generation_prompt: end with the header that an answer of the assistant follows.
      variables: what else the template may read, such as `tools` or `enable_thinking`.

    Raises:
      ChatTemplateError: there are no messages, one is no object, or the template fails on them.
    """
    if not messages:
      raise ChatTemplateError(f'{self.where}: there are no messages to render')
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping):
        raise ChatTemplateError(f'{self.where}: messages[{i}] must be a message with a role and a content, not {type(message).__name__}')
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    known = {'tools': None, 'documents': None, **self.special_tokens, **variables}
    try:
      return self._template.render(messages=given, add_generation_prompt=add_generation_prompt, **known)
    except Exception as error:  # a template is a program: besides Jinja's errors it can raise TypeError, IndexError, ...
      raise ChatTemplateError(f'{self.where}: {_line(error)}{_one_line(error)}') from error


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return text if isinstance(error, jinja2.TemplateError) and text else f'{type(error).__name__}: {text}'


def _line(error: Exception) -> str:
  """'line N of the template: ', the innermost one. Jinja rewrites tracebacks to point into its source."""
  line, traceback = None, error.__traceback__
  while traceback is not None:
    if traceback.tb_frame.f_code.co_filename == '<template>':
      line = traceback.tb_lineno
    traceback = traceback.tb_next
  return '' if line is None else f'line {line} of the template: '


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  environment.globals['dict'] = lambda *args, **values: dict(*args, **values)  # the class has attributes that a template must not reach
  environment.globals['namespace'] = _Namespace
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
  """Jinja's own filter would escape <, >, & and ' for HTML."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}` marks what the assistant wrote. We take the answer's tokens from elsewhere: no-op."""

  tags = {'generation'}  # noqa: RUF012 (Jinja's interface)

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    return jinja2.nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
  """A template's mutable variables, without names that could replace what Python looks up on any object."""

  def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the values
    for name in dict(*args[1:], **values):
      _check_name(name)
    jinja2.utils.Namespace.__init__(*args, **values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if str(name).startswith('_'):
    raise jinja2.sandbox.SecurityError(f'a namespace cannot hold {name!r}: names that begin with an underscore are not allowed')
