"""Training the jobs of a sweep: language models, and runs of contrastive pre-training that read tokens stored once for all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from polar_jax import api
from polar_jax.checkpoints import checkpointer, settings
from polar_jax.config import ConfigError
from polar_jax.data import identity, pipeline, survey, token_store
from polar_jax.data.examples import max_candidates
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model import flops
from polar_jax.runtime import json_files
from polar_jax.runtime.paths import write_atomically
from polar_jax.scaling import grid, results
from polar_jax.scaling.grid import Cell, Job
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain_lm import RUN as LANGUAGE_MODEL
from polar_jax.stages.pretrain_lm import train_language_model
from polar_jax.train.session import NonFiniteError
from polar_jax.types import UserError

SETTINGS, TOKENS = 'sweep/settings.json', 'sweep/tokens'
_SAMPLED_TRIPLETS = 2_048  # their mean length converts tokens to steps


def language_models(context: Context, cells: Sequence[Cell]) -> list[Job]:
  """Return the language-model jobs that must be done before `cells`."""
  if context.config.pretrain.start_from != LANGUAGE_MODEL:
    return []
  jobs = [Job(size, None, seed) for size, seed in dict.fromkeys((cell.size, cell.seed) for cell in cells)]
  return [job for job in jobs if _start_folder(context, job) == context.home(job.run_name)]


def _start_folder(context: Context, job: Job) -> pathlib.Path:
  """Return the folder of the language model that a run starts from: the workdir's own if it is the same, else the sweep's."""
  config, own = context.config, context.home(LANGUAGE_MODEL)
  same = grid.model_of(config, job.size) == config.model and not job.seed and checkpointer.exists(own)
  return own if same else context.home(Job(job.size, None, job.seed).run_name)


def run_job(context: Context, job: Job) -> dict[str, Any]:
  """Run a job to its end, resuming it where it stopped. A finished job is not run again.

  Only one process at a time works on a job: a second one waits, and then finds it done.

  Args:
    context: of the sweep.
    job: to run.

  Returns:
    The job's result.

  Raises:
    UserError, NonFiniteError, Preempted: from training.
  """
  folder = job.folder(context.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with _locked(folder):
    done = results.read_result(folder)
    if done is not None:
      return done
    job_context = dataclasses.replace(context, config=grid.config_of(context.config, job))
    if job.cell:
      start = _start_folder(context, job) if context.config.pretrain.start_from == LANGUAGE_MODEL else None
      result = _train_cell(job_context, job, start)
    else:
      result = train_language_model(job_context, job.run_name)
    results.write_result(folder, result)
    return result


def try_job(context: Context, job: Job) -> str | None:
  """Run a job and return the message of an error that the user can act on, or None when the job is done.

  Raises:
    Preempted: from training.
  """
  try:
    run_job(context, job)
    return None
  except (UserError, NonFiniteError) as error:
    return str(error)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Hold the lock of a job's folder."""
  with (folder / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # the system releases it when the process ends, however it ends
    yield


def _train_cell(context: Context, job: Job, start: pathlib.Path | None) -> dict[str, Any]:
  """Train a cell of the grid. Returns its row of results.csv."""
  assert job.cell is not None
  config, cell, available = context.config, job.cell, len(context.triplets('train'))
  steps = _steps(cell, tokens_per_triplet(context))
  if steps * cell.batch > available:
    context.log(
      f'{cell.name}: {steps * cell.batch:,} triplets are drawn from {available:,}, so some are repeated '
      'and a scaling law for fresh data does not apply'
    )
  train = dataclasses.replace(config.pretrain, steps=steps)
  tokenizer = _tokenizer(context)
  model = context.model_config(tokenizer)
  summary = api.train_reward_model(
    _stored_tokens(context),
    context.triplets('validation'),
    init=start or context.init(train),
    args=train,
    tokenizer=tokenizer,
    model=model,
    template=context.template_config(),
    data=config.data,
    **context.run_arguments(job.run_name),
  ).summary
  count = flops.reward_model_parameters(model)
  return {
    # Read by the fits.
    'run': cell.name,
    'parameters': count.total,
    'tokens': cell.tokens,
    'flops': summary['flops'],
    'loss': summary['validation_loss'],
    'learning_rate': train.learning_rate,
    'batch': cell.batch,
    'seed': config.seed,
    # For people.
    'accuracy': summary['validation_accuracy'],
    'steps': steps,
    'tokens_read': summary['tokens'],
    'parameters_without_embedding': count.without_embedding,
    'd_model': config.model.d_model,
    'num_layers': config.model.num_layers,
    'seconds': summary['seconds'],
  }


def _tokenizer(context: Context) -> Tokenizer:
  return context.tokenizer(context.config.pretrain.start_from)


def _segments(context: Context, split: str = 'train') -> pipeline.TripletSegments:
  if max_candidates(context.triplets(split)) > 2:
    raise ConfigError('a sweep pre-trains on triplets, but data.triplets has ranked lists; name a data set of triplets')
  return pipeline.TripletSegments(context.triplets(split), context.template(_tokenizer(context)))


def surveys(context: Context) -> dict[str, dict[str, Any]]:
  """Log and return, by split, what of the triplets of all runs cannot be learned from, or is cut off."""
  splits = {'training': _segments(context), 'validation': _segments(context, 'validation')}
  read = {split: (segments, range(len(segments))) for split, segments in splits.items()}
  return survey.log_surveys('sweep', read, context.config.data.read_threads, context.log)


def _steps(cell: Cell, triplet_tokens: float) -> int:
  return max(round(cell.tokens / (cell.batch * triplet_tokens)), 1)


def tokens_per_triplet(context: Context) -> float:
  """Return the mean number of tokens of a triplet with a shared prefix, over the first training triplets."""
  segments = _segments(context)
  return float(np.mean([len(segment.tokens) for segment in segments.take(range(min(len(segments), _SAMPLED_TRIPLETS)))]))


def store_tokens(context: Context, cells: Sequence[Cell]) -> None:
  """Tokenize the triplets that several runs read once for all of them, into the workdir."""
  if len(cells) < 2:
    return
  triplets, length = context.triplets('train'), tokens_per_triplet(context)
  needed = min(max(_steps(cell, length) * cell.batch for cell in cells), len(triplets))
  orders = [pipeline.global_order(len(triplets), context.config.seed + seed) for seed in dict.fromkeys(cell.seed for cell in cells)]
  indices = np.fromiter(dict.fromkeys(order(position)[0] for order in orders for position in range(needed)), np.int64)
  folder, key = context.workdir / TOKENS, _tokens_key(context)
  if token_store.is_stored(folder, key, indices):
    return
  context.log(f'sweep: tokenizing the {len(indices):,} triplets that the runs read')
  token_store.store(_segments(context), indices, folder, key, context.config.data.read_threads or 1)


def _stored_tokens(context: Context) -> pipeline.TripletSegments:
  """Return the training triplets with the tokens of `store_tokens`, if it has stored them."""
  template = context.template(_tokenizer(context))
  columns = context.config.pretrain.loss.columns
  return token_store.open_store(context.triplets('train'), template, context.workdir / TOKENS, _tokens_key(context), columns)


def _tokens_key(context: Context) -> str:
  template = dataclasses.asdict(context.config.template)
  digests = identity.triplets_digest(context.triplets('train')), identity.tokenizer_digest(_tokenizer(context))
  return json.dumps([*digests, template])


def check_settings(context: Context) -> None:
  """Record the settings that all runs of a sweep share, so that runs with other settings do not end up in the same table.

  Raises:
    ConfigError: the workdir holds a sweep with other settings, naming those that changed.
  """
  config = context.config
  sections = dataclasses.asdict(config)
  shared = {name: sections[name] for name in ('seed', 'tokenizer', 'template', 'model', 'pretrain_lm', 'pretrain')}
  for section, name in itertools.product(('pretrain_lm', 'pretrain'), ('log_every', 'evaluate_every', 'gradient_accumulation_steps')):
    del shared[section][name]
  for name in ('learning_rate', 'batch_size', 'steps'):  # those of the grid apply, not those of the section
    del shared['pretrain'][name]
  shared['sweep.width_exponent'] = config.sweep.width_exponent
  shared['rows'] = {split: identity.triplets_digest(context.triplets(split)) for split in ('train', 'validation')}
  now = flatten_dict(shared, sep='.')
  path = context.workdir / SETTINGS
  if not path.exists():
    write_atomically(path, json_files.dumps(now, indent=2) + '\n')
    return
  changed = settings.differences(json_files.read(path, 'delete it if the settings are still the same'), now)
  if changed:
    raise ConfigError(f'the sweep in this workdir was started with other settings ({"; ".join(changed[:4])}); use another --workdir')
