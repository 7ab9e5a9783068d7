"""A policy that is sampled through an OpenAI-compatible server: vLLM, SGLang, LMDeploy, llama.cpp, or a service.

The answer to a request must depend on nothing but the request. Every request therefore carries its seed, a retry repeats the request as it
was, and what a server gives for another reason does not count: a generation that the server aborted is asked for again. A server that
ignores the seeds is only noticed if it also gives the same answer to all of them, as a cache does.

A server that is down, busy, or replies with something else than an answer is asked again, at another address if there is one, for up to
`patience` seconds. A status that no retry changes ends the policy at once (`QuarantineError`), or is the `Failure` of one request if it is
about its prompt.
"""

from __future__ import annotations

import dataclasses
import datetime
import email.utils
import json
import os
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polar_jax.config import ConfigError
from polar_jax.runtime import json_files, urls
from polar_jax.synthesis.addresses import Address, Addresses, Call, Stopped
from polar_jax.synthesis.connection import Connection, Reply, TemporaryError
from polar_jax.synthesis.samples import Failure, QuarantineError, Request, Sample
from polar_jax.types import UserError

__all__ = ['Addresses', 'ServerConfig', 'ServerSampler', 'Stopped']

_BUSY = (408, 429)  # statuses below 500 after which a retry makes sense
_ABOUT_THE_PROMPT = (400, 413, 422)
_NOT_ENDED_BY_THE_POLICY = ('abort', 'error')  # values of finish_reason: the server gave up in the middle
_LONGEST_WISH = 60.0  # seconds of Retry-After that are honored
_EXCERPT = 80  # characters of a reply in a message
_ENOUGH = 3  # requests, or prompts, that all show the same problem
_SURROGATES = re.compile('[\ud800-\udfff]')


@dataclasses.dataclass(frozen=True)
class ServerConfig:
  """How to sample a policy through a server.

  Attributes:
    base_urls: of servers that all serve the policy, such as http://host:8000, with or without /v1.
    model: its name there.
    chat: whether a prompt is the message of a user, to /v1/chat/completions, or text to continue, to /v1/completions.
    system: the system prompt of chat; None: none.
    temperature: of sampling.
    top_p: of sampling.
    top_k: of sampling; None: not sent, because not every server knows it.
    max_tokens: limit of an answer's length.
    api_key_env: the environment variable that holds the API key; None: no key.
    max_in_flight: most requests in flight to one address.
    timeout: seconds that one request may take.
    patience: seconds that a request may fail in a row before the policy is given up.
  """

  base_urls: tuple[str, ...]
  model: str
  chat: bool
  system: str | None
  temperature: float
  top_p: float
  top_k: int | None
  max_tokens: int
  api_key_env: str | None
  max_in_flight: int
  timeout: float
  patience: float


class ServerSampler:
  """Samples a policy through the servers at one or more addresses. All methods can be called from several threads.

  Args:
    config: the addresses, the model and how it is sampled.
    addresses: shared with other samplers; None: of this sampler alone.
    clock: returns seconds; for tests.
    sleep: waits for some seconds; for tests.

  Raises:
    ConfigError: the variable of the API key is missing, or an address is not a URL.
  """

  def __init__(
    self,
    config: ServerConfig,
    *,
    addresses: Addresses | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._config, self._clock, self._sleep = config, clock, sleep
    self._key = _api_key(config.api_key_env)
    self._head, self._path = _head(config), '/chat/completions' if config.chat else '/completions'
    self._request_headers = {'Content-Type': 'application/json', 'Accept': 'application/json', 'Accept-Encoding': 'identity'}
    if self._key:
      self._request_headers['Authorization'] = f'Bearer {self._key}'
    urls = dict.fromkeys(_base_url(url) for url in config.base_urls)
    if not urls or config.max_in_flight < 1:
      raise ConfigError(f'a policy of a server needs at least one address and max_in_flight >= 1, not {config.max_in_flight}')
    self._shared, self._owned = addresses or Addresses(), addresses is None
    self._addresses = [self._shared.get(url, config.max_in_flight) for url in urls]
    self._lock = threading.Lock()
    self._counts = dict.fromkeys(('requests', 'retries', 'failures', 'prompt_tokens', 'tokens'), 0)

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request, in order.

    Raises:
      QuarantineError: the policy does not answer, or not as it should (see `_check`). Requests in flight are given up.
      Stopped: the event `stop` of the addresses was set.
      StopRequested: SIGTERM arrived (see `Addresses`).
    """
    answers: list[Sample | Failure | None] = [None] * len(requests)
    bodies: dict[int, bytes] = {}
    for i, request in enumerate(requests):
      if found := _SURROGATES.search(request.prompt.text):
        answers[i] = Failure(f'the prompt has a lone surrogate (character {found.start()}), which no request can carry')
      else:
        bodies[i] = self._body(request)
    sent = list(bodies)
    call = Call(
      self._addresses,
      [requests[i].seed for i in sent],
      lambda place, address, connection: self._send(bodies[sent[place]], address, connection),
      self._give_up,
      self._config.patience,
      self._clock,
      self._sleep,
    )
    try:
      results = self._shared.run(call)
    finally:
      self._count(retries=call.retries)
    for i, result in zip(sent, results, strict=True):
      answers[i] = result
    self._count(requests=len(requests), failures=sum(isinstance(answer, Failure) for answer in answers))
    self._check([requests[i] for i in sent], results)
    return [answer for answer in answers if answer is not None]

  def counts(self) -> dict[str, Any]:
    """Return counts for the data card: requests, those among them without an answer, retries, and tokens as far as servers count them."""
    with self._lock:
      return dict(self._counts)

  def close(self) -> None:
    """Close the connections, unless they are shared."""
    if self._owned:
      self._shared.close()

  def _count(self, **more: int) -> None:
    with self._lock:
      for name, number in more.items():
        self._counts[name] += number

  def _body(self, request: Request) -> bytes:
    text, config = request.prompt.text, self._config
    body = dict(self._head)
    if config.chat:
      system = [{'role': 'system', 'content': config.system}] if config.system is not None else []
      body['messages'] = [*system, {'role': 'user', 'content': text}]
    else:
      body['prompt'] = text
    body['seed'] = request.seed
    return json.dumps(body, ensure_ascii=False).encode()

  def _send(self, body: bytes, address: Address, connection: Connection) -> Sample | Failure:
    """Send a request once.

    Raises:
      TemporaryError: a retry may succeed.
      QuarantineError: a retry would not help.
    """
    try:
      reply = connection.post(address.url + self._path, self._request_headers, body, self._config.timeout)
    except TemporaryError as error:
      raise TemporaryError(self._excerpt(str(error))) from error
    if not 200 <= reply.status < 300:
      return self._refused(reply, address)
    try:
      sample, prompt_tokens = _parse(json_files.parse(reply.content), self._config.chat)
    except ValueError as error:  # JsonError is one
      content = self._excerpt(reply.content.decode(errors='replace'))
      raise TemporaryError(f'{json_files.shorten(error)} (reply: {content})') from error
    self._count(prompt_tokens=prompt_tokens, tokens=sample.tokens)
    return sample

  def _refused(self, reply: Reply, address: Address) -> Failure:
    """Return the failure of one request, or raise what the status means for others too."""
    config = self._config
    where, status, message = address.url + self._path, reply.status, self._excerpt(_message(reply.content))
    if status >= 500 or status in _BUSY:
      raise TemporaryError(f'status {status}: {message}', _seconds_to_wait(reply.headers.get('retry-after', '')))
    if status in _ABOUT_THE_PROMPT:
      return Failure(f'the server refuses the request with status {status}: {message}')
    if status in (401, 403):
      advice = (
        f'check the API key in the environment variable {config.api_key_env}'
        if config.api_key_env
        else 'set api_key_env to the name of the environment variable that holds an API key'
      )
    elif status == 404:
      path = urllib.parse.urlsplit(where).path
      advice = f'check that the server serves {path}, and a model with the name {config.model!r}'
    elif status < 400:
      advice = 'redirects are not followed: give the address that it leads to'
    else:
      advice = 'check that it is the address of an OpenAI-compatible server'
    raise QuarantineError(f'{where}: status {status}: {message}; {advice}', status)

  def _give_up(self, address: Address, error: TemporaryError, tries: int, seconds: float) -> QuarantineError:
    return QuarantineError(
      f'{address.url}{self._path}: no answer after {tries} {"tries" if tries > 1 else "try"} in {seconds:.0f} s: {error}; start the server '
      '(patience is how long it may be down), then repeat the command'
    )

  def _excerpt(self, text: str) -> str:
    """Return the beginning of a text for a message, on one line and without the API key."""
    if self._key:
      for form in (self._key, json.dumps(self._key)[1:-1], urllib.parse.quote(self._key, safe='')):
        text = text.replace(form, '***')
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(text.split())[: _EXCERPT + 1])
    return (line if len(line) <= _EXCERPT else line[: _EXCERPT - 3] + '...') or 'empty'

  def _check(self, requests: Sequence[Request], results: Sequence[Sample | Failure]) -> None:
    """Refuse results that are not those of a policy that is sampled, in which all requests show the same problem."""
    url = ', '.join(address.url for address in self._addresses)
    several = len(results) >= _ENOUGH and len({request.prompt.id for request in requests}) > 1
    reasons = [result.reason for result in results if isinstance(result, Failure)]
    if several and len(reasons) == len(results):
      raise QuarantineError(
        f'{url}: all {len(results)} requests failed, the first because {reasons[0]}; check max_tokens, the settings of sampling, and the '
        "length of prompts against the server's limits"
      )
    if several and all(isinstance(result, Sample) and not result.text for result in results):
      raise QuarantineError(
        f'{url}: all {len(results)} answers are empty; check that chat={self._config.chat} suits the model, and that '
        'max_tokens leaves room for more than its reasoning'
      )
    texts: dict[str, set[str]] = {}
    seeds: dict[str, set[int]] = {}
    for request, result in zip(requests, results, strict=True):
      if isinstance(result, Sample):
        texts.setdefault(request.prompt.id, set()).add(result.text)
        seeds.setdefault(request.prompt.id, set()).add(request.seed)
    sampled = [texts[prompt] for prompt, different in seeds.items() if len(different) > 1 and texts[prompt] != {''}]
    if self._config.temperature > 0 and len(sampled) >= _ENOUGH and all(len(group) == 1 for group in sampled):
      raise QuarantineError(
        f'{url}: gives the same answer to every seed, for each of {len(sampled)} prompts; check that the server honors `seed` and the '
        'temperature, and disable its response cache'
      )


def _head(config: ServerConfig) -> dict[str, Any]:
  """Return what all requests have in common."""
  head: dict[str, Any] = {'model': config.model, 'max_tokens': config.max_tokens, 'temperature': config.temperature, 'top_p': config.top_p}
  if config.top_k is not None:
    head['top_k'] = config.top_k
  for name, text in (('model', config.model), ('system', config.system)):
    if text is not None and _SURROGATES.search(text):
      raise ConfigError(f'{name} of a policy has a lone surrogate, which no request can carry; remove it')
  if config.system is not None and not config.chat:
    raise ConfigError('a policy that continues text has no system prompt; set chat=true, or remove system')
  return head | {'n': 1, 'stream': False}


def _api_key(variable: str | None) -> str | None:
  if variable is None:
    return None
  key = os.environ.get(variable, '').strip()
  if not key:
    raise ConfigError(f'the environment variable {variable}, which api_key_env names, is not set; set it to the API key of the server')
  if not key.isascii() or not key.isprintable() or ' ' in key:
    raise ConfigError(f'the environment variable {variable} does not hold an API key, but text with spaces or other characters')
  return key


def _base_url(address: str) -> str:
  url = urls.base_url(address)
  if url is not None and '@' in (parts := urllib.parse.urlsplit(url)).netloc:
    raise ConfigError(f'the address of {parts.hostname} holds a user or password; name the variable of an API key in api_key_env instead')
  if url is None or not url.isascii():
    raise ConfigError(f'the address {address!r:.100} of a policy must be HOST:PORT, or a URL that starts with http:// or https://')
  return url if re.search(r'/v\d+$', url) else f'{url}/v1'


def _parse(reply: Any, chat: bool) -> tuple[Sample, int]:
  """Return the sample in a reply, and the number of tokens of the prompt.

  Raises:
    ValueError: the reply has another form, or the server gave the generation up.
  """
  choices = reply.get('choices') if isinstance(reply, dict) else None
  if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
    raise ValueError('a reply without exactly one choice')
  choice = choices[0]
  reason = choice.get('finish_reason')
  if reason in _NOT_ENDED_BY_THE_POLICY:
    raise ValueError(f'the server gave the generation up (finish_reason {reason})')
  holder = choice.get('message') if chat else choice
  if not isinstance(holder, dict) or not (chat or 'text' in holder):
    raise ValueError(f'a choice without {"message" if chat else "text"}')
  text = holder.get('content' if chat else 'text')  # servers that leave out what is null leave out the content of mere reasoning
  if not isinstance(text, str | None):
    raise ValueError('a choice whose text is not a string')
  usage = reply.get('usage')
  tokens, prompt_tokens = (_number(usage, name) for name in ('completion_tokens', 'prompt_tokens'))
  # Half a character cannot be stored. Asking again would give it again, and servers themselves write U+FFFD for half a character.
  return Sample(_SURROGATES.sub('\ufffd', text or ''), reason != 'length', tokens), prompt_tokens


def _number(usage: Any, name: str) -> int:
  value = usage.get(name) if isinstance(usage, dict) else None
  return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _message(content: bytes) -> str:
  """Return what the body of an error says: its message, if it has one of the usual forms."""
  text = content.decode(errors='replace')
  try:
    value = json_files.parse(text)
  except UserError:
    return text
  for key in ('error', 'message', 'detail'):
    if isinstance(value, Mapping) and key in value:
      value = value[key]
  return value if isinstance(value, str) else text


def _seconds_to_wait(wish: str) -> float:
  """Return the seconds of a header Retry-After, which is a number of them or a date; 0 if it is neither."""
  try:
    seconds = float(wish)
  except ValueError:
    try:
      when = email.utils.parsedate_to_datetime(wish)
    except ValueError:
      return 0.0
    seconds = (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp() - time.time()
  return min(max(seconds, 0.0), _LONGEST_WISH) if seconds == seconds else 0.0
