"""Checks of the later stages of a command before its first one runs: their data, the checkpoints they start from, disk space.

The first stage needs none: it makes the same checks, and more, when it starts. What an earlier stage of the command is going to write
cannot be checked.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import jax

from polar_jax.checkpoints import checkpointer, space
from polar_jax.config import ConfigError, ModelConfig, TrainConfig
from polar_jax.data import columns, lengths
from polar_jax.data.conversation_template import open_template
from polar_jax.data.pipeline import open_segments
from polar_jax.model import heads
from polar_jax.ppo.rewards.sources import RuleReward
from polar_jax.runtime import paths
from polar_jax.stages import arms, evaluate_sets
from polar_jax.stages import evaluate as evaluate_stage
from polar_jax.stages import finetune as finetune_stage
from polar_jax.stages import pretrain as pretrain_stage
from polar_jax.stages import pretrain_lm as pretrain_lm_stage
from polar_jax.stages import rft as rft_stage
from polar_jax.stages.context import RUNS, SCRATCH, Context, is_run
from polar_jax.train import trainer
from polar_jax.train.optimizer import make_optimizer
from polar_jax.train.validation import PairValidation
from polar_jax.types import Triplet, UserError

_EARLIER_STAGE = {run: 'finetune' if run.startswith('finetune') else run for run in RUNS}  # that writes a run


def check(context: Context, names: Sequence[str]) -> None:
  """Check what the stages after the first, and the ablations, will read, and that the disk has room for what all of them write.

  Args:
    context: config, workdir and devices. Its cache keeps the examples for the stages.
    names: the stages of the command, in order.

  Raises:
    UserError: a later stage would fail.
  """
  for position, name in enumerate(names):
    if name == 'finetune':
      _check_ablations(context, names[:position])
    if position and name in _CHECKS:
      _CHECKS[name](context, names[:position])
  if len(names) > 1 and jax.process_index() == 0:
    _check_space(context, names)


def _check_pretrain(context: Context, earlier: Sequence[str]) -> None:
  config = context.config
  _check_start(context, config.pretrain.start_from, pretrain_stage.RUN, earlier)
  _check_examples(context, context.triplets, config.data.triplets, config.pretrain, earlier)


def _check_finetune(context: Context, earlier: Sequence[str]) -> None:
  config = context.config
  _check_start(context, config.finetune.start_from, arms.FINETUNE, earlier)
  _check_examples(context, context.preferences, config.data.preferences, config.finetune, earlier)


def _check_evaluate(context: Context, earlier: Sequence[str]) -> None:
  data = context.config.data
  if _in_miniature(context, data.triplets or data.preferences or data.validation, earlier):
    return
  if evaluate_sets.is_requested(context.config):
    evaluate_sets.check(context.config)
    return
  for run, read, setting in (
    (pretrain_stage.RUN, context.triplets, 'triplets'),
    (arms.FINETUNE, context.preferences, 'preferences'),
  ):
    is_there = run in earlier or evaluate_stage.trained(context, run)
    if is_there and not _is_written(context, data.validation or getattr(data, setting), earlier):
      evaluate_stage.held_out(context, read, f'data.{setting}')


def _check_rft(context: Context, earlier: Sequence[str]) -> None:
  config, options = context.config, context.config.rft
  is_study = _in_miniature(context, config.data.prompts, earlier)
  _check_start(context, options.policy, None if is_study else rft_stage.RFT, earlier)
  if options.reward.source == 'model' and options.reward.model_weight:
    _check_start(context, options.reward.checkpoint, None, earlier)
  if not is_study and not _is_written(context, config.data.prompts, earlier):
    for split in ('train', 'validation'):
      prompts = rft_stage.read_prompts(context, split)
      if options.reward.rule and options.method != 'sft':
        RuleReward(options.reward.rule).check(prompts, 'prompt' if split == 'train' else 'held-out prompt')


_CHECKS: dict[str, Callable[[Context, Sequence[str]], None]] = {
  'pretrain': _check_pretrain,
  'finetune': _check_finetune,
  'evaluate': _check_evaluate,
  'rft': _check_rft,
}


def _is_written(context: Context, given: str | None, earlier: Sequence[str]) -> bool:
  """Return whether an earlier stage of the command writes a data set, which is in the workdir if none is given."""
  inside = given is None or (not paths.in_bucket(given) and context.workdir.absolute() in pathlib.Path(given).absolute().parents)
  return inside and 'synthesize' in earlier


def _check_ablations(context: Context, earlier: Sequence[str]) -> None:
  """Check that the ablations, which run after the fine-tuning itself, have a language model to start from.

  Raises:
    ConfigError: they have none.
  """
  config = context.config
  ablations = config.ablations and config.synthesize.world != 'arithmetic'
  for wanted, setting, run in (
    (ablations, 'ablations', arms.FINETUNE_ONLY),
    (config.equal_compute, 'equal_compute', arms.FINETUNE_EQUAL_COMPUTE),
  ):
    try:
      if wanted:
        _check_start(context, config.pretrain.start_from, run, earlier)
    except ConfigError as error:
      raise ConfigError(f'{setting}: {error}, or set {setting} to False') from error
  if config.equal_compute and jax.process_count() > 1:
    raise ConfigError('equal_compute counts the tokens of earlier runs, which needs a single process; set it to False')
  if config.equal_compute and arms.PRETRAIN not in earlier:
    finetune_stage.pretraining_tokens(context)


def _in_miniature(context: Context, given: str | None, earlier: Sequence[str]) -> bool:
  """Return whether a stage reads only what the miniature makes."""
  made = 'synthesize' in earlier or (context.data / 'pool.json').exists()
  return given is None and context.config.synthesize.world == 'ngram' and made


def _check_start(context: Context, reference: str, run: str | None, earlier: Sequence[str]) -> None:
  """Check that a checkpoint exists, or that an earlier stage writes it.

  Args:
    context: config and workdir.
    reference: names the checkpoint, as the config does.
    run: that starts from it; if it has a checkpoint of its own, it needs no other. None: no run.
    earlier: the stages before.

  Raises:
    ConfigError: there is none.
  """
  if reference == SCRATCH or (run is not None and checkpointer.exists(context.home(run))):
    return
  path = context.checkpoint(reference)
  exists = checkpointer.exists(path) if is_run(reference) else path.exists()
  if not exists and _EARLIER_STAGE.get(reference) not in earlier:
    raise ConfigError(f'no checkpoint to start from in {path}: run the stage that writes it first, or name another checkpoint')


def _check_examples(
  context: Context, read: Callable[[str], Sequence[Triplet]], given: str | None, train: TrainConfig, earlier: Sequence[str]
) -> None:
  """Read the training and validation examples of a run and check that they fit its rows.

  Args:
    context: config, workdir and devices.
    read: opens a split.
    given: the option that names the data set.
    train: options of the run.
    earlier: the stages before.

  Raises:
    UserError: there is no such data, or an example is bad or too long.
  """
  config, data = context.config, context.config.data
  if _is_written(context, given, earlier):
    return
  examples, held_out = read('train'), read('validation')
  for split in (examples, held_out):
    columns.check(split, train.loss.columns)
  if data.row_length is None or (config.tokenizer.kind == 'trained' and 'synthesize' in earlier):
    return
  template = open_template(context.template_config(), context.tokenizer(train.start_from))
  plan, steps = trainer.batch_plan(train, context.mesh), trainer.num_steps(train, len(examples))
  segments, validation = (open_segments(split, template, train.loss.columns) for split in (examples, held_out))
  lengths.check_run(segments, plan, data, steps=steps, seed=config.seed)
  PairValidation(validation, plan, data.row_length, train.evaluate_examples).check(data.read_threads)


def _check_space(context: Context, names: Sequence[str]) -> None:
  """Check that the disk has room for the checkpoints of all training stages together, as far as their models are known."""
  config = context.config
  model = _known_model(context, names)
  runs = {
    pretrain_lm_stage.RUN: (config.pretrain_lm, 'lm'),
    pretrain_stage.RUN: (config.pretrain, 'reward'),
    arms.FINETUNE: (config.finetune, 'reward'),
  }
  needed = 0
  for run, (train, head) in runs.items():
    if model is not None and run in names and not checkpointer.exists(context.home(run)):
      saved = space.most_at_once(config.checkpointing, 0, train.steps or 1_000_000, train.evaluate_every)
      params = heads.abstract_trained(model, head, train.lora)
      needed += saved * space.size_of((params, jax.eval_shape(make_optimizer(train, 1).init, params)))
  space.check(', '.join(name for name in names if name in runs), context.home(''), config.checkpointing, needed)


def _known_model(context: Context, names: Sequence[str]) -> ModelConfig | None:
  """Return the shape of the models to train; None if the tokenizer, which decides the vocabulary, is not there yet."""
  if context.config.model.vocab_size is not None:
    return context.config.model
  if context.config.tokenizer.kind == 'trained' and 'synthesize' in names:
    return None
  try:
    return context.model_config(context.tokenizer())
  except UserError:  # a stage that needs it will say so
    return None
