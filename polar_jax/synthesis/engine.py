"""Samples the units of a pool: servers in threads of their own, all at once; the other policies one after the other meanwhile."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from polar_jax.runtime import preemption
from polar_jax.synthesis.plan import Plan, Unit
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, QuarantineError, Sample, Sampler
from polar_jax.synthesis.store import Store
from polar_jax.synthesis.workers import Attempt, Tasks, Watch
from polar_jax.types import one_line

Backend = Callable[[Tasks, Watch], Generator[Attempt, None, None]]
_LANES = 2  # units of a server in flight, so that it is busy while one of them ends
_SHOW_SECONDS = 10.0
_POLL_SECONDS = 0.2


@dataclasses.dataclass
class _Progress:
  """How far a policy is."""

  total: int  # units
  done: int = 0
  samples: int = 0  # of this process
  started: float | None = None

  def line(self, name: str, now: float) -> str:
    """Return a line about the policy."""
    elapsed = max(now - (self.started or now), 1e-9)
    rate = self.samples / elapsed
    left = (self.total - self.done) * elapsed / self.done if self.done else None
    return f'synthesize: {name}  unit {self.done:,}/{self.total:,}  {rate:,.1f} samples/s' + (
      '' if left is None or self.done == self.total else f'  {_duration(left)} left'
    )


class Engine:
  """Samples what a plan lacks.

  Args:
    plan: of the units.
    store: receives their results.
    log: receives lines about progress.
    stop: is set when the run stops, so that waits for servers end.
  """

  def __init__(self, plan: Plan, store: Store, log: Callable[[str], None], stop: threading.Event):
    self._plan, self._store, self._log, self._stop = plan, store, log, stop
    self._progress: dict[str, _Progress] = {}
    self._shown = time.monotonic()
    self._failed: list[BaseException] = []
    self._run = store.start_run()
    self.quarantined: dict[str, str] = {}  # name -> reason

  def run(self, servers: Mapping[str, Sampler], local: Sequence[PolicySpec], backend: Backend) -> None:
    """Sample all that is missing.

    Args:
      servers: by the name of their policy; sampled at the same time.
      local: the other policies, one after the other.
      backend: samples the units of the latter; see `workers.run`.

    Raises:
      UserError: a result cannot be stored, or a model of this process cannot be used.
      StopRequested: SIGTERM arrived. What is finished is stored.
    """
    for name in [*servers, *(spec.name for spec in local)]:
      self._progress[name] = _Progress(self._plan.missing(name))
    threads = [thread for name, sampler in servers.items() for thread in self._lanes(name, sampler)]
    try:
      for thread in threads:
        thread.start()
      if local:
        self._sample_local(local, backend)
      while any(thread.is_alive() for thread in threads):
        self._check()
        time.sleep(_POLL_SECONDS)
    except BaseException:
      self._stop.set()
      raise
    finally:
      for thread in threads:
        thread.join()
    self._raise()
    self._show(last=True)

  def _sample_local(self, local: Sequence[PolicySpec], backend: Backend) -> None:
    costs: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def tasks() -> Iterator[tuple[PolicySpec, Unit]]:
      for spec in local:
        for unit in self._plan.units(spec.name):
          if spec.name in self.quarantined:
            break
          self._progress[spec.name].started = self._progress[spec.name].started or time.monotonic()
          yield spec, unit

    attempts = backend(tasks(), self._check)
    try:
      for attempt in attempts:
        name = attempt.unit.policy
        if isinstance(attempt.results, QuarantineError):
          self._give_up(name, attempt.results)
          continue
        costs[name].update(attempt.counts)
        self._finish(attempt.unit, attempt.results, costs[name])
    finally:
      attempts.close()  # at once: it ends the processes

  def _lanes(self, name: str, sampler: Sampler) -> list[threading.Thread]:
    """Return the threads that sample one server, which take its units from one queue."""
    units, lock = self._plan.units(name), threading.Lock()

    def queue() -> Iterator[Unit]:
      while True:
        with lock:
          unit = next(units, None)
        if unit is None or name in self.quarantined or self._stop.is_set():
          return
        yield unit

    def work() -> None:
      try:
        self._sample(name, sampler, queue())
      except BaseException as error:
        if not self._stop.is_set():
          self._failed.append(error)

    count = min(_LANES, self._progress[name].total)
    return [threading.Thread(target=work, name=f'{name} {lane}', daemon=True) for lane in range(count)]

  def _sample(self, name: str, sampler: Sampler, units: Iterator[Unit]) -> None:
    """Sample units of a server, and store each when it is done."""
    self._progress[name].started = self._progress[name].started or time.monotonic()
    for unit in units:
      try:
        results = sampler.sample(unit.requests)
      except QuarantineError as error:
        self._store.count(name, self._run, sampler.counts())
        self._give_up(name, error)
        return
      self._finish(unit, results, sampler.counts())

  def _finish(self, unit: Unit, results: Sequence[Sample | Failure], counts: Mapping[str, int]) -> None:
    self._store.finish_unit(unit.policy, unit.shard, unit.requests, results, self._run, counts)
    progress = self._progress[unit.policy]
    progress.done += 1
    progress.samples += len(unit.requests)

  def _give_up(self, name: str, error: QuarantineError) -> None:
    if name not in self.quarantined:
      self.quarantined[name] = one_line(str(error))
      self._log(f'synthesize: {name}: given up, and what it finished is kept: {error}')

  def _check(self) -> None:
    """Look after everything that is not done in this thread."""
    preemption.check()
    self._raise()
    if time.monotonic() - self._shown > _SHOW_SECONDS:
      self._show()

  def _raise(self) -> None:
    if self._failed:
      raise self._failed[0]

  def _show(self, last: bool = False) -> None:
    self._shown = time.monotonic()
    for name, progress in self._progress.items():
      if progress.started is not None and name not in self.quarantined and (last or progress.done < progress.total):
        self._log(progress.line(name, self._shown))


def _duration(seconds: float) -> str:
  for size, unit in ((3600, 'h'), (60, 'min')):
    if seconds >= size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.0f} s'
