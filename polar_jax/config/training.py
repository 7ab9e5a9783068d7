"""Options of training runs: optimizer, schedule, checkpoints, devices and processes."""

from __future__ import annotations

import dataclasses
from typing import Any

from polar_jax.config.base import ConfigError, info, option, section
from polar_jax.config.model import DTYPES

# Weights of a layer that can have an adapter: those of attention (query, key, value, output) and of the feed-forward layer.
PROJECTIONS = ('wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down')
QUANTIZED = ('int8', 'nf4')


def _check_choices(options: Any, name: str) -> None:
  """Check options that have a list of allowed values, which a program may have set without `parse`."""
  for f in dataclasses.fields(options):
    choices = info(f.metadata).choices
    if choices and getattr(options, f.name) not in choices:
      raise ConfigError(f'{name}.{f.name} is {getattr(options, f.name)!r}; it must be one of: {", ".join(choices)}')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """An optimizer, AdamW by default, with a linear warm-up and a cosine decay."""

  optimizer: str = option(
    'adamw',
    'adafactor: a second moment per row and column of a matrix, and no first one; muon: orthogonal updates of the matrices of layers, '
    'AdamW for the rest.',
    choices=('adamw', 'adafactor', 'muon'),
  )
  moments: str = option(
    'float32', 'Type of the stored moments of adamw; int8: 8 bits, with a scale per block.', choices=('float32', 'bfloat16', 'int8')
  )
  offload: bool = option(False, 'Keep the moments in host memory; they are on the device only while they are updated.')
  learning_rate: float = option(1e-3, 'Peak learning rate.', exclusive_min=0)
  warmup_ratio: float = option(0.03, 'Share of all updates over which the rate grows linearly from 0.', min=0, max=1)
  final_lr_ratio: float = option(
    0.1, 'Rate at the end of the cosine, as a share of `learning_rate`; 1 keeps it constant after the warm-up.', min=0, max=1
  )
  b1: float = option(0.9, 'Decay of the first moment, which is the momentum of muon; adafactor has none.', min=0, max=1)
  b2: float = option(0.95, 'Decay of the second moment; that of adafactor is 1 - (update number)^-0.8.', min=0, max=1)
  eps: float = option(1e-8, 'Epsilon of Adam.', exclusive_min=0)
  weight_decay: float = option(0.0, 'Decoupled weight decay; norms and the reward head have none.', min=0)
  clip_norm: float | None = option(1.0, 'Largest global norm of the gradient. None: no clipping.', exclusive_min=0)

  def check_optimizer(self, name: str = 'args') -> None:
    """Check the rules that involve several options.

    Args:
      name: of the section, for messages.

    Raises:
      ConfigError: a choice is unknown, or two options contradict each other.
    """
    _check_choices(self, name)
    if self.moments != 'float32' and self.optimizer != 'adamw':
      raise ConfigError(f"{name}.moments is {self.moments!r}, which only {name}.optimizer='adamw' has; set it to 'float32'")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The loss of a reward model on ranked candidates (docs/losses.md). The defaults are those of the paper."""

  name: str = option(
    'bradley_terry',
    'bradley_terry or focal: a loss of pairs, and the mean over all pairs of a list; plackett_luce: the likelihood of the whole ranking.',
    choices=('bradley_terry', 'focal', 'plackett_luce'),
  )
  label_smoothing: float = option(0.0, 'Assumed share of pairs whose label is wrong; for bradley_terry.', min=0, max=0.5)
  margin: bool = option(False, 'Subtract the column `margin` of an example from the difference of its rewards.')
  weights: bool = option(False, 'Weight each example by its column `weight` in the mean of the loss and of the metrics.')
  center_rewards_coefficient: float = option(0.0, 'Coefficient of the squared sum of the two rewards of a pair.', min=0)
  penalty: str = option('none', 'Penalty on each reward, in addition to the loss.', choices=('none', 'log_barrier', 'l2'))
  penalty_weight: float = option(0.01, 'Weight of `penalty`.', min=0)
  penalty_bound: float = option(5.0, 'Largest absolute reward inside the log barrier, beyond which the penalty is constant.', min=0.01)
  mean: str = option(
    'example',
    'Average over all examples of a step, or as the official trainer does, with the mean of 1 / (examples of a row) over rows.',
    choices=('example', 'official'),
  )

  @property
  def columns(self) -> tuple[str, ...]:
    """The columns of numbers that the loss reads of each example."""
    return ('margin',) * self.margin + ('weight',) * self.weights

  def check(self, name: str = 'loss') -> None:
    """Check the rules that involve several options.

    Args:
      name: of the section, for messages.

    Raises:
      ConfigError: a choice is unknown, or two options contradict each other.
    """
    _check_choices(self, name)
    if self.label_smoothing and self.name != 'bradley_terry':
      raise ConfigError(
        f"{name}.label_smoothing is set, but {name}.name is {self.name!r}; set it to 'bradley_terry', or the smoothing to 0"
      )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters (LoRA): the weights stay as they are, and a product of two narrow matrices is trained next to each of `targets`."""

  rank: int | None = option(None, 'Width of the adapters. None: no adapters, all parameters are trained.', min=1)
  alpha: float = option(16.0, 'The product of the matrices is scaled by alpha / rank.', exclusive_min=0)
  rank_stabilized: bool = option(False, 'Scale by alpha / sqrt(rank) instead (rsLoRA), for high ranks.')
  dropout: float = option(0.0, "Share of an adapter's inputs that are dropped in training (rft: must be 0).", min=0, max=0.9)
  targets: tuple[str, ...] = option(
    PROJECTIONS, 'Weights that get an adapter, of attention (wq, wk, wv, wo) and of the feed-forward layer.', choices=PROJECTIONS
  )
  base_dtype: str = option(
    'float32',
    'Type of the frozen parameters; int8, nf4: weights of the layers have 8 or 4 bits and a scale for each 64, others are bfloat16.',
    choices=(*DTYPES, *QUANTIZED),
  )


def check_adapters(name: str, c: LoraConfig) -> None:
  """Check a section of adapters, which may have been made in Python.

  Args:
    name: of the section, for messages.
    c: the section.

  Raises:
    ConfigError: it cannot be used.
  """
  if c.rank is None and c.base_dtype != LoraConfig().base_dtype:
    raise ConfigError(
      f'{name}.base_dtype is {c.base_dtype!r}, but {name}.rank is None: without adapters all parameters are trained, in float32; '
      f'set {name}.rank'
    )
  if c.rank is not None and c.rank < 1:
    raise ConfigError(f'{name}.rank is {c.rank}; it must be >= 1, or None')
  unknown = [target for target in c.targets if target not in PROJECTIONS]
  if unknown or not c.targets:
    raise ConfigError(f'{name}.targets is {c.targets!r}; the weights of a layer that can have an adapter are: {", ".join(PROJECTIONS)}')


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
  """A training run. The stages pretrain_lm, pretrain and finetune have a section each."""

  steps: int | None = option(None, 'Optimizer steps. None: one epoch.', min=1)
  batch_size: int = option(64, 'Global batch size, in triplets (pretrain_lm: in text windows).', min=1)
  gradient_accumulation_steps: int = option(1, 'Micro-batches per step; the result does not depend on it.', min=1)
  sequence_length: int = option(128, 'pretrain_lm only: tokens of a text window.', min=8)
  start_from: str = option(
    'pretrain_lm',
    "Initial parameters: 'scratch', 'pretrain_lm' or 'pretrain' (a stage of this workdir), or the folder of a run or checkpoint.",
  )
  start_layers: int | None = option(
    None, 'How many layers of the checkpoint to start from: its first ones, below its last norm. None: all.', min=1
  )
  loss: LossConfig = section(LossConfig())
  log_every: int = option(10, 'Steps between progress lines; metrics.jsonl has every step.', min=1)
  evaluate_every: int | None = option(None, 'Steps between evaluations on the validation split. None: only at the end.', min=1)
  evaluate_examples: int = option(512, 'Validation examples per evaluation.', min=1)
  lora: LoraConfig = section(LoraConfig())


@dataclasses.dataclass(frozen=True)
class CheckpointingConfig:
  """When checkpoints are saved, where, and which are kept."""

  every_steps: int = option(200, 'Steps between checkpoints.', min=1)
  keep: int = option(2, 'Newest checkpoints to keep.', min=1)
  keep_best: int = option(1, 'Best checkpoints to keep in addition, by validation accuracy (pretrain_lm: loss).', min=0)
  asynchronous: bool = option(True, 'Write checkpoints while training goes on.')
  folder: str | None = option(
    None, 'Where runs keep checkpoints, tokenizers and logs, such as gs://bucket/name or s3://bucket/name. None: the workdir.'
  )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  """Traces by JAX's profiler, and the peak that MFU refers to."""

  steps: int = option(0, 'Steps to trace in each run; 0: none.', min=0)
  skip: int = option(5, 'Steps after a start or resume before the trace begins; the first one compiles.', min=1)
  peak_flops: float | None = option(
    None, 'Dense bfloat16 FLOP/s of one device, for MFU. None: of its data sheet; a CPU is measured.', exclusive_min=0
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh. At most one axis may be -1, which takes the devices that the others leave."""

  data: int = option(1, 'Divides batches.', min=-1)
  fsdp: int = option(-1, 'Divides batches, and parameters with their optimizer state.', min=-1)
  tensor: int = option(1, 'Divides heads, feed-forward width and vocabulary.', min=-1)
  context: int = option(1, 'Divides the tokens of a row.', min=-1)
  cpu_devices: int | None = option(
    None,
    "Devices that this host's CPU is divided into, with rows of their own, which speeds up small models. "
    'None: what JAX_NUM_CPU_DEVICES or XLA_FLAGS sets, or one.',
    min=1,
  )


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """The processes of a run on several hosts. Unset: what SLURM, the TPU slice or JAX's environment variables define."""

  coordinator: str | None = option(None, 'Address of process 0 as host:port. None: read from the environment.')
  processes: int | None = option(None, 'Number of processes. None: read from the environment.', min=1)
  process: int | None = option(None, 'Index of this process. None: read from the environment.', min=0)
  timeout: int = option(300, 'Seconds to wait for the other processes at the start.', min=1)
  heartbeat: int = option(100, 'Seconds without a sign from a process after which JAX considers it lost.', min=1)
  beat: float = option(10.0, 'Seconds between the heartbeat files that each process writes.', exclusive_min=0)
  stall: float = option(900.0, 'Seconds without a step after which the processes that are behind are reported.', exclusive_min=0)
