"""A policy of a pool behind servers: which endpoint answers which prompts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from polar_jax.config import PoolConfig
from polar_jax.synthesis.addresses import Addresses
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import INSTRUCTION, Failure, QuarantineError, Request, Sample
from polar_jax.synthesis.server import ServerConfig, ServerSampler


class OpenaiSampler:
  """A policy that servers answer for: conversations for `chat`, plain text otherwise.

  Where the pool does not say which, instructions are conversations and beginnings of documents are plain text; servers without a chat
  endpoint get instructions as plain text too.
  """

  def __init__(self, spec: PolicySpec, config: PoolConfig, addresses: Addresses):
    chat = spec.settings.get('chat')
    self._samplers = {
      is_chat: ServerSampler(_config(spec, config, is_chat), addresses=addresses) for is_chat in ([True, False] if chat is None else [chat])
    }
    self._chat, self._lock, self._settled = chat, threading.Lock(), chat is not None

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request, in order."""
    out: dict[int, Sample | Failure] = {}
    for is_chat in self._samplers:
      places = [i for i, request in enumerate(requests) if self._is_chat(request) == is_chat]
      if places:
        answers = self._ask(is_chat, [requests[i] for i in places])
        out |= dict(zip(places, answers, strict=True))
    return [out[i] for i in range(len(requests))]

  def counts(self) -> dict[str, Any]:
    """Return the sums of both endpoints."""
    out: dict[str, int] = {}
    for sampler in self._samplers.values():
      for name, value in sampler.counts().items():
        out[name] = out.get(name, 0) + value
    return out

  def _is_chat(self, request: Request) -> bool:
    return self._chat if self._chat is not None else request.prompt.kind == INSTRUCTION

  def _ask(self, is_chat: bool, requests: Sequence[Request]) -> list[Sample | Failure]:
    if is_chat and not self._settled:
      with self._lock:  # one thread finds out, by one request, whether there is a chat endpoint
        first = [] if self._settled else self._find_out(requests[0])
      return [*first, *self._send(is_chat, requests[len(first) :])]
    return self._send(is_chat, requests)

  def _send(self, is_chat: bool, requests: Sequence[Request]) -> list[Sample | Failure]:
    return self._samplers[is_chat if self._chat is None else self._chat].sample(requests)

  def _find_out(self, request: Request) -> list[Sample | Failure]:
    """Return the answer to a conversation, as plain text if the servers have no chat endpoint."""
    try:
      answer = self._samplers[True].sample([request])
    except QuarantineError as error:
      if error.status != 404:
        raise
      self._chat = False
      answer = self._samplers[False].sample([request])
    self._settled = True
    return answer


def _config(spec: PolicySpec, config: PoolConfig, chat: bool) -> ServerConfig:
  s = spec.settings
  return ServerConfig(
    base_urls=tuple(s['base_url']),
    model=s['model'],
    chat=chat,
    system=s.get('system') if chat else None,
    temperature=spec.temperature,
    top_p=spec.top_p,
    top_k=spec.top_k,
    max_tokens=spec.max_tokens,
    api_key_env=s.get('api_key_env'),
    max_in_flight=config.max_in_flight,
    timeout=config.timeout,
    patience=config.patience,
  )
