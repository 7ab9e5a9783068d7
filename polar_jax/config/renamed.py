"""Former names of settings. Configs that use them are refused with the present name; checkpoints that hold them are read."""

from __future__ import annotations

_SECTIONS = {'lm': 'pretrain_lm', 'train': 'pretrain', 'synthesis': 'synthesize'}
_OPTIONS = {
  **{f'{section}.accumulation': f'{section}.gradient_accumulation_steps' for section in ('pretrain_lm', 'pretrain', 'finetune')},
  **{f'{section}.evaluate_rows': f'{section}.evaluate_examples' for section in ('pretrain_lm', 'pretrain', 'finetune')},
  'data.evaluation': 'data.validation',
  'data.prompts_evaluation': 'data.prompts_validation',
  'data.on_bad_row': 'data.on_bad_example',
  'synthesize.smallest_window': 'synthesize.min_window',
  'synthesize.train_rows': 'synthesize.train_examples',
  'synthesize.evaluation_rows': 'synthesize.evaluation_examples',
  'synthesize.preference_rows': 'synthesize.preference_examples',
  'synthesize.preference_evaluation_rows': 'synthesize.preference_evaluation_examples',
  'synthesize.largest': 'synthesize.max_number',
  'evaluate.rows': 'evaluate.rows_per_batch',
  'rft.prompts': 'rft.prompts_per_step',
  'rft.samples': 'rft.num_generations',
  'rft.minibatch': 'rft.mini_batch_size',
  'rft.rows': 'rft.micro_batch_rows',
  'rft.lam': 'rft.gae_lambda',
  'rft.seeds': 'study.seeds',
  'rft.reward.rows': 'rft.reward.rows_per_batch',
  'rft.rollout.slots': 'rft.rollout.max_concurrent',
}
# Dotted former name -> dotted present name. Options of a former section are listed under its present name: see `current_name`.
RENAMED = _SECTIONS | _OPTIONS

# Dotted name of an option -> {former value: present value}. The values name a stage; any other value is a path.
RENAMED_VALUES = {
  'pretrain_lm.start_from': {'lm': 'pretrain_lm'},
  'pretrain.start_from': {'lm': 'pretrain_lm'},
  'finetune.start_from': {'lm': 'pretrain_lm'},
  'rft.policy': {'lm': 'pretrain_lm'},
}


def current_name(name: str) -> str:
  """Return the present name of an option or section; a name that did not change is returned as it is.

  Args:
    name: A dotted name, such as 'train.accumulation'.
  """
  section, dot, option = name.partition('.')
  name = RENAMED.get(section, section) + dot + option
  return RENAMED.get(name, name)


def present_names(part: str) -> list[str]:
  """Return the present names of all settings that formerly ended in `part`, such as 'train' or 'samples'."""
  return list(dict.fromkeys(new for old, new in RENAMED.items() if old.rpartition('.')[2] == part))
