"""The section on scaling laws: a line for each law, and what each predicts of the largest size."""

from __future__ import annotations

import pathlib

import pytest

from polar_jax.report import scaling
from polar_jax.scaling import analysis, results

SHIPPED = pathlib.Path(__file__).parents[2] / 'notebooks/results.csv'


@pytest.fixture(scope='module')
def found():
  return analysis.analyze(results.read(SHIPPED))


def test_each_law_has_a_line_with_its_floor(found):
  table = next(part for part in scaling.section(found, {}) if '| R2 |' in part.replace('---: ', ''))
  for name in 'NC':
    law, floored = found[name], found['floored'][name]
    assert f'| beta X^alpha, {name} |' in table and f'| {law["alpha"]:.4f} | [{law["low"]:.4f}, {law["high"]:.4f}] |' in table
    assert f'| {floored["irreducible"]:.4g} + beta X^alpha, {name} | as above | {floored["alpha"]:.4f} | - |' in table


def test_each_form_predicts_the_largest_size(found):
  text = '\n'.join(scaling.section(found, {}))
  for law, name in ((found['N'], 'L(N)'), (found['floored']['C'], 'L(C) with a floor')):
    held_out = law['held_out']
    assert f'predicted from the others by {name}, is {held_out["predicted"]:.4f} [{held_out["low"]:.4f}, ' in text
  floored = {**found['floored']['N'], 'held_out': {**held_out, 'within': not held_out['within']}}
  assert held_out['within'] and floored != found['floored']['N']
  changed = '\n'.join(scaling.section({**found, 'floored': {**found['floored'], 'N': floored}}, {}))
  assert changed.count('**not** within') == text.count('**not** within') + 1
