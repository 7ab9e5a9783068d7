"""Checkpoints in torch's own format, pytorch_model*.bin. They are pickles, so only torch's restricted reader opens them."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from polar_jax.checkpoints.formats.storage import CheckpointFileError, Entry, TensorInfo, damaged, first_bytes
from polar_jax.types import UserError


class TorchFiles:
  """Reader of .bin files. Newer ones are zip archives, which are memory-mapped: a tensor is paged in, copied and released.

  Files from before torch 1.6 can only be loaded whole. The last one stays in memory, so that not every tensor loads it again.
  """

  def __init__(self) -> None:
    self._last: tuple[pathlib.Path, Mapping[str, Any]] | None = None

  def entries(self, file: pathlib.Path) -> dict[str, Entry]:
    """Return the tensors of a file.

    Raises:
      CheckpointFileError: the file is damaged, or contains anything but float32, float16 and bfloat16 tensors.
      UserError: torch is not installed.
    """
    state = self._load(file)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
      raise CheckpointFileError(f'{file}: contains a {type(state).__name__}, not tensors by name; save `model.state_dict()` to it')
    entries = {}
    for name, value in state.items():
      dtype = _numpy_dtype(value)
      if dtype is None:
        kind = getattr(value, 'dtype', type(value).__name__)
        raise CheckpointFileError(f'{file}: {name!r} is not a dense float32, float16 or bfloat16 tensor ({kind}); remove or convert it')
      entries[name] = Entry(TensorInfo(tuple(value.shape), dtype, file), functools.partial(self._read, file, name))
    return entries

  def _read(self, file: pathlib.Path, name: str) -> np.ndarray:
    state = self._load(file)
    if name not in state:
      raise CheckpointFileError(f'{file}: tensor {name!r} disappeared after the file was opened; run again')
    tensor = state[name].detach().contiguous()
    if _numpy_dtype(tensor) == ml_dtypes.bfloat16:  # torch cannot convert bfloat16 to numpy
      return np.array(tensor.view(_torch().int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(tensor.numpy())

  def _load(self, file: pathlib.Path) -> Mapping[str, Any]:
    if self._last and self._last[0] == file:
      return self._last[1]
    self._last = None  # never keep two whole files in memory
    mappable = first_bytes(file, 4) == b'PK\x03\x04'
    state = _load_weights(file, mappable)
    if not mappable:
      self._last = (file, state)
    return state


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise UserError("reading pytorch_model*.bin needs torch: pip install 'polar_jax[torch]', or convert it to safetensors") from error
  return torch


def _load_weights(file: pathlib.Path, mappable: bool) -> Any:
  torch = _torch()
  try:
    return torch.load(file, map_location='cpu', weights_only=True, mmap=mappable)
  except Exception as error:  # torch raises nearly anything on damaged pickles and archives
    refused = re.search(r'unsupported global[^\n]*', str(error), re.IGNORECASE)
    if refused:
      raise CheckpointFileError(
        f'{file}: contains more than weights, and reading it could run code ({refused[0]}); convert it to safetensors if you trust it'
      ) from error
    reason = re.search(r'WeightsUnpickler error:\s*([^\n]*)', str(error))
    raise damaged(file, reason[1] if reason else error) from error


def _numpy_dtype(value: Any) -> np.dtype | None:
  """Return the numpy dtype of a dense tensor; None for anything else."""
  torch = _torch()
  if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
    return None
  known = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
  return np.dtype(known[value.dtype]) if value.dtype in known else None
