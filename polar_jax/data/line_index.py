"""Random access to the examples of a large .jsonl file, of which only the places of its lines are in memory."""

from __future__ import annotations

import array
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

from polar_jax.data import readers
from polar_jax.data.readers import DataError

# Files of so many bytes are read from disk when an example is needed. As objects of Python, texts take two to three times as much memory.
LARGE = 256 << 20
_Checked = TypeVar('_Checked')


def is_large(path: pathlib.Path) -> bool:
  """Return whether a file has lines that can be found again, which a bucket or a compressed file has not, and is large."""
  return isinstance(path, pathlib.Path) and path.suffix == '.jsonl' and path.is_file() and path.stat().st_size >= LARGE


class LineIndex(Sequence[_Checked], Generic[_Checked]):
  """The examples on lines of a file that were kept, in order, read and parsed on access. Any number of threads may read.

  Args:
    path: the file.
    parse: makes an example of a line; raises an exception if it cannot.
  """

  def __init__(self, path: pathlib.Path, parse: Callable[[bytes], _Checked]):
    self.path, self._parse = path, parse
    self._starts, self._sizes = array.array('q'), array.array('q')
    self._last = (0, 0)
    self._descriptor = os.open(path, os.O_RDONLY)

  def __del__(self) -> None:
    if hasattr(self, '_descriptor'):
      os.close(self._descriptor)

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name != '_descriptor'}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._descriptor = os.open(self.path, os.O_RDONLY)

  def lines(self) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of each line that is not blank; `keep` keeps the latest one."""
    for number, start, line in readers.lines_of(self.path):
      self._last = start, len(line)
      yield number, line

  def keep(self) -> None:
    """Keep the place of the line that `lines` yielded last."""
    self._starts.append(self._last[0])
    self._sizes.append(self._last[1])

  def __len__(self) -> int:
    return len(self._starts)

  @overload
  def __getitem__(self, index: int) -> _Checked: ...
  @overload
  def __getitem__(self, index: slice) -> list[_Checked]: ...
  def __getitem__(self, index: int | slice) -> _Checked | list[_Checked]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    start, size = self._starts[index], self._sizes[index]
    try:
      return self._parse(os.pread(self._descriptor, size, start))
    except Exception as error:  # the line was checked when it was kept
      raise DataError(f'{self.path}: byte {start}: the file was changed while it was read; run again') from error
