"""The stages, and the settings that each of them reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from polar_jax.config.base import ConfigError
from polar_jax.config.root import Config


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage of the command line.

  Attributes:
    help: One line: what the stage does.
    reads: The sections that it reads, or single options of sections that are otherwise another stage's; `EVERY_STAGE_READS` aside.
  """

  help: str
  reads: tuple[str, ...]


EVERY_STAGE_READS = ('stage', 'seed', 'mesh', 'compile_cache', 'distributed')
_MODEL = ('model', 'tokenizer', 'template', 'data', 'checkpoint')  # with tokenizer.kind 'checkpoint' the tokenizer is the checkpoint's
_TRAINING = (*_MODEL, 'checkpointing', 'profile')

STAGE_TABLE = {
  'synthesize': Stage('Write data: triplets and preferences of a pool of n-gram policies, or word problems.', ('synthesize',)),
  'pretrain_lm': Stage('Train a language model on text.', ('pretrain_lm', *_TRAINING)),
  'pretrain': Stage('Pre-train a reward model on triplets of policies, contrastively.', ('pretrain', *_TRAINING)),
  'finetune': Stage(
    'Fine-tune a reward model on ranked data.',
    (
      'finetune',
      *_TRAINING,
      *('ablations', 'equal_compute', 'ablation_learning_rate', 'seeds'),
      *('pretrain.start_from', 'pretrain.start_layers', 'synthesize.world'),
    ),
  ),
  'evaluate': Stage(
    'Evaluate the reward models of the workdir, or one on files and public benchmarks, next to heuristic baselines; or a policy on '
    'benchmarks.',
    ('evaluate', *_MODEL, 'input', 'output', 'checkpointing.folder', 'seeds', 'synthesize.world', 'synthesize.workers'),
  ),
  # In the miniature, rft trains start models by the settings of pretrain_lm, and samples references by those of synthesize.
  'rft': Stage(
    'Fine-tune a policy by PPO with the reward model; in the miniature, run the study of it.',
    ('rft', 'study', *_TRAINING, 'ablations', 'pretrain_lm', 'synthesize'),
  ),
  'sweep': Stage(
    'Pre-train reward models over a grid of sizes, tokens, learning rates, batch sizes and seeds.',
    ('sweep', 'pretrain_lm', 'pretrain', *_TRAINING, 'synthesize.vocab_size'),
  ),
  'fit': Stage('Fit scaling laws to the results of a sweep, and advise on a budget.', ('fit',)),
  'convert': Stage(
    'Convert a checkpoint from another format to that of polar_jax, or from that to Hugging Face.',
    ('convert', 'checkpoint', 'output', 'template'),
  ),
  'score': Stage(
    'Write a reward for each example of a file.',
    ('score', 'checkpoint', 'input', 'output', 'model', 'tokenizer', 'template', 'data.on_bad_example'),
  ),
  'serve': Stage(
    'Serve a reward model over HTTP, to any trainer.',
    ('serve', 'checkpoint', 'model', 'tokenizer', 'template'),
  ),
  'certify': Stage(
    'Compare the rewards of a model by every way to ask for them: offline, our server, transformers, other servers.',
    ('certify', 'checkpoint', 'input', 'output', 'model', 'tokenizer', 'template', 'data.on_bad_example'),
  ),
  # Also all that the planned stage reads (see `_reads`): adding --config.stage=plan to the command of a run plans that run.
  'plan': Stage(
    'Compile a training step for a TPU slice without having one: its memory, time and cost.', ('plan', 'synthesize.vocab_size')
  ),
}
STAGES = ('all', *STAGE_TABLE)
ALL_HELP = "Every stage of the config's world: the miniature from synthesize to fit, or synthesize, finetune and rft on word problems."
_ALONE = ('all', 'plan')


def check_stage(value: str) -> None:
  """Check the value of the option `stage`.

  Raises:
    ConfigError: `value` is neither a stage nor a comma-separated list of them.
  """
  for name in value.split(','):
    if name not in STAGES or (name in _ALONE and value != name):
      raise ConfigError(
        f'stage is {value!r}; it must be one of: {", ".join(STAGES)}; or several of them in order, separated by commas '
        '("all" and "plan" must stand alone)'
      )


def requested_stages(config: Config) -> tuple[str, ...]:
  """Return the names of the stages that a config runs, in order."""
  if config.stage != 'all':
    return tuple(config.stage.split(','))
  if config.synthesize.world == 'arithmetic':  # starts from a language model that exists
    return ('synthesize', 'finetune', 'rft')
  return ('synthesize', 'pretrain_lm', 'pretrain', 'finetune', 'evaluate', 'rft', 'sweep', 'fit')


def check_overrides(config: Config, names: Iterable[str]) -> None:
  """Check that some requested stage reads each setting of the command line.

  Args:
    config: The parsed config, overrides included.
    names: Dotted names of the settings on the command line. Settings of a config file may belong to any stage: one file serves many.

  Raises:
    ConfigError: A setting would have no effect. The message names it, what the stages read, and the stages that read it.
  """
  stages = requested_stages(config)
  reads = list(dict.fromkeys(name for stage in stages for name in _reads(stage, config)))
  reads = [name for name in reads if not any(name.startswith(f'{whole}.') for whole in reads)]
  for name in names:
    if not _is_read(name, [*reads, *EVERY_STAGE_READS]):
      raise ConfigError(f'{name} is set, but {_unread(name, config, stages, reads)}; {_remedy(name, config)}')


def _reads(stage: str, config: Config) -> tuple[str, ...]:
  own = STAGE_TABLE[stage].reads
  return (*own, *STAGE_TABLE[config.plan.step].reads) if stage == 'plan' else own


def _is_read(name: str, reads: Sequence[str]) -> bool:
  """Return whether `name` is in `reads`, is part of a section there, or is a section of which a part is read."""
  return any(name == read or name.startswith(f'{read}.') or read.startswith(f'{name}.') for read in reads)


def _unread(name: str, config: Config, stages: Sequence[str], reads: Sequence[str]) -> str:
  """Return the part of the message that lists what the requested stages read."""
  several = len(stages) > 1 and config.stage != 'all'
  who = f'stages {" and ".join(stages)}' if several else f'stage {config.stage}'
  section, _, option = name.partition('.')
  parts = [read for read in reads if read.startswith(f'{section}.')]
  if parts:
    return f'{who} {"read" if several else "reads"} only {", ".join(parts)} of section {section}'
  read = f'{"they read" if several else "it reads"}: {", ".join([*reads, *EVERY_STAGE_READS])}'
  return f'{who} {"do" if several else "does"} not read {f"section {section}" if option else "it"}; {read}'


def _remedy(name: str, config: Config) -> str:
  """Return the part of the message with the remedy: drop the setting, or run a stage that reads it."""
  readers = [stage for stage in STAGE_TABLE if stage != 'plan' and _is_read(name, STAGE_TABLE[stage].reads)] or ['plan']
  section = name.partition('.')[0]
  readers = [section] if section in readers else readers
  if config.stage == 'plan':
    return f'drop it, or plan a stage that reads it (plan.step): {", ".join(readers)}'
  verb = 'run' if config.stage == 'all' or readers == ['plan'] else 'add'
  which = f'stage {readers[0]}' if len(readers) == 1 else f'one of the stages that read it: {", ".join(readers)}'
  return f'drop it or {verb} {which}'
