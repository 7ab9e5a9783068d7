"""The table of a sweep's jobs."""

from __future__ import annotations

import io
import json
import os

import pytest

from polar_jax.scaling import progress, results
from polar_jax.scaling.grid import Cell, Job
from polar_jax.scaling.progress import JobState


def test_render_shows_running_jobs_first_and_fits_the_terminal():
  jobs = [Job(size, None) for size in ('1x1', '2x2', '3x3', '4x4')]
  states = [JobState(), JobState(5, 0.5, done=True), JobState(3, 0.61234), JobState(1, error='oh')]
  lines = progress.render(jobs, states, 10).split('\n')
  assert lines == [
    '3x3_lm  step 3        loss 0.6123',
    '4x4_lm  failed',
    '2x2_lm  done          loss 0.5000',
    '1x1_lm  waiting',
    '1 of 4 done, 1 failed',
  ]
  assert progress.render(jobs, states, 3).split('\n')[-1] == '1 of 4 done, 1 failed, 2 not shown'


def test_read_state_follows_the_files_of_a_job(tmp_path):
  job = Job('8x1', Cell('8x1', 300, 1e-3, 4))
  folder = job.folder(tmp_path)
  assert progress.read_state(job, tmp_path) == JobState()
  folder.mkdir(parents=True)
  records = [{'step': 1, 'loss': 0.7}, {'step': 2, 'loss': 0.6}, {'step': 2, 'validation_loss': 0.65}]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records) + '{"step": 3, "lo')
  assert progress.read_state(job, tmp_path) == JobState(2, 0.6)
  results.write_result(folder, {'steps': 3, 'loss': 0.5})
  assert progress.read_state(job, tmp_path) == JobState(3, 0.5, done=True)


class Terminal(io.StringIO):
  shown = ''  # what was flushed

  def isatty(self):
    return True

  def flush(self):
    self.shown = self.getvalue()


def test_live_table_redraws_over_itself_in_a_terminal(tmp_path):
  jobs = [Job(size, None) for size in ('1x1', '2x2', '3x3')]
  for job in jobs[:2]:
    job.folder(tmp_path).mkdir(parents=True)
    results.write_result(job.folder(tmp_path), {'steps': 5})
  out = Terminal()
  table = progress.LiveTable(jobs, tmp_path, out=out)
  table.watch()
  table.watch()  # too soon to draw again
  assert out.getvalue().count('done') == 2 + 1 and '\x1b[' not in out.getvalue()
  table.ended(jobs[0], None)
  assert out.getvalue().count('\x1b[4F\x1b[J') == 1


def test_live_table_prints_a_line_per_job_elsewhere(tmp_path, capsys):
  jobs = [Job(size, None) for size in ('1x1', '2x2')]
  jobs[0].folder(tmp_path).mkdir(parents=True)
  results.write_result(jobs[0].folder(tmp_path), {'steps': 5, 'loss': 0.25})
  for table in (progress.LiveTable(jobs, tmp_path, live=False, out=Terminal()), progress.LiveTable(jobs, tmp_path, out=io.StringIO())):
    table.watch()
    table.ended(jobs[0], None)
    table.ended(jobs[1], 'out of luck')
    assert capsys.readouterr().out == 'sweep: 1x1_lm: done, loss 0.2500\nsweep: 2x2_lm: failed: out of luck\n'


def test_a_table_is_drawn_again_once_a_second_has_passed_and_never_elsewhere(tmp_path, monkeypatch):
  now, job = [1.5], Job('1x1', None)  # seconds since the machine started, as some systems count
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  out, drawn = Terminal(), []
  table, elsewhere = progress.LiveTable([job], tmp_path, out=out), progress.LiveTable([job], tmp_path, live=False, out=Terminal())
  for now[0] in (1.5, 2.0, 2.5, 3.0, 4.0):
    table.watch()
    elsewhere.watch()
    drawn.append(out.shown.count('waiting'))
  assert drawn == [1, 1, 2, 2, 3] and elsewhere._out.getvalue() == ''


def test_a_table_fits_its_terminal_and_shows_what_failed(tmp_path, monkeypatch):
  monkeypatch.setattr(progress.shutil, 'get_terminal_size', lambda: os.terminal_size((16, 5)))
  jobs, out = [Job(f'{i}x1', None) for i in range(4)], Terminal()
  table = progress.LiveTable(jobs, tmp_path, out=out)
  table.ended(jobs[3], 'no luck')
  assert out.getvalue().split('\n') == ['3x1_lm  failed', '0x1_lm  waiting', '0 of 4 done, 1 ', '']
  monkeypatch.setattr(progress.shutil, 'get_terminal_size', lambda: os.terminal_size((80, 2)))
  table.ended(jobs[3], None)  # erases three lines, and shows a job and the totals wherever it can
  assert out.getvalue().endswith('\x1b[3F\x1b[J3x1_lm  failed\n0 of 4 done, 1 failed, 3 not shown\n')


@pytest.mark.parametrize(
  ('lines', 'expected'),
  [
    ([{'step': 7, 'loss': 0.5}, *({'step': 7, 'note': 'x' * 90} for _ in range(60))], JobState(7, 0.5)),  # within the last 8 KiB
    ([{'step': 7, 'loss': 0.5}, *({'step': 7, 'note': 'x' * 90} for _ in range(90))], JobState()),
    ([{'step': 7, 'loss': 0.5}], JobState(7, 0.5)),
    ([{'step': 7, 'loss': 0.5}, {'step': 8, 'loss': 1}, {'step': None, 'loss': 0.4}, [1], {'loss': 0.1}], JobState(7, 0.5)),
  ],
)
def test_the_last_step_is_read_from_the_end_of_a_file(tmp_path, lines, expected):
  job = Job('8x1', None)
  job.folder(tmp_path).mkdir(parents=True)
  (job.folder(tmp_path) / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert progress.read_state(job, tmp_path) == expected


def test_a_state_in_words():
  states = [JobState(), JobState(3, 0.5), JobState(3, 0.5, done=True), JobState(3, 0.5, error='oh'), JobState(3, None, True, 'oh')]
  assert [state.status for state in states] == ['waiting', 'step 3', 'done', 'failed', 'failed']


@pytest.mark.parametrize(('size', 'expected'), [(8_192, JobState(7, 0.5)), (8_193, JobState())])
def test_the_last_eight_kibibytes_of_a_file_are_read(tmp_path, size, expected):
  job, line = Job('8x1', None), '{"step": 7, "loss": 0.5}\n'
  job.folder(tmp_path).mkdir(parents=True)
  note = '{"step": 7, "note": "%s"}\n'
  (job.folder(tmp_path) / 'metrics.jsonl').write_text('x' * 99 + '\n' + line + note % ('x' * (size - len(line + note % ''))))
  assert progress.read_state(job, tmp_path) == expected
