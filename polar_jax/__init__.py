"""POLAR reward models in JAX: policy-discriminative pre-training, fine-tuning, evaluation and reinforcement fine-tuning."""

__version__ = '0.1.0'
