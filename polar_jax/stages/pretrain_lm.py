"""The pretrain_lm stage: next-token pre-training of the language model that the reward model starts from."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from polar_jax.checkpoints import pretrained, run_folder
from polar_jax.checkpoints.adapted import adapter_start
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import ConfigError, TrainConfig
from polar_jax.data import identity, pipeline, text
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.runtime import paths, text_files
from polar_jax.stages.context import SCRATCH, Context
from polar_jax.train import trainer
from polar_jax.train.objectives import NEXT_TOKEN
from polar_jax.train.validation import text_validation

RUN = 'pretrain_lm'
_VALIDATION_SHARE = 0.05  # of `data.text`, from its end


def pretrain_lm(context: Context) -> dict[str, Any]:
  """Train on `data.text`, or on the corpora of the synthesize stage. Returns the section `pretrain_lm` of the report."""
  return {'pretrain_lm': train_language_model(context, RUN)}


def train_language_model(context: Context, name: str) -> dict[str, Any]:
  """Train the language model that `context.config` describes in the run `name`. Returns its summary."""
  config = context.config
  tokenizer = context.tokenizer(config.pretrain_lm.start_from)
  train_ids, validation_ids = text_tokens(context, tokenizer)
  length = config.pretrain_lm.sequence_length
  windows = pipeline.TextWindows(train_ids, length, config.seed)
  held_out = pipeline.TextWindows(validation_ids, length, config.seed)
  return trainer.train(language_model_run(context, name, config.pretrain_lm, tokenizer, windows, held_out, config.seed)).summary


def language_model_run(
  context: Context,
  name: str,
  train: TrainConfig,
  tokenizer: Tokenizer,
  windows: pipeline.TextWindows,
  held_out: pipeline.TextWindows | None,
  seed: int,
) -> trainer.Run:
  """Return a run of next-token prediction, with the tokenizer kept next to its checkpoints.

  Args:
    context: config, workdir and devices.
    name: of the run and its folder in the workdir.
    train: steps, batch size, learning rate and so on.
    tokenizer: of the text.
    windows: training text.
    held_out: validation text; None for no validation.
    seed: of initialization and order.
  """
  config, data = context.config, context.config.data
  plan, steps = trainer.batch_plan(train, context.mesh), trainer.num_steps(train, len(windows))
  model, home, start = context.model_config(tokenizer, train), context.home(name), context.init(train)

  open_base = lambda: None if start == SCRATCH else open_pretrained(start).first_layers(train.start_layers)
  base = adapter_start(open_base, model, 'lm', context.mesh, train.lora, tokenizer)

  def load_start() -> dict[str, Any]:
    assert isinstance(start, pathlib.PurePath)
    context.log(f'{name}: starts from the parameters in {start}')
    return base.trained if train.lora.rank else pretrained.start_params(start, model, 'lm', context.mesh, tokenizer, train.start_layers)

  settings = _text_settings(context, windows, held_out) | {'seed': seed} | base.settings
  run_folder.keep_tokenizer(tokenizer, home)
  return trainer.Run(
    name=name,
    folder=context.workdir / name,
    home=home,
    objective=NEXT_TOKEN,
    model=model,
    train=train,
    checkpointing=config.checkpointing,
    profile=config.profile,
    mesh=context.mesh,
    seed=seed,
    num_examples=len(windows),
    plan=plan,
    batches=pipeline.text_batches(windows, plan, steps=steps, seed=seed),
    planned_rows=pipeline.text_rows(plan),
    validation=None if held_out is None else text_validation(held_out, plan, train.evaluate_examples),
    load_start=None if start == SCRATCH else load_start,
    fingerprint=run_folder.training_settings(NEXT_TOKEN.name, train, model, config.template, tokenizer, config.seed, settings),
    frozen=base.frozen,
    threads=data.read_threads,
    prefetch=data.prefetch,
    log=context.log,
  )


def _text_settings(context: Context, windows: pipeline.TextWindows, held_out: pipeline.TextWindows | None) -> dict[str, Any]:
  """Return the settings that identify the text, with the name that was all that earlier versions stored."""
  digests = {'text': identity.ids_digest(windows.token_ids)}
  if held_out is not None:
    digests['validation_text'] = identity.ids_digest(held_out.token_ids)
  return {'data.text': context.config.data.text, **digests}


def text_tokens(context: Context, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """Return the (training, validation) token ids of the language model's text.

  Raises:
    ConfigError: there is no text.
    TextError: a file is not UTF-8.
  """
  given = context.config.data.text
  if given is None:
    path = context.data / text.STREAMS
    if not path.exists():
      raise ConfigError(
        f'data.text: no text at {path}; name a .txt file or folder there, or run the synthesize stage in this workdir first'
      )
    streams = text.load_streams(path)
    train, validation = (np.concatenate(list(streams[split].values())) for split in ('train', 'validation'))
    return train, validation
  path = paths.path_of(given)
  files = [file for file in paths.files_below(path) if file.suffix == '.txt'] if path.is_dir() else [path]
  if not files or not all(f.exists() for f in files):
    raise ConfigError(f'data.text: no .txt file at {path}')
  end = [tokenizer.eos_id] if tokenizer.eos_id is not None else []
  ids = np.concatenate([np.asarray(tokenizer.encode(text_files.read_text(f)) + end, np.int32) for f in files])
  cut = int(len(ids) * (1 - _VALIDATION_SHARE))
  return ids[:cut], ids[cut:]
