"""Conversion of checkpoints to the format of polar_jax, and back to a folder that transformers, vLLM and SGLang load.

  python -m polar_jax.main --config=configs/convert.py --config.checkpoint=DIR_OR_FILE --config.output=DIR

Reads a Hugging Face folder (internlm2, internlm3, llama, qwen2), a .gguf file or a llama2.c file and writes a polar_jax checkpoint; from a
polar_jax checkpoint it writes a Hugging Face folder. Prints a certificate. The default is bit-exact; --config.convert.dtype=bfloat16 casts.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'convert'
  return config
