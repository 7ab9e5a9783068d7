"""A reward model as a server, for any trainer: POLAR's client, verl, OpenRLHF, TRL, slime, or curl.

  python -m polar_jax.main --config=configs/serve.py --config.checkpoint=DIR

The checkpoint is a run of polar_jax or anything that it reads (a Hugging Face folder); its tokenizer is used. Rewards have the same bits as
those of the score stage with the same settings; --config.serve.exact=False packs requests densely, for several times the throughput.
SIGTERM answers what was accepted and exits. Needs: pip install 'polar_jax[serve]'.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'serve'
  config.tokenizer.kind = 'checkpoint'
  config.model.compute_dtype = 'float32'
  config.mesh.data = -1
  config.mesh.fsdp = 1
  return config
