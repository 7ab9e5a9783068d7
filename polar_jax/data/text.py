"""Tokenized text of the language model on disk: one token stream for each split and source."""

from __future__ import annotations

import pathlib

import numpy as np

from polar_jax.runtime import json_files
from polar_jax.types import UserError

STREAMS = 'text.npz'  # file in the data folder that the synthesize stage writes


def load_streams(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """Return {'train' | 'validation': {source: int32 ids}} of a `text.npz`, whose arrays are named `<split>_<source>`.

  Raises:
    UserError: the file is damaged.
  """
  out: dict[str, dict[str, np.ndarray]] = {'train': {}, 'validation': {}}
  try:
    with np.load(path) as arrays:
      for key in arrays.files:
        split, source = key.split('_', 1)
        ids = arrays[key]
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
          raise ValueError(f'{key} is no stream of ids')
        out[split][source] = ids
  except Exception as error:  # zipfile, zlib and numpy each raise their own
    remedy = f'delete {path.with_name("synthesis.json")} and run the synthesize stage again'
    raise UserError(f'{path}: damaged ({json_files.shorten(error)}); {remedy}') from error
  return out
