"""The tiny world with more policies, documents and triplets, and a wider model.

  python -m polar_jax.main --config=configs/small.py

Sized for an hour on two CPU cores (docs/miniature.md).
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_small', train_examples=260_000, preference_examples=8_000)
  config.synthesize.policies = 384
  config.synthesize.unseen_policies = 64
  config.synthesize.documents = 80_000
  # As in the sweep, rates fall with the square root of the width.
  config.pretrain_lm.learning_rate = 4e-3
  config.pretrain_lm.steps = 2_400
  config.pretrain.learning_rate = 1.6e-3
  config.pretrain.evaluate_every = 1_250
  config.checkpointing.every_steps = 1_250
  return config
