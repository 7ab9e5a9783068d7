"""The files of the page. They need nothing from elsewhere, and their headers forbid the browser to load it."""

from __future__ import annotations

import importlib.resources
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

# Path of the server -> file and type.
_FILES = {
  '/': ('index.html', 'text/html; charset=utf-8'),
  '/page/style.css': ('style.css', 'text/css; charset=utf-8'),
  '/page/page.js': ('page.js', 'text/javascript; charset=utf-8'),
  '/page/examples.js': ('examples.js', 'text/javascript; charset=utf-8'),
  '/page/icon.svg': ('icon.svg', 'image/svg+xml'),
}
PATHS = tuple(_FILES)
_HEADERS = {
  'content-security-policy': "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
  'cross-origin-opener-policy': 'same-origin',
  'cross-origin-resource-policy': 'same-origin',
  'cache-control': 'no-cache',
}


def file_routes() -> list[Route]:
  """Return the routes of all files."""
  folder = importlib.resources.files('polar_jax.serve.page')
  return [Route(path, _endpoint(folder.joinpath(name).read_bytes(), kind), methods=['GET']) for path, (name, kind) in _FILES.items()]


def _endpoint(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
  async def file(_: Request) -> Response:
    return Response(content, headers={'content-type': kind, **_HEADERS})

  return file
