"""One connection to a server: a request at a time, kept open between requests, with limits on every wait.

Requests are written to the socket in one piece, and `http.client` reads the replies. It knows no proxies, follows no redirects and logs
nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from typing import NamedTuple

from polar_jax.types import one_line

_CONNECT = 10.0  # seconds; a machine that is up accepts a connection long before
_KEEP_ALIVE = 4.0  # seconds; common servers close idle connections after 5, and a request that meets this fails
_PART = 1 << 16  # bytes of a body that are read at once, at most


class TemporaryError(Exception):
  """A request failed, and a retry may succeed. The message is one line.

  Attributes:
    after: seconds that the server asks to wait, 0 if it does not say.
  """

  def __init__(self, message: str, after: float = 0.0):
    super().__init__(message)
    self.after = after


class Reply(NamedTuple):
  """What a server sent."""

  status: int
  headers: Mapping[str, str]  # names in lower case
  content: bytes


class Connection:
  """A connection to an address, opened when it is first used, and again after it was closed.

  Args:
    context: of addresses that start with https.
  """

  def __init__(self, context: ssl.SSLContext | None):
    self._context = context
    self._socket: socket.socket | None = None
    self._used = 0.0  # when the last reply was complete
    self.aborted = False

  def post(self, url: str, headers: Mapping[str, str], body: bytes, timeout: float) -> Reply:
    """Send a request and return the whole reply. The time limit bounds each wait for the server, and all parts of the body together.

    Raises:
      TemporaryError: there is none.
    """
    parts = urllib.parse.urlsplit(url)
    target = f'{parts.path or "/"}?{parts.query}' if parts.query else parts.path or '/'
    lines = [f'POST {target} HTTP/1.1', f'Host: {parts.netloc}', f'Content-Length: {len(body)}']
    lines += [f'{name}: {value}' for name, value in headers.items()]
    message = '\r\n'.join([*lines, '\r\n']).encode('latin-1') + body
    try:
      response = self._begin(message, timeout) if self._is_kept() else None
      if response is None:
        self._open(parts, timeout)
        response = self._begin(message, timeout, is_new=True)
      assert response is not None
      content = _read(response, timeout)
    except BaseException as error:
      self.close()
      if isinstance(error, TimeoutError):
        raise TemporaryError(f'no reply within {timeout:g} s') from error
      if isinstance(error, (http.client.HTTPException, OSError)):
        raise TemporaryError(one_line(str(error)) or type(error).__name__) from error
      raise
    if response.will_close:
      self.close()
    self._used = time.monotonic()
    return Reply(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

  def _is_kept(self) -> bool:
    """Return whether the connection is open and, as far as can be seen, the server has not closed it. Otherwise it is closed."""
    if self._socket is None:
      return False
    # Nothing may come before a request: what can be read is the end of the connection.
    if time.monotonic() - self._used < _KEEP_ALIVE and not _can_be_read(self._socket):
      return True
    self.close()
    return False

  def _open(self, parts: urllib.parse.SplitResult, timeout: float) -> None:
    is_encrypted = parts.scheme == 'https'
    limit = min(timeout, _CONNECT)
    try:
      plain = socket.create_connection((parts.hostname, parts.port or (443 if is_encrypted else 80)), limit)
      plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      self._socket = plain
      if is_encrypted and self._context is not None:
        self._socket = self._context.wrap_socket(plain, server_hostname=parts.hostname)
    except TimeoutError as error:
      raise TemporaryError(f'no connection within {limit:g} s') from error
    self._socket.settimeout(timeout)
    if self.aborted:
      self.abort()

  def _begin(self, message: bytes, timeout: float, is_new: bool = False) -> http.client.HTTPResponse | None:
    """Send a request and read the head of the reply. None: the server had closed the connection, which is not new, before it replied."""
    assert self._socket is not None
    try:
      self._socket.settimeout(timeout)
      self._socket.sendall(message)
      response = http.client.HTTPResponse(self._socket, method='POST')
      response.begin()
    except (ConnectionError, ssl.SSLError):  # what `http.client` raises at the end of the connection is a ConnectionError too
      if is_new or self.aborted:
        raise
      self.close()
      return None
    return response

  def abort(self) -> None:
    """Make the request in flight fail at once, from another thread. Servers then give its generation up."""
    self.aborted = True
    if (open_socket := self._socket) is not None:
      with contextlib.suppress(OSError):
        # Not ssl's shutdown, which takes the encryption away under the thread that reads.
        socket.socket.shutdown(open_socket, socket.SHUT_RDWR)

  def close(self) -> None:
    """Close the connection, which must not be in use."""
    if self._socket is not None:
      self._socket.close()
    self._socket = None


def _can_be_read(open_socket: socket.socket) -> bool:
  poll = select.poll()  # select.select cannot watch the sockets of a process that has many
  poll.register(open_socket, select.POLLIN)
  return bool(poll.poll(0))


def _read(response: http.client.HTTPResponse, timeout: float) -> bytes:
  """Return the body of a reply.

  Raises:
    TemporaryError: it has not come in time, or not whole.
  """
  started, parts = time.monotonic(), []
  while part := response.read1(_PART):  # `read` would wait for all parts, each as long as the limit
    parts.append(part)
    if time.monotonic() - started > timeout:
      raise TemporaryError(f'no whole reply within {timeout:g} s')
  if response.length:
    raise TemporaryError(f'the server closed the connection {response.length} bytes before the end of its reply')
  response.close()
  return b''.join(parts)
