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
  # Many policies that differ only in their word preferences, so that an hour of training does not exhaust the data.
  config.synthesize.max_order = 1
  config.synthesize.min_window = 0.02
  config.synthesize.max_tokens = 64
  # The language models read documents by such policies, so that runs learn to compare from their first steps.
  config.synthesize.documents = 40_000
  config.data.row_length = 480
  config.pretrain_lm.sequence_length = 256
  config.pretrain_lm.steps = 1_200  # no text twice
  config.pretrain_lm.learning_rate = 5e-3  # at width 64, like sweep.learning_rates
  config.pretrain.evaluate_examples = 8_000
  config.sweep.sizes = ('4x2', '6x2', '8x2', '12x2', '18x2', '28x2', '44x2', '64x2')
  config.sweep.tokens = (15_000_000, 30_000_000)  # at 64x3
  config.sweep.tokens_exponent = 0.6
  config.sweep.learning_rates = (2e-3,)
  config.sweep.width_exponent = 0.5
  config.sweep.seeds = (0, 1, 2)  # the best of three counts
  config.sweep.backend = 'processes'
  return config
