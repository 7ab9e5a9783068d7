"""Checkpoints from elsewhere into ours, and ours into a folder that transformers, vLLM and SGLang load.

  python -m polar_jax.main --config=configs/convert.py --config.checkpoint=DIR_OR_FILE --config.output=DIR

Reads: a Hugging Face folder (internlm2, internlm3, llama, qwen2), a .gguf or llama2.c file, and writes ours; of a folder of ours
it writes a Hugging Face folder. Prints a certificate. --config.convert.dtype=bfloat16 casts; the default is exact to the bit.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'convert'
  return config
