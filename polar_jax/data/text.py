"""Tokenized text of the language model on disk: one token stream for each split and source."""

from __future__ import annotations

import pathlib

import numpy as np

STREAMS = 'text.npz'  # file in the data folder that the synthesize stage writes


def load_streams(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  """Return {'train' | 'validation': {source: int32 ids}} of a `text.npz`, whose arrays are named `<split>_<source>`."""
  out: dict[str, dict[str, np.ndarray]] = {'train': {}, 'validation': {}}
  with np.load(path) as arrays:
    for key in arrays.files:
      split, source = key.split('_', 1)
      out[split][source] = arrays[key]
  return out
