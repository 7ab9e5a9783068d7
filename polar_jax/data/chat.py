"""Chat templates of policies, which turn messages into the text that a policy was trained on.

A checkpoint contains its template as Jinja source. This is untrusted code, so it runs in Jinja's immutable sandbox, with the filters,
functions and settings of the Hugging Face tokenizers. The reward model itself uses no chat template (template.py).
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
  """The folder has no chat template, so its model is a base model, which continues plain text."""


class ChatTemplate:
  """A compiled chat template. Can be pickled.

  Args:
    source: the Jinja source.
    special_tokens: strings of 'bos_token', 'eos_token' and so on, for use in templates.
    where: name of the template in error messages.
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
    """Load the template from chat_template.jinja, or else from tokenizer_config.json (the one named 'default' if it has several).

    Raises:
      NoChatTemplateError: the folder has no template.
      ChatTemplateError: the template is not a text, or not valid Jinja.
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
    """Render a conversation as text. The text includes the BOS if the model uses one, so it must be tokenized without adding another.

    Args:
      messages: messages with a 'role' and a 'content'; keys whose value is null count as absent.
      add_generation_prompt: end with the header that precedes a response of the assistant.
      variables: other variables that the template may read, such as `tools` or `enable_thinking`.

    Raises:
      ChatTemplateError: there are no messages, one is not an object, or the template fails on them.
    """
    if not messages:
      raise ChatTemplateError(f'{self.where}: there are no messages to render')
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping):
        raise ChatTemplateError(f'{self.where}: messages[{i}] must be a message with a role and a content, not {type(message).__name__}')
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    known = {'tools': None, 'documents': None, **self.special_tokens, **variables}
    try:
      return self._template.render(messages=present, add_generation_prompt=add_generation_prompt, **known)
    except Exception as error:  # a template is a program: it can raise Jinja's errors, TypeError, IndexError, ...
      raise ChatTemplateError(f'{self.where}: {_line(error)}{_one_line(error)}') from error


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())
  return text if isinstance(error, jinja2.TemplateError) and text else f'{type(error).__name__}: {text}'


def _line(error: Exception) -> str:
  """Return 'line N of the template: ' for the innermost line. Jinja rewrites tracebacks to point into its source."""
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
  # A function, because the class has attributes that a template must not reach.
  environment.globals['dict'] = lambda *args, **values: dict(*args, **values)
  environment.globals['namespace'] = _Namespace
  return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
  """Convert to JSON without escaping <, >, & and ' for HTML, as Jinja's own filter does."""
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
  raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
  """The tag `{% generation %}...{% endgeneration %}`, which marks the assistant's text. It has no effect here."""

  tags = {'generation'}  # noqa: RUF012 (Jinja's interface)

  def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    return jinja2.nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
  """The mutable variables of a template, without names that Python looks up on every object."""

  def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the values
    for name in dict(*args[1:], **values):
      _check_name(name)
    jinja2.utils.Namespace.__init__(*args, **values)

  def __setitem__(self, name: str, value: Any) -> None:
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if str(name).startswith('_'):
    raise jinja2.sandbox.SecurityError(f'a namespace cannot contain {name!r}: names that begin with an underscore are not allowed')
