"""PPO of Qwen2.5-7B-Instruct with POLAR-7B as the reward, with the paper's hyper-parameters.

  python -m polar_jax.main --config=configs/rft_qwen2_5_7b.py --workdir=runs/rft_qwen2_5_7b        (the same command on every host)

Reads: data/rft_prompts (splits train and, if there is one, test: the official parquet or any format of docs/rft.md),
checkpoints/qwen2_5_7b_instruct (Qwen/Qwen2.5-7B-Instruct), checkpoints/polar_7b (internlm/POLAR-7B); both as on Hugging Face.
Machine: 8 H100 (80 GB), or a TPU slice v5p:2x2x2 (8 chips of 95 GB); more devices of either kind need no change.
Mesh: tensor 4, as there are four key/value heads; fsdp takes the rest (2 of 8 devices).
Memory of a device: actor with Adam 11.4 GB, critic with Adam 10.6 GB, reference policy and reward model 3.7 GB (bfloat16),
gradients of one of them 3.8 GB, key/value cache of 512 responses 7.5 GB (docs/rft.md has the sums).
Paper: 1.25M prompts, 32 H800 for 48 hours. Not run at this size here.
"""

from polar_jax.recipes import reinforcement


def get_config():
  return reinforcement(
    'qwen2_5_7b_instruct',
    policy='checkpoints/qwen2_5_7b_instruct',
    prompts='data/rft_prompts',
    tensor=4,
    rows=8,
  )
