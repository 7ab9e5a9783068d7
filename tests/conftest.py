"""Fixtures of all tests, and what must be set before JAX starts."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile

# Tests of sharding need devices: eight fake ones share the CPU. Nearly all of a test's time is compiling tiny graphs, so the
# compiler is told not to try hard. Subprocess tests set their own flags.
os.environ.setdefault(
  'XLA_FLAGS',
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true',
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# What one test compiled, another process of the tests need not compile again: killed runs that resume, files that run side by side.
_COMPILED = None if 'JAX_COMPILATION_CACHE_DIR' in os.environ else tempfile.mkdtemp(prefix='polar_jax_compiled_')
if _COMPILED:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(os.environ.get('POLAR_TEST_DATA', ROOT / '../shared/data')).resolve()

# Silent broadcasting of arrays of different rank hides mistakes.
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Leaves out what cannot or should not run, with a count: slow tests unless asked for, data tests without the data."""
  dropped = {'slow': [], 'data': []}
  kept = []
  for item in items:
    if item.get_closest_marker('slow') and 'slow' not in config.option.markexpr:
      dropped['slow'].append(item)
    elif item.get_closest_marker('data') and not DATA.is_dir():
      dropped['data'].append(item)
    else:
      kept.append(item)
  if dropped['data'] and os.environ.get('CI'):
    raise pytest.UsageError(f'{len(dropped["data"])} tests need the data folder {DATA}, which does not exist: set POLAR_TEST_DATA')
  items[:] = kept
  left_out = [item for some in dropped.values() for item in some]
  if left_out:
    config.hook.pytest_deselected(items=left_out)
  counts = {name: len(some) for name, some in dropped.items()}
  config.stash[_DROPPED] = counts
  if hasattr(config, 'workeroutput'):  # a process of xdist: the one that reports never sees the tests themselves
    config.workeroutput['dropped'] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
  """Every process of xdist collects the same tests, so any one's counts are those of the run."""
  node.config.stash[_DROPPED] = getattr(node, 'workeroutput', {}).get('dropped', {})


def pytest_unconfigure(config: pytest.Config) -> None:
  if _COMPILED and not hasattr(config, 'workerinput'):  # by the process that made it, when the others are done
    shutil.rmtree(_COMPILED, ignore_errors=True)


_DROPPED = pytest.StashKey[dict]()


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
  counts = config.stash.get(_DROPPED, {})
  if counts.get('data'):
    terminalreporter.write_line(f'left out: {counts["data"]} tests that need the data folder {DATA} (set POLAR_TEST_DATA)')
  if counts.get('slow'):
    terminalreporter.write_line(f'left out: {counts["slow"]} slow tests (run them with: pytest -m slow)')


@pytest.fixture(scope='session')
def data_folder() -> pathlib.Path:
  """The folder of real data; tests that use it carry the marker `data`."""
  return DATA
