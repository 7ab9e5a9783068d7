"""GRPO with TRL, rewarded by a POLAR server. Start the server first (docs/serving.md), then:

  POLAR_REWARD_ADDRESS=127.0.0.1:30000 python examples/trl_grpo.py MODEL DATA OUTPUT

DATA is a JSON Lines file with `prompt`, a string or a list of messages, and `reference`. Other arguments are those of GRPOConfig.
"""

import sys

import datasets
import trl

from polar_jax.serve.adapters.trl import polar_reward


def main(model: str, data: str, output: str, *arguments: str) -> None:
  (config,) = trl.TrlParser(trl.GRPOConfig).parse_args_and_config(['--output_dir', output, *arguments])
  trainer = trl.GRPOTrainer(
    model=model,
    reward_funcs=polar_reward,
    args=config,
    train_dataset=datasets.load_dataset('json', data_files=data, split='train'),
  )
  trainer.train()


if __name__ == '__main__':
  main(*sys.argv[1:])
