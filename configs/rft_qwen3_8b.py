"""PPO of Qwen3-8B, which thinks before it answers, with POLAR-7B as the reward, with the paper's hyper-parameters.

  python -m polar_jax.main --config=configs/rft_qwen3_8b.py --workdir=runs/rft_qwen3_8b        (the same command on every host)

Reads: data/rft_prompts (splits train and, if there is one, test: the official parquet or any format of docs/rft.md),
checkpoints/qwen3_8b (Qwen/Qwen3-8B), checkpoints/polar_7b (internlm/POLAR-7B); both as on Hugging Face.
Machine: 32 H100 (80 GB), or a TPU slice v5p:2x4x4 (32 chips of 95 GB); more devices of either kind need no change.
Mesh: tensor 8, as there are eight key/value heads; fsdp takes the rest (4 of 32 devices).
Memory of a device: actor with Adam 3.1 GB, critic with Adam 2.8 GB, reference policy and reward model 1.0 GB (bfloat16),
gradients of one of them 1.0 GB, key/value cache of 256 responses 18.9 GB (docs/rft.md has the sums).
Responses have up to 15,000 tokens, as in the official script for this policy; only the text after </think> is scored.
Not run at this size here.
"""

from polar_jax.recipes import reinforcement


def get_config():
  config = reinforcement(
    'qwen3_8b',
    policy='checkpoints/qwen3_8b',
    prompts='data/rft_prompts',
    tensor=8,
    rows=8,
    slots=256,
  )
  config.rft.rollout.max_new = 15_000
  config.rft.row_length = 16_384
  return config
