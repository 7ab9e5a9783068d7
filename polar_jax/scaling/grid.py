"""The grid of a sweep: its cells, its jobs, and the model and settings of each.

Every run is a job with a name and a folder in the workdir. A size that starts from a language model has one more job, which trains
that model and comes before the size's runs. A finished job has a `result.json`. Jobs share nothing but these files, so they can run
anywhere that sees the workdir.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib

from polar_jax.config import Config, ConfigError, ModelConfig
from polar_jax.model import flops

FOLDER = 'sweep'  # of all jobs, in the workdir


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
    """The cell's unique name in the sweep, which is also the name of its folder."""
    return f'{self.size}_tokens{self.tokens}_lr{self.learning_rate:g}_batch{self.batch}{_suffix(self.seed)}'


@dataclasses.dataclass(frozen=True)
class Job:
  """A run of the grid, or (where `cell` is None) the language model that the runs of one size and seed start from."""

  size: str
  cell: Cell | None
  lm_seed: int = 0  # of a language model; a run has that of its cell

  @property
  def seed(self) -> int:
    """The seed that is added to that of the sweep."""
    return self.cell.seed if self.cell else self.lm_seed

  @property
  def name(self) -> str:
    """The job's unique name in the sweep."""
    return self.cell.name if self.cell else f'{self.size}_lm{_suffix(self.seed)}'

  @property
  def run_name(self) -> str:
    """The name of the job's run in the workdir."""
    return f'{FOLDER}/{self.name}'

  def folder(self, workdir: pathlib.Path) -> pathlib.Path:
    """Return the folder of the job's logs and result."""
    return workdir / self.run_name


def _suffix(seed: int) -> str:
  return f'_seed{seed}' if seed else ''


def cells_of(config: Config) -> list[Cell]:
  """Return all cells of the sweep, ordered by size (smallest first), then by number of tokens."""
  s = config.sweep
  sizes = sorted(s.sizes, key=lambda size: _parameters(config, model_of(config, size)).without_embedding)
  return [
    Cell(size, _tokens(config, size, tokens), rate, batch, seed)
    for size, tokens, rate, batch, seed in itertools.product(sizes, sorted(s.tokens), s.learning_rates, s.batches, s.seeds)
  ]


def _tokens(config: Config, size: str, tokens: int) -> int:
  """Return the number of training tokens of a size, rounded to three digits where it is scaled."""
  if not config.sweep.tokens_exponent:
    return tokens
  ratio = _parameters(config, model_of(config, size)).total / _parameters(config, config.model).total
  return int(float(f'{tokens * ratio**config.sweep.tokens_exponent:.3g}'))


def _parameters(config: Config, model: ModelConfig) -> flops.Parameters:
  """Count the parameters of a model, with the vocabulary that the tokenizer will have: it may not exist yet."""
  return flops.reward_model_parameters(dataclasses.replace(model, vocab_size=config.model.vocab_size or config.synthesize.vocab_size))


def job_named(config: Config, name: str) -> Job:
  """Return the job of the sweep with this name.

  Raises:
    ConfigError: the sweep has no such job.
  """
  cells = cells_of(config)
  for job in [*(Job(cell.size, None, cell.seed) for cell in cells), *(Job(cell.size, cell) for cell in cells)]:
    if job.name == name:
      return job
  raise ConfigError(f'the sweep has no run {name!r}')


def model_of(config: Config, size: str) -> ModelConfig:
  """Return the model of a size such as '64x3': `config.model` with that width and depth, and the rest in proportion.

  The head dimension is that of `config.model`, or the largest smaller even number that divides the width. The initial scale is
  proportional to 1 / sqrt(width).

  Raises:
    ConfigError: the text is not a size, or its width is odd.
  """
  base = config.model
  try:
    width, depth = (int(part) for part in size.split('x'))
  except ValueError:
    raise ConfigError(f'sweep.sizes: {size!r} is not of the form d_model x num_layers, such as 64x3') from None
  even_head_dims = [dim for dim in range(2, min(base.head_dim, width) + 1, 2) if width % dim == 0]
  if depth < 1 or not even_head_dims:
    raise ConfigError(f'sweep.sizes: {size!r}: the width must be even and positive, and the depth at least 1')
  head_dim = max(even_head_dims)
  heads = width // head_dim
  group = base.num_heads // base.num_kv_heads
  return dataclasses.replace(
    base,
    d_model=width,
    num_layers=depth,
    d_ff=max(round(base.d_ff * width / base.d_model), 1),
    num_heads=heads,
    num_kv_heads=heads // group if heads % group == 0 else heads,
    head_dim=head_dim,
    init_std=base.init_std * math.sqrt(base.d_model / width),
    scan_unroll=base.scan_unroll if depth == base.num_layers or base.scan_unroll < base.num_layers else depth,
  )


def config_of(config: Config, job: Job) -> Config:
  """Return the settings of a job's run, except the number of steps of a cell, which depends on the data."""
  model = model_of(config, job.size)
  factor = (config.model.d_model / model.d_model) ** config.sweep.width_exponent
  lm = dataclasses.replace(config.pretrain_lm, learning_rate=config.pretrain_lm.learning_rate * factor)
  pretrain = config.pretrain
  if job.cell:
    pretrain = dataclasses.replace(pretrain, learning_rate=job.cell.learning_rate * factor, batch_size=job.cell.batch)
  stage = 'pretrain' if job.cell else 'pretrain_lm'
  return dataclasses.replace(config, stage=stage, seed=config.seed + job.seed, model=model, pretrain_lm=lm, pretrain=pretrain)


def cost(config: Config, job: Job) -> float:
  """Return a number proportional to the training FLOPs of a cell's run: parameters without embedding times tokens."""
  assert job.cell is not None
  return _parameters(config, model_of(config, job.size)).without_embedding * job.cell.tokens
