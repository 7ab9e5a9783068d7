"""Memory, FLOPs, collectives and roofline time of a training step, from compiling it for a TPU slice.

The step is that of the trainer, compiled for shapes alone: nothing is allocated, and no TPU runtime starts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax import sharding
from polar_jax.config import Config, ConfigError, ModelConfig, TrainConfig
from polar_jax.data.layout import pair_batch, pair_segment, text_batch
from polar_jax.model import flops
from polar_jax.model.attention import for_platform
from polar_jax.model.heads import num_trained
from polar_jax.planning import hlo
from polar_jax.planning.matmuls import matmul_flops
from polar_jax.planning.topology import open_slice
from polar_jax.runtime.chips import GIB, Chip
from polar_jax.runtime.compiled import Memory, bytes_of_a_device, compile_call
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import NEXT_TOKEN, Objective, ranking
from polar_jax.train.optimizer import make_optimizer
from polar_jax.types import PairBatch, TextBatch

# Share of a candidate in a triplet of known length: at the paper's maximum lengths it is 4,096 of 14,336 tokens.
_CANDIDATE_SHARE = 2 / 7
_STEPS = 1_000  # of a run; only the learning rate schedule depends on it
# Matrix multiplications over the attended query-key pairs: logits, values; then logits, d_logits, dq; then logits, dv, d_logits, dk.
_KERNEL_MATMULS = {'attention_forward': 2, 'attention_dq': 3, 'attention_dkv': 4}


class Roofline(NamedTuple):
  """Lower bounds of a step's time, in seconds: matrix units, HBM and links, each at its peak rate."""

  compute: float
  memory: float
  network: float

  @property
  def overlapped(self) -> float:
    """Time with perfect overlap of the three."""
    return max(self)

  @property
  def serial(self) -> float:
    """Time without any overlap."""
    return sum(self)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The plan of a step.

  `flops_model` follows the rule of MFU; `flops_hardware` also counts padding and recomputation. Both are those of all chips.
  """

  topology: str
  mesh: dict[str, int]
  chip: Chip
  peak_flops: float  # per chip
  parameters: int  # without adapters
  trained: int
  rows: int  # in a step
  row_length: int
  accumulation: int
  tokens_per_step: float  # without padding
  total_tokens: float | None  # of the run, if it is configured
  state: int  # parameters and moments, bytes per chip
  memory: Memory
  flops_model: float
  flops_hardware: float
  flops_xla: float | None  # of all chips, as XLA counts them: a loop's body once, kernels not at all
  traffic: hlo.Traffic | None  # None: the step did not compile

  @property
  def chips(self) -> int:
    """Number of chips."""
    return math.prod(self.mesh.values())

  @property
  def fits(self) -> bool:
    """Whether the step compiles and fits."""
    return not (self.memory.refused or self.memory.failure) and self.memory.peak <= self.chip.hbm

  @property
  def rows_per_chip(self) -> int:
    """Rows of a micro-batch per chip."""
    return self.rows // (self.mesh['data'] * self.mesh['fsdp'] * self.accumulation)

  @property
  def roofline(self) -> Roofline | None:
    """The roofline of the step, or None if it did not compile."""
    if self.traffic is None:
      return None
    # The interconnect number counts both directions; one carries half of it.
    sent = sum(self.traffic.sent.values()) / (self.chip.interconnect / 2)
    return Roofline(self.flops_hardware / self.chips / self.peak_flops, self.traffic.hbm / self.chip.bandwidth, sent)


def plan(config: Config, model: ModelConfig, log: Callable[[str], None]) -> Plan:
  """Compile the step of `config.plan.step` for `config.plan.topology`.

  Args:
    config: of the run.
    model: its shape, with a vocabulary.
    log: takes one line of progress.

  Raises:
    ConfigError: the slice is unknown, the mesh does not fit it, or a shape is not set that a run would take from its data.
  """
  settings: TrainConfig = getattr(config, config.plan.step)
  name, chip, devices = open_slice(config.plan.topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  objective = NEXT_TOKEN if config.plan.step == 'pretrain_lm' else ranking(settings.loss)
  shape = _text_shape if objective is NEXT_TOKEN else _ranking_shape
  batch, tokens, pairs, flops_model = shape(config, settings, model, mesh)
  optimizer, accumulation = make_optimizer(settings, _STEPS), settings.gradient_accumulation_steps
  functions = step_lib.build(objective, model, optimizer, mesh, accumulation, settings.lora)
  log(f'plan: compiling a step of {batch.tokens_BT.shape[0]} x {batch.tokens_BT.shape[1]} tokens for {len(devices)} chips of {name}')
  with jax.set_mesh(mesh), for_platform('tpu'):
    traced = cast(Any, functions.train).trace(functions.abstract, batch, *functions.abstract_frozen)
    arguments = bytes_of_a_device((functions.abstract, batch, functions.abstract_frozen))
    memory, compiled = compile_call(traced.lower(), arguments)
  return Plan(
    topology=config.plan.topology,
    mesh=dict(mesh.shape),
    chip=chip,
    peak_flops=chip.peak_flops,
    parameters=_parameters(objective, model),
    trained=num_trained(model, objective.head, settings.lora),
    rows=batch.tokens_BT.shape[0],
    row_length=batch.tokens_BT.shape[1],
    accumulation=accumulation,
    tokens_per_step=tokens,
    total_tokens=config.plan.tokens or (settings.steps * tokens if settings.steps else None),
    state=bytes_of_a_device((functions.abstract.params, functions.abstract.opt_state, functions.abstract_frozen)),
    memory=memory,
    flops_model=flops_model,
    flops_hardware=matmul_flops(traced.jaxpr, _attention(pairs / batch.tokens_BT.shape[0])),
    flops_xla=None if compiled is None else float(cast(Any, compiled.cost_analysis())['flops']) * len(devices),
    traffic=None if compiled is None else hlo.traffic(compiled.as_text() or ''),
  )


def _parameters(objective: Objective, model: ModelConfig) -> int:
  count = flops.language_model_parameters if objective is NEXT_TOKEN else flops.reward_model_parameters
  return count(model).total


def _attention(pairs_per_row: float) -> Callable[[str, list[tuple[int, ...]]], float]:
  """Return a function with the FLOPs of an attention kernel whose rows have `pairs_per_row` attended query-key pairs."""

  def count(name: str, shapes: list[tuple[int, ...]]) -> float:
    if name not in _KERNEL_MATMULS:
      raise ValueError(f'the plan has no FLOPs of the kernel {name}')
    (batch, heads, queries, dim), (_, _, keys, _) = [shape for shape in shapes if len(shape) == 4][:2]
    # In the last layer only the reward tokens are queries, and they see about half of their row.
    pairs = pairs_per_row if queries == keys else queries * keys / 2
    return 2.0 * _KERNEL_MATMULS[name] * batch * heads * dim * pairs

  return count


def _rows(batch_size: int, per_row: float, mesh: jax.sharding.Mesh, accumulation: int) -> int:
  multiple = sharding.batch_shards(mesh) * accumulation
  return math.ceil(batch_size / per_row / multiple) * multiple


def _ranking_shape(config: Config, settings: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh):
  """Return (batch, its real tokens, attended query-key pairs, model FLOPs of a step)."""
  length = config.data.row_length
  if length is None:
    raise ConfigError('data.row_length is None, which a run measures from its data; set it for a plan')
  tokens = min(config.plan.triplet_tokens or length, length)
  rows = _rows(settings.batch_size, length / tokens, mesh, settings.gradient_accumulation_steps)
  pairs_per_row = max(2 * length // tokens, 1)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
  text, pairs = array((rows, length), jnp.int32), array((rows, pairs_per_row), jnp.float32)
  batch = PairBatch(text, text, text, text, array((rows, pairs_per_row, 2), jnp.int32), pairs, array(pairs.shape, jnp.int32))
  one = _one_triplet(tokens)
  seen = float((one.end_BT - one.start_BT).sum()) * settings.batch_size
  return (
    batch,
    float(tokens * settings.batch_size),
    seen,
    flops.training_flops(flops.reward_model_flops, model, one, settings.lora) * settings.batch_size,
  )


def _one_triplet(tokens: int) -> PairBatch:
  """Return a row of one triplet with candidates of equal length."""
  tail = max(int(tokens * _CANDIDATE_SHARE), 1)
  shared = [0] * (tokens - 2 * tail)
  return pair_batch([pair_segment(shared + [1] * tail, shared + [2] * tail)], [0], [[0]], tokens, 1)


def _text_shape(config: Config, settings: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh):
  """Return the same as `_ranking_shape` for language modeling."""
  length, rows = settings.sequence_length, _rows(settings.batch_size, 1, mesh, settings.gradient_accumulation_steps)
  array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
  text = array((rows, length), jnp.int32)
  batch = TextBatch(text, text, text, text, text, array((rows, length), jnp.float32), array((rows,), jnp.int32))
  one = text_batch([np.zeros(length + 1, np.int32)], [0], length)
  seen = length * (length + 1) / 2 * settings.batch_size
  model_flops = flops.training_flops(flops.language_model_flops, model, one, settings.lora) * settings.batch_size
  return batch, float(length * settings.batch_size), seen, model_flops


def changes(plan: Plan, model: ModelConfig) -> list[str]:
  """Return what to change if a step does not fit, cheapest first."""
  if plan.fits:
    return []
  if plan.memory.failure:
    return [f'the compiler failed for a reason other than memory: {plan.memory.failure}']
  hbm, peak = plan.chip.hbm, plan.memory.peak
  out = []
  if plan.state < 0.9 * hbm:
    need = math.ceil((peak - plan.state) / (0.95 * hbm - plan.state))
    if plan.rows_per_chip > 1:
      more = min(need, plan.rows_per_chip)
      out.append(
        f'gradient_accumulation_steps {plan.accumulation * more} (now {plan.accumulation}): '
        f'{math.ceil(plan.rows_per_chip / more)} rows per chip at a time instead of {plan.rows_per_chip}'
      )
    if model.remat != 'full':
      out.append(f"model.remat='full' (now {model.remat!r}): stores one activation per layer")
    if need > plan.rows_per_chip:
      split = 2 ** math.ceil(math.log2(need / plan.rows_per_chip))
      out.append(f'mesh.tensor={plan.mesh["tensor"] * split}: splits the computation of a row among chips')
      out.append(f'rows shorter than data.row_length={plan.row_length}, if the longest triplet allows it')
  total = plan.state * plan.chips
  min_chips = math.ceil(total / (0.6 * hbm))
  out.append(
    f'more chips, or larger ones: parameters and moments take {plan.state / GIB:.1f} of {hbm / GIB:.0f} GiB on {plan.chips} chips'
    + (f', and 60% of {min_chips} chips' if min_chips > plan.chips else '')
  )
  return out
