"""Reports of stalled runs, from heartbeat files. Real processes: distributed_test.py."""

from __future__ import annotations

import json
import threading
import time

import pytest

from polar_jax.runtime import heartbeat


def write(folder, process, phase, step, since=0.0, silent=0.0):
  now = time.time()
  beat = {'host': f'h{process}', 'pid': process, 'phase': phase, 'step': step, 'since': now - since, 'time': now - silent}
  (folder / f'{process}.json').write_text(json.dumps(beat))


def test_report_names_processes_at_an_earlier_step(tmp_path):
  write(tmp_path, 0, 'pretrain', 8, since=300)
  write(tmp_path, 1, 'pretrain', 7, since=310)
  write(tmp_path, 2, 'pretrain', 8, since=299)
  (tmp_path / '1.stack').write_text(
    'Thread 0x1:\n  File "a.py", line 1 in run\n\nCurrent thread 0x2 (most recent call first):\n  File "b.py", line 3 in read\n'
  )
  lines = heartbeat.report(tmp_path, 3, 200)
  assert [line for line in lines if 'behind' in line] == [lines[2]] and 'process 1 on h1 (pid 1): pretrain, step 7' in lines[2]
  assert lines[-2:] == ['  process 1 is at (innermost call first):', '    File "b.py", line 3 in read']


def test_report_names_silent_and_missing_processes(tmp_path):
  write(tmp_path, 0, 'pretrain', 8, since=300)
  write(tmp_path, 1, 'finetune', 1, since=290, silent=250)
  (tmp_path / '2.json').write_text('{"torn')
  text = '\n'.join(heartbeat.report(tmp_path, 3, 200))
  assert 'process 1 on h1 (pid 1): finetune, step 1, for 290 s; SILENT for 250 s <- behind' in text
  assert 'process 2: no heartbeat received' in text and 'process 2 wrote no stack' in text
  assert 'process 0 on h0' in text and 'process 0 is at' not in text


def test_no_report_while_a_process_advances(tmp_path, capsys):
  (tmp_path / 'heartbeats').mkdir()
  (tmp_path / 'heartbeats/0.stack').write_text('of an earlier run')
  with heartbeat.beating(tmp_path, 0, 2, every=0.02, stall=0.3):
    for step in range(20):
      heartbeat.at('pretrain', step)
      time.sleep(0.05)
    beat = json.loads((tmp_path / 'heartbeats/0.json').read_text())
  assert beat['phase'] == 'pretrain' and beat['step'] >= 18
  assert capsys.readouterr().err == '' and not list(tmp_path.glob('heartbeats/*.stack'))


def test_a_stalled_process_reports_once_with_its_stack(tmp_path, capsys):
  heartbeat.at('pretrain', 5)
  (tmp_path / 'heartbeats').mkdir()
  (tmp_path / 'heartbeats/0.stack').write_text('of an earlier run')
  with heartbeat.beating(tmp_path, 0, 2, every=0.02, stall=0.2):
    time.sleep(1.5)
  report = capsys.readouterr().err
  assert 'earlier run' not in (tmp_path / 'heartbeats/0.stack').read_text()
  assert report.count('no progress for 0.2 s') == 1 and 'process 1: no heartbeat received' in report
  assert 'test_a_stalled_process' in (tmp_path / 'heartbeats/0.stack').read_text()


@pytest.mark.parametrize('processes', [1, 2])
def test_heartbeats_end_with_their_scope_and_one_process_has_none(tmp_path, processes):
  with heartbeat.beating(tmp_path, 0, processes, every=0.02, stall=9):
    time.sleep(0.1)
    assert (tmp_path / 'heartbeats/0.json').exists() == (processes == 2)
  assert not [thread for thread in threading.enumerate() if thread.name == 'heartbeat']
