"""The tiny world with a larger model and more triplets: how far the miniature gets in an hour.

  python -m polar_jax.main --config=configs/small.py

Two CPU cores, under an hour. Unseen policies: 76.2%, where the best heuristic baseline has 65.0%.
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_small', train_examples=200_000, preference_examples=8_000)
  config.synthesize.policies = 384
  config.synthesize.unseen_policies = 64
  config.pretrain.learning_rate = 1.5e-3
  config.pretrain.evaluate_every = 1_250
  config.checkpointing.every_steps = 1_250
  return config
