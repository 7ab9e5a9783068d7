"""Rewards from a server of the official kinds: POLAR served by sglang, vLLM or LMDeploy.

A PPO step must not lose its responses because a server restarts. A request is repeated, with growing pauses, if the server cannot be
reached, takes too long, or replies with status 5xx, 408 or 429 or with something that is not JSON, until it has failed for `patience`
seconds. Any other status, and a reply whose form or length is not that of the server's kind, stops the run at once, because a retry would
not help. Rewards are never dropped, guessed or reordered.

A sigmoid keeps the order of rewards, crushes their differences, and shows in nothing but their range. vLLM applies one by default.
Requests to it ask for none, and rewards that all lie between 0 and 1 stop the run, whatever the server (`rft.reward.unit_interval`).
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
from polar_jax.runtime import json_files, urls
from polar_jax.types import Prompt, UserError

BATCH = 64  # texts per request: they fill the server's batch, and at 2,000 tokens each a 7B model stays far below the timeout
_PATHS = {'sglang': '/classify', 'vllm': '/pooling', 'lmdeploy': '/pooling'}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds; each pause is twice the one before
_TEMPORARY = (408, 429)  # statuses below 500 after which a retry makes sense


class RewardServerError(UserError):
  """The reward server is down for too long, or its reply cannot be used. The message is one line for the user."""


class _TemporaryError(Exception):
  """A request failed, and a retry may succeed."""


class HttpReward:
  """A reward server, which scores every (prompt, reference, response) in the template's text (see `Template.candidate_texts`).

  Args:
    template: of the model that is served. Its tokenizer cuts texts and removes control tokens; the server tokenizes the result.
    config: address and kind of the server, timeouts and wrapper.
    batch: texts per request.
    clock: returns seconds; for tests.
    sleep: waits for some seconds; for tests.

  Attributes:
    template: the same.
  """

  def __init__(
    self,
    template: Template,
    config: RewardConfig,
    batch: int = BATCH,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self.template = template
    self._config, self._batch, self._clock, self._sleep = config, batch, clock, sleep
    self._is_raw = config.unit_interval  # whether the rewards need no check, or one of them was outside [0, 1]
    self._url = _base_url(config.address) + _PATHS[config.server]
    # No proxy, and no redirects, which urllib would follow with a GET.
    self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())

  def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return rewards (n,), float32. In a run of several processes only the first queries the server.

    Raises:
      RewardServerError: the server failed for `patience` seconds, refused a request, sent a reply of a wrong form, or has sent only
        rewards between 0 and 1 so far.
      RewardError: a reward is not finite.
    """
    wrapper = self._config.wrapper
    texts = [
      self.template.candidate_texts(prompt.prompt, prompt.reference, [response], wrapper)[0]
      for prompt, response in zip(prompts, responses, strict=True)
    ]
    failed = RewardServerError(f'{self._url}: the first process got no rewards; see its log')
    # Equal texts are sent once, because the last bits of a reward may depend on its place in a batch of the server: they tie.
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    distinct = score_on_first_process(lambda: self._score_all(list(place)), len(place), RewardServerError, failed)
    rewards = distinct[np.array([place[text] for text in texts], int)]
    return check_rewards(rewards, self._url, prompts, responses)

  def _score_all(self, texts: list[str]) -> np.ndarray:
    rewards = np.zeros(len(texts), np.float32)
    for low in range(0, len(texts), self._batch):
      part = texts[low : low + self._batch]
      reply = self._send_with_retries(self._request(part))
      try:
        numbers = _parse_rewards(self._config.server, reply, len(part))
      except (ValueError, OverflowError) as error:
        raise RewardServerError(
          f'{self._url}: {error}; check that a server of kind rft.reward.server ({self._config.server}) runs there, and that it serves a '
          f'reward model (reply: {_excerpt(reply)})'
        ) from error
      with np.errstate(over='ignore'):  # a number too large for float32 becomes infinite, which `score` refuses
        rewards[low : low + self._batch] = numbers
    self._check_range(rewards)
    return rewards

  def _check_range(self, rewards: np.ndarray) -> None:
    """Refuse rewards that all look like the output of a sigmoid, until one has shown that they are not."""
    self._is_raw = self._is_raw or not ((rewards >= 0) & (rewards <= 1)).all()
    if rewards.size and not self._is_raw:
      raise RewardServerError(
        f'{self._url}: all {len(rewards)} rewards lie between 0 and 1 ({rewards.min():g} to {rewards.max():g}), as after a sigmoid, which '
        'crushes their differences; serve raw scores (vLLM: 0.12 or later, which obeys the request, or turn the activation of its pooler '
        'off), or set rft.reward.unit_interval=true if that is the scale of this reward'
      )

  def _request(self, texts: list[str]) -> urllib.request.Request:
    """Build a request. It holds a list even for one text, because sglang replies in another form to a bare string."""
    config = self._config
    body: dict[str, Any] = {'text' if config.server == 'sglang' else 'input': texts}
    if config.server == 'sglang':
      body['model'] = config.server_model or pathlib.PurePath(config.checkpoint).name
    elif config.server_model:  # the other kinds need no name, and refuse a wrong one
      body['model'] = config.server_model
    if config.server == 'vllm':
      body['use_activation'] = False
    return urllib.request.Request(self._url, json.dumps(body).encode(), {'Content-Type': 'application/json'}, method='POST')

  def _send_with_retries(self, request: urllib.request.Request) -> Any:
    """Send a request until it succeeds or has failed for `patience` seconds."""
    first_failure, pause, tries = None, _FIRST_PAUSE, 0
    while True:
      tries += 1
      try:
        return self._send(request)
      except _TemporaryError as failure:
        now = self._clock()
        first_failure = now if first_failure is None else first_failure
        left = first_failure + self._config.patience - now
        if left <= 0:
          raise RewardServerError(
            f'{self._url}: no rewards after {tries} tries in {now - first_failure:.0f} s: {failure}; start the server (at '
            'rft.reward.address; rft.reward.patience is how long it may be down), then repeat the command: the run continues from its last '
            'checkpoint'
          ) from failure
        if tries == 1:
          logging.warning('%s: %s; retrying for up to %.0f s', self._url, failure, left)
        self._sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)

  def _send(self, request: urllib.request.Request) -> Any:
    """Send a request once and return the JSON of the reply.

    Raises:
      _TemporaryError: a retry may succeed.
      RewardServerError: a retry would not help.
    """
    timeout = self._config.timeout
    try:
      with self._opener.open(request, timeout=timeout) as response:
        content = self._read(response)
    except urllib.error.HTTPError as error:
      with error:
        description = f'status {error.code} {error.reason}: {_message_of(error)}'
      if error.code >= 500 or error.code in _TEMPORARY:
        raise _TemporaryError(description) from error
      raise RewardServerError(f'{self._url}: refuses the request with {description}') from error
    except (OSError, http.client.HTTPException) as error:
      reason = getattr(error, 'reason', error)
      if isinstance(reason, TimeoutError):
        raise _TemporaryError(f'no reply within {timeout:g} s (rft.reward.timeout)') from error
      raise _TemporaryError(str(reason) or type(reason).__name__) from error
    try:
      return json_files.parse(content)
    except json_files.RepeatedKeyError as error:
      raise RewardServerError(
        f'{self._url}: a reply has the key {shorten(error.key)} twice in one object, so that it is open which value counts; check the '
        f'server (reply: {_excerpt(content.decode(errors="replace"))})'
      ) from error
    except json_files.JsonError as error:
      raise _TemporaryError(f'a reply that is not JSON ({_excerpt(content.decode(errors="replace"))})') from error

  def _read(self, response: http.client.HTTPResponse) -> bytes:
    """Return the whole body. A socket's timeout bounds one read only; here it bounds them all, also for a body that trickles in."""
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
  url = urls.base_url(address)
  if url is None:
    raise ConfigError(f'rft.reward.address is {address!r}; it must be HOST:PORT, or a URL that starts with http:// or https://')
  return url


def _parse_rewards(server: str, reply: Any, count: int) -> list[float]:
  """Return the rewards in a server's reply, in the order of the texts.

    sglang    [{"embedding": [reward]}, ...]
    vllm      {"data": [{"data": [[token 0], ..., [last token: the reward]]}, ...]}, or [reward] in place of the tokens
    lmdeploy  {"data": [{"data": reward}, ...]}

  Raises:
    ValueError: the reply has another form or length, or a reward is not a number.
  """
  items = reply if server == 'sglang' else reply.get('data') if isinstance(reply, dict) else None
  if not isinstance(items, list):
    raise ValueError(f'the reply does not have the form of {server}')
  if len(items) != count:
    raise ValueError(f'the reply has {len(items)} rewards for {count} texts')
  out = [_parse_reward(server, item, i) for i, item in enumerate(items)]
  indices = [item['index'] for item in items if 'index' in item]
  if not indices:
    return out
  if sorted(map(repr, indices)) != sorted(map(repr, range(count))):
    raise ValueError(f'the indices of the rewards are not 0 to {count - 1}, those of the texts')
  return [number for _, number in sorted(zip(indices, out, strict=True))]


def _parse_reward(server: str, item: Any, i: int) -> float:
  key = 'embedding' if server == 'sglang' else 'data'
  if not isinstance(item, dict) or key not in item:
    raise ValueError(f'reward {i} does not have the form of {server}')
  value = item[key]
  if server != 'lmdeploy' and not isinstance(value, list):
    raise ValueError(f'reward {i} is {shorten(json.dumps(value))}, not a list, and does not have the form of {server}')
  if server == 'vllm' and any(isinstance(token, list) for token in value):
    # Of several numbers in one list, nothing says whether they belong to tokens or to labels; of lists of one number each, their form does.
    widths = {len(token) if isinstance(token, list) else 0 for token in value}
    if widths != {1}:
      raise ValueError(f'reward {i} has {max(widths)} numbers instead of one, or tokens of different forms')
    value = value[-1]
  if server != 'lmdeploy':
    if len(value) != 1:
      raise ValueError(f'reward {i} has {len(value)} numbers instead of one')
    value = value[0]
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise ValueError(f'reward {i} is {shorten(json.dumps(value))}, which is not a number')
  return float(value)


def _message_of(error: urllib.error.HTTPError) -> str:
  try:
    return _excerpt(error.read(4_096).decode(errors='replace'))
  except (OSError, http.client.HTTPException) as failure:
    return f'no message ({failure})'


def _excerpt(content: Any) -> str:
  """Return the beginning of a reply on one line."""
  text = ' '.join((content if isinstance(content, str) else json.dumps(content)).split())
  return (text[:200] + ('...' if len(text) > 200 else '')) or 'empty'
