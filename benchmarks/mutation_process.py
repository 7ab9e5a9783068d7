"""A process that runs pytest in a copy of the project. It is forked from one that has imported what takes long."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

# Nothing of the project itself, of which every copy has its own, and nothing that starts threads.
IMPORTED_BEFORE = ('pytest', 'xdist', 'hypothesis', 'numpy.testing', 'scipy.optimize', 'scipy.stats', 'jax.numpy', 'flax.nnx', 'optax')
IMPORTED_BEFORE += ('orbax.checkpoint', 'tokenizers', 'sentencepiece', 'ml_collections', 'safetensors.numpy')


def run_tests(copy: pathlib.Path, arguments: Sequence[str], environment: Mapping[str, str], output: pathlib.Path) -> None:
  """Run pytest and exit with its status.

  Args:
    copy: of the project; the working directory.
    arguments: of pytest.
    environment: variables that are set before.
    output: the file for what is printed.
  """
  os.setsid()  # ended together with the processes that it starts
  os.chdir(copy)
  os.environ.update(environment)
  file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.path[:] = [str(copy), *(path for path in sys.path if not (pathlib.Path(path) / 'polar_jax').exists())]
  sys.dont_write_bytecode = True
  import hypothesis
  import pytest

  # The first counterexample is enough; to search for the smallest one takes longer than the tests.
  quick = [phase for phase in hypothesis.Phase if phase.name not in ('shrink', 'explain')]
  hypothesis.settings.register_profile('mutants', phases=quick, database=None)
  hypothesis.settings.load_profile('mutants')
  status = pytest.main(['-q', '-x', '-n', '0', '--tb=no', '-p', 'no:cacheprovider', *arguments])
  sys.stdout.flush()
  os._exit(int(status))
