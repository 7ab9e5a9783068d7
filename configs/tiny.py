"""POLAR in miniature on text that comes with Python, from an installation alone.

  python -m polar_jax.main --config=configs/tiny.py

Two CPU cores, offline, 12 minutes: a policy pool, triplets, a language model that has read text by many authors, contrastive
pre-training, fine-tuning with two ablations, evaluation, PPO towards five policies of the pool in turn, a sweep of three sizes (which
shows how scaling laws are fitted but is too small for one), and a report in runs/tiny. docs/miniature.md has its results.
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_examples=28_000, preference_examples=4_000)
  config.pretrain_lm.steps = 800
  config.pretrain.evaluate_every = 500
  config.checkpointing.every_steps = 500
  return config
