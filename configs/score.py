"""Rewards for a file of examples: prompt, reference and output (strings or lists of messages), as in POLAR's client.

  python -m polar_jax.main --config=configs/score.py --config.checkpoint=DIR --config.input=examples.jsonl --config.output=scores.jsonl

The checkpoint is a run of polar_jax or anything that it reads (a Hugging Face folder); its tokenizer is used. A reward depends on
its example alone, to the last bit, so a stopped run continues where it stopped. Precision: --config.model.compute_dtype=bfloat16 is faster.
Every device holds the whole model. To divide a model that does not fit: --config.mesh.data=1 --config.mesh.fsdp=-1.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'score'
  config.tokenizer.kind = 'checkpoint'
  config.model.compute_dtype = 'float32'
  config.mesh.data = -1
  config.mesh.fsdp = 1
  return config
