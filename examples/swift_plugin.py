"""For ms-swift: swift rlhf --rlhf_type grpo --external_plugins examples/swift_plugin.py --reward_funcs polar"""

from swift.rewards import orms

from polar_jax.serve.adapters.swift import PolarReward

orms['polar'] = PolarReward
