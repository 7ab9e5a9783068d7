from __future__ import annotations

import importlib.util
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def load_benchmark(monkeypatch):
  """Return a function from the name of a benchmark to its module."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))

  def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load
