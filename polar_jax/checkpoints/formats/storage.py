"""Tensors of a checkpoint on disk, read and written one at a time, so that a model may be larger than host memory."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import safetensors

from polar_jax.runtime import json_files, paths
from polar_jax.types import UserError

DTYPES = {'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointFileError(UserError):
  """A file of a checkpoint cannot be used. The message is one line that names the file, and the tensor if there is one."""


class TensorInfo(NamedTuple):
  """A tensor as described by the header of its file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  file: pathlib.Path


class TensorSource(Protocol):
  """A checkpoint on disk. Headers are read when it is opened, the bytes of a tensor on request."""

  path: pathlib.Path

  def tensors(self) -> Mapping[str, TensorInfo]:
    """Return all tensors by Hugging Face name."""

  def read(self, name: str) -> np.ndarray:
    """Return one tensor in its stored dtype. The array owns its memory; the source keeps no reference."""


class Entry(NamedTuple):
  """A tensor that has not been read yet."""

  info: TensorInfo
  read: Callable[[], np.ndarray]


class LazyTensors:
  """The `TensorSource` of every file format: it maps a name to a function that reads the tensor."""

  def __init__(self, path: pathlib.Path, entries: Mapping[str, Entry]):
    self.path = path
    self._entries = dict(entries)

  def tensors(self) -> Mapping[str, TensorInfo]:
    """Return all tensors by Hugging Face name."""
    return {name: entry.info for name, entry in self._entries.items()}

  def read(self, name: str) -> np.ndarray:
    """Return one tensor in its stored dtype.

    Raises:
      CheckpointFileError: there is no such tensor, or its file changed after it was opened.
    """
    if name not in self._entries:
      raise CheckpointFileError(f'{self.path}: has no tensor {name!r}')
    return self._entries[name].read()


def first_bytes(file: pathlib.Path, count: int) -> bytes:
  """Return at most `count` bytes from the start of a file.

  Raises:
    CheckpointFileError: the file cannot be opened.
  """
  try:
    with file.open('rb') as f:
      return f.read(count)
  except OSError as error:
    raise CheckpointFileError(f'{file}: cannot be read ({error.strerror}); check its permissions and the disk') from error


def damaged(file: pathlib.Path, error: Exception | str) -> CheckpointFileError:
  """Return the error for a file that the reader of its format rejects, usually because it is truncated or contains no weights."""
  start = first_bytes(file, 64)
  if not start:
    return CheckpointFileError(f'{file}: is empty; download it again')
  if start.startswith(b'version https://git-lfs'):
    return CheckpointFileError(f'{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder')
  reason = (str(error) or type(error).__name__).splitlines()[0][:160]
  size = file.stat().st_size
  return CheckpointFileError(f'{file}: is damaged, truncated or in another format ({size} bytes; {reason}); download it again')


def read_array(file: pathlib.Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
  """Read the array whose bytes begin at `offset`.

  Args:
    file: the file.
    offset: in bytes.
    dtype: of the array.
    shape: of the array.

  Raises:
    CheckpointFileError: the file ends before the array does.
  """
  array = np.empty(shape, dtype)
  try:
    with file.open('rb') as f:
      f.seek(offset)
      got = f.readinto(array.reshape(-1).view(np.uint8).data)
  except OSError as error:
    raise CheckpointFileError(f'{file}: cannot be read ({error.strerror}); check its permissions and the disk') from error
  if got != array.nbytes:
    raise damaged(file, f'expected {array.nbytes} bytes at {offset}, got {got}')
  return array


def halves_from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reorder a query or key projection, (heads * H, D), from llama.cpp's and llama2.c's order of rotary dimensions to ours.

  They rotate dimension 2i against 2i + 1, we rotate i against i + H / 2. The same permutation of queries and keys leaves attention
  scores unchanged.
  """
  rows, width = weight.shape
  return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


# ---- Hugging Face folders ----


class Layout(NamedTuple):
  """File names of a format's weights in a folder, and the function that reads the header of a file."""

  single_name: str
  index_name: str
  pattern: str
  entries: Callable[[pathlib.Path], dict[str, Entry]]


def open_folder(path: str | pathlib.Path) -> TensorSource:
  """Open the weights of a Hugging Face folder: safetensors if there are any, otherwise pytorch_model*.bin (extra `torch`).

  Raises:
    CheckpointFileError: there are no weights; or files or tensors are missing, duplicated, damaged, or have a dtype other than float32,
      float16 and bfloat16.
    UserError: there are only .bin files and torch is not installed.
  """
  from polar_jax.checkpoints.formats import torch_files

  folder = pathlib.Path(path)
  if not folder.is_dir():
    what = 'is a file' if folder.exists() else 'does not exist'
    raise CheckpointFileError(f'{folder}: {what}; name the folder of a Hugging Face checkpoint')
  for layout in (
    Layout('model.safetensors', 'model.safetensors.index.json', '*.safetensors', safetensors_entries),
    Layout('pytorch_model.bin', 'pytorch_model.bin.index.json', 'pytorch_model*.bin', torch_files.TorchFiles().entries),
  ):
    files, tensor_files = _find_files(folder, layout)
    if files:
      return LazyTensors(folder, _gather(files, layout, tensor_files, folder / layout.index_name))
  content = sorted(p.name for p in folder.iterdir())
  listed = ', '.join(content[:10]) + (f' and {len(content) - 10} more' if len(content) > 10 else '')
  raise CheckpointFileError(f'{folder}: contains no weights (*.safetensors or pytorch_model*.bin), only: {listed or "nothing"}')


def _find_files(folder: pathlib.Path, layout: Layout) -> tuple[list[pathlib.Path], dict[str, str]]:
  """Return (files with weights, {tensor: file name} from the index); both are empty if the folder has no weights of this format."""
  single, index = folder / layout.single_name, folder / layout.index_name
  if index.is_symlink() or index.exists():
    tensor_files = _read_index(index)
    if single.exists() and layout.single_name not in tensor_files.values():
      raise CheckpointFileError(f'{folder}: contains both {single.name} and {index.name}, which does not name it; remove one of them')
    names = sorted(set(tensor_files.values()))
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
      listed = ', '.join(absent[:3]) + (f' and {len(absent) - 3} more' if len(absent) > 3 else '')
      raise CheckpointFileError(f'{index}: names missing files: {listed}; download them')
    return [folder / name for name in names], tensor_files
  if single.is_symlink() or single.exists():
    return [single], {}
  files = sorted(folder.glob(layout.pattern))
  for file in files:
    part = re.fullmatch(r'(.*)-(\d+)-of-(\d+)(\.\w+)', file.name)
    if part and int(part[3]) != sum(f.name.startswith(f'{part[1]}-') and f.name.endswith(f'-of-{part[3]}{part[4]}') for f in files):
      raise CheckpointFileError(f'{file}: is one of {int(part[3])} files, and some of them are missing; download the others')
  return files, {}


def _read_index(index: pathlib.Path) -> dict[str, str]:
  """Return {tensor: file name} of an index file."""
  try:
    tensor_files = json_files.read(index, 'download it again')['weight_map']
    plain = all(map(paths.is_plain_name, tensor_files.values()))
  except json_files.JsonError as error:
    raise CheckpointFileError(str(error)) from error
  except (KeyError, AttributeError) as error:
    raise CheckpointFileError(
      f'{index}: is not an index (a JSON object whose `weight_map` maps each tensor to its file); download it again'
    ) from error
  if not tensor_files or not plain:
    raise CheckpointFileError(f'{index}: `weight_map` must map each tensor to the name of a file in this folder')
  return tensor_files


def _gather(files: list[pathlib.Path], layout: Layout, tensor_files: dict[str, str], index: pathlib.Path) -> dict[str, Entry]:
  """Return the tensors of all files.

  Tensors in the index must exist, and are read from the file that it names, whatever other files contain. Tensors that it does not list
  are included, because they belong to the same checkpoint.
  """
  gathered: dict[str, Entry] = {}
  for file in files:
    entries = layout.entries(file)
    for name, entry in entries.items():
      if tensor_files.get(name, file.name) != file.name:
        continue
      if name in gathered:
        raise CheckpointFileError(f'{file}: contains tensor {name[:80]!r}, and so does {gathered[name].info.file.name}; remove one of them')
      gathered[name] = entry
    lacking = [name for name, holder in tensor_files.items() if holder == file.name and name not in entries]
    if lacking:
      raise CheckpointFileError(
        f'{file}: has no tensor {lacking[0][:80]!r}, but {index.name} lists it there ({len(lacking)} missing in all); download both again'
      )
  return gathered


# ---- safetensors ----


def safetensors_entries(file: pathlib.Path) -> dict[str, Entry]:
  """Return the tensors of a safetensors file.

  The library reads and checks the header. It ensures that tensors cover the file without gaps, so their order and sizes give their
  offsets. The bytes are read here: the library's default maps the file, which after many tensors counts as the whole file in memory,
  and its `pread` reader is four times slower than `readinto` (1.4 against 6 GB/s from the page cache).
  """
  offset = 8 + int.from_bytes(first_bytes(file, 8), 'little')
  entries = {}
  try:
    with safetensors.safe_open(file, 'numpy') as f:
      for name in f.offset_keys():
        header = f.get_slice(name)
        code, shape = header.get_dtype(), tuple(header.get_shape())
        if code not in DTYPES:
          raise CheckpointFileError(
            f'{file}: tensor {name[:80]!r} is stored as {code}; only {", ".join(DTYPES)} can be read: convert it first'
          )
        info = TensorInfo(shape, DTYPES[code], file)
        entries[name] = Entry(info, functools.partial(read_array, file, offset, info.dtype, shape))
        offset += math.prod(shape) * info.dtype.itemsize
  except safetensors.SafetensorError as error:
    raise damaged(file, error) from error
  return entries


class SafetensorsWriter:
  """Writes tensors to safetensors files one by one, in any order, without keeping them in memory.

  The library's own writer needs all tensors of a file at once. A file is 8 bytes with the length of the header, the header (JSON, padded
  with spaces) and the tensors' bytes without gaps. Sizes alone determine every offset. The header is written last, when all shapes are
  known, so that every reader rejects a file left incomplete by a crash.

  Args:
    folder: created if needed; it must not contain weights.
    sizes: bytes of each tensor, in the order in which files are filled.
    max_bytes: size limit of the tensors of a file; a larger tensor gets its own file.
    single: name of the file, if one is enough.
    metadata: strings to store in the header of each file.

  Raises:
    CheckpointFileError: the folder contains weights.
  """

  def __init__(
    self,
    folder: str | pathlib.Path,
    sizes: Mapping[str, int],
    max_bytes: int,
    single: str = 'model.safetensors',
    metadata: Mapping[str, str] = types.MappingProxyType({}),
  ):
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(p.name for pattern in ('*.safetensors', '*.safetensors.index.json') for p in self._folder.glob(pattern))
    if existing:
      raise CheckpointFileError(f'{self._folder / existing[0]}: exists already; write to an empty folder')
    groups: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
      if groups[-1] and sum(groups[-1].values()) + size > max_bytes:
        groups.append({})
      groups[-1][name] = size
    file = lambda i: self._folder / (_file_name(i, len(groups)) if len(groups) > 1 else single)
    self._files = [_PlannedFile(file(i), group, metadata) for i, group in enumerate(groups)]
    self._file_of = {name: file for file in self._files for name in file.spans}

  def add(self, name: str, array: np.ndarray) -> None:
    """Write a tensor.

    Raises:
      ValueError: the tensor was not planned, does not have the planned size, or has been written already.
    """
    if name not in self._file_of:
      raise ValueError(f'tensor {name!r} was not planned')
    self._file_of[name].write(name, array)

  def close(self) -> None:
    """Write the index, if there are several files.

    Raises:
      ValueError: tensors are missing.
    """
    missing = [name for name, file in self._file_of.items() if name not in file.header]
    if missing:
      raise ValueError(f'{len(missing)} planned tensors were not written: {missing[0]!r}')
    if len(self._files) > 1:
      total = sum(end - start for file in self._files for start, end in file.spans.values())
      index = {'metadata': {'total_size': total}, 'weight_map': {name: file.path.name for name, file in self._file_of.items()}}
      (self._folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _file_name(number: int, count: int) -> str:
  return f'model-{number + 1:05}-of-{count:05}.safetensors'


# The longest shape as text: numpy has at most 64 dimensions, and the product of those that are not 0 has at most 19 digits.
_LONGEST_SHAPE = 'x' * 160


class _PlannedFile:
  """One safetensors file of a writer."""

  def __init__(self, path: pathlib.Path, sizes: Mapping[str, int], metadata: Mapping[str, str]):
    self.path, self._metadata = path, metadata
    self.header: dict[str, Any] = {}  # entries of the tensors written so far
    self.spans: dict[str, tuple[int, int]] = {}
    end = 0
    # Tensors of 4-byte dtypes have sizes divisible by 4. Before all others they are aligned, which torch's reader requires.
    for name in sorted(sizes, key=lambda name: sizes[name] % 4 != 0):
      self.spans[name] = (end, end + sizes[name])
      end += sizes[name]
    longest = self._header_text({name: self._describe('BF16', _LONGEST_SHAPE, name) for name in sizes})
    self._length = -(-len(longest) // 8) * 8
    path.touch()
    if not sizes:
      self._finish()

  def _describe(self, code: str, shape: Any, name: str) -> dict[str, Any]:
    return {'dtype': code, 'shape': shape, 'data_offsets': self.spans[name]}

  def _header_text(self, tensors: Mapping[str, Any]) -> bytes:
    # transformers rejects a file without this metadata.
    return json.dumps({'__metadata__': {'format': 'pt', **self._metadata}, **tensors}, separators=(',', ':')).encode()

  def write(self, name: str, array: np.ndarray) -> None:
    """Write a tensor to its place, and the header after the last one."""
    start, end = self.spans[name]
    if name in self.header or array.dtype not in _CODES or array.nbytes != end - start:
      raise ValueError(
        f'{self.path}: tensor {name!r} was written already, is not {"/".join(DTYPES)} ({array.dtype}), '
        f'or does not have the planned {end - start} bytes ({array.nbytes})'
      )
    with self.path.open('r+b') as f:
      f.seek(8 + self._length + start)
      f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    self.header[name] = self._describe(_CODES[array.dtype], array.shape, name)
    if len(self.header) == len(self.spans):
      self._finish()

  def _finish(self) -> None:
    with self.path.open('r+b') as f:
      f.write(self._length.to_bytes(8, 'little') + self._header_text(self.header).ljust(self._length))
