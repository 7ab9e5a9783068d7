"""Numbers as messages show them."""

from __future__ import annotations


def in_units(size: float) -> str:
  """Return a number of bytes in a unit that suits it, such as '1.5 GiB'."""
  for unit in ('bytes', 'KiB', 'MiB', 'GiB'):
    if size < 1024:
      return f'{size:.0f} {unit}' if unit == 'bytes' else f'{size:.3g} {unit}'
    size /= 1024
  return f'{size:,.4g} TiB'
