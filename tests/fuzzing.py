"""Seeded damage to JSON values, for the tests that read damaged files."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np


def changed_value(value: Any, odd: Sequence[Any], rng: np.random.Generator) -> Any:
  """Return a JSON value in which one part is replaced by one of the values `odd`, dropped or renamed."""
  value = copy.deepcopy(value)
  parent, key, node = None, None, value
  while isinstance(node, (dict, list)) and node and (parent is None or rng.random() < 0.8):
    parent, key = node, list(node)[int(rng.integers(len(node)))] if isinstance(node, dict) else int(rng.integers(len(node)))
    node = parent[key]
  other = odd[int(rng.integers(len(odd)))]
  if parent is None:
    return other
  kind = int(rng.integers(5))
  if kind == 0:
    del parent[key]
  elif kind == 1 and isinstance(parent, dict):
    parent[f'{key}{rng.integers(3)}'] = parent.pop(key)
  else:
    parent[key] = other
  return value
