"""POLAR in miniature on real English, from nothing but a Python installation.

  python -m polar_jax.main --config=configs/tiny.py

Two CPU cores, offline, seven to twenty-five minutes: a policy pool, triplets, a language model, contrastive pre-training,
fine-tuning with two ablations, evaluation, PPO towards a policy of the pool in three seeds, a sweep of three sizes (which
shows the machinery of a scaling law, and proves nothing), and a report in runs/tiny.
Unseen policies: 69.8%, where the best rule without learning has 63.0% and the Bayes discriminator 99.2%. PPO brings the
policy 1.5 nats per token nearer to its target, relative to the pool.
"""

from polar_jax.recipes import miniature


def get_config():
  config = miniature('mini_tiny', train_examples=80_000, preference_examples=6_000)
  config.pretrain_lm.steps = 700
  config.pretrain.evaluate_every = 625
  config.checkpointing.every_steps = 500
  return config
