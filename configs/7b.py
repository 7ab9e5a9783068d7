"""Contrastive pre-training of POLAR-7B with the paper's sizes and hyper-parameters.

  python -m polar_jax.main --config=configs/7b.py --workdir=runs/7b        (the same command on every host)

Reads: data/polar_triplets (triplets with splits train and validation), checkpoints/internlm2_5_7b (the language model to start
from, a Hugging Face folder). Paper: 3.6T tokens, 912 H800 for 175 hours. Not run at this size here.
"""

from polar_jax.recipes import SHARED, pretraining


def get_config():
  config = pretraining('internlm2_5_7b', start_from='checkpoints/internlm2_5_7b', learning_rate=1.67e-5, batch_size=4_343)
  config.pretrain.gradient_accumulation_steps = 25  # on 64 chips: one row per chip at a time
  config.plan.tokens = 3.6e12 / SHARED
  return config
