"""Sweeps: a grid of pre-training runs, each of them resumable, into results.csv.

Every run is a job with a name and a folder in the workdir. A size that starts from a language model has one more job, which trains
that model and comes before the size's runs. A job that is done has a `result.json`; whoever runs it again is told so and does
nothing. Jobs know of each other only by these files, so they may run anywhere that sees the workdir.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax import api
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import run_folder
from polar_jax.checkpoints import settings as settings_lib
from polar_jax.config import Config, ConfigError, ModelConfig
from polar_jax.data import pipeline, token_store
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model import flops
from polar_jax.stages.context import Context
from polar_jax.stages.pretrain_lm import train_language_model
from polar_jax.types import Triplet

FOLDER, RESULTS, RESULT, SETTINGS, TOKENS = 'sweep', 'results.csv', 'result.json', 'sweep/settings.json', 'sweep/tokens'
_SAMPLED = 2_048  # triplets whose mean length turns tokens into steps


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of the grid."""

  size: str  # d_model x num_layers
  tokens: int
  learning_rate: float  # at the width of `model`
  batch: int
  seed: int = 0  # added to that of the sweep

  @property
  def name(self) -> str:
    """Unique in a sweep, and the name of its folder."""
    return f'{self.size}_tokens{self.tokens}_lr{self.learning_rate:g}_batch{self.batch}{_suffix(self.seed)}'


@dataclasses.dataclass(frozen=True)
class Job:
  """A run of the grid, or the language model that runs of a size and a seed start from (`cell` None)."""

  size: str
  cell: Cell | None
  lm_seed: int = 0  # of a language model; a run has that of its cell

  @property
  def seed(self) -> int:
    return self.cell.seed if self.cell else self.lm_seed

  @property
  def name(self) -> str:
    return self.cell.name if self.cell else f'{self.size}_lm{_suffix(self.seed)}'

  @property
  def run(self) -> str:
    """The run's name in the workdir."""
    return f'{FOLDER}/{self.name}'

  def folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return workdir / self.run


def _suffix(seed: int) -> str:
  return f'_seed{seed}' if seed else ''


def grid(config: Config) -> list[Cell]:
  """All cells: smaller sizes and fewer tokens first."""
  s = config.sweep
  sizes = sorted(s.sizes, key=lambda size: flops.reward_model_parameters(model_of(config, size)).without_embedding)
  return [
    Cell(size, _tokens(config, size, tokens), rate, batch, seed)
    for size, tokens, rate, batch, seed in itertools.product(sizes, sorted(s.tokens), s.learning_rates, s.batches, s.seeds)
  ]


def _tokens(config: Config, size: str, tokens: int) -> int:
  """The tokens of a size, to three digits."""
  if not config.sweep.tokens_exponent:
    return tokens
  vocabulary = config.model.vocab_size or config.synthesize.vocab_size  # of a tokenizer that is not there yet
  count = lambda model: flops.reward_model_parameters(dataclasses.replace(model, vocab_size=vocabulary)).total
  scaled = tokens * (count(model_of(config, size)) / count(config.model)) ** config.sweep.tokens_exponent
  return int(float(f'{scaled:.3g}'))


def language_models(context: Context, cells: Sequence[Cell]) -> list[Job]:
  """The jobs that must be done before `cells`."""
  if context.config.pretrain.start_from != 'pretrain_lm':
    return []
  own = [Job(size, None, seed) for size, seed in dict.fromkeys((cell.size, cell.seed) for cell in cells)]
  return [job for job in own if _start(context, job) == context.home(job.run)]


def _start(context: Context, job: Job) -> pathlib.Path:
  """The language model that a run starts from: that of this workdir where it is the same, else the sweep's own."""
  config, there = context.config, context.home('pretrain_lm')
  same = model_of(config, job.size) == config.model and not job.seed and checkpoint.exists(there)
  return there if same else context.home(Job(job.size, None, job.seed).run)


def job_named(config: Config, name: str) -> Job:
  """
  Raises:
    ConfigError: the sweep has no such job.
  """
  cells = grid(config)
  for job in [*(Job(cell.size, None, cell.seed) for cell in cells), *(Job(cell.size, cell) for cell in cells)]:
    if job.name == name:
      return job
  raise ConfigError(f'the sweep has no run {name!r}')


def model_of(config: Config, size: str) -> ModelConfig:
  """The model of a size such as '64x3': `config.model` with other width and depth, and the rest in proportion.

  The width of a head is that of `config.model`, or the largest even one below it that divides the size's width; the initial scale
  goes with 1 / sqrt(width).

  Raises:
    ConfigError: what is no size, or of odd width.
  """
  base = config.model
  try:
    width, depth = (int(part) for part in size.split('x'))
  except ValueError:
    raise ConfigError(f'sweep.sizes: {size!r} is not d_model x num_layers, such as 64x3') from None
  heads_of_even_width = [head for head in range(2, min(base.head_dim, width) + 1, 2) if width % head == 0]
  if depth < 1 or not heads_of_even_width:
    raise ConfigError(f'sweep.sizes: {size!r}: the width must be even, and there must be a layer')
  head = max(heads_of_even_width)
  heads = width // head
  shared = base.num_heads // base.num_kv_heads
  return dataclasses.replace(
    base,
    d_model=width,
    num_layers=depth,
    d_ff=max(round(base.d_ff * width / base.d_model), 1),
    num_heads=heads,
    num_kv_heads=heads // shared if heads % shared == 0 else heads,
    head_dim=head,
    init_std=base.init_std * math.sqrt(base.d_model / width),
    scan_unroll=base.scan_unroll if depth == base.num_layers or base.scan_unroll < base.num_layers else depth,
  )


def config_of(config: Config, job: Job) -> Config:
  """The settings of a job's run but for the steps of a cell, which depend on the data."""
  model = model_of(config, job.size)
  factor = (config.model.d_model / model.d_model) ** config.sweep.width_exponent
  lm = dataclasses.replace(config.pretrain_lm, learning_rate=config.pretrain_lm.learning_rate * factor)
  train = config.pretrain
  if job.cell:
    train = dataclasses.replace(train, learning_rate=job.cell.learning_rate * factor, batch_size=job.cell.batch)
  stage = 'pretrain' if job.cell else 'pretrain_lm'
  return dataclasses.replace(config, stage=stage, seed=config.seed + job.seed, model=model, pretrain_lm=lm, pretrain=train)


def run_job(context: Context, job: Job) -> dict[str, Any]:
  """Runs a job to its end, resuming it where it stopped, and returns its result; one that is done is not run again.

  Only one process at a time works on a job: another that comes meanwhile waits, and finds it done.

  Args:
    context: of the sweep.

  Raises:
    UserError: as training does.
  """
  folder = job.folder(context.workdir)
  folder.mkdir(parents=True, exist_ok=True)
  with _alone(folder):
    done = read_result(folder)
    if done is not None:
      return done
    made = dataclasses.replace(context, config=config_of(context.config, job))
    if job.cell:
      start = _start(context, job) if context.config.pretrain.start_from == 'pretrain_lm' else None
      result = _train_cell(made, job.cell, start)
    else:
      result = train_language_model(made, job.run)
    temporary = folder / (RESULT + '.tmp')
    temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + '\n')
    os.replace(temporary, folder / RESULT)
    return result


def _train_cell(context: Context, cell: Cell, start: pathlib.Path | None) -> dict[str, Any]:
  config, rows = context.config, len(context.triplets('train'))
  steps = _steps(cell, tokens_per_triplet(context))
  if steps * cell.batch > rows:
    context.log(f'{cell.name}: {steps * cell.batch:,} triplets of {rows:,}: some are seen again, and a law of fresh ones does not hold')
  train = dataclasses.replace(config.pretrain, steps=steps)
  tokenizer = context.tokenizer(train.start_from)
  template = context.template(tokenizer)
  result = api.train_reward_model(
    _stored(context, context.triplets('train'), template),
    context.triplets('validation'),
    init=start or context.init(train),
    args=train,
    tokenizer=tokenizer,
    model=context.model_config(tokenizer),
    template=context.template_config(),
    **context.run_settings(f'{FOLDER}/{cell.name}'),
  )
  summary = result.summary
  count = flops.reward_model_parameters(context.model_config(tokenizer))
  return {
    # What the fits read ...
    'run': cell.name,
    'parameters': count.total,
    'tokens': cell.tokens,
    'flops': summary['flops'],
    'loss': summary['validation_loss'],
    'learning_rate': train.learning_rate,
    'batch': cell.batch,
    'seed': config.seed,
    # ... and what a person may ask.
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


def _steps(cell: Cell, triplet_tokens: float) -> int:
  return max(round(cell.tokens / (cell.batch * triplet_tokens)), 1)


def store_tokens(context: Context, cells: Sequence[Cell]) -> None:
  """Tokenises what several runs will read once for all of them, into the workdir."""
  if len(cells) < 2:
    return
  rows, template = context.triplets('train'), context.template(_tokenizer(context))
  length = tokens_per_triplet(context)
  most = min(max(_steps(cell, length) * cell.batch for cell in cells), len(rows))
  orders = [pipeline.global_order(len(rows), context.config.seed + seed) for seed in dict.fromkeys(cell.seed for cell in cells)]
  indices = np.fromiter(dict.fromkeys(order(position)[0] for order in orders for position in range(most)), np.int64)
  folder, key = context.workdir / TOKENS, _tokens_key(context, rows)
  if token_store.is_stored(folder, key, indices):
    return
  context.log(f'sweep: tokenises the {len(indices):,} triplets that the runs read')
  token_store.store(pipeline.TripletSegments(rows, template), indices, folder, key, context.config.data.read_threads or 1)


def _stored(context: Context, rows: Sequence[Triplet], template: Template) -> pipeline.TripletSegments:
  return token_store.open_store(rows, template, context.workdir / TOKENS, _tokens_key(context, rows))


def _tokens_key(context: Context, rows: Sequence[Triplet]) -> str:
  template = dataclasses.asdict(context.config.template)
  return json.dumps([run_folder.examples_digest(rows), run_folder.tokenizer_digest(_tokenizer(context)), template])


def tokens_per_triplet(context: Context) -> float:
  """Mean tokens of a triplet laid out as one row, over the first of the training rows."""
  tokens = pipeline.TripletSegments(context.triplets('train'), context.template(_tokenizer(context)))
  return float(np.mean([len(triplet.tokens) for triplet in tokens.take(range(min(len(tokens), _SAMPLED)))]))


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  with (folder / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # given up by the system when the process ends, however it ends
    yield


def read_result(folder: pathlib.Path) -> dict[str, Any] | None:
  """The result of a job, None where it is not done."""
  path = folder / RESULT
  return json.loads(path.read_text()) if path.exists() else None


def read_table(path: pathlib.Path) -> dict[str, dict[str, str]]:
  """Rows of a results.csv by the name of their run; none where there is no file.

  Raises:
    ConfigError: the file is no table of a sweep.
  """
  if not path.exists():
    return {}
  with path.open(newline='', encoding='utf-8') as file:
    rows = list(csv.DictReader(file))
  if any(row.get('run') in (None, '') or None in row.values() for row in rows):
    raise ConfigError(f'{path}: not the table of a sweep (a column `run`, and every row whole): move it away')
  return {row['run']: row for row in rows}


def write_table(path: pathlib.Path, rows: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> None:
  """Rows in the order of the grid, after those of other sweeps that are there already."""
  out = io.StringIO()
  others = [name for name in rows if name not in set(order)]
  columns = list(dict.fromkeys(name for row in rows.values() for name in row))
  writer = csv.DictWriter(out, columns, restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows[name] for name in [*others, *order] if name in rows)
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(out.getvalue(), encoding='utf-8')
  os.replace(temporary, path)


def check_settings(context: Context) -> None:
  """Keeps what all runs of a sweep share, so that rows made with other settings do not end in one table.

  Raises:
    ConfigError: naming the settings that changed.
  """
  config = context.config
  every = dataclasses.asdict(config)
  shared = {name: every[name] for name in ('seed', 'tokenizer', 'template', 'model', 'pretrain_lm', 'pretrain')}
  for section, name in itertools.product(('pretrain_lm', 'pretrain'), ('log_every', 'evaluate_every', 'gradient_accumulation_steps')):
    del shared[section][name]
  for name in ('learning_rate', 'batch_size', 'steps'):  # the grid's, not the section's
    del shared['pretrain'][name]
  shared['sweep.width_exponent'] = config.sweep.width_exponent
  shared['rows'] = {split: run_folder.examples_digest(context.triplets(split)) for split in ('train', 'validation')}
  now = json.loads(json.dumps(_flat(shared)))
  path = context.workdir / SETTINGS
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=2) + '\n')
    return
  changed = settings_lib.differences(json.loads(path.read_text()), now)
  if changed:
    raise ConfigError(f'the sweep in this workdir was begun with other settings ({"; ".join(changed[:4])}): use another --workdir')


def _flat(section: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  out = dict[str, Any]()
  for name, value in section.items():
    out |= _flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {f'{prefix}{name}': value}
  return out
