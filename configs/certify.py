"""A certificate that a reward model gives the same rewards whichever way it is asked.

  python -m polar_jax.main --config=configs/certify.py --config.checkpoint=DIR
  python -m polar_jax.main --config=configs/certify.py --config.checkpoint=DIR --config.certify.vllm=http://127.0.0.1:8000

Fixed rows, or those of --config.input (as for the score stage), are scored by the score stage, packed, with more padding, through every
endpoint of our server, by transformers, and by running servers. It ends with an error if a way differs by more than certify.tolerance.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'certify'
  config.tokenizer.kind = 'checkpoint'
  config.model.compute_dtype = 'float32'
  config.mesh.data = -1
  config.mesh.fsdp = 1
  return config
