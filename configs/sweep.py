"""A scaling law in miniature: seven sizes over a factor of 30 in parameters, four numbers of tokens, and the laws through them.

  python -m polar_jax.main --config=configs/sweep.py

Two CPU cores, offline: 57 minutes (28 runs, of which the largest takes 12). L(N) and L(C) have R2 0.64 and 0.82: docs/scaling.md
says why that is no law yet. Runs that are in runs/sweep/results.csv are not run again; `--config.stage=fit` fits alone, and
`--config.fit.flops=1e15` asks for advice on a budget. Learning rates and batches are swept into the same table, in ten minutes and five, by

  ... --config.sweep.sizes="('16x2','24x2','36x2')" --config.sweep.tokens="(3_600_000,)"
      --config.sweep.learning_rates="(5e-4,1e-3,2e-3,4e-3,8e-3)"      and      --config.sweep.batches="(16,32,64)"
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_rows=320_000, preference_rows=8)
  config.stage = 'synthesize,sweep,fit'
  config.train.evaluate_rows = 2_000
  # One depth: with another, learning rates that suit one size do not suit the next.
  config.sweep.sizes = ('6x2', '10x2', '16x2', '24x2', '36x2', '56x2', '80x2')
  config.sweep.tokens = (3_600_000, 7_200_000, 14_400_000, 28_800_000)
  config.sweep.learning_rates = (1e-3,)
  config.sweep.backend = 'processes'
  return config
