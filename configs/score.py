"""Rewards for a file of rows: prompt, reference and output (strings or lists of messages), as POLAR's client takes them.

  python -m polar_jax.main --config=configs/score.py --config.checkpoint=DIR --config.input=rows.jsonl --config.output=scores.jsonl

The checkpoint is a run of polar_jax or anything that it reads (a Hugging Face folder); its tokenizer is used. A reward depends on
its row alone, to the last bit, so a stopped run continues where it was. Precision: --config.model.compute_dtype=bfloat16 is faster.
Every device holds the whole model; for one that does not fit, divide it: --config.mesh.data=1 --config.mesh.fsdp=-1.
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
