"""Ahead-of-time compilation of jitted functions, and the memory of a chip that the compiler reports for them."""

from __future__ import annotations

import functools
import math
import re
import time
from typing import Any, NamedTuple

import jax

from polar_jax.runtime import preemption
from polar_jax.runtime.units import in_units
from polar_jax.types import UserError

_TOO_MUCH = re.compile(r'(?:Used |temporaries \()([\d.]+)([KMGT])\b')  # all memory, or that of the temporaries alone


class Memory(NamedTuple):
  """Memory of one call, in bytes per chip."""

  argument: int = 0
  output: int = 0
  alias: int = 0  # results that reuse the memory of donated arguments
  temporary: int = 0
  code: int = 0
  seconds: float = 0.0  # to compile
  refused: int = 0  # bytes that the compiler reports if they are more than the chip has; else 0
  failure: str = ''  # why the compiler failed, if not for lack of memory; then only arguments are counted

  @property
  def peak(self) -> int:
    """Memory of the function while it runs."""
    return self.refused or self.argument + self.output - self.alias + self.temporary + self.code


def compile_call(lowered: jax.stages.Lowered, argument: int) -> tuple[Memory, jax.stages.Compiled | None]:
  """Compile a lowered function and read its memory.

  Args:
    lowered: the function, for shapes alone.
    argument: bytes per chip of the arguments, which count if the function does not compile.

  Returns:
    (its memory, the compiled function or None).
  """
  started = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used, seconds = _TOO_MUCH.search(str(error)), time.perf_counter() - started
    if 'RESOURCE_EXHAUSTED' in str(error) and used:
      extra = argument if 'temporaries' in used[0] else 0
      return Memory(seconds=seconds, refused=extra + int(float(used[1]) * 1024 ** ('KMGT'.index(used[2]) + 1))), None
    return Memory(argument=argument, seconds=seconds, failure=' '.join(str(error).split())[:300]), None
  sizes: Any = compiled.memory_analysis()
  parts = (sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes, sizes.temp_size_in_bytes)
  return Memory(*parts, sizes.generated_code_size_in_bytes, time.perf_counter() - started), compiled


def bytes_of_a_device(tree: Any) -> int:
  """Return the bytes of a tree in the memory of one device, not of its host. Arrays without a sharding, as of numpy, count in full."""
  local = lambda a: a.shape if getattr(a, 'sharding', None) is None else a.sharding.shard_shape(a.shape)
  on_host = lambda a: 'host' in (getattr(getattr(a, 'sharding', None), 'memory_kind', None) or '')
  return sum(math.prod(local(a)) * a.dtype.itemsize for a in jax.tree.leaves(tree) if not on_host(a))


class Executables:
  """The executables of a jitted function, one for each shape of its arguments.

  They are the ones that run, so that knowing their memory costs no second compilation.
  """

  def __init__(self, function: Any):
    """Compile nothing yet.

    Args:
      function: the result of `jax.jit`, with the shardings of its arguments.
    """
    self._function = function
    self._compiled: dict[Any, tuple[Memory, jax.stages.Compiled | None]] = {}

  def prepare(self, *args: Any) -> Memory:
    """Compile the function for arguments of these shapes, unless it is compiled, and return the memory of a call.

    SIGTERM is noticed while the compiler works (see `preemption.in_thread`).

    Raises:
      StopRequested: SIGTERM arrived.
      RuntimeError: the compiler failed, and not for lack of memory.
    """
    key = _shapes(args)
    if key not in self._compiled:
      lowered, argument = self._function.lower(*args), bytes_of_a_device(args)
      self._compiled[key] = preemption.in_thread(lambda: compile_call(lowered, argument))
    memory, _ = self._compiled[key]
    if memory.failure:
      raise RuntimeError(f'XLA cannot compile this step: {memory.failure}')
    return memory

  def __call__(self, *args: Any) -> Any:
    """Call the function.

    Raises:
      UserError: the compiler finds that the device has too little memory.
      StopRequested, RuntimeError: as `prepare`.
    """
    memory = self.prepare(*args)
    _, compiled = self._compiled[_shapes(args)]
    if compiled is None:
      raise UserError(f'a compiled function needs {in_units(memory.refused)}, more than the device has: use fewer rows or a smaller model')
    return compiled(*args)


@functools.lru_cache(maxsize=16)  # small, so that executables of finished runs are freed
def executables(function: Any) -> Executables:
  """Return the executables of a jitted function, which all runs that share the function share."""
  return Executables(function)


def _shapes(tree: Any) -> tuple[Any, ...]:
  return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
