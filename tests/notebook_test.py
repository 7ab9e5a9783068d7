"""The notebooks run, and print the results of the library."""

from __future__ import annotations

import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

from polar_jax.scaling import analysis, results

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
  """One CPU device and optimized code, as readers have: these runs take more steps than compilations."""
  monkeypatch.setenv('XLA_FLAGS', '')


def text_of(notebook) -> str:
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  return '\n'.join(output['text'] for output in outputs if output['output_type'] == 'stream')


@pytest.mark.long
def test_scaling_laws(tmp_path):
  notebook = nbformat.read(FOLDER / 'scaling_laws.ipynb', as_version=4)
  shown = text_of(notebook)
  NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(FOLDER)}}).execute()
  printed, found = text_of(notebook), analysis.analyze(results.read(FOLDER / 'results.csv'))
  for name in 'NC':
    law = found[name]
    assert f'{law["beta"]:.4g} {name}^{law["alpha"]:.4f}, 95% interval [{law["low"]:.4f}, {law["high"]:.4f}]' in printed
  figures = [o for cell in notebook.cells for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
  assert len(figures) == 5
  # The stored output is that of a run.
  laws = re.compile(r'^L\([NC]\) = .*', re.MULTILINE)
  assert laws.findall(shown) == laws.findall(printed)


# Numbers of the notebook -> those of a run that learns nothing.
FEW_STEPS = (('steps=300,', 'steps=6,'), ('steps=25,', 'steps=2,'))


@pytest.mark.long
@pytest.mark.parametrize('learns', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quickstart(learns):
  notebook = nbformat.read(FOLDER / 'quickstart.ipynb', as_version=4)
  for long, short in () if learns else FEW_STEPS:
    (cell,) = [cell for cell in notebook.cells if long in cell.source]
    cell.source = cell.source.replace(long, short)
  NotebookClient(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(FOLDER)}}).execute()
  shown = text_of(notebook)
  accuracy = re.search(r'held-out accuracy: Interval\(accuracy=([\d.]+)', shown)
  assert accuracy and float(accuracy[1]) > (0.7 if learns else 0), shown
  figures = [o for cell in notebook.cells for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
  assert len(figures) == 3  # losses, rewards of candidates, rewards of PPO
