"""PPO of InternLM3-8B-Instruct with POLAR-7B as the reward, with the paper's hyper-parameters.

  python -m polar_jax.main --config=configs/rft_internlm3_8b.py --workdir=runs/rft_internlm3_8b        (the same command on every host)

Reads: data/rft_prompts (splits train and, if there is one, test: the official parquet or any format of docs/rft.md),
checkpoints/internlm3_8b_instruct (internlm/internlm3-8b-instruct), checkpoints/polar_7b (internlm/POLAR-7B); both as on Hugging Face.
Machine: 8 H100 (80 GB), or a TPU slice v5p:2x2x2 (8 chips of 95 GB); more devices of either kind need no change.
Mesh: tensor 2, because there are two key/value heads; fsdp takes the rest (4 of 8 devices).
Memory of a device: actor with Adam 13.2 GB, critic with Adam 12.4 GB, reference policy and reward model 4.0 GB (bfloat16),
gradients of one of them 4.4 GB, key/value cache of 512 responses 6.4 GB (docs/rft.md has the sums).
Paper: 1.25M prompts, 32 H800 for 48 hours. Not run at this size here.
"""

from polar_jax.recipes import reinforcement


def get_config():
  return reinforcement(
    'internlm3_8b',
    policy='checkpoints/internlm3_8b_instruct',
    prompts='data/rft_prompts',
    tensor=2,
    rows=8,
  )
