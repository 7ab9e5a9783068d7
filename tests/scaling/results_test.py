"""Files with results of runs, and the runs that the fits use."""

from __future__ import annotations

import numpy as np
import pytest

from polar_jax.config import ConfigError
from polar_jax.scaling import results
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results


def column(*values: float) -> np.ndarray:
  return np.array(values, np.float64)


def test_read_accepts_any_notation_of_floats_and_other_columns(tmp_path):
  file = tmp_path / 'r.csv'
  file.write_text('name, parameters,tokens,flops,loss\na,1E6,2e+07,1.2e14, .7\nb,2000000,2e7,2.4E14,0.65\nc,4.0e6,20_000_000,4.8e14,6e-1\n')
  rows = results.read(file)
  assert rows.parameters.tolist() == [1e6, 2e6, 4e6] and rows.tokens.tolist() == [2e7] * 3 and rows.loss.tolist() == [0.7, 0.65, 0.6]
  assert rows.batch is None


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('parameters,tokens,loss\n1,1,1\n', 'no column flops; the header has: parameters, tokens, loss'),
    ('parameters,tokens,flops,loss\n', 'a header but no rows'),
    ('', 'no column parameters, tokens, flops, loss; the header has: nothing'),
    ('parameters,tokens,flops,loss\n1e6,1e7,1e14,0.6\n1e6,1e7,1e14,nan\n', "line 3, column loss: 'nan'"),
    ('parameters,tokens,flops,loss\n1e6,1e7,1e14,-0.6\n', "line 2, column loss: '-0.6'"),
    ('parameters,tokens,flops,loss\n1e6,much,1e14,0.6\n', "line 2, column tokens: 'much' is not a number"),
    ('parameters,tokens,flops,loss\n1e6,1e7\n', 'line 2, column flops: None is not a number'),
  ],
)
def test_read_names_line_and_column_of_a_bad_field(tmp_path, text, message):
  file = tmp_path / 'bad.csv'
  file.write_text(text)
  with pytest.raises(FitError, match=message):
    results.read(file)


def test_best_is_the_lowest_loss_of_each_size_and_number_of_tokens():
  rows = Results(column(1, 1, 2, 1, 2), column(5, 5, 5, 9, 5), column(1, 2, 3, 4, 5), column(0.6, 0.5, 0.4, 0.3, 0.45))
  best = rows.best()
  assert best.flops.tolist() == [2, 3, 4] and best.loss.tolist() == [0.5, 0.4, 0.3]


def test_longest_is_the_run_with_the_most_tokens_of_each_size():
  """Also where a shorter run has the lower loss."""
  rows = Results(column(2, 1, 2, 1, 1), column(7, 30, 8, 10, 20), column(1, 2, 3, 4, 5), column(0.4, 0.6, 0.5, 0.5, 0.7))
  assert rows.longest().tokens.tolist() == [30, 8] and rows.longest().flops.tolist() == [2, 3]


def test_a_table_is_read_as_it_was_written(tmp_path):
  path = tmp_path / results.TABLE
  assert results.read_table(path) == {}
  rows = {'b': {'run': 'b', 'loss': 0.5}, 'other': {'run': 'other', 'loss': 0.7}, 'a': {'run': 'a', 'loss': 0.6, 'seed': 1}}
  results.write_table(path, rows, ['a', 'b', 'c'])
  # Rows of other sweeps come first, then those of the grid in its order.
  assert path.read_text() == 'run,loss,seed\nother,0.7,\na,0.6,1\nb,0.5,\n'
  assert [*results.read_table(path)] == ['other', 'a', 'b']


@pytest.mark.parametrize('text', ['loss\n0.5\n', 'run,loss\n,0.5\n', 'run,loss\na\n'])
def test_read_table_refuses_other_files(tmp_path, text):
  path = tmp_path / results.TABLE
  path.write_text(text)
  with pytest.raises(ConfigError, match='not the table of a sweep'):
    results.read_table(path)
