"""Pre-train a reward model on triplets, from any language model: its shape and tokenizer are those of the checkpoint.

  python -m polar_jax.main --config=configs/pretrain.py --config.data.triplets=runs/pool/data/triplets --config.pretrain.start_from=LM \
    --config.template.reward_token='<|endoftext|>' --workdir=runs/reward

LM is a folder or file that `load` opens; --config.pretrain.start_layers=4 takes its first layers alone, which is what a CPU can train.
Rewards are read at the reward token: any control token of the tokenizer that texts do not have. Sizes of the paper: 1_8b.py, 7b.py.
"""

from polar_jax.config import default_config


def get_config():
  config = default_config()
  config.stage = 'pretrain,evaluate'
  config.tokenizer.kind = 'checkpoint'
  config.pretrain.learning_rate = 2e-4
  config.pretrain.batch_size = 32
  config.pretrain.evaluate_every = 50
  return config
