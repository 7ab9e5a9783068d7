"""Chat templates of policies, and of reward models of other families, which turn messages into the text that a model was trained on.

A checkpoint contains its template as Jinja source. This is untrusted code: it runs in a process of its own (chat_worker.py), in Jinja's
sandbox, with limits of time, memory and output. POLAR's reward models use no chat template (template.py).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.data import chat_worker
from polar_jax.data.special_tokens import read_json, read_special_tokens
from polar_jax.runtime import text_files
from polar_jax.types import UserError

_PATIENCE = 60.0  # seconds until a reply; the worker itself counts processor time, which is less where the processors are busy


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
    self._ask(None)

  def __reduce__(self) -> tuple:
    return type(self), (self.source, self.special_tokens, self.where)

  @classmethod
  def from_folder(cls, folder: str | pathlib.Path) -> ChatTemplate:
    """Load the template from chat_template.jinja, or else from tokenizer_config.json (the one named 'default' if it has several).

    Raises:
      NoChatTemplateError: the folder has no template.
      TextError: chat_template.jinja is not UTF-8.
      ChatTemplateError: the template is not a text, or not valid Jinja.
    """
    folder = pathlib.Path(folder)
    tokens = {f'{name}_token': token for name, token in read_special_tokens(folder).named.items() if token is not None}
    path = folder / 'chat_template.jinja'
    if path.is_file():
      return cls(text_files.read_text(path), tokens, str(path))
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

  @staticmethod
  def exists(folder: str | pathlib.Path) -> bool:
    """Return whether a folder has a chat template, usable or not."""
    folder = pathlib.Path(folder)
    return (folder / 'chat_template.jinja').is_file() or read_json(folder / 'tokenizer_config.json').get('chat_template') is not None

  def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
    """Render a conversation as text. The text includes the BOS if the model uses one, so it must be tokenized without adding another.

    Args:
      messages: messages with a 'role' and a 'content'; keys whose value is null count as absent.
      add_generation_prompt: end with the header that precedes a response of the assistant.
      variables: other variables that the template may read, such as `tools` or `enable_thinking`.

    Raises:
      ChatTemplateError: there are no messages, one is not an object, or the template fails on them or exceeds a limit.
    """
    if not messages:
      raise ChatTemplateError(f'{self.where}: there are no messages to render')
    for i, message in enumerate(messages):
      if not isinstance(message, Mapping):
        raise ChatTemplateError(f'{self.where}: messages[{i}] must be a message with a role and a content, not {type(message).__name__}')
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    known = {'tools': None, 'documents': None, **self.special_tokens, **variables}
    return self._ask({'messages': present, 'add_generation_prompt': add_generation_prompt, **known})

  def _ask(self, variables: Mapping[str, Any] | None) -> str:
    """Render the template, or compile it if `variables` is None."""
    try:
      request = pickle.dumps((self.source, variables))
    except Exception as error:  # pickle passes on whatever the objects raise
      raise ChatTemplateError(f'{self.where}: the messages must consist of plain values: {" ".join(str(error).split())[:200]}') from error
    reply = _WORKER.ask(request)
    if 'syntax' in reply:
      raise ChatTemplateError(f'{self.where}: not a Jinja template: {reply["syntax"]}')
    if 'error' in reply:
      raise ChatTemplateError(f'{self.where}: {reply["error"]}')
    return reply['text']


class _Worker:
  """The process that renders templates: started at the first request, and anew after a template that ended it."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._process: subprocess.Popen[bytes] | None = None

  def ask(self, request: bytes) -> dict[str, str]:
    """Return the reply to a request of chat_worker.py, or an error if the worker ends before it has one."""
    with self._lock:
      process = self._process or self._start()
      reply = None
      try:
        assert process.stdin is not None
        process.stdin.write(chat_worker.LENGTH.pack(len(request)) + request)
        process.stdin.flush()
        deadline = time.monotonic() + _PATIENCE
        if header := _read(process, chat_worker.LENGTH.size, deadline):
          reply = _read(process, chat_worker.LENGTH.unpack(header)[0], deadline)
      except BrokenPipeError:
        pass
      except BaseException:  # an interrupt, after which the next reply would be that of this request
        self.stop()
        raise
      answer = {'error': self._reason(process)} if reply is None else json.loads(reply)
      if answer.get('error') == chat_worker.TOO_LARGE:  # the worker ends itself
        self.stop()
      return answer

  def _start(self) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), *filter(None, sys.path)])
    try:
      self._process = subprocess.Popen(
        [sys.executable, '-m', 'polar_jax.data.chat_worker'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONPATH': path, 'PYTHONSAFEPATH': '1'},
        start_new_session=True,  # no signal of the terminal reaches it; it ends when its input does
      )
    except OSError as error:
      raise ChatTemplateError(f'the process that renders chat templates cannot be started: {sys.executable}: {error}') from error
    return self._process

  def _reason(self, process: subprocess.Popen[bytes]) -> str:
    """Return why a worker gave no reply, after it has ended."""
    self.stop(wait=2.0)
    if process.returncode == -signal.SIGPROF:
      return f'takes more than {chat_worker.SECONDS:g} s'
    if process.returncode == -signal.SIGKILL:
      return f'takes more than {_PATIENCE:g} s, or more memory than there is'
    return f'ends the process that renders it (exit status {process.returncode})'

  def stop(self, wait: float = 0.0) -> None:
    """End the process, if there is one, if it does not end by itself within `wait` seconds."""
    process, self._process = self._process, None
    if process is None:
      return
    try:
      process.wait(wait)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    for pipe in (process.stdin, process.stdout):
      assert pipe is not None
      with contextlib.suppress(BrokenPipeError):  # of a request that was not read
        pipe.close()

  def forget(self) -> None:
    """Leave the process to the parent of this one, which has been forked."""
    self._lock, self._process = threading.Lock(), None


def _read(process: subprocess.Popen[bytes], count: int, deadline: float) -> bytes | None:
  """Return `count` bytes of the process's output; None if it ends or is not ready before the deadline."""
  assert process.stdout is not None
  poll = select.poll()
  poll.register(process.stdout, select.POLLIN)
  data = bytearray()
  while len(data) < count:
    ready = poll.poll(max(deadline - time.monotonic(), 0.0) * 1_000)
    part = os.read(process.stdout.fileno(), count - len(data)) if ready else b''
    if not part:
      return None
    data += part
  return bytes(data)


_WORKER = _Worker()
atexit.register(_WORKER.stop)
os.register_at_fork(after_in_child=_WORKER.forget)
