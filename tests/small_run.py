"""The config of a run that is over in seconds, for tests that start real processes."""

from __future__ import annotations

import json
import pathlib

import numpy as np

FIELDS = ('prompt', 'reference', 'chosen', 'rejected')
# Metrics that may differ between two equal runs.
TIMED = ('step_seconds', 'tokens_per_second', 'mfu', 'goodput')


def write_config(path: pathlib.Path, settings: dict[str, object], **train: object) -> None:
  """Return a config file of contrastive pre-training of one small layer, with `settings` by their dotted names."""
  model = {'num_layers': 1, 'd_model': 16, 'd_ff': 16, 'num_heads': 1, 'num_kv_heads': 1, 'head_dim': 8}
  every = {'stage': 'pretrain'} | {f'model.{name}': value for name, value in model.items()}
  every |= {'pretrain.start_from': 'scratch', 'pretrain.learning_rate': 3e-3} | {f'pretrain.{name}': value for name, value in train.items()}
  path.write_text(
    'from polar_jax.config import default_config\n\n\ndef get_config():\n  config = default_config()\n'
    f'  config.update_from_flattened_dict({every | settings!r})\n  return config\n'
  )


def triplets(rng: np.random.Generator, count: int, longest: int = 8) -> str:
  """Return JSON lines of triplets whose texts have two to `longest` letters."""
  triplet = lambda: {name: bytes(rng.integers(97, 123, rng.integers(2, longest + 1)).tolist()).decode() for name in FIELDS}
  return '\n'.join(json.dumps(triplet()) for _ in range(count))
