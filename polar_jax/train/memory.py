"""Memory of a compiled step, compared with what its devices have before it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from polar_jax.config import ConfigError, ModelConfig, TrainConfig
from polar_jax.runtime import malloc
from polar_jax.runtime import memory as memory_lib
from polar_jax.runtime.compiled import Memory
from polar_jax.runtime.units import in_units

# With less free memory than this many times the need, the allocator gives freed blocks back, which costs time.
_ROOMY = 4
# Bytes that Orbax compresses and writes at a time, at most: its default of `save_concurrent_gb`.
_WRITTEN_AT_ONCE = 96 * 10**9


class Fit(NamedTuple):
  """Memory that a call needs beyond its arguments, which are allocated already, and that which is free, in bytes."""

  needed: int
  free: int | None  # None: the device does not say
  where: str  # 'host' or 'device'

  @property
  def fits(self) -> bool:
    """Whether the call fits, as far as is known."""
    return self.free is None or self.needed <= self.free


def fit_of(memory: Memory, mesh: Mesh, extra: int = 0) -> Fit:
  """Compare the memory of a call with that which is free on the devices of this process.

  Args:
    memory: of the call, per device.
    mesh: the devices.
    extra: bytes per device of arguments that are not allocated yet.
  """
  local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  own = memory.refused or memory.output - memory.alias + memory.temporary + memory.code + extra
  if local[0].platform == 'cpu':  # all devices of a process share the host's memory
    return Fit(own * len(local), memory_lib.available(local[0]), 'host')
  free = [size for device in local if (size := memory_lib.available(device)) is not None]
  return Fit(own, min(free, default=None), 'device')


def check(
  what: str, memory: Memory, mesh: Mesh, log: Callable[[str], None], remedies: Callable[[Fit], Sequence[str]], extra: int = 0
) -> Fit:
  """Log the memory of a call, and refuse it if there is not enough.

  Args:
    what: the run and the call, for messages.
    memory: of the call, per device.
    mesh: the devices.
    log: receives one line.
    remedies: returns what to change.
    extra: bytes per device of arguments that are not allocated yet.

  Returns:
    What the call needs and what is free.

  Raises:
    ConfigError: there is not enough memory; the message says what to change.
  """
  fit = fit_of(memory, mesh, extra)
  free = 'an unknown amount' if fit.free is None else in_units(fit.free)
  facts = f'{what} needs {in_units(fit.needed)} of memory besides parameters and moments, and the {fit.where} has {free} free'
  if memory.refused or not fit.fits:
    raise ConfigError(f'{facts}: {"; or ".join(remedies(fit))}')
  log(facts)
  if fit.where == 'host' and fit.free is not None and _ROOMY * fit.needed > fit.free:
    malloc.map_large_blocks()
  return fit


def check_save(run: str, state: Any, asynchronous: bool, calls: Sequence[Fit], log: Callable[[str], None]) -> None:
  """Log the memory that a checkpoint takes on the host, and refuse it if there is not enough.

  Orbax compresses the arrays of a checkpoint in memory before it writes them. An asynchronous save first copies them, because training
  goes on and overwrites them, so that the copy, the compressed arrays and a step are in memory at once.

  Args:
    run: its name, for messages.
    state: the arrays of a checkpoint, or their shapes with shardings.
    asynchronous: whether training goes on during a save.
    calls: what the steps need.
    log: receives one line.

  Raises:
    ConfigError: there is not enough memory; the message says what to change.
  """
  size = _bytes_of_this_process(state)
  step = max((fit.needed for fit in calls if fit.where == 'host'), default=0)
  written = min(size, _WRITTEN_AT_ONCE)
  needed = size + written + step if asynchronous else written
  malloc.give_back()
  free = memory_lib.available_on_host()
  amount = 'an unknown amount' if free is None else in_units(free)
  kind = 'an asynchronous save next to a step' if asynchronous else 'a save'
  facts = f'{run}: {kind} needs {in_units(needed)} of memory besides parameters and moments, and the host has {amount} free'
  if free is not None and needed > free:
    wait = [f'set checkpointing.asynchronous=False ({in_units(written)})'] if asynchronous and written <= free else []
    raise ConfigError(f'{facts}: {"; or ".join([*wait, "a smaller model, or free memory"])}')
  log(facts)


def _bytes_of_this_process(state: Any) -> int:
  """Return the bytes of the arrays' parts on the devices of this process, each part once however many devices hold it."""

  def of_leaf(leaf: Any) -> int:
    if getattr(leaf, 'sharding', None) is None:
      return math.prod(leaf.shape) * leaf.dtype.itemsize
    parts = {str(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
    return len(parts) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

  return sum(map(of_leaf, jax.tree.leaves(state)))


def remedies(model: ModelConfig, train: TrainConfig, rows: int, fit: Fit) -> list[str]:
  """Return what to change so that a step of supervised training fits, cheapest first.

  Args:
    model: how it is computed.
    train: options of the run.
    rows: of a batch on one device.
    fit: what the step needs and what is free.
  """
  accumulation, out = train.gradient_accumulation_steps, list[str]()
  at_once = math.ceil(rows / accumulation)
  if at_once > 1:
    wanted = accumulation * min(math.ceil(1.1 * fit.needed / max(fit.free or 1, 1)), at_once)  # gradients stay whole, activations do not
    out.append(f'set gradient_accumulation_steps to {wanted} or more (now {accumulation})')
  if model.remat != 'full':
    out.append(f"model.remat to 'full' (now '{model.remat}')")
  out.append(f'a smaller batch_size (now {train.batch_size}) or model, or free memory')
  return out
