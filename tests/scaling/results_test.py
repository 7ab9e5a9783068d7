"""Files with results of runs, and the runs that the fits use."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax.config import ConfigError
from polar_jax.scaling import results
from polar_jax.scaling.fit import FitError
from polar_jax.scaling.results import Results
from polar_jax.types import UserError


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


@pytest.mark.parametrize('text', ['loss\n0.5\n', 'run,loss\n,0.5\n', 'run,loss\na\n', 'run,loss\na,0.5\n,0.6\n'])
def test_read_table_refuses_other_files(tmp_path, text):
  path = tmp_path / results.TABLE
  path.write_text(text)
  with pytest.raises(ConfigError, match='not the table of a sweep'):
    results.read_table(path)


@pytest.mark.parametrize(
  ('result', 'message'),
  [
    ({'loss': 0.5}, 'has no `steps`'),
    ({'steps': True}, 'steps is True, which is not a finite number; delete result.json'),
    ({'steps': 3, 'loss': float('nan')}, 'loss is nan|NaN'),
    ({'steps': 3, 'learning_rate': '1e-3'}, "learning_rate is '1e-3', which is not a finite number"),
    ({'steps': 3, 'validation_loss': None}, 'validation_loss is None'),
  ],
)
def test_damaged_results_of_jobs_are_named(tmp_path, result, message):
  assert results.read_result(tmp_path) is None
  good = {'steps': 3, 'loss': 0.5, 'batch': 4, 'name': 'text', 'more': None}
  results.write_result(tmp_path, good)
  assert results.read_result(tmp_path) == good
  (tmp_path / results.RESULT).write_text(json.dumps(result))
  with pytest.raises(UserError, match=message):
    results.read_result(tmp_path)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('parameters,tokens,flops,loss,loss\n1,1,1,1,1\n', "2 columns are called 'loss'; rename or remove all but one"),
    ('parameters,tokens,flops,loss\n1,1,1,1,9\n', 'line 2 has 5 fields, and the header 4; quote fields with commas'),
    ('parameters,tokens,flops,loss\n1,1,1,1,,9\n', 'line 2 has 6 fields, and the header 4; quote fields with commas'),
    ('parameters,tokens,flops,loss\n1,1,1,0\n', "line 2, column loss: '0' is not a positive finite number"),
  ],
)
def test_read_refuses_columns_that_occur_twice_and_rows_that_are_too_long(tmp_path, text, message):
  (tmp_path / 'bad.csv').write_text(text)
  with pytest.raises(FitError, match=message):
    results.read(tmp_path / 'bad.csv')
  (tmp_path / 'good.csv').write_text('parameters,,tokens,flops,loss,,batch\n1,x,2,3,4,y,5,,\n\n6,,7,8,9,,10\n')  # empty names and fields
  rows = results.read(tmp_path / 'good.csv')
  assert rows.batch.tolist() == [5, 10] and rows.tokens.tolist() == [2, 7] and rows.learning_rate is None and len(rows) == 2
  (tmp_path / 'runs.csv').write_text('run,loss\na,1\nb,2\na,3\n')
  with pytest.raises(ConfigError, match="2 rows are of the run 'a'; remove all but one"):
    results.read_table(tmp_path / 'runs.csv')


def test_the_rows_of_the_best_runs_stay_in_the_order_of_the_file():
  rows = Results(column(3, 1, 2, 1), column(5, 5, 5, 5), column(1, 2, 3, 4), column(0.1, 0.5, 0.3, 0.4))
  assert rows.best().flops.tolist() == [1, 3, 4]


def test_a_result_is_indented_and_finite(tmp_path):
  results.write_result(tmp_path, {'steps': 3})
  assert (tmp_path / results.RESULT).read_text() == '{\n  "steps": 3\n}\n'
  with pytest.raises(ValueError, match='JSON'):
    results.write_result(tmp_path, {'steps': 3, 'loss': float('nan')})


def test_quoted_fields_may_follow_a_space(tmp_path):
  (tmp_path / 'r.csv').write_text('parameters, tokens, flops, loss, "a note"\n1, 2, 3, 4, "one, two"\n')
  assert results.read(tmp_path / 'r.csv').loss.tolist() == [4.0]
