"""Triplets of a pool of language models: servers, checkpoints, recorded answers and n-grams.

  python -m polar_jax.main --config=configs/synthesize.py --config.synthesize.pool=pool.json --config.synthesize.prompts=prompts.jsonl
      --workdir=runs/pool

Writes runs/pool/data/triplets and, next to it, card.json and card.md, which say what the triplets are and how to make them again. The same
command continues a run that was stopped. Add --config.synthesize.check=True to see first what each policy answers to three prompts. See
docs/pools.md.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'synthesize'
  config.synthesize.world = 'pool'
  return config
