"""A server with the part of Google Cloud Storage's JSON API that gcsfs and TensorStore use, for tests of buckets without a bucket.

Objects are in memory, generations count up, and conditional writes and reads are honored: without them two writers could both win.
"""

from __future__ import annotations

import contextlib
import email.parser
import email.policy
import http.server
import json
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any


class Bucket:
  """The state of the server.

  Attributes:
    objects: name -> (content, generation); the name begins with the bucket's.
    requests: their number by method.
  """

  def __init__(self, address: str = ''):
    self.address = address
    self.objects: dict[str, tuple[bytes, int]] = {}
    self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
    self.requests: dict[str, int] = {}
    self.lock = threading.RLock()
    self._generation = 0

  def names(self, bucket: str) -> list[str]:
    with self.lock:
      return sorted(name.removeprefix(f'{bucket}/') for name in self.objects if name.startswith(f'{bucket}/'))

  def put(self, name: str, content: bytes) -> int:
    with self.lock:
      self._generation += 1
      self.objects[name] = content, self._generation
      return self._generation


class _Refused(Exception):
  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request: Any, client_address: Any) -> None:
    if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  held: Bucket

  def log_message(self, *_: Any) -> None:
    pass

  def _respond(self, status: int, body: bytes = b'', headers: dict[str, str] | None = None) -> None:
    if status in (204, 304):  # have no body: a client would take it for the next response of the connection
      body = b''
    self.send_response(status)
    for key, value in ({'Content-Type': 'application/json'} | (headers or {})).items():
      self.send_header(key, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    with contextlib.suppress(ConnectionError):  # the client has closed the connection
      self.wfile.write(body)

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _serve(self) -> None:
    parts = urllib.parse.urlsplit(self.path)
    query = {key: values[0] for key, values in urllib.parse.parse_qs(parts.query).items()}
    body = self._body()
    path = parts.path.removeprefix('/download').removeprefix('/upload').removeprefix('/storage/v1').removeprefix('/b/')
    with self.held.lock:
      self.held.requests[self.command] = self.held.requests.get(self.command, 0) + 1
      try:
        self._route(path, query, body)
      except _Refused as refused:
        error = {'error': {'code': refused.status, 'message': str(refused)}}
        self._respond(refused.status, json.dumps(error).encode())

  do_GET = do_POST = do_PUT = do_DELETE = _serve

  def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
    if 'upload_id' in query:
      return self._resume(query, body)
    bucket, _, rest = path.partition('/o')
    if not rest:
      if self.command == 'POST':
        return self._upload(bucket, query, body)
      return self._list(bucket, query) if path.endswith('/o') else self._respond(200, json.dumps({'name': bucket}).encode())
    name, to, target = rest.removeprefix('/').partition('/rewriteTo/b/')
    if not to:
      name, to, target = name.partition('/moveTo/o/')
      target = f'{bucket}/o/{target}'
    full = f'{bucket}/{urllib.parse.unquote(name)}'
    if to:
      return self._copy(full, target, move='moveTo' in to)
    if self.command == 'DELETE':
      self._check(full, query)
      if self.held.objects.pop(full, None) is None:
        raise _Refused(404, f'No such object: {full}')
      return self._respond(204)
    return self._get(full, query)

  def _check(self, full: str, query: dict[str, str]) -> None:
    generation = self.held.objects.get(full, (b'', 0))[1]
    if 'ifGenerationMatch' in query and int(query['ifGenerationMatch']) != generation:
      raise _Refused(412, 'conditionNotMet')
    if 'ifGenerationNotMatch' in query and int(query['ifGenerationNotMatch']) == generation:
      raise _Refused(304, 'not modified')

  def _facts(self, full: str) -> dict[str, Any]:
    content, generation = self.held.objects[full]
    bucket, _, name = full.partition('/')
    link = f'{self.held.address}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe="")}?alt=media'
    facts = {'kind': 'storage#object', 'bucket': bucket, 'name': name, 'size': str(len(content)), 'generation': str(generation)}
    times = dict.fromkeys(('timeCreated', 'updated'), '2026-01-01T00:00:00.000Z')
    return facts | times | {'metageneration': '1', 'mediaLink': link, 'storageClass': 'STANDARD'}

  def _get(self, full: str, query: dict[str, str]) -> None:
    if full not in self.held.objects:
      raise _Refused(404, f'No such object: {full}')
    self._check(full, query)
    content, generation = self.held.objects[full]
    if query.get('alt') != 'media':
      return self._respond(200, json.dumps(self._facts(full)).encode())
    headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream'}
    if wanted := self.headers.get('Range'):
      first, _, last = wanted.removeprefix('bytes=').partition('-')
      start = int(first) if first else max(len(content) - int(last), 0)
      end = min(int(last) + 1 if first and last else len(content), len(content))
      if start >= len(content):
        raise _Refused(416, 'range')
      headers['Content-Range'] = f'bytes {start}-{end - 1}/{len(content)}'
      return self._respond(206, content[start:end], headers)
    return self._respond(200, content, headers)

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], dict[str, None]()
    for name in self.held.names(bucket):
      if not name.startswith(prefix) or name < query.get('startOffset', '') or ('endOffset' in query and name >= query['endOffset']):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes[prefix + rest.split(delimiter)[0] + delimiter] = None
      else:
        items.append(self._facts(f'{bucket}/{name}'))
    listing: dict[str, Any] = {'kind': 'storage#objects', 'items': items, 'prefixes': list(prefixes)}
    self._respond(200, json.dumps(listing).encode())

  def _store(self, full: str, query: dict[str, str], content: bytes) -> None:
    self._check(full, query)
    self.held.put(full, content)
    self._respond(200, json.dumps(self._facts(full)).encode())

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    kind = query.get('uploadType')
    if kind == 'media':
      return self._store(f'{bucket}/{query["name"]}', query, body)
    if kind == 'multipart':
      head = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'.encode()
      facts, content = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body).iter_parts()
      name = json.loads(facts.get_payload(decode=True))['name']
      return self._store(f'{bucket}/{name}', query, content.get_payload(decode=True))
    if kind != 'resumable':
      raise _Refused(400, f'uploadType {kind}')
    name = query.get('name') or json.loads(body)['name']
    upload = str(len(self.held.uploads))
    self.held.uploads[upload] = f'{bucket}/{name}', query, bytearray()
    at = f'{self.held.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload}'
    return self._respond(200, b'', {'Location': at})

  def _resume(self, query: dict[str, str], body: bytes) -> None:
    full, wanted, content = self.held.uploads[query['upload_id']]
    content += body
    if self.headers.get('Content-Range', '').endswith('/*'):  # more will come
      return self._respond(308, b'', {'Range': f'bytes=0-{len(content) - 1}'} if content else {})
    return self._store(full, wanted, bytes(content))

  def _copy(self, full: str, target: str, *, move: bool) -> None:
    if full not in self.held.objects:
      raise _Refused(404, f'No such object: {full}')
    bucket, _, name = target.partition('/o/')
    to = f'{bucket}/{urllib.parse.unquote(name)}'
    self.held.put(to, self.held.objects[full][0])
    if move:
      del self.held.objects[full]
      return self._respond(200, json.dumps(self._facts(to)).encode())
    return self._respond(200, json.dumps({'done': True, 'resource': self._facts(to)}).encode())


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
  """Run a server on a free port of this machine, at `Bucket.address`, until the end of the block."""
  held = Bucket()
  server = _Server(('127.0.0.1', 0), type('Handler', (_Handler,), {'held': held}))
  held.address = f'http://127.0.0.1:{server.server_port}'
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield held
  finally:
    server.shutdown()
    server.server_close()


def environment(held: Bucket) -> dict[str, str]:
  """Return environment variables that make gcsfs and TensorStore send all requests to the server."""
  return {
    'STORAGE_EMULATOR_HOST': held.address,
    'TENSORSTORE_GCS_HTTP_URL': held.address,
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would query another service over gRPC
    'GOOGLE_AUTH_DISABLE': '1',
    'TENSORSTORE_GOOGLE_AUTH': 'anonymous',
    'GCE_METADATA_HOST': '127.0.0.1:9',  # a closed port instead of a metadata server
    'NO_GCE_CHECK': 'true',
  }
