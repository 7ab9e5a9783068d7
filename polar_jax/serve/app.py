"""Routes of the server, its answers to errors, and what is done for every request: token, request id, log and metrics."""

from __future__ import annotations

import hmac
import json
import math
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polar_jax.serve import dialects, observe, openapi, tokens
from polar_jax.serve.dialects import Facts
from polar_jax.serve.page import files as page
from polar_jax.serve.requests import RequestError, Work, parse_score
from polar_jax.serve.service import Record, Service

OPEN_PATHS = (*page.PATHS, '/health', '/ready')  # without a token
_RECORD = 'polar_jax.record'  # key of the scope
_HUNG_UP = 499  # in the log; nobody receives it

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, token: str | None, facts: Facts, max_length: int) -> ASGIApp:
  """Return the application.

  Args:
    service: scores requests.
    token: that requests must carry; None: none.
    facts: of the model and the server.
    max_length: tokens of the longest sequence.
  """

  def score(body: Any, facts: Facts, _: str) -> Work:
    return parse_score(body, facts.limits, facts.use_reference, facts.model, service.config.exact)

  def scoring(path: str, parse: Callable[[Any, Facts, str], Work], *methods: str) -> Route:
    return Route(path, _scoring(service, path, lambda body, request_id: parse(body, facts, request_id)), methods=list(methods) or ['POST'])

  card = {
    'id': facts.model,
    'object': 'model',
    'created': int(time.time()),
    'owned_by': 'polar_jax',
    'root': facts.model,
    'max_model_len': max_length,
  }
  names = dict.fromkeys(('model_path', 'served_model_name', 'tokenizer_path'), facts.model)
  facts_of_model = {'max_length': max_length, 'exact': service.config.exact, 'use_reference': facts.use_reference}
  info = {**names, 'is_generation': False, **facts_of_model, 'pooling_dialect': facts.pooling}
  listing = {'object': 'list', 'data': [card]}
  description = openapi.document(facts, token is not None)
  routes = [
    Route('/health', _health(service), methods=['GET']),
    Route('/ready', _ready(service), methods=['GET']),
    Route('/metrics', _metrics(service), methods=['GET']),
    Route('/openapi.json', _constant('/openapi.json', description), methods=['GET']),
    Route('/v1/models', _constant('/v1/models', listing), methods=['GET']),
    Route('/v1/models/{model:path}', _model(card), methods=['GET']),
    Route('/get_model_info', _constant('/get_model_info', info), methods=['GET']),
    Route('/model_info', _constant('/model_info', info), methods=['GET']),
    scoring('/score', score),
    scoring('/classify', dialects.classify, 'POST', 'PUT'),
    scoring('/encode', dialects.classify, 'POST', 'PUT'),
    scoring('/pooling', dialects.pooling),
    scoring('/v1/embeddings', dialects.embeddings),
    scoring('/get_reward', dialects.get_reward),
    scoring('/reward', dialects.reward),
    Route('/template', _template(service), methods=['POST']),
    *page.file_routes(),
  ]
  handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _http_error, Exception: _failed}
  return Guard(Starlette(routes=routes, exception_handlers=handlers), service, token)


def _scoring(service: Service, name: str, parse: Callable[[Any, str], Work]) -> Endpoint:
  """Return an endpoint that scores what `parse(body, request id)` finds in a request."""

  async def endpoint(request: Request) -> Response:
    record: Record = request.scope[_RECORD]
    record.endpoint = name
    try:
      return as_json(await service.answer(request, record, lambda body: parse(body, record.id)))
    except ClientDisconnect:
      record.aborted = True
      return Response(status_code=_HUNG_UP)

  return endpoint


def _template(service: Service) -> Endpoint:
  """Return the endpoint that shows what the model reads."""

  async def template(request: Request) -> Response:
    record: Record = request.scope[_RECORD]
    record.endpoint = '/template'
    try:
      return as_json(await service.compute(request, lambda body: tokens.describe(body, service.limits, service.template)))
    except ClientDisconnect:
      record.aborted = True
      return Response(status_code=_HUNG_UP)

  return template


def _constant(name: str, value: Any) -> Endpoint:
  async def constant(request: Request) -> Response:
    request.scope[_RECORD].endpoint = name
    return as_json(value)

  return constant


def _model(card: dict[str, Any]) -> Endpoint:
  async def model(request: Request) -> Response:
    request.scope[_RECORD].endpoint = '/v1/models'
    if request.path_params['model'] != card['id']:
      raise RequestError(f'model: this server has only {card["id"]}', 'model', 404, 'model_not_found')
    return as_json(card)

  return model


def _health(service: Service) -> Endpoint:
  async def health(request: Request) -> Response:
    request.scope[_RECORD].endpoint = '/health'
    if not service.healthy:
      raise RequestError('the device thread has ended; restart the server', None, 503, 'unhealthy')
    return as_json({'status': 'ok'})

  return health


def _ready(service: Service) -> Endpoint:
  async def ready(request: Request) -> Response:
    request.scope[_RECORD].endpoint = '/ready'
    service.check_ready()
    return as_json({'status': 'ready'})

  return ready


def _metrics(service: Service) -> Endpoint:
  async def metrics(request: Request) -> Response:
    request.scope[_RECORD].endpoint = '/metrics'
    page = service.metrics.page(service.engine, service.in_progress, service.ready)
    return Response(page, headers={'content-type': observe.CONTENT_TYPE})

  return metrics


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  """Return a response with a JSON body."""
  return Response(json.dumps(value, allow_nan=False), status, headers, 'application/json')


def error_response(error: RequestError) -> Response:
  """Return the response that tells a client about an error. Its keys are none in which a client would look for rewards."""
  content = {'message': str(error), 'type': error.kind, 'param': error.param, 'code': error.status}
  headers = {} if error.retry_after is None else {'retry-after': str(math.ceil(error.retry_after))}
  if error.status == 401:
    headers['www-authenticate'] = 'Bearer'
  return as_json({'error': content}, error.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, RequestError)
  request.scope[_RECORD].reason = error.kind
  return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
  """Answer a path or method that does not exist."""
  assert isinstance(error, HTTPException)
  kinds = {404: ('not_found', 'there is no such path'), 405: ('method_not_allowed', 'this path does not take the method of the request')}
  kind, message = kinds.get(error.status_code, ('http_error', error.detail))
  request.scope[_RECORD].reason = kind
  response = error_response(RequestError(message, None, error.status_code, kind))
  response.headers.update(error.headers or {})
  return response


async def _failed(request: Request, error: Exception) -> Response:
  record: Record = request.scope[_RECORD]
  record.reason = 'server_error'
  # Without the message, which might quote a text.
  logging.error('request %s failed: %s\n%s', record.id, type(error).__name__, ''.join(traceback.format_tb(error.__traceback__)))
  return error_response(RequestError(f'the server failed; its log has the reason (request {record.id})', None, 500, 'server_error'))


class Guard:
  """Checks the token of every request, names it, counts and logs it.

  Args:
    app: what is guarded.
    service: of the app.
    token: that requests must carry; None: none.
  """

  def __init__(self, app: ASGIApp, service: Service, token: str | None):
    self._app, self._service = app, service
    self._token = None if token is None else token.encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Handle a request."""
    if scope['type'] != 'http':
      return
    headers = Headers(scope=scope)
    record = scope[_RECORD] = Record.of(headers.get('x-request-id'))
    status = 0

    async def send_named(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        MutableHeaders(scope=message)['x-request-id'] = record.id
      await send(message)

    try:
      if scope['path'] in OPEN_PATHS or self._is_authorized(headers):
        await self._app(scope, receive, send_named)
      else:
        record.reason = 'token'
        error = RequestError('Authorization must be Bearer with the token of this server', 'Authorization', 401, 'token')
        await error_response(error)(scope, receive, send_named)
    except Exception:
      if status == 0:  # else it is answered and logged; see `_failed`
        raise
    finally:
      self._note(record, status)

  def _is_authorized(self, headers: Headers) -> bool:
    if self._token is None:
      return True
    kind, _, given = headers.get('authorization', '').partition(' ')
    return hmac.compare_digest(given.strip().encode(), self._token) and kind.lower() == 'bearer'

  def _note(self, record: Record, status: int) -> None:
    """Count and log a request that is over. Probes are counted only."""
    metrics, seconds = self._service.metrics, time.monotonic() - record.started
    metrics.answered(record.endpoint, status, seconds)
    if record.aborted:
      metrics.aborted()
    if record.reason:
      metrics.refused(record.reason)
    if record.endpoint in ('/health', '/ready', '/metrics') and status == 200:
      return
    counts = {'sequences': record.sequences, 'tokens': record.tokens, 'truncated': record.truncated}
    reason = {'reason': record.reason} if record.reason else {}
    self._service.log('request', id=record.id, endpoint=record.endpoint, status=status, ms=round(seconds * 1e3, 1), **counts, **reason)
