"""A process that renders chat templates, which are programs of strangers.

Jinja's sandbox keeps a template from files and from Python's internals, but not from loops, from strings of gigabytes or from a crash of
the interpreter. So templates run in a process of their own (`python -m polar_jax.data.chat_worker`), started by chat.py, with a limit of
its memory, and of the processor time and the output of each rendering. It imports nothing but Jinja.

A request is a pickled (source, variables); variables None: only compile. A reply is a JSON object with one key: `text`, `syntax` or
`error`. Both are preceded by their length. A rendering that exceeds its time ends the process by SIGPROF.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pickle
import signal
import struct
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

SECONDS = 5.0  # of processor time for a request
MEMORY = 2**30  # bytes
MAX_OUTPUT = 2**24  # characters of a rendered text
TOO_LARGE = f'needs more than {MEMORY >> 20:,} MiB of memory'
TOO_LONG = f'gives a text of more than {MAX_OUTPUT:,} characters'
LENGTH = struct.Struct('<Q')

_MAX_MESSAGE = 300  # characters: templates may raise errors of any length
_CACHED = 32  # compiled templates


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
  """Return Jinja's immutable sandbox with the filters, functions and settings of the Hugging Face tokenizers."""
  env = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
  )
  env.filters['tojson'] = _to_json
  env.globals['raise_exception'] = _raise_exception
  env.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  # A function, because the class has attributes that a template must not reach.
  env.globals['dict'] = lambda *args, **values: dict(*args, **values)
  env.globals['namespace'] = _Namespace
  return env


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


def answer(
  env: jinja2.Environment, compiled: dict[str, jinja2.Template], source: str, variables: Mapping[str, Any] | None
) -> dict[str, str]:
  """Return the reply to a request.

  Args:
    env: the result of `environment`.
    compiled: templates by their source; the request's is added.
    source: of the template.
    variables: to render it with; None: only compile it.
  """
  try:
    template = compiled.get(source)
    if template is None:
      if len(compiled) >= _CACHED:
        compiled.clear()
      template = compiled[source] = env.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    return {'syntax': f'line {error.lineno}: {_one_line(error)}'}
  except MemoryError:
    return {'error': TOO_LARGE}
  except Exception as error:  # Jinja translates to Python, whose compiler has errors of its own
    return {'syntax': _one_line(error)}
  if variables is None:
    return {'text': ''}
  try:
    text = template.render(**variables)
  except MemoryError:
    return {'error': TOO_LARGE}
  except Exception as error:  # a template is a program: it can raise Jinja's errors, TypeError, IndexError, ...
    return {'error': f'{_line(error)}{_one_line(error)}'}
  return {'text': text} if len(text) <= MAX_OUTPUT else {'error': TOO_LONG}


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error)[: 2 * _MAX_MESSAGE].split())[:_MAX_MESSAGE]
  return text if isinstance(error, jinja2.TemplateError) and text else f'{type(error).__name__}: {text}'


def _line(error: Exception) -> str:
  """Return 'line N of the template: ' for the innermost line. Jinja rewrites tracebacks to point into its source."""
  line, traceback = None, error.__traceback__
  while traceback is not None:
    if traceback.tb_frame.f_code.co_filename == '<template>':
      line = traceback.tb_lineno
    traceback = traceback.tb_next
  return '' if line is None else f'line {line} of the template: '


def _limit() -> None:
  """Limit the memory of this process, and let SIGPROF end it."""
  with contextlib.suppress(ImportError, ValueError, OSError):  # where the system has no such limit, the time limit has to do
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
  """Answer requests until there are no more, or the memory is exhausted."""
  env, compiled = environment(), dict[str, jinja2.Template]()
  while header := requests.read(LENGTH.size):
    source, variables = pickle.loads(requests.read(*LENGTH.unpack(header)))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
      reply = answer(env, compiled, source, variables)
      data = json.dumps(reply).encode()
    except MemoryError:
      reply = {'error': TOO_LARGE}
      data = json.dumps(reply).encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    replies.write(LENGTH.pack(len(data)) + data)
    replies.flush()
    if reply.get('error') == TOO_LARGE:  # what filled the memory may still be held
      return


if __name__ == '__main__':
  own_output = os.fdopen(os.dup(sys.stdout.fileno()), 'wb')
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  _limit()
  serve(sys.stdin.buffer, own_output)
