"""Local files and files in buckets, through the interface of pathlib."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
from typing import cast

from etils import epath

from polar_jax.types import UserError

_PLAIN_NAME = re.compile(r'(?!\.{1,2}$)[^/\\\x00-\x1f]{1,100}')
_SCHEMES = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}  # -> the package that reads it, and the extra that installs it


def path_of(text: str | os.PathLike[str]) -> pathlib.Path:
  """Return the path of a local file, or of gs://... and s3://... one with the same methods.

  Raises:
    UserError: the scheme is unknown, or the package that reads it is not installed.
  """
  if not in_bucket(text):
    return pathlib.Path(text)
  scheme = str(text).partition('://')[0]
  if scheme not in _SCHEMES:
    raise UserError(f'{text}: {scheme}:// is not supported; use a local path, gs:// or s3://')
  module, extra = _SCHEMES[scheme]
  if importlib.util.find_spec(module) is None:
    raise UserError(f"{text}: reading {scheme}:// needs {module}; run: pip install 'polar_jax[{extra}]'")
  return cast(pathlib.Path, epath.Path(text))  # a PurePosixPath with the methods of pathlib.Path, but not a subclass


def is_plain_name(name: object) -> bool:
  """Return whether a name found in a file is that of a file in the same folder: no path, which could lead out of it."""
  return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def in_bucket(path: str | os.PathLike[str]) -> bool:
  """Return whether a path is the address of a bucket."""
  return '://' in os.fspath(path)


def absolute(path: pathlib.Path) -> pathlib.Path:
  """Return the absolute path; the address of a bucket is returned as it is."""
  return path if in_bucket(path) else path.absolute()


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
  """Return all files below a folder, sorted."""
  if not in_bucket(folder):
    return sorted(file for file in folder.rglob('*') if file.is_file())
  scheme = str(folder).partition('://')[0]
  # fsspec names folders without the scheme.
  files = [f'{parent}/{name}'.removeprefix(f'{scheme}://') for parent, _, names in cast(epath.Path, folder).walk() for name in names]
  return sorted(path_of(f'{scheme}://{name}') for name in files)


def size_and_time(file: pathlib.Path) -> tuple[int, int]:
  """Return the size of a file in bytes and its modification time (in nanoseconds; in a bucket, in seconds)."""
  if in_bucket(file):
    bucket_stat = cast(epath.Path, file).stat()
    return bucket_stat.length, int(bucket_stat.mtime)
  stat = file.stat()
  return stat.st_size, stat.st_mtime_ns


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Write a file so that no reader ever sees it half written: to a temporary file, synced to disk, then renamed.

  Args:
    path: local or in a bucket; its folder is created if needed.
    content: text is encoded as UTF-8.
  """
  data = content.encode('utf-8') if isinstance(content, str) else content
  path.parent.mkdir(parents=True, exist_ok=True)
  if in_bucket(path):
    path.write_bytes(data)  # an object appears whole
    return
  temporary = path.with_name(path.name + '.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copy a file atomically (see `write_atomically`)."""
  write_atomically(target, source.read_bytes())
