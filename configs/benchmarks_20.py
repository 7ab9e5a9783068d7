"""The twenty benchmarks of policies in the paper, as far as lm-eval has them (pip install 'polar_jax[lm_eval]').

  python -m polar_jax --config=configs/benchmarks_20.py --config.checkpoint=DIR --config.output=OUT [--config.evaluate.tasks=gsm8k,musr]

Writes OUT/policies.json, the responses, and a section of the report in the workdir. Benchmarks that need a judge, and those whose data
cannot be read, are named with the reason. polar_jax/policies/benchmarks.py has all twenty with metrics, shots and configs of OpenCompass.

  with lm-eval          drop, bbh, gpqa_diamond, hellaswag, musr, gsm8k, math_500, cmmlu, mmlu_pro, mmmlu_lite
  run code              humaneval, mbpp: in a sandbox, with --config.evaluate.run_code=True
  another model judges  alignbench, alpacaeval, arena_hard, wildbench, mtbench, followbench, fofo: OpenCompass
  no task of lm-eval    korbench: OpenCompass
"""

from polar_jax.config import default_config
from polar_jax.policies.benchmarks import BY_NAME


def get_config():
  config = default_config()
  config.stage = 'evaluate'
  config.tokenizer.kind = 'checkpoint'
  config.model.compute_dtype = 'float32'
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.evaluate.tasks = ','.join(BY_NAME)
  config.evaluate.chat = 'auto'
  config.evaluate.max_new = 1_024  # solutions with their reasoning
  return config
