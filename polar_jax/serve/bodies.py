"""Bodies of requests, read within limits of size, memory and time."""

from __future__ import annotations

import zlib

from starlette.requests import Request

from polar_jax.serve.requests import RequestError

_MB = 1_000_000
_TYPES = ('application/json', 'text/json')


class BodyReader:
  """Reads bodies. It belongs to the event loop.

  Args:
    max_body: bytes of one body, also after decompression.
    memory: bytes of all bodies together.
  """

  def __init__(self, max_body: int, memory: int):
    self._max_body, self._memory = max_body, memory
    self.used = 0

  @classmethod
  def in_mb(cls, max_body: int, memory: int) -> BodyReader:
    """Return a reader with limits in MB."""
    return cls(max_body * _MB, max(memory, max_body) * _MB)

  async def read(self, request: Request) -> Body:
    """Return the body of a request as it was sent. The caller must `release` it.

    Raises:
      RequestError: it is too large or of another type.
      ClientDisconnect: the client hung up.
    """
    _check_type(request)
    compressed = _is_compressed(request)
    declared = _declared(request)
    if declared is not None and declared > self._max_body:
      raise self._too_large()
    body = Body(self, compressed)
    try:
      async for chunk in request.stream():
        body.append(chunk)
        if body.size > self._max_body:
          raise self._too_large()
        self.check_memory()
    except BaseException:
      body.release()
      raise
    return body

  def expand(self, body: Body) -> bytes:
    """Return the content of a body, decompressed. It takes a while: call it in a thread.

    Raises:
      RequestError: it is no gzip stream, or too large.
    """
    data = b''.join(body.chunks)
    if not body.compressed:
      return data
    expander = zlib.decompressobj(wbits=31)  # gzip
    try:
      out = expander.decompress(data, self._max_body + 1)
    except zlib.error as error:
      raise RequestError('the body is not in gzip format, as Content-Encoding says') from error
    if len(out) > self._max_body:
      raise self._too_large()
    if not expander.eof:
      raise RequestError('the gzip stream of the body has no end')
    if expander.unused_data:
      raise RequestError('the body has bytes after the end of its gzip stream')
    return out

  def check_memory(self) -> None:
    """Check the memory that all bodies use.

    Raises:
      RequestError: it is too much.
    """
    if self.used > self._memory:
      raise RequestError('too many large requests are in progress (serve.body_memory_mb)', None, 429, 'memory', retry_after=1.0)

  def _too_large(self) -> RequestError:
    return RequestError(
      f'the body is larger than {self._max_body // _MB} MB, the limit (serve.max_body_mb); divide the request', None, 413, 'too_large'
    )


class Body:
  """The parts of a body. They, or what is made of them, count towards the memory of the reader until it is released."""

  def __init__(self, reader: BodyReader, compressed: bool):
    self._reader, self.compressed = reader, compressed
    self.chunks: list[bytes] = []
    self.size = 0

  def append(self, chunk: bytes) -> None:
    """Add a part."""
    self.chunks.append(chunk)
    self.size += len(chunk)
    self._reader.used += len(chunk)

  def replace(self, size: int) -> None:
    """Forget the parts, and count what was made of them instead: `size` bytes.

    Raises:
      RequestError: that is too much memory.
    """
    self._reader.used += size - self.size
    self.chunks, self.size = [], size
    self._reader.check_memory()

  def release(self) -> None:
    """Forget the parts, and what was made of them."""
    self._reader.used -= self.size
    self.chunks, self.size = [], 0


def _check_type(request: Request) -> None:
  """Refuse bodies that claim to be something else than JSON; a page of another site could send those without asking."""
  kind = request.headers.get('content-type')
  name = (kind or _TYPES[0]).partition(';')[0].strip().lower()
  if name not in _TYPES and not (name.startswith('application/') and name.endswith('+json')):
    raise RequestError('Content-Type must be application/json', None, 415, 'content_type')


def _is_compressed(request: Request) -> bool:
  encoding = request.headers.get('content-encoding', 'identity').strip().lower()
  if encoding not in ('identity', 'gzip', 'x-gzip', ''):
    raise RequestError('Content-Encoding must be gzip or identity', None, 415, 'content_encoding')
  return encoding in ('gzip', 'x-gzip')


def _declared(request: Request) -> int | None:
  length = request.headers.get('content-length', '')
  return int(length) if length.isascii() and length.isdigit() else None
