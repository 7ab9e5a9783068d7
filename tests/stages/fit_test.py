"""The fit stage from a file of runs to fit.json, report and figure; and what it says of files it cannot use."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from polar_jax import runner
from polar_jax.config import default_config, parse
from polar_jax.scaling import results
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results
from polar_jax.stages import fit as stage

SIZES, RATIOS = np.geomspace(5e7, 1e9, 5), np.geomspace(2, 40, 6)


def sweep(noise: float = 0.0, seed: int = 0) -> Results:
  """Runs whose envelope is a power law: a size is best at 20 tokens a parameter, and loses by the square of the distance in logarithms."""
  n, ratio = (a.ravel() for a in np.meshgrid(SIZES, RATIOS, indexing='ij'))
  flops = 6 * n * n * ratio
  worse = 0.004 * np.log(ratio / 20) ** 2
  loss = 2.4 * flops**-0.0342 * np.exp(worse + np.random.default_rng(seed).normal(0, noise, len(n)))
  return Results(n, n * ratio, flops, loss)


def write(path: pathlib.Path, rows: Results, **more) -> pathlib.Path:
  columns = {name: getattr(rows, name) for name in results.NEEDED} | more
  lines = [','.join(columns), *(','.join(f'{v:.6e}' for v in row) for row in zip(*columns.values(), strict=True))]
  path.write_text('\n'.join(lines) + '\n')
  return path


def fitted(tmp_path: pathlib.Path, file: pathlib.Path) -> int:
  config = default_config()
  config.stage = 'fit'
  config.fit.input = str(file)
  return runner.run(parse(config), tmp_path / 'work')


def test_the_stage_writes_laws_report_and_figure(tmp_path, capsys):
  assert fitted(tmp_path, write(tmp_path / 'results.csv', sweep(0.001))) == 0
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


def test_the_largest_size_is_predicted_from_the_others():
  held = stage.study(sweep())['N']['held_out']
  longest = sweep().longest()
  slope, level = np.polyfit(np.log(longest.parameters[:-1]), np.log(longest.loss[:-1]), 1)
  assert held['predicted'] == pytest.approx(np.exp(level) * longest.parameters[-1] ** slope, rel=1e-4)
  assert held['loss'] == longest.loss[-1]
  # A run that breaks the law is told from one that follows it.
  rows = sweep(0.0005)
  assert stage.study(rows)['N']['held_out']['within']
  rows.loss[rows.parameters == SIZES[-1]] *= 1.1
  assert not stage.study(rows)['N']['held_out']['within']


def test_three_sizes_are_called_what_they_are():
  few = sweep().rows(np.flatnonzero(sweep().parameters < SIZES[3]))
  found = stage.study(few)
  assert found['N']['held_out'] is None and any('3 sizes prove nothing' in line for line in stage.describe(found))


def test_runs_that_differ_in_learning_rate_count_once():
  rows = sweep()
  rates = np.geomspace(1e-5, 1e-3, 6)
  tuned = 1e-4 * (rows.parameters / 1e8) ** -0.2
  repeated = [np.repeat(getattr(rows, name), 6) for name in results.NEEDED]
  rate = np.tile(rates, len(rows))
  worse = 0.01 * np.log(rate / np.repeat(tuned, 6)) ** 2
  swept = Results(*repeated[:3], repeated[3] + worse, learning_rate=rate)
  assert len(swept.best()) == len(rows) and len(swept.longest()) == 5
  lowest = {
    (n, t): min(swept.loss[(swept.parameters == n) & (swept.tokens == t)]) for n, t in zip(rows.parameters, rows.tokens, strict=True)
  }
  best = swept.best()
  assert best.loss.tolist() == [lowest[key] for key in zip(best.parameters, best.tokens, strict=True)]
  found = stage.study(swept)['learning_rate']
  assert found['law']['exponents']['parameters'] == pytest.approx(-0.2, abs=1e-3)
  assert 'batch' in stage.study(swept)['left_out']


def test_any_notation_of_floats_and_other_columns(tmp_path):
  file = tmp_path / 'r.csv'
  file.write_text('name, parameters,tokens,flops,loss\na,1E6,2e+07,1.2e14, .7\nb,2000000,2e7,2.4E14,0.65\nc,4.0e6,20_000_000,4.8e14,6e-1\n')
  rows = results.read(file)
  assert rows.parameters.tolist() == [1e6, 2e6, 4e6] and rows.tokens.tolist() == [2e7] * 3 and rows.loss.tolist() == [0.7, 0.65, 0.6]
  assert rows.batch is None


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('parameters,tokens,loss\n1,1,1\n', 'no column flops; the header has: parameters, tokens, loss'),
    ('parameters,tokens,flops,loss\n', 'a header and no rows'),
    ('', 'no column parameters, tokens, flops, loss; the header has: nothing'),
    ('parameters,tokens,flops,loss\n1e6,1e7,1e14,0.6\n1e6,1e7,1e14,nan\n', "line 3, column loss: 'nan'"),
    ('parameters,tokens,flops,loss\n1e6,1e7,1e14,-0.6\n', "line 2, column loss: '-0.6'"),
    ('parameters,tokens,flops,loss\n1e6,much,1e14,0.6\n', "line 2, column tokens: 'much' is not a number"),
    ('parameters,tokens,flops,loss\n1e6,1e7\n', 'line 2, column flops: None is not a number'),
  ],
)
def test_bad_files_are_refused_by_line_and_column(tmp_path, text, message):
  file = tmp_path / 'bad.csv'
  file.write_text(text)
  with pytest.raises(FitError, match=message):
    results.read(file)


def test_one_size_is_no_law(tmp_path, capsys):
  rows = sweep()
  assert fitted(tmp_path, write(tmp_path / 'one.csv', rows.rows(np.flatnonzero(rows.parameters == SIZES[0])))) == 1
  assert 'one.csv: parameters: 1 different values' in capsys.readouterr().err
  assert not (tmp_path / 'work' / 'fit.json').exists()


def test_no_file_is_an_error_that_says_what_to_do(tmp_path, capsys):
  assert fitted(tmp_path, tmp_path / 'absent.csv') == 1
  assert 'no such file' in capsys.readouterr().err


def test_a_sweep_of_batches_is_one_at_the_same_learning_rate():
  """Batch 32 alone was run with several rates: that it is lowest over all of them says nothing of batches."""
  rate, batch, loss = zip(
    *((1e-3, 16, 0.50), (1e-3, 32, 0.52), (1e-3, 64, 0.60), (5e-4, 32, 0.56), (2e-3, 32, 0.45), (4e-3, 32, 0.51), (8e-3, 32, 0.70)),
    strict=True,
  )
  column = lambda values: np.array(values, np.float64)
  rows = Results(*(np.full(7, value) for value in (1e4, 1e6, 1e12)), column(loss), column(rate), column(batch))
  batches, rates = (stage._tuned(rows, name, degree)['optima'][0] for name, degree in (('batch', 2), ('learning_rate', 4)))
  assert (batches['swept'], batches['losses']) == ([16, 32, 64], [0.50, 0.52, 0.60]) and batches['value'] < 24
  assert rates['swept'] == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3] and rates['losses'] == [0.56, 0.52, 0.45, 0.51, 0.70]
