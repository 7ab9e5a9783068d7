"""Logs of a run: records, TensorBoard, histograms and progress."""

from __future__ import annotations

import io
import json
import sys
import types

import numpy as np
import pytest

from polar_jax.train import metrics
from polar_jax.train.metrics import FILE, MetricsLog, StepProgress, read_metrics, reward_histogram
from polar_jax.types import UserError


class Terminal(io.StringIO):
  def isatty(self):
    return True


def write_steps(folder, steps, last_step=0):
  log = MetricsLog(folder, last_step)
  for step in steps:
    log.write({'stage': 's', 'step': step, 'loss': 1 / 3 + step})
  log.close()


def test_records_are_read_back_bit_for_bit(tmp_path):
  write_steps(tmp_path, [1, 2, 3])
  assert read_metrics(tmp_path) == [{'stage': 's', 'step': s, 'loss': 1 / 3 + s} for s in (1, 2, 3)]


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_in_the_record(tmp_path):
  log = MetricsLog(tmp_path, 0)
  log.write({'stage': 's', 'step': 1, 'loss': 0.5, 'explained_variance': float('nan'), 'gap': -float('inf'), 'deep': 1.0})
  log.close()
  line = (tmp_path / FILE).read_text()
  assert json.loads(line, parse_constant=pytest.fail)['gap'] is None
  (record,) = read_metrics(tmp_path)
  assert record['loss'] == 0.5 and np.isnan([record['explained_variance'], record['gap']]).all()
  write_steps(tmp_path, [2], last_step=1)  # a resumed run writes the old records again
  assert (tmp_path / FILE).read_text().startswith(line)


@pytest.mark.parametrize('field', ['"loss": "x"', '"loss": [1]', '"stage": 3', '"alarms": {}', '"loss": true', '"a": 1, "a": 2'])
def test_fields_of_another_type_are_named(tmp_path, field):
  (tmp_path / FILE).write_text(f'{{"step": 1}}\n{{"step": 2, {field}}}\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:2: .*; delete the line') as caught:
    read_metrics(tmp_path)
  assert field.split('"')[1] in str(caught.value)
  (tmp_path / FILE).write_text('{"step": 1}\n')  # the advice
  assert len(read_metrics(tmp_path)) == 1


def test_a_missing_file_has_no_records(tmp_path):
  assert read_metrics(tmp_path) == []


@pytest.mark.parametrize('cut', [1, 2, 20, 30])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
  write_steps(tmp_path, [1, 2, 3])
  path = tmp_path / FILE
  path.write_bytes(path.read_bytes()[:-cut])
  # A line that lacks only its newline is complete.
  assert [record['step'] for record in read_metrics(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])
  write_steps(tmp_path, [3, 4], last_step=2)
  assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize('line', ['{"step": 1, "lo', '{"loss": 1.0}', '3'])
def test_any_other_broken_line_is_named(tmp_path, line):
  write_steps(tmp_path, [1])
  with (tmp_path / FILE).open('a') as file:
    file.write(line + '\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:2: '):
    read_metrics(tmp_path)


def test_a_resumed_run_drops_records_after_the_restored_step(tmp_path):
  write_steps(tmp_path, [1, 2, 3, 4, 5])
  write_steps(tmp_path, [4], last_step=3)
  assert [record['step'] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
  write_steps(tmp_path, [1], last_step=0)
  assert [record['step'] for record in read_metrics(tmp_path)] == [1]


def test_flushed_records_survive_without_close(tmp_path):
  log = MetricsLog(tmp_path, 0)
  log.write({'step': 1})
  assert read_metrics(tmp_path) == []
  log.flush()
  assert read_metrics(tmp_path) == [{'step': 1}]
  log.close()


def test_tensorboard_holds_numbers_and_histograms(tmp_path):
  log = MetricsLog(tmp_path, 0)
  log.write({'stage': 's', 'step': 1, 'loss': 0.5})
  log.histogram(1, 'rewards/chosen', np.arange(5.0))
  log.close()
  (event,) = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  content = event.read_bytes()
  assert b'loss' in content and b'rewards/chosen' in content


def slow_histogram(rewards, bins):
  """Bins are half open except the last one, which includes the largest value."""
  values = [v for pair in rewards for v in pair]
  low, high = min(values), max(values)
  counts = {0: [0] * bins, 1: [0] * bins}
  for pair in rewards:
    for c, value in enumerate(pair):
      counts[c][min(int((value - low) / (high - low) * bins), bins - 1)] += 1
  return {'low': low, 'high': high, 'chosen': counts[0], 'rejected': counts[1]}


@pytest.mark.parametrize('bins', [3, 12])
def test_histogram_counts(bins):
  rewards = np.random.default_rng(bins).normal([0.7, 0], size=(50, 2))
  assert reward_histogram(rewards, bins) == slow_histogram(rewards.tolist(), bins)


def test_histogram_of_equal_rewards_counts_them_all():
  histogram = reward_histogram(np.zeros((4, 2), np.float32))
  assert sum(histogram['chosen']) == sum(histogram['rejected']) == 4
  assert histogram['low'] == 0 < histogram['high']
  assert json.loads(json.dumps(histogram)) == histogram


def test_bar_in_a_terminal(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'stderr', terminal := Terminal())
  progress = StepProgress('pretrain', total=20, initial=5, every=1)
  for step in (6, 7, 20):
    progress.update({'step': step, 'loss': 0.25, 'accuracy': 0.875, 'tokens_per_second': 10.0})
  progress.close()
  bar = terminal.getvalue()
  assert '\r' in bar and 'pretrain' in bar and '20/20' in bar and 'loss=0.250' in bar and 'accuracy=0.875' in bar
  assert capsys.readouterr().out == ''


def test_plain_lines_elsewhere(capsys):
  progress = StepProgress('pretrain', total=12, initial=0, every=5)
  for step in range(1, 13):
    progress.update({'step': step, 'loss': 0.25, 'accuracy': 0.875, 'tokens_per_second': 1234.5})
  progress.update({'step': 7, 'validation_loss': 0.5, 'validation_accuracy': 0.75})
  progress.close()
  output = capsys.readouterr()
  assert output.out.splitlines() == [
    'pretrain  step 5/12  loss 0.2500  accuracy 0.8750  1,234 tokens/s',
    'pretrain  step 10/12  loss 0.2500  accuracy 0.8750  1,234 tokens/s',
    'pretrain  step 12/12  loss 0.2500  accuracy 0.8750  1,234 tokens/s',
    'pretrain  step 7/12  validation_loss 0.5000  validation_accuracy 0.7500',
  ]
  assert output.err == ''


def test_tensorboard_is_imported_without_torch(tmp_path, monkeypatch):
  for name in [name for name in sys.modules if name == 'torch' or name.partition('.')[0] == 'tensorboardX']:
    monkeypatch.delitem(sys.modules, name)
  (tmp_path / 'torch.py').write_text('raise RuntimeError("torch was imported")')
  monkeypatch.syspath_prepend(tmp_path)
  assert hasattr(metrics._import_tensorboard(), 'SummaryWriter')
  assert 'torch' not in sys.modules  # so that whoever needs it can import it


def test_torch_stays_imported_if_it_is(monkeypatch):
  metrics._import_tensorboard()
  monkeypatch.setitem(sys.modules, 'torch', torch := types.ModuleType('torch'))
  assert hasattr(metrics._import_tensorboard(), 'SummaryWriter') and sys.modules['torch'] is torch


def test_only_the_first_process_has_logs(tmp_path, monkeypatch):
  home, folder = tmp_path / 'home', tmp_path / 'folder'
  home.mkdir()
  (home / FILE).write_text('{"step": 1}\n')
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  for log in (MetricsLog(folder, 0), metrics.StepLog(folder, 0, 'samples.jsonl')):
    log.write({'step': 1})
    log.flush()
    log.close()
    assert log.lost == 0
  MetricsLog(folder, 0).histogram(1, 'rewards', np.zeros(3))
  metrics.fetch_logs(folder, home, 5)
  metrics.keep_logs(home, folder)
  assert not folder.exists()


def test_logs_are_kept_with_the_checkpoints_and_fetched_where_this_machine_has_fewer(tmp_path):
  home, folder = tmp_path / 'home', tmp_path / 'folder'
  home.mkdir()
  write_steps(folder, [1, 2, 3])
  (folder / 'summary.json').write_text('{}')
  metrics.keep_logs(folder, home)
  assert (home / FILE).read_bytes() == (folder / FILE).read_bytes() and (home / 'summary.json').exists()
  assert not (home / 'samples.jsonl').exists()
  kept = (home / FILE).stat()
  metrics.keep_logs(home, home)  # one folder: nothing to copy
  metrics.fetch_logs(home, home, 9)
  assert (home / FILE).stat().st_ino == kept.st_ino and (home / FILE).stat().st_mtime_ns == kept.st_mtime_ns
  for own, step, fetched in (([1], 3, True), ([1, 2], 2, False), ([1, 2, 3, 4], 3, False), ([], 1, True)):
    (folder / FILE).write_text(''.join(json.dumps({'step': s}) + '\n' for s in own))
    (folder / 'summary.json').unlink()
    metrics.fetch_logs(folder, home, step)
    assert [record['step'] for record in read_metrics(folder)] == ([1, 2, 3] if fetched else own)
    assert (folder / 'summary.json').exists() == fetched
    (folder / 'summary.json').write_text('{}')


def test_an_evaluation_before_the_first_step_or_of_the_last_one_can_be_dropped(tmp_path):
  lines = [{'step': 0, 'evaluation_raw': 1.0}, {'step': 1, 'loss': 0.5, 'step_seconds': 2.0}, {'step': 1, 'validation_loss': 1.0}]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  for last, again, kept, lost in (
    (-1, False, [], 2.0),
    (0, True, [], 2.0),
    (0, False, [0], 2.0),
    (1, True, [0, 1], 0.0),
    (1, False, [0, 1, 1], 0.0),
  ):
    (tmp_path / FILE).write_text(text)
    log = metrics.StepLog(tmp_path, last, FILE, again)
    log.close()
    assert ([record['step'] for record in read_metrics(tmp_path)], log.lost) == (kept, lost)
    assert log._file.closed
  assert [metrics.is_evaluation(line) for line in lines] == [True, False, True]


@pytest.mark.parametrize('step', ['true', '"1"', 'null', '1e999', '-1e999', '[1]'])
def test_a_step_is_a_finite_number(tmp_path, step):
  (tmp_path / FILE).write_text(f'{{"step": {step}}}\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:1: .*(not an object with a `step`|not JSON|number)'):
    read_metrics(tmp_path)


def test_fields_that_are_no_numbers(tmp_path):
  record = {
    'step': 1,
    'stage': 's',
    'alarms': ['a'],
    'reward_histogram': {'low': 0},
    'pick': 'p',
    'prompt': 'q',
    'reference': 'r',
    'output': 'o',
  }
  (tmp_path / FILE).write_text(json.dumps(record) + '\n')
  assert read_metrics(tmp_path) == [record]
  (tmp_path / FILE).write_text('{"step": 1, "output": 3}\n')
  with pytest.raises(UserError, match="'output' is 3, which is not a str; delete the line"):
    read_metrics(tmp_path)
  (tmp_path / FILE).write_text('{"step": 1, "loss": "x"}\n')
  with pytest.raises(UserError, match="'loss' is 'x', which is not a number; delete the line"):
    read_metrics(tmp_path)


def test_null_is_nan_in_metrics_alone(tmp_path):
  for file in (FILE, metrics.SAMPLES):
    (tmp_path / file).write_text('{"step": 1, "reward": null}\n')
  assert np.isnan(read_metrics(tmp_path)[0]['reward']) and read_metrics(tmp_path, metrics.SAMPLES) == [{'step': 1, 'reward': None}]


def test_tensorboard_gets_numbers_by_step_after_what_is_purged(tmp_path, monkeypatch):
  made, calls = [], []

  class Writer:
    def __init__(self, folder, **settings):
      made.append((folder, settings))

    def __getattr__(self, name):
      return lambda *arguments: calls.append((name, *arguments))

  monkeypatch.setattr(metrics, '_import_tensorboard', lambda: types.SimpleNamespace(SummaryWriter=Writer))
  log = MetricsLog(tmp_path, 4)
  assert made == [(str(tmp_path / 'tensorboard'), {'purge_step': 5, 'flush_secs': 30})]
  log.write({'stage': 's', 'step': 5, 'loss': 0.5, 'tokens': 3, 'reward_histogram': {}})
  values = np.zeros(2)
  log.histogram(5, 'rewards', values)
  log.close()
  assert calls == [('add_scalar', 'loss', 0.5, 5), ('add_scalar', 'tokens', 3, 5), ('add_histogram', 'rewards', values, 5), ('close',)]


def test_records_are_synced_before_a_checkpoint_and_at_the_end(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(metrics.os, 'fsync', lambda file: synced.append(len(read_metrics(tmp_path))))
  log = metrics.StepLog(tmp_path / 'new' / '..', 0, FILE)
  synced.clear()
  log.write({'step': 1})
  log.flush()
  log.write({'step': 2})
  log.close()
  assert synced == [1, 2]


def test_a_histogram_has_twelve_bins_and_some_width():
  found = reward_histogram(np.array([[1.0, 1.0]]))
  assert len(found['chosen']) == len(found['rejected']) == 12
  assert (found['low'], found['high']) == (1.0, 1.0 + 1e-6)


def test_an_evaluation_of_the_last_step_stays_by_default(tmp_path):
  text = '{"step": 1, "loss": 0.5}\n{"step": 1, "validation_loss": 1.0}\n'
  for make in (lambda: metrics.StepLog(tmp_path, 1, FILE), lambda: MetricsLog(tmp_path, 1)):
    (tmp_path / FILE).write_text(text)
    make().close()
    assert len(read_metrics(tmp_path)) == 2
