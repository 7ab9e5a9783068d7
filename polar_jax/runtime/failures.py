"""The last net under a run: one line for an error of a file, a library or the machine that no reader explained.

Readers name file, row and field themselves, with a UserError. What they miss, such as a disk that fails in the middle of a file, ends
here. An error that only a mistake in the code can cause is not explained: its traceback is worth more.
"""

from __future__ import annotations

import errno
import pathlib
import re
import struct
import traceback
import zlib

from polar_jax.types import one_line

_MAX_REASON, _MAX_PLACE = 200, 120

_DAMAGED = 'check the file: it is damaged, incomplete or of another format'
# Readers of files that raise errors of their own, or those of Python, when a file is damaged.
_LIBRARIES = (
  'array_record',
  'csv',
  '_csv',
  'datasets',
  'etils',
  'fsspec',
  'gcsfs',
  'gguf',
  'google',
  'jinja2',
  'json',
  'lzma',
  'orbax',
  'pyarrow',
  'safetensors',
  'sentencepiece',
  'tensorflow_datasets',
  'tensorstore',
  'tokenizers',
)
_REMEDIES = {
  errno.ENOENT: 'check the path',
  errno.ENOSPC: 'free disk space, then run the same command again',
  errno.EDQUOT: 'free disk space, then run the same command again',
  errno.EACCES: 'check its permissions',
  errno.EPERM: 'check its permissions',
  errno.EROFS: 'name a folder that can be written',
  errno.EISDIR: 'name a file',
  errno.ENOTDIR: 'name a folder',
  errno.ENAMETOOLONG: 'use a shorter name',
  errno.EMFILE: 'raise the limit of open files (ulimit -n)',
  errno.ENFILE: 'close other programs, or raise the limit of open files',
  errno.EPIPE: 'whatever read the output has stopped',
}


def explain(error: BaseException) -> str | None:
  """Return one line with place, reason and remedy for an error that a file, a library or the machine caused; None for any other."""
  reason = shortened(' '.join(str(error).split()) or type(error).__name__, _MAX_REASON)
  if isinstance(error, MemoryError):
    return one_line(f'{_place(error)}the host ran out of memory ({reason}); use smaller batches or rows, or a host with more memory')
  if _is_device_memory(error):
    return one_line(f'a device ran out of memory ({reason}); use smaller batches or rows, model.remat=full, or more devices')
  if isinstance(error, OSError) and error.strerror:
    place = f'{shortened(str(error.filename), _MAX_PLACE)}: ' if error.filename else _place(error)
    return one_line(
      f'{place}{error.strerror}; {_REMEDIES.get(error.errno or 0, "check the disk or the network, then run the same command again")}'
    )
  if isinstance(error, UnicodeError):
    return one_line(f'{_place(error)}is not UTF-8 ({reason}); save it in that encoding')
  if isinstance(error, RecursionError):
    return one_line(f'{_place(error)}is nested too deeply ({reason}); make it flat')
  if isinstance(error, (OSError, EOFError, OverflowError, struct.error, zlib.error)) or _library(error):
    return one_line(f'{_place(error)}{type(error).__name__}: {reason}; {_DAMAGED}')
  return None


def _is_device_memory(error: BaseException) -> bool:
  return type(error).__name__ in ('JaxRuntimeError', 'XlaRuntimeError') and str(error).startswith('RESOURCE_EXHAUSTED')


def _library(error: BaseException) -> bool:
  """Return whether a library that reads files defines the error or raised it. The compiled ones raise a bare Exception."""
  frames = [frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__)]
  modules = [type(error).__module__, *frames[-1:]]
  return type(error) is Exception or any(module.split('.')[0] in _LIBRARIES for module in modules)


def _place(error: BaseException) -> str:
  """Return the file that our innermost function was reading, with a colon, as far as its variables tell; '' if they do not."""
  for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
    if not re.match(r'polar_jax(\.|$)', frame.f_globals.get('__name__', '')):
      continue
    values = [frame.f_locals.get(name) for name in ('path', 'file', 'source', 'folder')]
    values += [getattr(frame.f_locals.get('self'), name, None) for name in ('path', '_path', '_file')]
    found = next((value for value in values if isinstance(value, pathlib.PurePath)), None)
    if found is not None:
      return f'{shortened(str(found), _MAX_PLACE)}: '
  return ''


def shortened(text: str, most: int) -> str:
  """Return a text without its middle if it is longer than `most` characters."""
  return text if len(text) <= most else f'{text[: most // 2]}...{text[-(most // 2) :]}'
