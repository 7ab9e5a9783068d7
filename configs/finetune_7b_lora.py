"""Fine-tuning of POLAR-7B on ranked data with adapters (LoRA): the weights stay as they are, in bfloat16, and 0.6% are trained.

  python -m polar_jax.main --config=configs/finetune_7b_lora.py --config.data.preferences=mine.jsonl --config.data.validation=held_out.jsonl

Reads: data/preferences (examples with prompt, reference, chosen and rejected), checkpoints/polar_7b_base (as `finetune_7b.py` does).
Data, batch and schedule are those of the paper's fine-tuning, which trains all weights; rank and learning rate are ours. Not run at this
size here. docs/finetuning.md has its memory.
"""

from polar_jax.recipes import finetuning


def get_config():
  config = finetuning('polar_7b', start_from='checkpoints/polar_7b_base', learning_rate=2e-4)
  config.finetune.lora.rank = 16
  config.finetune.lora.alpha = 32.0
  config.finetune.lora.base_dtype = 'bfloat16'
  config.finetune.gradient_accumulation_steps = 40  # on 8 chips: one row per chip at a time
  return config
