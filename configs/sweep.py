"""A scaling law in miniature: nine sizes over a factor of 75 in parameters, on tokens that grow with the root of their parameters.

  python -m polar_jax.main --config=configs/sweep.py

Two CPU cores, offline: 58 minutes (36 runs, of which the largest takes 13). docs/scaling.md says what L(N) and L(C) are worth. Runs that
are in runs/sweep/results.csv are not run again; `--config.stage=fit` fits alone, and `--config.fit.flops=1e15` asks for advice on a
budget. More learning rates and batches are swept into the same table, in five minutes and three, by

  ... --config.sweep.sizes="('12x2','18x2','28x2')" --config.sweep.tokens="(20_000_000,)"
      --config.sweep.learning_rates="(5e-4,4e-3,8e-3)"
  ... --config.sweep.sizes="('12x2','18x2','28x2')" --config.sweep.tokens="(20_000_000,)"
      --config.sweep.learning_rates="(2e-3,)" --config.sweep.batches="(16,64)"
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_rows=560_000, preference_rows=8)
  config.stage = 'synthesize,sweep,fit'
  config.data.row_length = 320
  config.lm.steps = 1_200  # four passes: how good the language model is decides when a run leaves its first plateau
  config.train.evaluate_rows = 2_000
  config.sweep.sizes = ('4x2', '6x2', '8x2', '12x2', '18x2', '28x2', '44x2', '64x2', '96x2')
  config.sweep.tokens = (20_000_000, 40_000_000)  # at 64x3
  config.sweep.tokens_exponent = 0.5
  config.sweep.learning_rates = (1e-3, 2e-3)  # and the better of the two counts
  config.sweep.width_exponent = 0.0
  config.sweep.backend = 'processes'
  return config
