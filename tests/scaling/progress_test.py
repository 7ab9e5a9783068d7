"""The table of a sweep's jobs."""

from __future__ import annotations

import io
import json

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
  def isatty(self):
    return True


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
