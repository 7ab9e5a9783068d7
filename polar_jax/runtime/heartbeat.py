"""Per-process heartbeats, and a report of which processes are behind when a run stalls.

Each process regularly writes its position in the run, and the time it got there, to heartbeats/<process>.json in the workdir. A process
whose position has not changed for too long also writes its stacks; process 0 then reads the files of all and reports which are behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from polar_jax.runtime import json_files
from polar_jax.runtime.paths import write_atomically

FOLDER = 'heartbeats'
_STACK_LINES = 12  # of a report, for each process that is behind


class Position(NamedTuple):
  """The position of a process in its run."""

  phase: str
  step: int
  since: float  # time.time()


_position = Position('start', 0, time.time())


def at(phase: str, step: int = 0) -> None:
  """Record that this process has reached `step` of `phase`. It costs nothing: the next heartbeat writes it."""
  global _position
  _position = Position(phase, step, time.time())


@contextlib.contextmanager
def beating(workdir: pathlib.Path, process: int, processes: int, every: float, stall: float) -> Iterator[None]:
  """Write heartbeats while in scope, if the run has several processes.

  Args:
    workdir: of the run.
    process: index of this process.
    processes: their number.
    every: seconds between heartbeats.
    stall: seconds at one position after which a report is made.
  """
  if processes == 1:
    yield
    return
  ended = threading.Event()
  writer = _HeartbeatWriter(workdir / FOLDER, process, processes, stall)
  thread = threading.Thread(target=writer.write_until, args=(ended, every), name='heartbeat', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(timeout=5)


class _HeartbeatWriter:
  def __init__(self, folder: pathlib.Path, process: int, processes: int, stall: float):
    self._folder, self._process, self._processes, self._stall = folder, process, processes, stall
    self._reported: Position | None = None  # for which stacks were written and the report was made
    self._started = time.time()
    for kind in ('json', 'stack'):  # of an earlier run
      (folder / f'{process}.{kind}').unlink(missing_ok=True)

  def write_until(self, ended: threading.Event, every: float) -> None:
    while True:
      with contextlib.suppress(OSError):  # a full disk must not end a run that could go on
        self._write()
      if ended.wait(every):
        return

  def _write(self) -> None:
    position, now = _position, time.time()
    self._folder.mkdir(parents=True, exist_ok=True)
    stalled = now - max(position.since, self._started) > self._stall
    if stalled and self._reported != position:
      self._write_stacks()
    beat = {'host': socket.gethostname(), 'pid': os.getpid(), **position._asdict(), 'time': now}
    write_atomically(self._folder / f'{self._process}.json', json.dumps(beat) + '\n')
    if stalled and self._reported != position:
      self._reported = position
      if self._process == 0:
        time.sleep(min(self._stall, 2.0))  # the others have stalled too and are writing theirs
        print('\n'.join(report(self._folder, self._processes, self._stall)), file=sys.stderr, flush=True)

  def _write_stacks(self) -> None:
    with (self._folder / f'{self._process}.stack').open('w') as file:
      faulthandler.dump_traceback(file, all_threads=True)


def report(folder: pathlib.Path, processes: int, stall: float) -> list[str]:
  """Return the position of each process, and the stacks of those that are behind.

  Args:
    folder: of the heartbeats.
    processes: their number.
    stall: seconds after which a process counts as silent.
  """
  now = time.time()
  beats: dict[int, dict[str, Any]] = {}
  for process in range(processes):
    with contextlib.suppress(KeyError, OverflowError, TypeError, ValueError):  # a damaged heartbeat is none
      beat = json_files.read(folder / f'{process}.json', '')
      times = {name: float(beat[name]) for name in ('time', 'since')}
      beats[process] = {name: beat[name] for name in ('host', 'pid', 'phase', 'step')} | times
  lines = [f'polar_jax: no progress for {stall:g} s. {processes} processes:']
  behind = _behind(beats, processes, now, stall)
  for process in range(processes):
    beat = beats.get(process)
    if beat is None:
      lines.append(f'  process {process}: no heartbeat received')
      continue
    silent = now - beat['time']
    position = f'{beat["phase"]}, step {beat["step"]}, for {now - beat["since"]:.0f} s'
    late = f'; SILENT for {silent:.0f} s' if silent > stall else ''
    lines.append(f'  process {process} on {beat["host"]} (pid {beat["pid"]}): {position}{late}{" <- behind" if process in behind else ""}')
  for process in behind:
    lines += _stack(folder / f'{process}.stack', process)
  return lines


def _behind(beats: dict[int, dict[str, Any]], processes: int, now: float, stall: float) -> list[int]:
  """Return the processes that are silent or never sent a heartbeat; if all are alive, those that are not at the newest position."""
  gone = [p for p in range(processes) if p not in beats or now - beats[p]['time'] > stall]
  if gone:
    return gone
  # Of processes that wait for each other, all but the late ones are at the position that was reached last.
  positions = {p: (beat['phase'], beat['step']) for p, beat in beats.items()}
  newest = positions[max(beats, key=lambda p: beats[p]['since'])]
  return [p for p in beats if positions[p] != newest]


def _stack(path: pathlib.Path, process: int) -> list[str]:
  """Return the stack of a process's main thread, which faulthandler writes last, innermost call first."""
  try:
    text = path.read_text()
  except OSError:
    return [f'  process {process} wrote no stack']
  main = text.split('\n\n')[-1].strip().splitlines()
  return [f'  process {process} is at (innermost call first):', *(f'    {line.strip()}' for line in main[1 : 1 + _STACK_LINES])]
