"""The fit stage from a file of runs to fit.json, report and figure, and its errors."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from scaling_runs import SIZES, sweep

from polar_jax import runner
from polar_jax.config import default_config, parse
from polar_jax.scaling import results
from polar_jax.scaling.results import Results


def write(path: pathlib.Path, rows: Results) -> pathlib.Path:
  columns = {name: getattr(rows, name) for name in results.NEEDED}
  lines = [','.join(columns), *(','.join(f'{v:.6e}' for v in row) for row in zip(*columns.values(), strict=True))]
  path.write_text('\n'.join(lines) + '\n')
  return path


def run_stage(tmp_path: pathlib.Path, file: pathlib.Path | None) -> int:
  config = default_config()
  config.stage = 'fit'
  config.fit.input = None if file is None else str(file)
  return runner.run(parse(config), tmp_path / 'work')


def test_stage_writes_laws_report_and_figure(tmp_path, capsys):
  assert run_stage(tmp_path, write(tmp_path / 'results.csv', sweep(0.001))) == 0
  found = json.loads((tmp_path / 'work' / 'fit.json').read_text())
  assert json.loads((tmp_path / 'work' / 'report.json').read_text())['scaling'] == found
  for name in ('N', 'C'):
    law = found[name]
    assert law['low'] < law['alpha'] < law['high'] < 0 < law['beta'] and law['r2'] > 0.98
  assert found['N']['n'] == 5 and found['C']['n'] < 30
  assert found['C']['alpha'] == pytest.approx(-0.0342, abs=0.003)
  assert (tmp_path / 'work' / 'figures' / 'scaling.png').stat().st_size > 10_000
  text = (tmp_path / 'work' / 'report.md').read_text()
  assert '## Scaling laws' in text and 'figures/scaling.png' in text and 'prove nothing' not in text
  assert 'L(C)' in capsys.readouterr().out


def test_one_size_is_an_error(tmp_path, capsys):
  rows = sweep()
  assert run_stage(tmp_path, write(tmp_path / 'one.csv', rows.rows(np.flatnonzero(rows.parameters == SIZES[0])))) == 1
  assert 'one.csv: parameters: needs at least 3 different values of x, got 1' in capsys.readouterr().err
  assert not (tmp_path / 'work' / 'fit.json').exists()


def test_missing_file_is_an_error_with_a_remedy(tmp_path, capsys):
  assert run_stage(tmp_path, tmp_path / 'absent.csv') == 1
  assert 'absent.csv: no such file; run the sweep stage' in capsys.readouterr().err
  assert run_stage(tmp_path, None) == 1
  assert 'name a CSV file with the columns parameters, tokens, flops, loss' in capsys.readouterr().err
