"""POLAR in miniature on real English, from nothing but a Python installation.

  python -m polar_jax.main --config=configs/tiny.py

Two CPU cores, offline: a policy pool, triplets, a language model, contrastive pre-training, fine-tuning with two ablations,
evaluation and a report in runs/tiny.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'all'
  config.ablations = True

  config.synthesis.train_rows = 90_000
  config.synthesis.preference_rows = 6_000

  # Small and often: at this scale a reward model is short of triplets long before it is short of parameters.
  config.model.num_layers = 3
  config.model.d_model = 64
  config.model.d_ff = 192
  config.model.num_heads = 2
  config.model.num_kv_heads = 1
  config.model.head_dim = 32
  config.model.init_std = 0.12  # about 1 / sqrt(d_model)
  config.model.scan_unroll = 3  # CPU: no loop over three layers
  config.data.row_length = 128

  config.lm.steps = 700
  config.lm.batch_size = 16
  config.lm.learning_rate = 1e-2

  config.train.batch_size = 32
  config.train.learning_rate = 2e-3
  config.train.evaluate_every = 700

  config.finetune.batch_size = 32
  config.finetune.learning_rate = 5e-4

  for run in (config.lm, config.train, config.finetune):
    run.log_every = 100
  config.checkpointing.every_steps = 350
  return config
