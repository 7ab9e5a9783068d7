"""The one trainer: resumes by itself, saves atomically, stops cleanly, and never waits for a metric it can fetch later."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints.checkpointer import Checkpointer
from polar_jax.config import CheckpointingConfig, ModelConfig, OptimizerConfig, ProfileConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.model import flops
from polar_jax.runtime import distributed, heartbeat
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.train import step as step_lib
from polar_jax.train.goodput import Clock
from polar_jax.train.metrics import SUMMARY, MetricsLog, Progress, fetch_logs, keep_logs, read_metrics, reward_histogram
from polar_jax.train.objectives import NEXT_TOKEN, Objective
from polar_jax.train.optimizer import learning_rate_schedule, make_optimizer, with_schedule, without_schedule
from polar_jax.train.profile import Profiler


class NonFiniteError(RuntimeError):
  """The loss or the gradient norm stopped being a number. Nothing was saved since."""


def batch_plan(train: TrainConfig, mesh: Mesh) -> pipeline.BatchPlan:
  """Return how the batches of a run are divided among devices, gradient accumulation and processes."""
  multiple = sharding.batch_shards(mesh) * train.gradient_accumulation_steps
  return pipeline.BatchPlan(train.batch_size, multiple, sharding.local_share(mesh))


def num_steps(train: TrainConfig, num_examples: int) -> int:
  """Return the configured number of steps, or that of one epoch of `num_examples`."""
  return train.steps or max(num_examples // train.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run: the model, its data and settings, and the folders it writes to.

  Attributes:
    folder: of the logs.
    home: of the checkpoints; the same folder, or one in a bucket.
    num_examples: triplets or windows of one epoch.
    plan: `batch_plan` of this run; `batches` and `validation` follow it.
    batches: the batch of every step.
    planned_rows: rows of most batches; another number means one more compilation.
    validation: the batches of one validation pass.
    load_start: loads the parameters that a new run starts from; a resumed run does not call it. None: start from scratch.
    fingerprint: settings that must not change when a run is resumed.
    threads: that read batches.
    prefetch: number of batches prepared ahead.
    started: `time.perf_counter()` at the start of the stage; seconds since then count as `start` in the goodput.
  """

  name: str
  folder: pathlib.Path
  home: pathlib.Path
  objective: Objective
  model: ModelConfig
  train: TrainConfig
  checkpointing: CheckpointingConfig
  profile: ProfileConfig
  mesh: Mesh
  seed: int
  num_examples: int
  plan: pipeline.BatchPlan
  batches: grain.MapDataset
  planned_rows: int
  validation: Iterable[Any] | None
  load_start: Callable[[], dict[str, Any]] | None
  fingerprint: dict[str, Any]
  threads: int
  prefetch: int
  log: Callable[[str], None]
  started: float = dataclasses.field(default_factory=time.perf_counter)

  @property
  def steps(self) -> int:
    """Number of steps of the whole run."""
    return len(self.batches)


class TrainedRun(NamedTuple):
  """The result of a training run."""

  params: dict[str, Any]  # after the last step, sharded over the mesh
  summary: dict[str, Any]  # content of `summary.json`; empty on all processes but the first


def train(run: Run) -> TrainedRun:
  """Train to the last step, resuming from the newest checkpoint.

  Raises:
    NonFiniteError: naming the step and the examples of its batch that gave a non-finite reward.
    Preempted: after SIGTERM, once the state is saved.
  """
  distributed.agree(run.name, run.fingerprint)
  with jax.set_mesh(run.mesh), contextlib.closing(_Trainer(run)) as trainer, distributed.leaving_when_lost():
    return trainer.run_to_end()


class _Trainer:
  def __init__(self, run: Run):
    self.run, config = run, run.train
    self.clock = Clock(run.started)
    # All at once: evaluated step by step it would queue behind the running step, and the host would wait for it.
    self.learning_rates = np.asarray(learning_rate_schedule(config, run.steps)(jnp.arange(run.steps)))
    self.functions = _functions(run.objective, run.model, config, run.steps, run.mesh, config.gradient_accumulation_steps)
    lm = run.objective is NEXT_TOKEN
    self.count_flops = flops.language_model_flops if lm else flops.reward_model_flops
    self.best_metric = 'validation_loss' if lm else 'validation_accuracy'
    self.checkpointer = Checkpointer(run.home, run.checkpointing, self.best_metric, best_is_lower=lm)
    self.compiled_rows = set[int]()
    self.profiler = Profiler(run.profile, run.folder, run.log)
    iterator = pipeline.iterate(run.batches, threads=run.threads, prefetch=run.prefetch)
    self.tokens, self.flops, self.step, self.validated, self.validated_step = 0, 0.0, 0, {}, -1
    earlier: dict[str, float] = {}
    if self.checkpointer.latest is None:
      self.state = self.functions.init(jax.random.key(run.seed), None if run.load_start is None else run.load_start())
    else:
      self.state, saved = self.checkpointer.restore(self.functions.abstract, run.fingerprint)
      iterator.set_state(saved['iterator'])
      self.tokens, self.flops, self.step, self.validated = (saved[name] for name in ('tokens', 'flops', 'step', 'validated'))
      earlier = saved.get('seconds', {})  # which checkpoints did not always have
      run.log(f'{run.name}: resumed from step {self.step} of {run.steps}')
    self.iterator = iterator
    fetch_logs(run.folder, run.home, self.step)
    self.metrics = MetricsLog(run.folder, self.step)
    self.clock.go_on(earlier, self.metrics.lost)
    self.progress = Progress(run.name, run.steps, self.step, config.log_every)
    self.pending: tuple[int, Any, dict[str, Any]] | None = None
    self.peak, self.peak_source = flops.peak_flops(jax.devices()[0])
    self.fetched_at = time.perf_counter()

  def run_to_end(self) -> TrainedRun:
    run, started, first = self.run, time.perf_counter(), self.step
    with SigtermFlag() as stop:
      self.clock.lap('start')
      while self.step < run.steps:
        host_batch = next(self.iterator)
        self.clock.lap('data')
        batch = sharding.put_local(host_batch, run.mesh)
        first_of_shape = self._note_shape(len(batch.tokens_BT))
        self.profiler.before(self.step - first)
        self.state, out = self.functions.train(self.state, batch)
        self.clock.lap('compile' if first_of_shape else 'step')
        self.step += 1
        heartbeat.at(run.name, self.step)
        self._finish_pending()
        self.pending = (self.step, out, self._host_facts(host_batch))
        self.profiler.after(self.step - first, out)
        self.clock.lap('step')
        self._maybe_validate()
        self.clock.lap('evaluate')
        if self.step < run.steps and (self.step % run.checkpointing.every_steps == 0 or self.validated_step == self.step):
          self._save()
          self.clock.lap('save')
        if stop.is_set() and self.step < run.steps:
          self._save()
          self.checkpointer.wait()
          raise Preempted(run.name, self.step)
      if first < run.steps:
        self._save()
      self.checkpointer.wait()
      self.clock.lap('save')
      summary = self._summary(time.perf_counter() - started, self.step - first)
      if stop.is_set():  # too late to cut this run short, but the next stage must not start
        raise Preempted(run.name, self.step)
    return TrainedRun(self.state.params, summary)

  def _note_shape(self, rows: int) -> bool:
    """Whether a step with so many rows is the first of this start: then it is compiled. Says so where that was not planned."""
    if rows in self.compiled_rows:
      return False
    self.compiled_rows.add(rows)
    if rows != self.run.planned_rows:
      self.run.log(f'{self.run.name}: step {self.step + 1} needs {rows} rows, planned {self.run.planned_rows}: one more compilation')
    return True

  def _host_facts(self, batch: Any) -> dict[str, Any]:
    """What the host knows of a batch without asking the device. On several hosts the FLOPs of this host's share are scaled up."""
    share = self.run.plan.share.of / (self.run.plan.share.high - self.run.plan.share.low)
    step_flops = 3.0 * self.count_flops(self.run.model, batch) * share
    self.flops += step_flops
    return {'slots': batch.tokens_BT.size * share, 'total_flops': self.flops, 'flops': step_flops}

  def _finish_pending(self) -> None:
    """Fetches and writes the metrics of the step before, while the device works on the next."""
    if self.pending is None:
      return
    (step, out, facts), self.pending = self.pending, None
    out = jax.device_get(out)
    now = time.perf_counter()
    seconds, self.fetched_at = now - self.fetched_at, now
    row: dict[str, Any] = {'stage': self.run.name, 'step': step, **{k: float(v) for k, v in out['scalars'].items()}}
    if not all(math.isfinite(row[name]) for name in ('loss', 'grad_norm', 'parameter_norm')):
      raise NonFiniteError(self._non_finite_message(step, row, out['rows']))
    tokens = int(row['tokens'])
    self.tokens += tokens
    row |= {
      'learning_rate': float(self.learning_rates[step - 1]),
      'epoch': step * self.run.train.batch_size / self.run.num_examples,
      'tokens': self.tokens,
      'flops': facts['total_flops'],  # by the rule of MFU
      'pad_fraction': 1 - tokens / facts['slots'],
      'step_seconds': seconds,
      'tokens_per_second': tokens / seconds,
      'mfu': facts['flops'] / seconds / (self.peak * jax.device_count()),
      'goodput': self.clock.goodput,
    }
    if 'rewards_BPC' in out['rows']:
      rewards_NC = out['rows']['rewards_BPC'][out['rows']['index'] >= 0]
      row['reward_histogram'] = reward_histogram(rewards_NC)
      if step % self.run.train.log_every == 0:
        self.metrics.histogram(step, 'rewards/chosen', rewards_NC[:, 0])
        self.metrics.histogram(step, 'rewards/rejected', rewards_NC[:, 1])
    self.metrics.write(row)
    self.progress.update(row)

  def _non_finite_message(self, step: int, row: dict[str, Any], rows: dict[str, np.ndarray]) -> str:
    """Names what shares a row of the batch with a non-finite output: what is no number in one triplet may spread to the others."""
    real = rows['index'] >= 0
    finite = np.all([np.isfinite(values).reshape(len(real), -1).all(axis=1) for values in rows.values()], axis=0)
    held = lambda bad: sorted(set(rows['index'][bad][real[bad]].tolist()))
    where = f'rows {held(~finite)}' if held(~finite) else f'no single row; the batch held rows {held(np.full(len(real), True))}'
    return f'{self.run.name}: step {step} has loss {row["loss"]} and gradient norm {row["grad_norm"]}; non-finite outputs: {where}'

  def _maybe_validate(self) -> None:
    every = self.run.train.evaluate_every
    due = self.step == self.run.steps or (every is not None and self.step % every == 0)
    if not due or self.run.validation is None:
      return
    self._finish_pending()
    means = evaluate(self.functions, self.state.params, self.run.validation, self.run.mesh)
    self.validated, self.validated_step = {f'validation_{name}': value for name, value in means.items()}, self.step
    row = {'stage': self.run.name, 'step': self.step, **self.validated}
    self.metrics.write(row)
    self.progress.update(row)
    self.fetched_at = time.perf_counter()

  def _save(self) -> None:
    # A checkpoint promises that its steps are good and logged, so their metrics are checked and on disk first.
    self._finish_pending()
    self.metrics.flush()
    keep_logs(self.run.folder, self.run.home)
    counts = {'tokens': self.tokens, 'flops': self.flops, 'step': self.step, 'validated': self.validated, 'seconds': self.clock.seconds}
    data = {'iterator': self.iterator.get_state(), **counts}
    metrics = self.validated if self.validated_step == self.step else {}
    self.checkpointer.save(self.step, self.state, data, self.run.fingerprint, metrics)

  def _summary(self, seconds: float, steps: int) -> dict[str, Any]:
    path = self.run.folder / SUMMARY
    if jax.process_index() != 0:  # whose disk need not have the metrics
      return {}
    if steps == 0 and path.exists():
      return json.loads(path.read_text())
    rows = [r for r in read_metrics(self.run.folder) if 'loss' in r]
    last = rows[-max(len(rows) // 20, 1) :]
    summary = {
      'steps': self.step,
      'tokens': self.tokens,
      'flops': self.flops,
      'rows': self.step * self.run.train.batch_size,
      'loss': float(np.mean([r['loss'] for r in last])),  # over the last twentieth: one batch is noise
      'accuracy': float(np.mean([r['accuracy'] for r in last])),
      'seconds': seconds,
      'seconds_by_part': {part: round(value, 3) for part, value in self.clock.seconds.items()},
      'goodput': self.clock.goodput,
      'tokens_per_second': float(np.median([r['tokens_per_second'] for r in rows])),
      'pad_fraction': float(np.mean([r['pad_fraction'] for r in rows])),
      'mfu': float(np.median([r['mfu'] for r in rows])),
      'mfu_rule': flops.MFU_RULE,
      'peak_flops': self.peak,
      'peak_source': self.peak_source,
      **self.validated,
    }
    path.write_text(json.dumps(summary, indent=2) + '\n')
    keep_logs(self.run.folder, self.run.home)
    return summary

  def close(self) -> None:
    self.profiler.close()
    self.progress.close()
    self.metrics.close()
    self.checkpointer.close()


def _functions(
  objective: Objective, model: ModelConfig, optimizer: OptimizerConfig, steps: int, mesh: Mesh, accumulation: int
) -> step_lib.StepFunctions:
  """The functions of a run. Runs that differ in data, seed, start, length or learning rate share what was compiled of them."""
  shared = _compiled(objective, model, without_schedule(optimizer), mesh, accumulation)

  def init(key: jax.Array, start: dict[str, Any] | None) -> step_lib.TrainState:
    state = _init(objective, model, mesh)(key, start)
    return state._replace(opt_state=with_schedule(state.opt_state, optimizer, steps))

  return shared._replace(init=init)


@functools.lru_cache(maxsize=4)  # few: a run that is over should not keep its compiled steps for long
def _compiled(
  objective: Objective, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, accumulation: int
) -> step_lib.StepFunctions:
  return step_lib.build(objective, model, make_optimizer(optimizer, 1), mesh, accumulation)


@functools.lru_cache(maxsize=4)
def _init(objective: Objective, model: ModelConfig, mesh: Mesh) -> Callable[..., step_lib.TrainState]:
  """A run's beginning, which no setting of the optimizer changes."""
  return step_lib.build(objective, model, make_optimizer(OptimizerConfig(), 1), mesh).init


def evaluate(functions: step_lib.StepFunctions, params: Any, batches: Iterable[Any], mesh: Mesh) -> dict[str, float]:
  """Means of the loss and metrics over one pass. Sums are added in float64 on the host."""
  count, totals = 0.0, dict[str, float]()
  for batch in batches:
    out = jax.device_get(functions.evaluate(params, sharding.put_local(batch, mesh)))
    count += float(out['count'])
    for name, value in out['sums'].items():
      totals[name] = totals.get(name, 0.0) + float(value)
  return {name: value / count for name, value in totals.items()}
