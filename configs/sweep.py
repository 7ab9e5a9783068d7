"""A scaling law in miniature: six sizes, four numbers of tokens, learning rates and batches at three of them, and the fits.

  python -m polar_jax.main --config=configs/sweep.py

Two CPU cores, offline, an hour. Runs that are in runs/sweep/results.csv are not run again; `--config.stage=fit` fits alone.
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_rows=80_000, preference_rows=8)
  config.stage = 'synthesize,sweep,fit'
  config.sweep.sizes = ('16x2', '24x3', '32x3', '48x3', '64x3', '96x3', '128x4')
  config.sweep.tokens = (900_000, 1_800_000, 3_600_000, 7_200_000)
  config.sweep.backend = 'processes'
  config.sweep.workers = 2
  return config
