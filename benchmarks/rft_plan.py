"""Whether a config of reinforcement fine-tuning fits a TPU slice: its steps, compiled on a machine without TPUs.

    pip install -e '.[tpu]' && python benchmarks/rft_plan.py --config=configs/rft_qwen2_5_32b.py --topology=v5p:4x4x4

Settings are given as for a run (--config.rft.rows=8). Prints what every function takes of a chip beside what the loop holds; the last
line is a JSON object, sizes in bytes. Starts no TPU runtime and allocates no array.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'XLA_FLAGS': '',  # flags for a CPU would change what is compiled here
  'TPU_SKIP_MDS_QUERY': '1',  # no metadata server
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # another process may be compiling too; no chip is taken
  'TPU_ACCELERATOR_TYPE': 'v5p-8',  # these two only spare warnings
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_LOG_DIR': 'disabled',
}

from absl import app, flags
from ml_collections import config_flags

from polar_jax.config import ModelConfig, parse
from polar_jax.model.presets import PRESETS
from polar_jax.ppo import plan
from polar_jax.types import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, for example configs/rft_qwen2_5_7b.py.', lock_config=True)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Chip and slice, for example v5p:4x4x4.')
_REWARD = flags.DEFINE_string('reward', 'polar_7b', 'Preset of the reward model.')


def main(argv: list[str]) -> None:
  del argv
  say = lambda line: print(line, file=sys.stderr, flush=True)
  try:
    found = plan.plan(parse(_CONFIG.value), _TOPOLOGY.value, ModelConfig(**PRESETS[_REWARD.value]), say)
  except UserError as error:
    sys.exit(str(error))
  print('\n'.join(plan.table(found)))
  print(json.dumps(plan.as_json(found)))


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'topology'])
  app.run(main)
