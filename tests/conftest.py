"""Fixtures of all tests, environment variables that must be set before JAX starts, and the choice of which tests run."""

from __future__ import annotations

import collections
import gc
import os
import pathlib
import shutil
import tempfile

import fast_compilation

# Sharding tests need devices: eight simulated ones share the CPU. Tests of subprocesses set their own flags.
os.environ.setdefault('XLA_FLAGS', f'--xla_force_host_platform_device_count=8 {fast_compilation.FLAGS}')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

# Lowering otherwise spends a tenth of its time on where in Python each operation comes from.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')

# Processes of the tests share what they compiled: xdist workers, and runs that are killed and resumed.
_COMPILED = None if 'JAX_COMPILATION_CACHE_DIR' in os.environ else tempfile.mkdtemp(prefix='polar_jax_compiled_')
if _COMPILED:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '0')

import jax
import optional
import pytest

ROOT = pathlib.Path(__file__).parent.parent
DATA = pathlib.Path(os.environ.get('POLAR_TEST_DATA', ROOT / '../shared/data')).resolve()

# Implicit broadcasting between arrays of different rank hides errors.
jax.config.update('jax_numpy_rank_promotion', 'raise')


_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def _missing_packages(item: pytest.Item) -> list[str]:
  """Return the packages that `item` needs (marker `needs`) and that are not installed."""
  needed = {package for marker in item.iter_markers('needs') for package in marker.args}
  if unknown := needed - optional.INSTALL.keys():
    raise pytest.UsageError(f'{item.nodeid} needs {sorted(unknown)}: add the command that installs it to tests/optional.py')
  return sorted(package for package in needed if not optional.is_installed(package))


def _reason_to_leave_out(config: pytest.Config, item: pytest.Item) -> str | None:
  """Return why `item` is not run, worded to follow "N tests", or None if it is run."""
  if item.get_closest_marker('slow') and 'slow' not in config.option.markexpr:
    return 'that are slow (run them with: pytest -m slow)'
  if missing := _missing_packages(item):
    required = set(os.environ.get('POLAR_TEST_REQUIRE', '').split()) & set(missing)
    if required:
      raise pytest.UsageError(f'{item.nodeid} needs {", ".join(sorted(required))}, which POLAR_TEST_REQUIRE requires to be installed')
    return f'that need {" and ".join(missing)} ({"; ".join(dict.fromkeys(optional.INSTALL[package] for package in missing))})'
  if item.get_closest_marker('data') and not DATA.is_dir():
    if os.environ.get('CI'):
      raise pytest.UsageError(f'{item.nodeid} needs the data folder {DATA}, which does not exist: set POLAR_TEST_DATA')
    return f'that need the data folder {DATA} (set POLAR_TEST_DATA)'
  return None


# Files whose few tests take minutes: they start whole runs and other processes.
_LONG_FILES = {'buckets_test.py', 'distributed_test.py', 'end_to_end_test.py', 'notebook_test.py', 'resume_test.py', 'sweep_test.py'}


def _longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
  """Order the files of `items` so that xdist ends without one worker on a long file: long ones, then those with many tests."""
  tests = collections.Counter(item.path for item in items)
  return sorted(items, key=lambda item: (item.path.name not in _LONG_FILES, -tests[item.path], item.path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Leave out slow tests unless requested, and tests whose packages or data are missing; count them by reason."""
  reasons = [_reason_to_leave_out(config, item) for item in items]
  left_out = [item for item, reason in zip(items, reasons, strict=True) if reason]
  items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
  if hasattr(config, 'workerinput'):  # xdist
    items[:] = _longest_first(items)
  if left_out:
    config.hook.pytest_deselected(items=left_out)
  counts = dict(collections.Counter(reason for reason in reasons if reason))
  config.stash[_LEFT_OUT] = counts
  if hasattr(config, 'workeroutput'):  # an xdist worker: the reporting process never sees the tests themselves
    config.workeroutput['left_out'] = counts


def pytest_collection_finish() -> None:
  optional.end_collection()
  # Modules and tests live as long as the process: a full collection would look at millions of their objects time and again.
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
  """Take the counts of any xdist worker: all of them collect the same tests."""
  node.config.stash[_LEFT_OUT] = getattr(node, 'workeroutput', {}).get('left_out', {})


def pytest_unconfigure(config: pytest.Config) -> None:
  """Remove the compilation cache when the process that made it ends, which is after its workers."""
  if _COMPILED and not hasattr(config, 'workerinput'):
    shutil.rmtree(_COMPILED, ignore_errors=True)


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
  """Print how many tests were left out, by reason."""
  for reason, count in sorted(config.stash.get(_LEFT_OUT, {}).items()):
    terminalreporter.write_line(f'left out: {count} tests {reason}')


@pytest.fixture(scope='session')
def data_folder() -> pathlib.Path:
  """Return the folder of real data. Tests that use it carry the marker `data`."""
  return DATA
