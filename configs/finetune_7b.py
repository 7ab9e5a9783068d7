"""Fine-tuning of POLAR-7B on ranked data with the paper's hyper-parameters.

  python -m polar_jax.main --config=configs/finetune_7b.py --config.data.preferences=mine.jsonl --config.data.validation=held_out.jsonl

Reads: data/preferences (examples with prompt, reference, chosen and rejected), checkpoints/polar_7b_base (the pre-trained reward
model, internlm/POLAR-7B-Base as on Hugging Face, or a polar_jax checkpoint).
Paper: 150,000 examples, 16 H800 for half an hour. Not run at this size here.
"""

from polar_jax.recipes import finetuning


def get_config():
  return finetuning('polar_7b', start_from='checkpoints/polar_7b_base', learning_rate=2e-5)
