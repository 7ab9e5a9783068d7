"""The arms of a comparison: the runs of a workdir that differ in what they were trained on, each with one or more seeds."""

from __future__ import annotations

from polar_jax.checkpoints import checkpointer
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain import RUN as PRETRAIN

# Names of runs, which are also those of their folders.
FINETUNE, FINETUNE_ONLY, FINETUNE_NO_REFERENCE = 'finetune', 'finetune_only', 'finetune_no_reference'
FINETUNE_EQUAL_COMPUTE = 'finetune_equal_compute'
MAIN_ARM = 'pretrained_finetuned'
# Arm -> the run of its first seed. The second to fourth are those of Table 7.
ARMS = {
  MAIN_ARM: FINETUNE,
  'finetuned_only': FINETUNE_ONLY,
  'finetuned_without_reference': FINETUNE_NO_REFERENCE,
  'pretrained_only': PRETRAIN,
  'finetuned_at_equal_compute': FINETUNE_EQUAL_COMPUTE,
}


def seed_run(run: str, seed: int) -> str:
  """Return the run of a seed, 0 being the first."""
  return f'{run}_seed_{seed}' if seed else run


def trained(context: Context, run: str) -> bool:
  """Return whether a run of the workdir has a checkpoint."""
  return checkpointer.exists(context.home(run))


def trained_seeds(context: Context, run: str) -> list[str]:
  """Return the runs of all seeds of a run that have a checkpoint."""
  names = [seed_run(run, seed) for seed in range(context.config.seeds)]
  return [name for name in names if trained(context, name)]


def trained_arms(context: Context) -> dict[str, list[str]]:
  """Return the arms that have been trained, each with the runs of its seeds; the main arm first."""
  found = {arm: trained_seeds(context, run) for arm, run in ARMS.items()}
  return {arm: runs for arm, runs in found.items() if runs}
