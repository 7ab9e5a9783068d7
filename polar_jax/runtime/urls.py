"""Addresses of servers that users give."""

from __future__ import annotations

import urllib.parse


def base_url(address: str) -> str | None:
  """Return an address, HOST:PORT or a URL, as a URL without a slash at its end; None if it is neither, or has a query or white space."""
  url = address if '://' in address else f'http://{address}'
  try:
    parts = urllib.parse.urlsplit(url)
    valid = parts.scheme in ('http', 'https') and parts.hostname and parts.port != 0 and not (parts.query or parts.fragment)
  except ValueError:
    return None
  return url.rstrip('/') if valid and not any(c.isspace() for c in url) else None
