"""A scaling law in miniature: seven sizes over a factor of 32 in parameters, four numbers of tokens, and the laws through them.

  python -m polar_jax.main --config=configs/sweep.py

Two CPU cores, offline; written for less than an hour, and not run to its end yet. Runs that are in runs/sweep/results.csv are
not run again; `--config.stage=fit` fits alone, and `--config.fit.flops=1e15` asks for advice on a budget.
Learning rates and batches are swept into the same table by

  ... --config.sweep.sizes="('16x2','32x2')" --config.sweep.tokens="(900_000,1_800_000)"
      --config.sweep.learning_rates="(5e-4,1e-3,2e-3,4e-3,8e-3)"      and      --config.sweep.batches="(16,32,64)"
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_rows=80_000, preference_rows=8)
  config.stage = 'synthesize,sweep,fit'
  config.train.evaluate_rows = 2_000
  # What limits a model of 64 and more is triplets, not parameters: the law is one of models that are too small.
  config.sweep.sizes = ('6x1', '10x1', '16x2', '24x2', '32x2', '48x3', '64x3')
  config.sweep.tokens = (900_000, 1_800_000, 3_600_000, 7_200_000)
  config.sweep.backend = 'processes'
  return config
