"""The tiny world with more policies, a larger model and more triplets.

  python -m polar_jax.main --config=configs/small.py

Sized for an hour on two CPU cores; not run as it is (docs/miniature.md).
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_small', train_examples=100_000, preference_examples=8_000)
  config.synthesize.policies = 384
  config.synthesize.unseen_policies = 64
  config.pretrain_lm.learning_rate = 3.5e-3  # the width is twice that of the tiny model
  config.pretrain.learning_rate = 1.5e-3
  config.pretrain.evaluate_every = 1_250
  config.checkpointing.every_steps = 1_250
  return config
