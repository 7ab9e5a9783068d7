"""Compiling a jitted function for shapes alone, and what the compiler then says of a chip's memory."""

from __future__ import annotations

import math
import re
import time
from typing import Any, NamedTuple

import jax

_TOO_MUCH = re.compile(r'(?:Used |temporaries \()([\d.]+)([KMGT])\b')  # all of it, or what the temporaries alone would take


class Memory(NamedTuple):
  """Of one call, in bytes of a chip."""

  argument: int = 0
  output: int = 0
  alias: int = 0  # part of the results that takes the place of arguments
  temporary: int = 0
  code: int = 0
  seconds: float = 0.0  # to compile
  refused: int = 0  # what the compiler said it would need, where it found more than the chip has; else 0
  failure: str = ''  # why there is nothing compiled, if that is not for want of memory; then only arguments are counted

  @property
  def peak(self) -> int:
    """All that is in memory for the function while it runs."""
    return self.refused or self.argument + self.output - self.alias + self.temporary + self.code


def compile_call(lowered: jax.stages.Lowered, argument: int) -> tuple[Memory, jax.stages.Compiled | None]:
  """
  Args:
    argument: bytes of a chip that the arguments take, for a function that does not compile.
  """
  began = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used, seconds = _TOO_MUCH.search(str(error)), time.perf_counter() - began
    if 'RESOURCE_EXHAUSTED' in str(error) and used:
      beyond = argument if 'temporaries' in used[0] else 0
      return Memory(seconds=seconds, refused=beyond + int(float(used[1]) * 1024 ** ('KMGT'.index(used[2]) + 1))), None
    return Memory(argument=argument, seconds=seconds, failure=' '.join(str(error).split())[:300]), None
  found: Any = compiled.memory_analysis()
  sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes, found.temp_size_in_bytes)
  return Memory(*sizes, found.generated_code_size_in_bytes, time.perf_counter() - began), compiled


def bytes_of_a_device(tree: Any) -> int:
  """What has no layout counts in full."""
  local = lambda a: a.shape if a.sharding is None else a.sharding.shard_shape(a.shape)
  return sum(math.prod(local(a)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
