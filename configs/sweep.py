"""A scaling law in miniature: eight sizes over a factor of 36 in parameters, on tokens that grow with them, three seeds each.

  python -m polar_jax.main --config=configs/sweep.py

Two CPU cores, offline: 50 minutes (48 runs). docs/scaling.md discusses the laws L(N) and L(C). Runs listed in
runs/sweep/results.csv are not repeated; `--config.stage=fit` only fits, and `--config.fit.flops=1e14` adds advice on a budget.
More learning rates and batches are swept into the same table, in five minutes and three, by

  ... --config.sweep.sizes="('12x2','18x2','28x2')" --config.sweep.tokens="(15_000_000,)" --config.sweep.seeds="(0,)"
      --config.sweep.learning_rates="(5e-4,1e-3,4e-3,8e-3)"
  ... --config.sweep.sizes="('12x2','18x2','28x2')" --config.sweep.tokens="(15_000_000,)" --config.sweep.seeds="(0,)"
      --config.sweep.batches="(16,64)"
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_examples=280_000, preference_examples=8)
  config.stage = 'synthesize,sweep,fit'
  config.synthesize.evaluation_examples = 8_000
  config.pretrain.evaluate_examples = 8_000
  config.sweep.sizes = ('4x2', '6x2', '8x2', '12x2', '18x2', '28x2', '44x2', '64x2')
  config.sweep.tokens = (15_000_000, 30_000_000)  # at 64x3
  config.sweep.tokens_exponent = 0.6
  config.sweep.learning_rates = (2e-3,)
  config.sweep.width_exponent = 0.5
  config.sweep.seeds = (0, 1, 2)  # the best of three counts
  return config
