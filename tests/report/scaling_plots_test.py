"""What a figure of laws must show."""

from __future__ import annotations

import pathlib

import pytest
from matplotlib.figure import Figure

from polar_jax.report import scaling_plots as plot
from polar_jax.scaling import results
from polar_jax.stages import fit as stage

SHIPPED = pathlib.Path(__file__).parents[2] / 'notebooks/results.csv'


@pytest.mark.parametrize('name', 'NC')
def test_runs_and_the_interval_of_the_largest_size_are_inside(name):
  rows = results.read(SHIPPED)
  law = stage.study(rows)[name]
  ax = Figure().subplots()
  plot._limits(ax, rows, law)
  low, high = ax.get_ylim()
  held = law['held_out']
  assert held['low'] < rows.loss.min()  # else the runs alone would make room for it
  assert low < held['low'] < held['high'] < high and low < rows.loss.min() and rows.loss.max() < high
