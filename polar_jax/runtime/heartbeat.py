"""Signs of life of the processes of a run, and a report of who lags behind when nothing moves any more.

Each process writes heartbeats/<process>.json in the workdir now and then: where it is, and since when. One that has been at the same
place for too long writes down its stacks as well; the first process then reads what all have written, and says who is behind.
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

FOLDER = 'heartbeats'
_STACK_LINES = 12  # of a report, for each process that lags


class Place(NamedTuple):
  """Where a process is in its run."""

  phase: str
  step: int
  since: float  # time.time()


_place = Place('start', 0, time.time())


def at(phase: str, step: int = 0) -> None:
  """Notes that this process has come to `step` of `phase`. Costs nothing: the next beat tells it."""
  global _place
  _place = Place(phase, step, time.time())


@contextlib.contextmanager
def beating(workdir: pathlib.Path, process: int, processes: int, every: float, stall: float) -> Iterator[None]:
  """Beats while in scope; a run of one process does not need it.

  Args:
    every: seconds between beats.
    stall: seconds at one place after which a process is said to lag.
  """
  if processes == 1:
    yield
    return
  ended = threading.Event()
  heart = _Heart(workdir / FOLDER, process, processes, stall)
  thread = threading.Thread(target=heart.beat_until, args=(ended, every), name='heartbeat', daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join(timeout=5)


class _Heart:
  def __init__(self, folder: pathlib.Path, process: int, processes: int, stall: float):
    self._folder, self._process, self._processes, self._stall = folder, process, processes, stall
    self._told: Place | None = None  # the place for which stacks were written and the report was made
    self._started = time.time()
    for kind in ('json', 'stack'):  # of an earlier start
      (folder / f'{process}.{kind}').unlink(missing_ok=True)

  def beat_until(self, ended: threading.Event, every: float) -> None:
    while True:
      with contextlib.suppress(OSError):  # a full disk must not end a run that could go on
        self._beat()
      if ended.wait(every):
        return

  def _beat(self) -> None:
    place, now = _place, time.time()
    self._folder.mkdir(parents=True, exist_ok=True)
    stalled = now - max(place.since, self._started) > self._stall
    if stalled and self._told != place:
      self._write_stacks()
    beat = {'host': socket.gethostname(), 'pid': os.getpid(), **place._asdict(), 'time': now}
    temporary = self._folder / f'{self._process}.json.tmp'
    temporary.write_text(json.dumps(beat) + '\n')
    os.replace(temporary, self._folder / f'{self._process}.json')
    if stalled and self._told != place:
      self._told = place
      if self._process == 0:
        time.sleep(min(self._stall, 2.0))  # the others, which stand as long, write theirs
        print('\n'.join(report(self._folder, self._processes, self._stall)), file=sys.stderr, flush=True)

  def _write_stacks(self) -> None:
    with (self._folder / f'{self._process}.stack').open('w') as file:
      faulthandler.dump_traceback(file, all_threads=True)


def report(folder: pathlib.Path, processes: int, stall: float) -> list[str]:
  """Who is where, those behind first named, with the stacks that they wrote."""
  now = time.time()
  beats: dict[int, dict[str, Any]] = {}
  for process in range(processes):
    with contextlib.suppress(OSError, ValueError):
      beats[process] = json.loads((folder / f'{process}.json').read_text())
  lines = [f'polar_jax: nothing has moved for {stall:g} s. {processes} processes:']
  behind = _behind(beats, processes, now, stall)
  for process in range(processes):
    beat = beats.get(process)
    if beat is None:
      lines.append(f'  process {process}: has never been heard of')
      continue
    silent = now - beat['time']
    said = f'{beat["phase"]}, step {beat["step"]}, for {now - beat["since"]:.0f} s'
    late = f'; SILENT for {silent:.0f} s' if silent > stall else ''
    lines.append(f'  process {process} on {beat["host"]} (pid {beat["pid"]}): {said}{late}{" <- behind" if process in behind else ""}')
  for process in behind:
    lines += _stack(folder / f'{process}.stack', process)
  return lines


def _behind(beats: dict[int, dict[str, Any]], processes: int, now: float, stall: float) -> list[int]:
  """Processes that are silent or were never heard of; where all are alive, those that came to their place first."""
  gone = [p for p in range(processes) if p not in beats or now - beats[p]['time'] > stall]
  if gone:
    return gone
  # Of processes that wait for each other, all but those that are late stand at the place that came last.
  places = {p: (beat['phase'], beat['step']) for p, beat in beats.items()}
  newest = places[max(beats, key=lambda p: beats[p]['since'])]
  return [p for p in beats if places[p] != newest]


def _stack(path: pathlib.Path, process: int) -> list[str]:
  """The stack of a process's main thread, which faulthandler writes last, innermost call first."""
  try:
    text = path.read_text()
  except OSError:
    return [f'  process {process} has written no stack']
  main = text.split('\n\n')[-1].strip().splitlines()
  return [f'  process {process} is at (innermost call first):', *(f'    {line.strip()}' for line in main[1 : 1 + _STACK_LINES])]
