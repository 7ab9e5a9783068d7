"""What the server tells its operator: metrics in Prometheus's format, and one line of JSON for each request.

Neither holds texts, tokens, addresses or secrets.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from polar_jax.serve.engine import Engine, Observer

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_COMPILED = '/jax/core/compile/backend_compile_duration'  # JAX's name of the event
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SIZES = tuple(4**k for k in range(10))
_LINES = 10_000  # of the log that may wait for a slow reader


class _Compilations:
  """Counts the programs that this process compiles, from the first use on."""

  def __init__(self) -> None:
    self.count = 0
    self._lock = threading.Lock()
    jax.monitoring.register_event_duration_secs_listener(self._add)

  def _add(self, event: str, *_: Any, **__: Any) -> None:
    if event == _COMPILED:
      with self._lock:
        self.count += 1


_compilations: _Compilations | None = None
_compilations_lock = threading.Lock()


def compilations() -> int:
  """Return how many programs this process has compiled since the first call."""
  global _compilations
  with _compilations_lock:
    if _compilations is None:
      _compilations = _Compilations()
  return _compilations.count


class Metrics(Observer):
  """Counts of one server. Names begin with `polar_`; durations are in seconds.

  Args:
    log: is told what the warm-up has compiled, which takes long for long rows.
  """

  def __init__(self, log: Log) -> None:
    self._log = log
    self.registry = CollectorRegistry()
    named: Any = {'registry': self.registry, 'namespace': 'polar'}
    self._requests = Counter('requests', 'Answered requests.', ('endpoint', 'status'), **named)
    self._latency = Histogram(
      'request_seconds', 'From the first byte of a request to its answer.', ('endpoint',), buckets=_LATENCIES, **named
    )
    self._refused = Counter('refused', 'Requests that were refused.', ('reason',), **named)
    self._aborted = Counter('aborted', 'Requests whose client hung up before the answer.', **named)
    self._dropped = Counter('dropped_sequences', 'Sequences that left the queue unscored.', ('reason',), **named)
    self._tokens = Counter('tokens', 'Tokens of scored sequences; what sequences share counts for each.', **named)
    self._sequences = Counter('sequences', 'Scored sequences.', **named)
    self._truncated = Counter('truncated_sequences', 'Scored sequences of which the template cut something off.', **named)
    self._batch_sequences = Histogram('batch_sequences', 'Distinct sequences of a batch.', buckets=_SIZES, **named)
    self._batch_tokens = Histogram('batch_tokens', 'Token positions computed for a batch, padding included.', buckets=_SIZES, **named)
    self._computed = Counter('computed_tokens', 'Token positions computed, padding included.', **named)
    self._queue_sequences = Gauge('queue_sequences', 'Sequences that wait.', **named)
    self._queue_tokens = Gauge('queue_tokens', 'Tokens that wait.', **named)
    self._in_progress = Gauge('requests_in_progress', 'Requests that are read, scored or answered.', **named)
    self._warm_up = Gauge('warm_up_shapes', 'Shapes compiled by the warm-up.', **named)
    self._late = Gauge('compilations_after_warmup', 'Programs compiled after the warm-up; more than 0 is a fault of the server.', **named)
    self._ready = Gauge('ready', '1 if the server accepts requests.', **named)
    self._compiled_before: int | None = None
    compilations()

  def compiled(self, shape: str) -> None:
    self._warm_up.inc()
    self._log('compiled', shape=shape)

  def warm(self) -> None:
    """Record that the warm-up has ended."""
    self._compiled_before = compilations()

  @property
  def late_compilations(self) -> int:
    """Programs compiled after the warm-up."""
    return 0 if self._compiled_before is None else compilations() - self._compiled_before

  def batch(self, sequences: int, tokens: int, padded: int) -> None:
    self._batch_sequences.observe(sequences)
    self._batch_tokens.observe(padded)
    self._computed.inc(padded)

  def dropped(self, sequences: int, reason: str) -> None:
    self._dropped.labels(reason).inc(sequences)

  def answered(self, endpoint: str, status: int, seconds: float) -> None:
    """Record the answer of a request."""
    self._requests.labels(endpoint, str(status)).inc()
    self._latency.labels(endpoint).observe(seconds)

  def refused(self, reason: str) -> None:
    """Record that a request was refused."""
    self._refused.labels(reason).inc()

  def aborted(self) -> None:
    """Record that a client hung up."""
    self._aborted.inc()

  def scored(self, sequences: int, tokens: int, truncated: int) -> None:
    """Record what a request received."""
    self._sequences.inc(sequences)
    self._tokens.inc(tokens)
    self._truncated.inc(truncated)

  def totals(self) -> dict[str, int]:
    """Return what was scored so far."""
    read = lambda name: int(self.registry.get_sample_value(f'polar_{name}_total') or 0)
    return {name: read(name) for name in ('sequences', 'tokens', 'truncated_sequences', 'aborted')}

  def page(self, engine: Engine, in_progress: int, ready: bool) -> bytes:
    """Return all metrics as text."""
    self._queue_sequences.set(engine.waiting_sequences)
    self._queue_tokens.set(engine.waiting_tokens)
    self._in_progress.set(in_progress)
    self._late.set(self.late_compilations)
    self._ready.set(int(ready))
    return prometheus_client.generate_latest(self.registry)


class Log:
  """Lines of JSON, written by a thread of its own: a reader that does not read stops no request, but loses lines.

  Args:
    write: takes a line; None: to standard output.
  """

  def __init__(self, write: Callable[[str], object] | None = None):
    self._write = write or _print
    self._lines: queue.Queue[str | None] = queue.Queue(_LINES)
    self._thread = threading.Thread(target=self._run, name='log', daemon=True)
    self._thread.start()

  def __call__(self, event: str, **fields: Any) -> None:
    line = json.dumps({'time': round(time.time(), 3), 'event': event, **fields}, allow_nan=False)
    with contextlib.suppress(queue.Full):
      self._lines.put_nowait(line)

  def close(self) -> None:
    """Write what waits, for at most a few seconds."""
    with contextlib.suppress(queue.Full):
      self._lines.put(None, timeout=1)
    self._thread.join(timeout=5)

  def _run(self) -> None:
    while (line := self._lines.get()) is not None:
      with contextlib.suppress(OSError, ValueError):  # a closed pipe
        self._write(line)


def _print(line: str) -> None:
  sys.stdout.write(line + '\n')
  sys.stdout.flush()
