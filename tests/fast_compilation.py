"""How tests compile: most of their time goes into compiling tiny graphs, so XLA does as little to each as it can."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

# The fusion emitters alone take two thirds of the time that a sharded training step takes to compile. XLA aborts at flags that it does not
# know, and jaxlib 0.12 no longer has this one.
_JAXLIB = tuple(int(part) for part in importlib.metadata.version('jaxlib').split('.')[:2])
_NO_FUSION_EMITTERS = ' --xla_cpu_use_fusion_emitters=false' if _JAXLIB < (0, 11) else ''
FLAGS = f'--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true{_NO_FUSION_EMITTERS}'
ROOT = pathlib.Path(__file__).parent.parent


def environment(*, devices: int = 1, **variables: str) -> dict[str, str]:
  """Return the environment of a process that imports this checkout and sees `devices` CPU devices, with `variables` added."""
  flags = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} {FLAGS}', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return os.environ | flags | variables
