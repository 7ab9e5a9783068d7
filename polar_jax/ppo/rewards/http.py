"""Rewards from a server of the official kinds: POLAR behind sglang, vLLM or LMDeploy.

A PPO step must not lose its answers because a server restarts. A server that cannot be reached, that takes too long, or that answers
with a status of 5xx, 408 or 429 or with something that is not JSON, is asked again, with growing pauses, until it has failed for
`patience` seconds. Any other status, and an answer of another form or length than the server's kind gives, stops the run at once:
asking again would not mend it. Nothing is ever left out, guessed or put in another order.
"""

from __future__ import annotations

import http.client
import json
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from polar_jax.config import ConfigError, RewardConfig
from polar_jax.data.template import Template
from polar_jax.ppo.rewards.sources import check_rewards, score_on_first_process, shorten
from polar_jax.types import Prompt, UserError

BATCH = 64  # texts of a request: at 2,000 tokens each a 7B model is far from the timeout, and the server's batch is full
_PATHS = {'sglang': '/classify', 'vllm': '/pooling', 'lmdeploy': '/pooling'}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; each pause is twice the one before
_PASSING = (408, 429)  # statuses below 500 that say: later


class RewardServerError(UserError):
  """The reward server is down for too long, or answers what cannot be used. The message is one line for the user."""


class _Failure(Exception):
  """A try that failed and is worth another."""


class HttpReward:
  """Asks a server for the reward of every (prompt, reference, output), in the template's text (see `Template.candidate_texts`).

  Args:
    template: of the model that is served. Its tokenizer is needed only where a text may have to be cut.
    batch: texts of a request.
    clock, sleep: seconds that pass, and a pause of seconds; for tests.
  """

  def __init__(
    self,
    template: Template,
    config: RewardConfig,
    batch: int = BATCH,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._template, self._config, self._batch, self._clock, self._sleep = template, config, batch, clock, sleep
    self._url = _base_url(config.address) + _PATHS[config.server]
    # No proxy, and no redirect: urllib would follow it with a GET.
    self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())

  def score(self, prompts: Sequence[Prompt], outputs: Sequence[str]) -> np.ndarray:
    """Rewards (n,), float32.

    Raises:
      RewardServerError: the server failed for `patience` seconds, refused the request, or gave an answer of a wrong form.
      RewardError: a reward is not finite.
    """
    wrapper = self._config.wrapper
    texts = [
      self._template.candidate_texts(prompt.prompt, prompt.reference, [output], wrapper)[0]
      for prompt, output in zip(prompts, outputs, strict=True)
    ]
    failed = RewardServerError(f'{self._url}: the first process got no rewards; see its log')
    rewards = score_on_first_process(lambda: self._ask_all(texts), len(texts), RewardServerError, failed)
    return check_rewards(rewards, self._url, prompts, outputs)

  def _ask_all(self, texts: list[str]) -> np.ndarray:
    rewards = np.zeros(len(texts), np.float32)
    for low in range(0, len(texts), self._batch):
      some = texts[low : low + self._batch]
      answer = self._ask_patiently(self._request(some))
      try:
        numbers = _numbers(self._config.server, answer, len(some))
      except (ValueError, OverflowError) as error:
        raise RewardServerError(
          f'{self._url}: {error}; check that rft.reward.server ({self._config.server}) is what runs there, and that it serves a '
          f'reward model ({_excerpt(answer)})'
        ) from error
      with np.errstate(over='ignore'):  # too large for float32: infinite, and so refused below
        rewards[low : low + self._batch] = numbers
    return rewards

  def _request(self, texts: list[str]) -> urllib.request.Request:
    """A list, even of one text: for a bare string sglang answers in another form."""
    config = self._config
    body: dict[str, Any] = {'text' if config.server == 'sglang' else 'input': texts}
    if config.server == 'sglang':
      body['model'] = config.server_model or pathlib.PurePath(config.checkpoint).name
    elif config.server_model:  # the others refuse a name that is not theirs, and need none
      body['model'] = config.server_model
    return urllib.request.Request(self._url, json.dumps(body).encode(), {'Content-Type': 'application/json'}, method='POST')

  def _ask_patiently(self, request: urllib.request.Request) -> Any:
    first_failure, pause, tries = None, _FIRST_PAUSE, 0
    while True:
      tries += 1
      try:
        return self._ask(request)
      except _Failure as failure:
        now = self._clock()
        first_failure = now if first_failure is None else first_failure
        left = first_failure + self._config.patience - now
        if left <= 0:
          raise RewardServerError(
            f'{self._url}: no rewards after {tries} tries in {now - first_failure:.0f} s: {failure}; start the server '
            '(rft.reward.address names it, rft.reward.patience is how long it may be away), then give the same command again: '
            'the run continues from its last checkpoint'
          ) from failure
        if tries == 1:
          logging.warning('%s: %s; asking again for up to %.0f s', self._url, failure, left)
        self._sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)

  def _ask(self, request: urllib.request.Request) -> Any:
    """The JSON that the server answers.

    Raises:
      _Failure: asking again may help.
      RewardServerError: it will not.
    """
    timeout = self._config.timeout
    try:
      with self._opener.open(request, timeout=timeout) as response:
        content = self._read(response)
    except urllib.error.HTTPError as error:
      with error:
        said = f'status {error.code} {error.reason}: {_message_of(error)}'
      if error.code >= 500 or error.code in _PASSING:
        raise _Failure(said) from error
      raise RewardServerError(f'{self._url}: refuses the request with {said}') from error
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, 'reason', error)
      if isinstance(reason, TimeoutError):
        raise _Failure(f'no answer within {timeout:g} s (rft.reward.timeout)') from error
      raise _Failure(str(reason) or type(reason).__name__) from error
    try:
      return json.loads(content)
    except ValueError as error:
      raise _Failure(f'an answer that is not JSON ({_excerpt(content.decode(errors="replace"))})') from error

  def _read(self, response: http.client.HTTPResponse) -> bytes:
    """The whole body. A socket's timeout is that of one read; a body that trickles must not take longer than that in all."""
    started, parts = time.monotonic(), []
    while part := response.read1(1 << 20):
      parts.append(part)
      if time.monotonic() - started > self._config.timeout:
        raise TimeoutError
    if response.length:
      raise http.client.IncompleteRead(b'', response.length)
    return b''.join(parts)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  def redirect_request(self, *_: Any) -> None:
    return None


def _base_url(address: str) -> str:
  url = address if '://' in address else f'http://{address}'
  try:
    parts = urllib.parse.urlsplit(url)
    valid = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0 and not (parts.query or parts.fragment)
  except ValueError:
    valid = False
  if not valid or any(c.isspace() for c in url):
    raise ConfigError(f'rft.reward.address is {address!r}; it must be HOST:PORT, or a URL that begins with http:// or https://')
  return url.rstrip('/')


def _numbers(server: str, answer: Any, count: int) -> list[float]:
  """The rewards in a server's answer, in the order of the texts.

    sglang    [{"embedding": [reward]}, ...]
    vllm      {"data": [{"data": [[of token 0], ..., [of the last token: the reward]]}, ...]}
    lmdeploy  {"data": [{"data": reward}, ...]}

  Raises:
    ValueError: the answer has another form or length, or what stands there is no number.
  """
  items = answer if server == 'sglang' else answer.get('data') if isinstance(answer, dict) else None
  if not isinstance(items, list):
    raise ValueError(f'the answer is not of the form that {server} gives')
  if len(items) != count:
    raise ValueError(f'{len(items)} rewards came for {count} texts')
  out = [_number(server, item, i) for i, item in enumerate(items)]
  places = [item['index'] for item in items if 'index' in item]
  if not places:
    return out
  if sorted(map(repr, places)) != sorted(map(repr, range(count))):
    raise ValueError(f'the indices of the rewards are not those of the {count} texts')
  return [number for _, number in sorted(zip(places, out, strict=True))]


def _number(server: str, item: Any, i: int) -> float:
  key = 'embedding' if server == 'sglang' else 'data'
  if not isinstance(item, dict) or key not in item:
    raise ValueError(f'reward {i} is not of the form that {server} gives')
  value = item[key]
  if server == 'vllm' and isinstance(value, list) and value:
    value = value[-1]
  if server != 'lmdeploy' and isinstance(value, list):
    if len(value) != 1:
      raise ValueError(f'in the place of reward {i} there are {len(value)} numbers')
    value = value[0]
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'reward {i} is {shorten(json.dumps(value))}, which is no number')
  return float(value)


def _message_of(error: urllib.error.HTTPError) -> str:
  try:
    return _excerpt(error.read(4_096).decode(errors='replace'))
  except (OSError, http.client.HTTPException) as failure:
    return f'no message ({failure})'


def _excerpt(content: Any) -> str:
  """The beginning of an answer on one line."""
  text = ' '.join((content if isinstance(content, str) else json.dumps(content)).split())
  return (text[:200] + ('...' if len(text) > 200 else '')) or 'empty'
