"""For OpenRLHF: --reward.remote_url examples/openrlhf_reward.py --data.label_key reference"""

from polar_jax.serve.adapters.openrlhf import reward_func

__all__ = ['reward_func']
