"""PPO of Qwen2.5-32B-Instruct with POLAR-7B as the reward, with the paper's hyper-parameters.

  python -m polar_jax.main --config=configs/rft_qwen2_5_32b.py --workdir=runs/rft_qwen2_5_32b        (the same command on every host)

Reads: data/rft_prompts (splits train and, if there is one, test: the official parquet or any format of docs/rft.md),
checkpoints/qwen2_5_32b_instruct (Qwen/Qwen2.5-32B-Instruct), checkpoints/polar_7b (internlm/POLAR-7B); both as on Hugging Face.
Machine: a TPU slice v5p:4x4x4 (64 chips of 95 GB), or 64 H100 (80 GB).
Mesh: tensor 4, because an axis must be a product of whole sides of the slice, which 8 is not for 4x4x4; fsdp takes the rest (16 of 64).
Memory of a device: actor with Adam 6.1 GB, critic with Adam 6.0 GB, reference policy and reward model 1.3 GB (bfloat16),
gradients of one of them 2.0 GB, key/value cache of 512 responses 4.3 GB (docs/rft.md has the sums).
Paper: 1.25M prompts, 64 H800 for 72 hours. Not run at this size here.
"""

from polar_jax.recipes import reinforcement


def get_config():
  return reinforcement(
    'qwen2_5_32b_instruct',
    policy='checkpoints/qwen2_5_32b_instruct',
    prompts='data/rft_prompts',
    tensor=4,
    rows=16,
  )
