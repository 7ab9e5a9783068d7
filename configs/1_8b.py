"""Contrastive pre-training of POLAR-1.8B with the paper's sizes and hyper-parameters.

  python -m polar_jax.main --config=configs/1_8b.py --workdir=runs/1_8b        (the same command on every host)

Reads: data/polar_triplets (triplets with splits train and validation), checkpoints/internlm2_5_1_8b (the language model to
start from, a Hugging Face folder). Paper: 0.94T tokens, 320 H800 for 57 hours. Not run at this size here.
"""

from polar_jax.recipes import SHARED, pretraining


def get_config():
  # LR = 0.0002306 N^0.01125 Dp^-0.66587 Drm^0.33916 and batch = 31.9032 N^0.06944 Drm^0.52997 give these, with N in 2^20
  # parameters and D in 2^30 tokens.
  config = pretraining('polar_1_8b', start_from='checkpoints/internlm2_5_1_8b', learning_rate=1.4e-5, batch_size=1_940)
  config.pretrain.gradient_accumulation_steps = 11  # on 64 chips: one row per chip at a time
  config.plan.tokens = 0.94e12 / SHARED
  return config
