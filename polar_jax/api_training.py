"""The training functions of the Python API: a reward model from ranked examples, a policy from prompts and a reward."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from polar_jax.api_models import Example, LanguageModel, Model, RewardModel, default_mesh, open_any_tokenizer
from polar_jax.checkpoints import pretrained, run_folder
from polar_jax.checkpoints.adapted import AdapterStart, adapter_start
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import (
  CheckpointingConfig,
  ConfigError,
  DataConfig,
  LossConfig,
  ModelConfig,
  ProfileConfig,
  RftConfig,
  TemplateConfig,
  TrainConfig,
)
from polar_jax.data import columns, identity, lengths, pipeline, survey
from polar_jax.data.conversation_template import open_template
from polar_jax.data.examples import as_prompts, as_triplets
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model import lora
from polar_jax.runtime import paths
from polar_jax.train import trainer
from polar_jax.train.metrics import read_metrics
from polar_jax.train.objectives import ranking
from polar_jax.train.validation import PairValidation
from polar_jax.types import Prompt, UserError

SCRATCH = 'scratch'


@dataclasses.dataclass(frozen=True)
class TrainResult:
  """The outcome of a training run.

  Attributes:
    make_model: returns the trained model; adapters are merged into its weights.
    summary: the content of summary.json: loss, accuracy, tokens, seconds and so on.
    folder: where metrics.jsonl, TensorBoard events and summary.json are.
  """

  make_model: Callable[[], Any]
  summary: dict[str, Any]
  folder: pathlib.Path

  @functools.cached_property
  def model(self) -> Any:
    """The trained model."""
    return self.make_model()

  @property
  def metrics(self) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, one for each step and evaluation."""
    return read_metrics(self.folder)


@dataclasses.dataclass(frozen=True)
class RunSettings:
  """Settings of a training run that do not depend on what is trained.

  Attributes:
    seed: of initialization, sampling and order of examples.
    log: receives lines of progress.
    name: of the run in logs; None: the last part of its output folder.
    checkpointing: how often to save, and which checkpoints to keep.
    checkpoint_dir: folder of the checkpoints; may be in a bucket. None: the output folder.
    profile: steps to capture with JAX's profiler.
  """

  seed: int = 0
  log: Callable[[str], None] = print
  name: str | None = None
  checkpointing: CheckpointingConfig = CheckpointingConfig()
  checkpoint_dir: pathlib.Path | None = None
  profile: ProfileConfig = ProfileConfig()

  def run_fields(self, output_dir: str | pathlib.Path) -> dict[str, Any]:
    """Return the fields that `train.trainer.Run` and `ppo.run.Run` have in common."""
    folder = pathlib.Path(output_dir)
    return {
      'name': self.name or folder.name,
      'folder': folder,
      'home': self.checkpoint_dir or folder,
      'checkpointing': self.checkpointing,
      'profile': self.profile,
      'seed': self.seed,
      'log': self.log,
    }


def train_reward_model(
  train: str | pathlib.Path | Sequence[Example] | pipeline.TripletSegments,
  validation: str | pathlib.Path | Sequence[Example] | None = None,
  *,
  init: str | pathlib.Path | Model | None,
  output_dir: str | pathlib.Path,
  args: TrainConfig = TrainConfig(),
  model: ModelConfig | None = None,
  tokenizer: Tokenizer | str | pathlib.Path | None = None,
  mesh: Mesh | None = None,
  template: TemplateConfig | None = None,
  data: DataConfig = DataConfig(),
  settings: RunSettings = RunSettings(),
) -> TrainResult:
  """Train a reward model on ranked examples: contrastive pre-training (equation 7) and fine-tuning (equation 8) alike.

  A run that was stopped continues from its newest checkpoint when it is called again with the same arguments.

  Args:
    train: dicts with `prompt`, `reference`, `chosen` and `rejected` (and optionally `wrapper`, `category`), or with `ranked` in place of
      the last two, Triplets, RankedLists, or the path of such a data set (docs/losses.md).
    validation: held-out examples in the same forms, evaluated at the end and every `args.evaluate_every` steps.
    init: the model to start from: a path as for `load`, a loaded model, or 'scratch'. A language model gives its decoder.
    output_dir: folder of this run's checkpoints, metrics and summary.
    args: steps, batch size, learning rate and so on (`args.start_from` is ignored in favor of `init`).
    model: shape of a model trained from scratch, else how to compute it; None: that of `init`.
    tokenizer: a tokenizer, its path, or 'byte'; None: that of `init`.
    mesh: devices; None: all, parameters sharded over them.
    template: settings of the reward template; None: those of `init`.
    data: packing and reading: `row_length`, `compilation_steps`, `read_threads`, `prefetch`, `on_bad_example`.
    settings: seed, log, checkpointing and profiling of the run.

  Returns:
    The trained model with its summary and metrics.

  Raises:
    UserError: an argument, a file or an example cannot be used.
    NonFiniteError: the loss is not finite; the message names the step and the examples.
    Preempted: after SIGTERM, once the state is saved.
  """
  started = time.perf_counter()
  mesh, objective, seed, log = mesh or default_mesh(), ranking(args.loss), settings.seed, settings.log
  fields = settings.run_fields(output_dir)
  start = functools.cache(lambda: _opened(init, args.start_layers))  # never called by a resumed run whose other arguments are given
  tokenizer = _tokenizer(tokenizer, start)
  config = _model_config(model, start, tokenizer)
  template = template or (start().template(TemplateConfig()) if start() else TemplateConfig())
  name = str(init) if isinstance(init, (str, pathlib.Path)) else 'the model'
  segments = _segments(train, open_template(template, tokenizer, config.known_vocab_size, name), data, args.loss)
  plan, steps = trainer.batch_plan(args, mesh), trainer.num_steps(args, len(segments))
  lengths.check_run(segments, plan, data, steps=steps, seed=seed)
  pack = pipeline.plan_packing(segments, plan, data.row_length, steps=steps, seed=seed, compilation_steps=data.compilation_steps)
  held_out = None if validation is None else _segments(validation, segments.template, data, args.loss, 'validation')
  validation_batches = None if held_out is None else PairValidation(held_out, plan, data.row_length, args.evaluate_examples)
  base = adapter_start(start, config, RewardModel.head, mesh, args.lora, tokenizer)
  given = _data_settings(segments, held_out) | base.settings
  run = trainer.Run(
    **fields,
    objective=objective,
    model=config,
    train=args,
    mesh=mesh,
    num_examples=len(segments),
    plan=plan,
    batches=pipeline.pair_batches(segments, plan, pack, steps=steps, seed=seed),
    planned_rows=pack.rows,
    validation=validation_batches and validation_batches.check(data.read_threads),
    load_start=None if init == SCRATCH else functools.partial(_start_params, start, base, config, tokenizer, mesh, fields['name'], log),
    fingerprint=run_folder.training_settings(objective.name, args, config, template, tokenizer, seed, given),
    threads=data.read_threads,
    prefetch=data.prefetch,
    frozen=base.frozen,
    facts={'examples': {} if segments is train else _survey(fields['name'], segments, held_out, args, (plan, steps, seed), data, log)},
    started=started,
  )
  run_folder.keep_tokenizer(tokenizer, run.home)
  trained = trainer.train(run)
  merged = functools.partial(lora.merge, trained.params, args.lora)
  return TrainResult(lambda: RewardModel(merged(), config, tokenizer, mesh, template=template), trained.summary, run.folder)


def train_policy(
  policy: str | pathlib.Path | LanguageModel | Pretrained,
  prompts: str | pathlib.Path | Sequence[Mapping[str, Any] | Prompt],
  reward: Any,
  *,
  output_dir: str | pathlib.Path,
  args: RftConfig = RftConfig(),
  held_out: str | pathlib.Path | Sequence[Mapping[str, Any] | Prompt] | None = None,
  mesh: Mesh | None = None,
  model: ModelConfig | None = None,
  settings: RunSettings = RunSettings(),
) -> TrainResult:
  """Tune a policy by PPO (or GRPO, RLOO; `args.advantage`) towards a reward.

  A run that was stopped continues from its newest checkpoint when it is called again with the same arguments.

  Args:
    policy: the language model to start from: a path as for `load`, or a loaded model.
    prompts: dicts with `prompt` and `reference` (and optionally `answer`, `category`), Prompts, or the path of such a data set. A
      reward that is a Python function does not need references.
    reward: a RewardModel; a function in TRL's signature, `f(prompts, completions, **columns) -> list of float`; or a list of
      (weight, reward model or function), whose weighted sum is the reward.
    output_dir: folder of this run's checkpoints, metrics and summary.
    args: steps, prompts per step, learning rates, rollouts, shaping of the reward and so on (`args.policy`, `args.reward.source` and
      `args.reward.checkpoint` are ignored in favor of `policy` and `reward`).
    held_out: prompts in the same forms, on which the policy is evaluated before and after, and every `args.evaluate_every` steps.
    mesh: devices; None: all, parameters sharded over them.
    model: how to compute the policy (precision, attention backend, rematerialization); None: in float32.
    settings: seed, log, checkpointing and profiling of the run.

  Returns:
    The tuned LanguageModel with the run's summary and metrics.

  Raises:
    UserError: an argument, a file, a prompt or a reward cannot be used.
    NonFiniteError: an update is not finite.
    Preempted: after SIGTERM, once the state is saved.
  """
  from polar_jax.ppo import policy as policy_lib
  from polar_jax.ppo import prompts as prompts_lib
  from polar_jax.ppo import trainer as ppo_trainer
  from polar_jax.ppo.run import Run

  mesh = default_mesh() if mesh is None else mesh
  start = policy_lib.check_policy(_opened(policy), 'policy')
  config, tokenizer = start.compute_like(model or ModelConfig()), start.tokenizer()
  assets = policy_lib.assets_of(start)
  chat = None if assets is None else prompts_lib.open_chat(assets, args.rollout.chat)
  encode = lambda examples: prompts_lib.PolicyPrompts(examples, tokenizer, chat, args.rollout.max_prompt, log=settings.log)

  optional = () if _needs_reference(reward) else ('reference',)
  examples = as_prompts(prompts, optional=optional)
  measured = None if held_out is None else as_prompts(held_out, 'validation', optional=optional)
  total, tuning, held_out_prompts = _reward_sum(reward, args, examples), encode(examples), encode(measured) if measured else None
  fields = settings.run_fields(output_dir)
  sets: dict[str, tuple[Any, Any]] = {'training': (examples, tuning)} | ({'held-out': (measured, held_out_prompts)} if measured else {})
  base = adapter_start(lambda: start, config, LanguageModel.head, mesh, args.lora, tokenizer)
  given = _prompts_settings(examples, measured, chat, with_metadata=_reads_columns(reward, args)) | base.settings

  run = Run(
    **fields,
    facts={'examples': {k: _survey_prompts(f'{fields["name"]}: {k}', of, total.template, settings.log) for k, of in sets.items()}},
    config=args,
    model=config,
    mesh=mesh,
    prompts=tuning,
    held_out=held_out_prompts,
    tokenizer=tokenizer,
    stop_ids=prompts_lib.stop_ids(tokenizer, assets, args.rollout.stop, chat),
    reward=total,
    initial_params=lambda: start.params(mesh, 'float32', head='lm'),
    fingerprint=run_folder.policy_settings(args, config, tokenizer, settings.seed, given) | _reward_settings(reward),
    base=base.frozen,
  )
  run.check()
  run_folder.keep_tokenizer(tokenizer, run.home)
  trained = ppo_trainer.train(run)
  merged = functools.partial(lora.merge, trained.params, args.lora)
  return TrainResult(lambda: LanguageModel(merged(), config, tokenizer, mesh), trained.summary, run.folder)


def _opened(init: Any, layers: int | None = None) -> Any:
  """Return a checkpoint on disk or a model in memory, or its first layers, as a `Pretrained`; None for 'scratch'."""
  if isinstance(init, str) and init == SCRATCH:
    return None
  if isinstance(init, Model):
    return init.as_pretrained().first_layers(layers)
  if isinstance(init, Pretrained):
    return init.first_layers(layers)
  if not paths.path_of(init).exists():
    raise ConfigError(f'no checkpoint to start from in {init}: run the stage that writes it first, or name another checkpoint')
  return open_pretrained(init).first_layers(layers)


def _tokenizer(given: Tokenizer | str | pathlib.Path | None, start: Callable[[], Pretrained | None]) -> Tokenizer:
  """Return the tokenizer of a run: the given one, or that of the checkpoint that it starts from.

  Raises:
    UserError: there is none.
  """
  tokenizer = open_any_tokenizer(given, None if given else start())
  if tokenizer is None:
    raise UserError('no tokenizer: pass `tokenizer`, or an `init` that has one')
  return tokenizer


def _model_config(model: ModelConfig | None, start: Callable[[], Pretrained | None], tokenizer: Tokenizer) -> ModelConfig:
  """Return the model to train. If `model` sets only how to compute, and the vocabulary, its shape is that of the checkpoint."""
  if model is None or (pretrained.has_no_shape(model) and start() is not None):
    opened, model = start(), model or ModelConfig()
    model = opened.compute_like(model) if opened else model
  return model if model.vocab_size is not None else dataclasses.replace(model, vocab_size=tokenizer.vocab_size)


def _start_params(
  start: Callable[[], Pretrained | None],
  base: AdapterStart,
  config: ModelConfig,
  tokenizer: Tokenizer,
  mesh: Mesh,
  name: str,
  log: Callable[[str], None],
) -> dict[str, Any]:
  """Return the trained parameters to start from, on the mesh."""
  opened = start()
  assert opened is not None
  log(f'{name}: starts from the parameters in {opened.path}')
  return base.trained if base.frozen else pretrained.start_params(opened, config, RewardModel.head, mesh, tokenizer)


def _segments(examples: Any, template: Template, data: DataConfig, loss: LossConfig, split: str = 'train') -> pipeline.TripletSegments:
  """Return examples in any of the accepted forms as triplet segments, which are tokenized when they are read."""
  if not isinstance(examples, pipeline.TripletSegments):
    examples = pipeline.open_segments(as_triplets(examples, split, data.on_bad_example), template, loss.columns)
  columns.check(examples.source, loss.columns)
  return examples


def _survey(
  name: str,
  train: pipeline.TripletSegments,
  validation: pipeline.TripletSegments | None,
  args: TrainConfig,
  order: tuple[pipeline.BatchPlan, int, int],
  data: DataConfig,
  log: Callable[[str], None],
) -> dict[str, Any]:
  """Log and return what the model does not see of the examples that a run reads. (A sweep surveys what its runs share, once.)

  Args:
    name: of the run.
    train: the training examples.
    validation: held-out ones.
    args: of the run.
    order: (batch of a step, steps, seed of the shuffle), which decide what is read.
    data: how examples are read.
    log: receives lines.
  """
  plan, steps, seed = order
  read: dict[str, tuple[pipeline.TripletSegments, Sequence[int]]]
  read = {'training': (train, pipeline.examples_of_run(plan, len(train), steps=steps, seed=seed))}
  if validation is not None:
    read['validation'] = (validation, range(min(len(validation), args.evaluate_examples)))
  return survey.log_surveys(name, read, data.read_threads, log)


def _survey_prompts(name: str, prompts: tuple[Any, Any], template: Template | None, log: Callable[[str], None]) -> dict[str, Any]:
  """Log and return what the reward model does not see of prompts and references, and which prompts the policy does not read.

  Args:
    name: of the run and the split.
    prompts: those of the data set, and the `PolicyPrompts` made of them.
    template: of the reward model, if it is one.
    log: receives lines.
  """
  given, read = prompts
  found = survey.survey_prompts(given, template, read.dropped)
  for line in found.lines():
    log(f'{name} prompts: {line}')
  return found.asdict()


def _reward_parts(reward: Any) -> list[tuple[float, Any]]:
  """Return a reward in any of the accepted forms as a list of (weight, RewardModel or function)."""
  parts = [(1.0, reward)] if isinstance(reward, RewardModel) or callable(reward) else list(reward)
  for part in parts:
    weighted = isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], (int, float))
    if not weighted or not (isinstance(part[1], RewardModel) or callable(part[1])):
      raise UserError(f'reward must be a RewardModel, a function, or a list of (weight, RewardModel or function), not {part!r}')
  if not parts:
    raise UserError('reward is an empty list; pass at least one (weight, reward)')
  return parts


def _needs_reference(reward: Any) -> bool:
  """Return whether a reward reads the references of the prompts."""
  from polar_jax.ppo.rewards.sources import RewardSum

  return isinstance(reward, RewardSum) or any(isinstance(part, RewardModel) for _, part in _reward_parts(reward))


def _reads_columns(reward: Any, args: RftConfig) -> bool:
  """Return whether a reward is a function, which receives every field of the prompts."""
  from polar_jax.ppo.rewards.sources import RewardSum

  if isinstance(reward, RewardSum):
    return args.reward.source == 'python'
  return not all(isinstance(part, RewardModel) for _, part in _reward_parts(reward))


def _data_settings(train: pipeline.TripletSegments, validation: pipeline.TripletSegments | None) -> dict[str, str]:
  """Return the settings that identify ranked examples."""
  digest = lambda segments: identity.triplets_digest(segments.source, segments.columns)
  digests = {'rows': digest(train)}
  return digests if validation is None else digests | {'validation_rows': digest(validation)}


def _prompts_settings(prompts: Sequence[Prompt], held_out: Sequence[Prompt] | None, chat: Any, *, with_metadata: bool) -> dict[str, str]:
  """Return the settings that identify prompts and the chat template that makes token ids of them."""
  digest = functools.partial(identity.prompts_digest, with_metadata=with_metadata)
  digests = {'rows': digest(prompts), 'chat': identity.chat_digest(chat)}
  return digests | {'validation_rows': digest(held_out)} if held_out else digests


def _reward_sum(reward: Any, args: RftConfig, prompts: Sequence[Prompt]) -> Any:
  """Return a reward in any of the accepted forms as a `RewardSum`."""
  from polar_jax.ppo.rewards.python import PythonReward
  from polar_jax.ppo.rewards.sources import ModelReward, RewardSum

  if isinstance(reward, RewardSum):
    return reward
  sources: dict[str, tuple[float, Any]] = {}
  for weight, part in _reward_parts(reward):
    source = ModelReward(part.policy_scorer(args, prompts), args.reward) if isinstance(part, RewardModel) else PythonReward(part)
    name = base = 'model' if isinstance(part, RewardModel) else f'reward_{getattr(part, "__name__", type(part).__name__)}'
    for number in range(2, len(sources) + 3):
      if name not in sources:
        break
      name = f'{base}_{number}'
    sources[name] = (float(weight), source)
  return RewardSum(sources, args.reward.strip_thinking)


def _reward_settings(reward: Any) -> dict[str, Any]:
  """Return the settings that identify a reward given in Python, so that a run is not resumed with another one."""
  from polar_jax.ppo.rewards.sources import RewardSum

  if isinstance(reward, RewardSum):  # built from a config, whose settings are in the fingerprint already
    return {}
  describe = lambda part: repr(part) if isinstance(part, RewardModel) else getattr(part, '__qualname__', type(part).__name__)
  return {'reward': [f'{weight:g} * {describe(part)}' for weight, part in _reward_parts(reward)]}
