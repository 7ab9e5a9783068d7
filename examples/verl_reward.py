"""For versions of verl that take a file and not a package: custom_reward_function.path=examples/verl_reward.py"""

from polar_jax.serve.adapters.verl import compute_score, compute_score_batch

__all__ = ['compute_score', 'compute_score_batch']
