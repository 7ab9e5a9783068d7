"""POLAR in miniature on real English, from nothing but a Python installation.

python -m polar_jax.main --config=configs/tiny.py
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'all'
  config.ablations = True
  return config
