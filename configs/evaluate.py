"""A reward model, or recorded rewards, on your own files and on public benchmarks.

  python -m polar_jax --config=configs/evaluate.py --config.checkpoint=DIR --config.input=pairs.jsonl,ranked.jsonl --config.output=OUT
  python -m polar_jax --config=configs/evaluate.py --config.evaluate.benchmarks=judgebench --config.evaluate.folder=DIR
      --config.evaluate.scores=scores.jsonl --config.output=OUT

Writes OUT/evaluation.json and OUT/scores.jsonl.gz, and a report in the workdir. See docs/evaluation.md for the files.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'evaluate'
  config.tokenizer.kind = 'checkpoint'
  config.model.compute_dtype = 'float32'
  config.mesh.data = -1
  config.mesh.fsdp = 1
  return config
