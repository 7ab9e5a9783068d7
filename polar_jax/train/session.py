"""The parts that supervised runs and PPO runs share: checkpoints, logs, clock, progress, SIGTERM handling and the summary."""

from __future__ import annotations

import contextlib
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import jax

from polar_jax.checkpoints import space
from polar_jax.checkpoints.checkpointer import Checkpointer
from polar_jax.config import CheckpointingConfig, ProfileConfig
from polar_jax.runtime import heartbeat, json_files, paths
from polar_jax.runtime.preemption import Preempted, SigtermFlag, StopRequested
from polar_jax.train.goodput import GoodputClock
from polar_jax.train.metrics import SUMMARY, MetricsLog, StepLog, StepProgress, fetch_logs, keep_logs
from polar_jax.train.profile import Profiler


class NonFiniteError(RuntimeError):
  """A loss, a gradient or another quantity of a step is not finite. Nothing was saved since the last checkpoint."""


class SessionSettings(Protocol):
  """The fields of a run that a session reads."""

  @property
  def name(self) -> str:
    """Name of the run."""
    ...

  @property
  def folder(self) -> pathlib.Path:
    """Folder of the logs."""
    ...

  @property
  def home(self) -> pathlib.Path:
    """Folder of the checkpoints: the same, or one in a bucket."""
    ...

  @property
  def checkpointing(self) -> CheckpointingConfig:
    """When to save, and what to keep."""
    ...

  @property
  def profile(self) -> ProfileConfig:
    """The steps to profile."""
    ...

  @property
  def fingerprint(self) -> dict[str, Any]:
    """Settings that must not change when the run is resumed."""
    ...

  @property
  def log(self) -> Callable[[str], None]:
    """Receives messages."""
    ...

  @property
  def steps(self) -> int:
    """Number of steps of the whole run."""
    ...


class Session:
  """One start of a run: everything that it opens, and the order in which it logs, saves and stops.

  Usage: `restore` if `resumed`, `open_logs`, then inside `running` one `advance` for each step, and `finish` after the last one.

  Attributes:
    step: steps taken, including those of earlier starts.
    first_step: value of `step` at this start.
    resumed: whether there is a checkpoint to continue from.
    metrics: open after `open_logs`; likewise `progress`.
  """

  metrics: MetricsLog
  progress: StepProgress

  def __init__(self, run: SessionSettings, best_metric: str, *, best_is_lower: bool, started: float | None = None):
    """Start the clock and open the checkpoints.

    Args:
      run: its settings.
      best_metric: name of the metric that decides which checkpoints are the best.
      best_is_lower: whether a lower value of it is better.
      started: reading of `time.perf_counter()` at the start of the stage; None: now.
    """
    self._run = run
    self.clock = GoodputClock(started)
    self.checkpointer = Checkpointer(run.home, run.checkpointing, best_metric, best_is_lower=best_is_lower)
    self.profiler = Profiler(run.profile, run.folder, run.log)
    self.resumed = self.checkpointer.latest is not None
    self.step = self.first_step = 0
    self._earlier_seconds: dict[str, float] = {}
    self._logs: list[StepLog] = []
    self._open = contextlib.ExitStack()

  def check_space(self, abstract: Any, evaluate_every: int | None = None) -> None:
    """Check that the disk has room for the checkpoints of all remaining steps.

    Args:
      abstract: the state that is saved, as shapes.
      evaluate_every: steps between evaluations that are followed by a checkpoint; None: there are none.

    Raises:
      ConfigError: it has not.
    """
    run, on_disk = self._run, self.checkpointer.steps
    if jax.process_index() == 0:
      count = space.most_at_once(run.checkpointing, max(on_disk, default=0), run.steps, evaluate_every)
      most = run.checkpointing.keep + run.checkpointing.keep_best + 1
      count = min(count, max(most - len(on_disk), 0))  # older ones make room for new ones
      space.check(run.name, run.home, run.checkpointing, count * space.size_of(abstract))

  def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Return the state of the newest checkpoint, laid out like `abstract`, and the data saved with it.

    Raises:
      ConfigError: the checkpoint was made with other settings, or no checkpoint can be read.
    """
    state, data = self.checkpointer.restore(abstract, self._run.fingerprint)
    self.step = self.first_step = data['step']
    self._earlier_seconds = data.get('seconds', {})  # older checkpoints have none
    self._run.log(f'{self._run.name}: resumed from step {self.step} of {self._run.steps}')
    return state, data

  def open_logs(self, log_every: int, evaluates_again: bool = False) -> None:
    """Open metrics.jsonl and the progress display. Records of steps after the restored one are dropped.

    Args:
      log_every: steps between plain lines of progress.
      evaluates_again: drop also an evaluation of the restored step, because SIGTERM stopped it and the run repeats it.
    """
    run = self._run
    fetch_logs(run.folder, run.home, self.step)
    self.metrics = MetricsLog(run.folder, self._last_step, evaluates_again)
    self._logs.append(self.metrics)
    self.clock.resume(self._earlier_seconds, self.metrics.lost)
    self.progress = self._open.enter_context(contextlib.closing(StepProgress(run.name, run.steps, self.step, log_every)))

  def open_log(self, file: str) -> StepLog:
    """Open one more log of steps, which is flushed and closed with the session. Call it after `open_logs`."""
    self._logs.append(StepLog(self._run.folder, self._last_step, file))
    return self._logs[-1]

  @property
  def _last_step(self) -> int:
    """Last step whose records stay; -1 drops also those of an evaluation before the first step."""
    return self.step if self.resumed else -1

  @property
  def steps_taken(self) -> int:
    """Steps of this start."""
    return self.step - self.first_step

  @property
  def is_complete(self) -> bool:
    """Whether all steps of the run are taken."""
    return self.step >= self._run.steps

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Scope of the training loop, in which SIGTERM means: save, then stop."""
    self._loop_started = time.perf_counter()
    with SigtermFlag() as self._sigterm:
      self.clock.lap('start')
      yield

  def advance(self) -> None:
    """Count one step."""
    self.step += 1
    heartbeat.at(self._run.name, self.step)

  @property
  def is_save_due(self) -> bool:
    """Whether a checkpoint is due by the number of steps; the one after the last step is written by `finish`."""
    return not self.is_complete and self.step % self._run.checkpointing.every_steps == 0

  def save(self, state: Any, data: Mapping[str, Any], metrics: dict[str, float], *, again: bool = False) -> None:
    """Start saving a checkpoint.

    Args:
      state: named tuple of arrays, which may be overwritten when this returns.
      data: JSON values that a resumed run needs, in addition to the step and the seconds.
      metrics: decide which checkpoint is the best; empty: this one is not a candidate.
      again: replace the checkpoint of this step, whose evaluation SIGTERM had stopped.
    """
    # A checkpoint promises that its steps are logged, so their records are on disk first.
    for log in self._logs:
      log.flush()
    keep_logs(self._run.folder, self._run.home)
    data = {'step': self.step, **data, 'seconds': self.clock.seconds}
    self.checkpointer.save(self.step, state, data, self._run.fingerprint, metrics, again=again)

  def stop_if_preempted(self, save: Callable[[], None], *, finished: bool) -> None:
    """Save and stop after SIGTERM. All processes must call this equally often.

    Args:
      save: calls `save` of this session.
      finished: whether no step is left, so that the run ends as usual.

    Raises:
      Preempted: SIGTERM arrived; the state is saved.
    """
    if self._sigterm.is_set() and not finished:
      self._save_and_stop(save)

  @contextlib.contextmanager
  def saving_if_stopped(self, save: Callable[[], None]) -> Iterator[None]:
    """Scope of work that may take long and changes nothing that `save` saves until it is done, so that a resumed run can repeat it.

    Args:
      save: calls `save` of this session.

    Raises:
      Preempted: SIGTERM arrived in a loop of this work; the state is saved.
    """
    try:
      yield
    except StopRequested:
      self._save_and_stop(save)

  def _save_and_stop(self, save: Callable[[], None]) -> NoReturn:
    if self.step == 0:
      raise Preempted(self._run.name, 'before its first step') from None
    save()
    self.checkpointer.wait()
    raise Preempted(self._run.name, self.step) from None

  def finish(self, save: Callable[[], None], summarize: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Save the last step, unless it is saved already, wait for all checkpoints, and write summary.json.

    Args:
      save: calls `save` of this session.
      summarize: given the summary's entries on time, returns the whole summary.

    Returns:
      The summary. It is empty on all processes but the first, whose disk alone is sure to have the metrics.

    Raises:
      Preempted: SIGTERM arrived too late to cut this run short, but the next stage must not start.
    """
    if self.steps_taken or not self.resumed:
      save()
    self.checkpointer.wait()
    self.clock.lap('save')
    summary = self._write_summary(summarize)
    if self._sigterm.is_set():
      raise Preempted(self._run.name, self.step)
    return summary

  def _write_summary(self, summarize: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    seconds = time.perf_counter() - self._loop_started
    path = self._run.folder / SUMMARY
    if jax.process_index() != 0:
      return {}
    if self.steps_taken == 0 and path.exists():
      return json_files.read(path, 'delete it, and the same command writes it again')
    by_part = {part: round(value, 3) for part, value in self.clock.seconds.items()}
    summary = summarize({'seconds': seconds, 'seconds_by_part': by_part, 'goodput': self.clock.goodput})
    paths.write_atomically(path, json_files.dumps(summary, indent=2) + '\n')
    keep_logs(self._run.folder, self._run.home)
    return summary

  def close(self) -> None:
    """Close everything, and wait for checkpoints that are being written."""
    self.profiler.close()
    self._open.close()
    for log in self._logs:
      log.close()
    self.checkpointer.close()
