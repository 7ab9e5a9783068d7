"""The training stages: what each reads, where it starts from, and where it writes."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import tokenizer_files
from polar_jax.checkpoints.pretrained import ASSETS, open_pretrained
from polar_jax.config import Config, ConfigError, ModelConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.data.examples import open_source
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer, load_tokenizer
from polar_jax.miniature import world as engine
from polar_jax.runtime import paths
from polar_jax.train import trainer
from polar_jax.train.objectives import NEXT_TOKEN, RANKING
from polar_jax.train.validation import PairValidation, text_validation
from polar_jax.types import Triplet

# Folder names of the runs inside a workdir.
LM, PRETRAIN, FINETUNE = 'pretrain_lm', 'pretrain', 'finetune'
FINETUNE_ONLY, FINETUNE_NO_REFERENCE = 'finetune_only', 'finetune_no_reference'


@dataclasses.dataclass(frozen=True)
class Context:
  """What every stage is given."""

  config: Config
  workdir: pathlib.Path
  mesh: Mesh
  log: Callable[[str], None]

  @property
  def data(self) -> pathlib.Path:
    """Where the synthesize stage writes."""
    return self.workdir / 'data'

  def home(self, run: str) -> pathlib.Path:
    """Where a run of this workdir has its checkpoints and its tokenizer: its folder, or that of `checkpointing.folder`."""
    elsewhere = self.config.checkpointing.folder
    return (paths.path_of(elsewhere) if elsewhere else self.workdir) / run

  def tokenizer(self) -> Tokenizer:
    """
    Raises:
      UserError: there is no such tokenizer.
    """
    if self.config.tokenizer.kind == 'checkpoint':
      return open_pretrained(self._checkpoint()).tokenizer()
    return load_tokenizer(self.config.tokenizer, self.data / 'tokenizer.json')

  def _checkpoint(self) -> pathlib.Path:
    """What tokenizer.kind 'checkpoint' means: the checkpoint that is given, or that the stage starts from."""
    c = self.config
    section = {'pretrain_lm': c.pretrain_lm, 'pretrain': c.pretrain, 'finetune': c.finetune}.get(c.stage)
    start = c.checkpoint or (section.start_from if section else None)
    if start in (None, 'scratch', 'pretrain_lm', 'pretrain'):
      raise ConfigError(
        "tokenizer.kind is 'checkpoint', but no checkpoint is named: set checkpoint, or the stage's start_from, to its folder"
      )
    return paths.path_of(start)

  def template(self, use_reference: bool = True) -> Template:
    settings = self.config.template
    return Template(dataclasses.replace(settings, use_reference=settings.use_reference and use_reference), self.tokenizer())

  def model_config(self) -> ModelConfig:
    """The model's shape with the tokenizer's vocabulary.

    Raises:
      ConfigError: when the model's vocabulary is too small for the tokenizer.
    """
    model, size = self.config.model, self.tokenizer().vocab_size
    if model.vocab_size is not None and model.vocab_size < size:
      raise ConfigError(f'model.vocab_size ({model.vocab_size}) is smaller than the tokenizer ({size})')
    return model if model.vocab_size is not None else dataclasses.replace(model, vocab_size=size)

  def triplets(self, split: str) -> Sequence[Triplet]:
    """Pre-training rows of a split: of `data.triplets`, or what the synthesize stage wrote."""
    return self._rows('data.triplets', self.config.data.triplets, 'triplets', split)

  def preferences(self, split: str) -> Sequence[Triplet]:
    """Fine-tuning rows of a split: of `data.preferences`, or what the synthesize stage wrote."""
    return self._rows('data.preferences', self.config.data.preferences, 'preferences', split)

  def _rows(self, setting: str, given: str | None, made: str, split: str) -> Sequence[Triplet]:
    path = paths.path_of(given) if given else self.data / made
    if split != 'train' and self.config.data.validation:
      setting, path = 'data.validation', paths.path_of(self.config.data.validation)
    elif split != 'train' and path.is_file():
      raise ConfigError(f'data.validation must name held-out rows: {path} is a single file, and its rows are trained on')
    if not path.exists():
      raise ConfigError(f'{setting}: no rows at {path}; name a data set there, or run the synthesize stage in this workdir first')
    return report_skipped(open_source(path, split, self.config.data.on_bad_example), path, self.log)


def report_skipped(rows: Sequence[Any], path: pathlib.Path, log: Callable[[str], None]) -> Sequence[Any]:
  """`rows` of a file, after saying which of them were left out as bad."""
  skipped = getattr(rows, 'skipped', [])
  if skipped:
    named = '; '.join(f'row {row}: {reason}' for row, reason in skipped[:20])
    log(f'{path}: skipped {len(skipped)} bad rows of {len(rows) + len(skipped)} ({named}{"; ..." if len(skipped) > 20 else ""})')
  return rows


def pretrain_lm(context: Context, name: str = LM) -> dict[str, Any]:
  """Next-token pre-training of the language model that the reward model starts from, in the folder `name` of the workdir."""
  config = context.config
  train_ids, validation_ids = text_tokens(context)
  length = config.pretrain_lm.sequence_length
  windows = pipeline.TextWindows(train_ids, length, config.seed)
  run = text_run(context, name, config.pretrain_lm, windows, pipeline.TextWindows(validation_ids, length, config.seed), config.seed)
  keep_tokenizer(context.tokenizer(), run.home)
  return trainer.train(run).summary


def text_run(
  context: Context, name: str, lm: TrainConfig, windows: pipeline.TextWindows, held_out: pipeline.TextWindows | None, seed: int
) -> trainer.Run:
  """A run of next-token prediction on `windows`, in the folder `name` of the workdir."""
  config, data = context.config, context.config.data
  plan = trainer.batch_plan(lm, context.mesh)
  steps = trainer.num_steps(lm, len(windows))
  return trainer.Run(
    name=name,
    folder=context.workdir / name,
    home=context.home(name),
    objective=NEXT_TOKEN,
    model=context.model_config(),
    train=lm,
    checkpointing=config.checkpointing,
    profile=config.profile,
    mesh=context.mesh,
    seed=seed,
    num_examples=len(windows),
    plan=plan,
    batches=pipeline.text_batches(windows, plan, steps=steps, seed=seed),
    planned_rows=pipeline.text_rows(plan),
    validation=None if held_out is None else text_validation(held_out, plan, lm.evaluate_examples),
    start_from=_start_folder(context, lm),
    fingerprint=_fingerprint(context, lm, NEXT_TOKEN.name, {'data.text': data.text, 'seed': seed}),
    threads=data.read_threads,
    prefetch=data.prefetch,
    log=context.log,
  )


def pretrain(context: Context) -> dict[str, Any]:
  """Contrastive pre-training on triplets of policies (equation 7)."""
  return rank(context, PRETRAIN, context.config.pretrain, context.triplets)


def finetune(context: Context) -> dict[str, Any]:
  """Fine-tuning on ranked data (equation 8)."""
  return rank(context, FINETUNE, context.config.finetune, context.preferences)


def finetune_only(context: Context) -> dict[str, Any]:
  """The arm without pre-training: the same ranked data on the plain language model."""
  return rank(context, FINETUNE_ONLY, _from_lm(context.config.finetune), context.preferences)


def finetune_no_reference(context: Context) -> dict[str, Any]:
  """The arm without pre-training and without the reference: a classic reward model."""
  return rank(context, FINETUNE_NO_REFERENCE, _from_lm(context.config.finetune), context.preferences, use_reference=False)


def _from_lm(train: TrainConfig) -> TrainConfig:
  return dataclasses.replace(train, start_from='pretrain_lm')


def rank(
  context: Context,
  name: str,
  train: TrainConfig,
  rows: Callable[[str], Sequence[Triplet]],
  *,
  start: pathlib.Path | None = None,
  use_reference: bool = True,
  tokenised: Callable[[Sequence[Triplet], Template], pipeline.PairTokens] = pipeline.PairTokens,
) -> dict[str, Any]:
  """A run on ranked rows, in the folder `name` of the workdir. Returns its summary.

  Args:
    rows: split -> its rows.
    start: the run whose parameters it starts from; None: what `pretrain.start_from` says.
    tokenised: how training rows become tokens.
  """
  config, data = context.config, context.config.data
  started = time.perf_counter()
  template = context.template(use_reference)
  tokens = tokenised(rows('train'), template)
  held_out = pipeline.PairTokens(rows('validation'), template)
  plan = trainer.batch_plan(train, context.mesh)
  steps = trainer.num_steps(train, len(tokens))
  pack = pipeline.plan_packing(tokens, plan, data.row_length, steps=steps, seed=config.seed)
  run = trainer.Run(
    name=name,
    folder=context.workdir / name,
    home=context.home(name),
    objective=RANKING,
    model=context.model_config(),
    train=train,
    checkpointing=config.checkpointing,
    profile=config.profile,
    mesh=context.mesh,
    seed=config.seed,
    num_examples=len(tokens),
    plan=plan,
    batches=pipeline.pair_batches(tokens, plan, pack, steps=steps, seed=config.seed),
    planned_rows=pack.rows,
    validation=PairValidation(held_out, plan, data.row_length, train.evaluate_examples),
    start_from=start or _start_folder(context, train),
    fingerprint=_fingerprint(
      context, train, RANKING.name, {'template.use_reference': template.config.use_reference, 'rows': rows_fingerprint(tokens.source)}
    ),
    threads=data.read_threads,
    prefetch=data.prefetch,
    log=context.log,
    started=started,
  )
  keep_tokenizer(template.tokenizer, run.home)
  return trainer.train(run).summary


def text_tokens(context: Context) -> tuple[np.ndarray, np.ndarray]:
  """(training, validation) token ids of the language model's text.

  Raises:
    ConfigError: when there is no text.
  """
  given = context.config.data.text
  if given is None:
    path = context.data / 'text.npz'
    if not path.exists():
      raise ConfigError(
        f'data.text: no text at {path}; name a .txt file or folder there, or run the synthesize stage in this workdir first'
      )
    streams = engine.load_text(path)
    train, validation = (np.concatenate(list(streams[part].values())) for part in ('train', 'validation'))
    return train, validation
  path = paths.path_of(given)
  files = [file for file in paths.files_below(path) if file.suffix == '.txt'] if path.is_dir() else [path]
  if not files or not all(f.exists() for f in files):
    raise ConfigError(f'data.text: no .txt file at {path}')
  tokenizer = context.tokenizer()
  end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
  ids = np.concatenate([np.asarray(tokenizer.encode(f.read_text(encoding='utf-8')) + end, np.int32) for f in files])
  cut = int(len(ids) * 0.95)
  return ids[:cut], ids[cut:]


def _start_folder(context: Context, train: TrainConfig) -> pathlib.Path | None:
  """Where a run's parameters come from; None is from scratch. A resumed run ignores it."""
  names = {'pretrain_lm': LM, 'pretrain': PRETRAIN}
  if train.start_from == 'scratch':
    return None
  if train.start_from in names:
    return context.home(names[train.start_from])
  return paths.path_of(train.start_from)


def rows_fingerprint(rows: Sequence[Triplet]) -> str:
  """See `texts_fingerprint`."""
  return texts_fingerprint(rows, lambda r: (r.prompt, r.reference, r.chosen, r.rejected))


def texts_fingerprint(rows: Sequence[Any], read: Callable[[Any], tuple]) -> str:
  """The number of rows and a digest of a few of them: enough to notice that a resumed run reads another file."""
  size = len(rows)
  texts = [read(rows[i]) for i in sorted({0, size // 3, size // 2, size - 1})]
  return f'{size}:{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}'


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
  path = getattr(tokenizer, 'path', None)
  return 'byte' if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def keep_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
  """Copies the tokenizer's files beside a run's checkpoints, so that the folder is all that scoring and exporting need.

  A run that has a checkpoint keeps its own: another tokenizer is refused later, when the run is resumed.
  """
  path = getattr(tokenizer, 'path', None)
  if path is None or jax.process_index() != 0 or checkpoint.exists(folder):
    return
  assets = folder / ASSETS
  paths.copy(path, assets / f'tokenizer{path.suffix}')
  for name in set(tokenizer_files.TOKENIZER_FILES) - {'tokenizer.json', 'tokenizer.model'}:
    if (path.parent / name).is_file():
      paths.copy(path.parent / name, assets / name)


def _fingerprint(context: Context, train: TrainConfig, objective: str, more: dict[str, Any]) -> dict[str, Any]:
  """Settings that must not change while a workdir is resumed: they decide what the run computes."""
  free = {'log_every', 'evaluate_every', 'evaluate_examples'}
  same_maths = {'attention', 'remat', 'scan_unroll'}
  model = {f'model.{k}': v for k, v in dataclasses.asdict(context.model_config()).items() if k not in same_maths}
  template = {f'template.{k}': v for k, v in dataclasses.asdict(context.config.template).items()}
  settings = {k: v for k, v in dataclasses.asdict(train).items() if k not in free}
  tokenizer = tokenizer_fingerprint(context.tokenizer())
  return {'objective': objective, 'seed': context.config.seed, 'tokenizer': tokenizer, **model, **template, **settings, **more}
