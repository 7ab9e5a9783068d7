"""Supervised training of language models and reward models.

A run resumes from its newest checkpoint, saves atomically and stops cleanly after SIGTERM. The metrics of a step are fetched while the
device works on the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, LoraConfig, ModelConfig, OptimizerConfig, ProfileConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.model import flops, lora
from polar_jax.runtime import distributed
from polar_jax.runtime.compiled import executables
from polar_jax.train import memory as memory_lib
from polar_jax.train import step as step_lib
from polar_jax.train.metrics import read_metrics, reward_histogram
from polar_jax.train.objectives import NEXT_TOKEN, Objective
from polar_jax.train.optimizer import learning_rate_schedule, make_optimizer, without_schedule
from polar_jax.train.session import NonFiniteError, Session
from polar_jax.train.validation import evaluate


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
    load_start: loads the trained parameters that a new run starts from; a resumed run does not call it. None: start from scratch.
    fingerprint: settings that must not change when a run is resumed.
    threads: that read batches.
    prefetch: number of batches prepared ahead.
    frozen: the parameters under adapters, on the mesh; empty if all are trained.
    facts: further entries of the summary, known before the first step.
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
  frozen: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  started: float = dataclasses.field(default_factory=time.perf_counter)

  @property
  def steps(self) -> int:
    """Number of steps of the whole run."""
    return len(self.batches)


class TrainedRun(NamedTuple):
  """The result of a training run."""

  params: dict[str, Any]  # after the last step, sharded over the mesh; with adapters, those next to the frozen parameters
  summary: dict[str, Any]  # content of `summary.json`; empty on all processes but the first


def train(run: Run) -> TrainedRun:
  """Train to the last step, resuming from the newest checkpoint.

  Raises:
    ConfigError: memory or disk space is not enough; the message says what to change.
    NonFiniteError: naming the step and the examples of its batch that gave a non-finite reward.
    Preempted: after SIGTERM, once the state is saved.
  """
  distributed.agree(run.name, run.fingerprint)
  is_lm = run.objective is NEXT_TOKEN
  best_metric = 'validation_loss' if is_lm else 'validation_accuracy'
  session = Session(run, best_metric, best_is_lower=is_lm, started=run.started)
  with jax.set_mesh(run.mesh), contextlib.closing(session), distributed.leaving_when_lost():
    return _Trainer(run, session).run_to_end()


class _PendingStep(NamedTuple):
  """A step whose metrics have not been fetched from the device.

  Attributes:
    output: of the train step, on the device.
    positions: token positions of the global batch, padding included.
    step_flops: of the global batch, by the rule of MFU.
    total_flops: of the run up to this step.
  """

  step: int
  output: dict[str, Any]
  positions: float
  step_flops: float
  total_flops: float


class _Trainer:
  """One start of a run."""

  def __init__(self, run: Run, session: Session):
    self.run, self.session, config = run, session, run.train
    # All at once: evaluated step by step they would queue after the running step, and the host would wait for them.
    self.learning_rates = np.asarray(learning_rate_schedule(config, run.steps)(jnp.arange(run.steps)))
    self.functions = _functions(run)
    self.train_step, self.evaluate_step = executables(self.functions.train), executables(self.functions.evaluate)
    session.check_space(self.functions.abstract, None if run.validation is None else config.evaluate_every)
    self.count_flops = flops.language_model_flops if run.objective is NEXT_TOKEN else flops.reward_model_flops
    given = run.profile.peak_flops
    self.peak_flops, self.peak_source = (given, 'profile.peak_flops') if given else flops.peak_flops(jax.devices()[0])
    self.compiled_rows = set[int]()
    # A CPU allocates the temporaries of a call when it is dispatched, and two steps at a time would need twice the memory.
    self.one_at_a_time = run.mesh.devices.flat[0].platform == 'cpu'
    self.iterator = pipeline.iterate(run.batches, threads=run.threads, prefetch=run.prefetch)
    self.tokens, self.flops = 0, 0.0
    self.validation: dict[str, float] = {}  # means of the last pass, by name in metrics.jsonl
    self.validated_step = -1
    self.validation_due = False  # at this step; saved, so that a pass that SIGTERM stopped is repeated
    if session.resumed:
      self.state, saved = session.restore(self.functions.abstract)
      self.iterator.set_state(saved['iterator'])
      self.tokens, self.flops, self.validation = saved['tokens'], saved['flops'], saved['validated']
      self.validation_due = run.validation is not None and saved.get('validation_due', False)  # older checkpoints have none
    else:
      self.state = self.functions.init(jax.random.key(run.seed), None if run.load_start is None else run.load_start())
    self.frozen = (step_lib.Frozen(run.frozen, np.uint32(run.seed)),) if run.frozen else ()
    self.iterator_state = self.iterator.get_state()  # after the last step taken, when the next batch may have been read already
    session.open_logs(config.log_every, self.validation_due)
    self.pending: _PendingStep | None = None
    self.fetched_at = time.perf_counter()

  @property
  def params(self) -> dict[str, Any]:
    """All parameters of the model, trained and frozen."""
    return lora.join(self.state.params, self.run.frozen)

  def run_to_end(self) -> TrainedRun:
    """Take all remaining steps."""
    session = self.session
    with session.running():
      if self.validation_due:
        with session.saving_if_stopped(self._save):
          self._validate()
        self._save(again=True)
      while not session.is_complete:
        with session.saving_if_stopped(self._save):
          self._take_step()
          self.validation_due = self._is_validation_due()
          if self.validation_due:
            self._validate()
        session.clock.lap('evaluate')
        if session.is_save_due or (self.validated_step == session.step and not session.is_complete):
          self._save()
          session.clock.lap('save')
        session.stop_if_preempted(self._save, finished=session.is_complete)
      return TrainedRun(self.params, session.finish(self._save, self._summarize))

  def _is_validation_due(self) -> bool:
    every, session = self.run.train.evaluate_every, self.session
    due = session.is_complete or (every is not None and session.step % every == 0)
    return due and self.run.validation is not None

  def _take_step(self) -> None:
    """Start a step on the device, then write the metrics of the step before."""
    session, clock = self.session, self.session.clock
    host_batch = next(self.iterator)
    clock.lap('data')
    batch = sharding.put_local(host_batch, self.run.mesh)
    is_new_shape = self._note_shape(len(batch.tokens_BT))
    if is_new_shape:
      self._compile(batch)
    if self.one_at_a_time:
      jax.block_until_ready(self.state)
    session.profiler.before(session.steps_taken)
    self.state, output = self.train_step(self.state, batch, *self.frozen)
    clock.lap('compile' if is_new_shape else 'step')
    session.advance()
    self.iterator_state = self.iterator.get_state()
    self._write_pending()
    self.pending = self._pending_step(host_batch, output)
    session.profiler.after(session.steps_taken, output)
    if self._is_validation_due() or session.is_complete or session.is_save_due:
      jax.block_until_ready(self.state)  # what follows waits for the step as well, and should not be charged with its time
    clock.lap('step')

  def _note_shape(self, rows: int) -> bool:
    """Return whether this is the first batch of `rows` rows in this start, which compiles; log it if that was not planned."""
    if rows in self.compiled_rows:
      return False
    self.compiled_rows.add(rows)
    planned = self.run.planned_rows
    if rows != planned:
      self.run.log(f'{self.run.name}: step {self.session.step + 1} needs {rows} rows, planned {planned}: one more compilation')
    return True

  def _compile(self, batch: Any) -> None:
    """Compile a step of a new shape, and before the first step also that of validation, and check that they fit the memory.

    Raises:
      ConfigError: one does not.
      StopRequested: SIGTERM arrived.
    """
    run, first = self.run, len(self.compiled_rows) == 1
    validation = sharding.put_local(next(iter(run.validation)), run.mesh) if first and run.validation is not None else None
    calls = [('a step', self.train_step, (self.state, batch, *self.frozen))]
    calls += [] if validation is None else [('validation', self.evaluate_step, (self.params, validation))]
    fits = []
    for what, call, arguments in calls:
      rows, length = arguments[1].tokens_BT.shape
      remedies = functools.partial(memory_lib.remedies, run.model, run.train, rows // sharding.batch_shards(run.mesh))
      memory = call.prepare(*arguments)
      fits.append(memory_lib.check(f'{run.name}: {what} of {rows} x {length} tokens', memory, run.mesh, run.log, remedies))
    if first:
      memory_lib.check_save(run.name, self.state, run.checkpointing.asynchronous, fits, run.log)

  def _pending_step(self, host_batch: Any, output: dict[str, Any]) -> _PendingStep:
    """Return the step just started. Each process knows only its share of the batch, so its counts are scaled up."""
    share = self.run.plan.share.of / (self.run.plan.share.high - self.run.plan.share.low)
    step_flops = flops.training_flops(self.count_flops, self.run.model, host_batch, self.run.train.lora) * share
    self.flops += step_flops
    return _PendingStep(self.session.step, output, host_batch.tokens_BT.size * share, step_flops, self.flops)

  def _write_pending(self) -> None:
    """Fetch and write the metrics of the step before."""
    if self.pending is None:
      return
    pending, self.pending = self.pending, None
    output = jax.device_get(pending.output)
    now = time.perf_counter()
    seconds, self.fetched_at = now - self.fetched_at, now
    record: dict[str, Any] = {'stage': self.run.name, 'step': pending.step, **{k: float(v) for k, v in output['scalars'].items()}}
    if not all(math.isfinite(record[name]) for name in ('loss', 'grad_norm', 'parameter_norm')):
      raise NonFiniteError(self._non_finite_message(record, output['rows']))
    tokens = int(record['tokens'])
    self.tokens += tokens
    record |= {
      'learning_rate': float(self.learning_rates[pending.step - 1]),
      'epoch': pending.step * self.run.train.batch_size / self.run.num_examples,
      'tokens': self.tokens,
      'flops': pending.total_flops,  # by the rule of MFU
      'pad_fraction': 1 - tokens / pending.positions,
      'step_seconds': seconds,
      'tokens_per_second': tokens / seconds,
      'mfu': pending.step_flops / seconds / (self.peak_flops * jax.device_count()),
      'goodput': self.session.clock.goodput,
    }
    if 'rewards_BPC' in output['rows']:
      rewards_NC = output['rows']['rewards_BPC'][output['rows']['index'] >= 0]
      record['reward_histogram'] = reward_histogram(rewards_NC)
      if pending.step % self.run.train.log_every == 0:
        self.session.metrics.histogram(pending.step, 'rewards/chosen', rewards_NC[:, 0])
        self.session.metrics.histogram(pending.step, 'rewards/rejected', rewards_NC[:, 1])
    self.session.metrics.write(record)
    self.session.progress.update(record)

  def _non_finite_message(self, record: dict[str, Any], outputs: dict[str, np.ndarray]) -> str:
    """Name the examples in rows with a non-finite output: a value that is not finite may spread to the other examples of its row."""
    real = outputs['index'] >= 0
    finite = np.all([np.isfinite(values).reshape(len(real), -1).all(axis=1) for values in outputs.values()], axis=0)
    examples_in = lambda rows: sorted(set(outputs['index'][rows][real[rows]].tolist()))
    everywhere = np.full(len(real), True)
    bad = examples_in(~finite)
    where = f'examples {bad}' if bad else f'none; the batch has examples {examples_in(everywhere)}'
    norm = record['grad_norm']
    return f'{self.run.name}: step {record["step"]} has loss {record["loss"]} and gradient norm {norm}; non-finite outputs: {where}'

  def _validate(self) -> None:
    """Run a validation pass."""
    run, session = self.run, self.session
    assert run.validation is not None
    self._write_pending()
    means = evaluate(self.evaluate_step, self.params, run.validation, run.mesh)
    self.validation, self.validated_step = {f'validation_{name}': value for name, value in means.items()}, session.step
    self.validation_due = False
    record = {'stage': run.name, 'step': session.step, **self.validation}
    session.metrics.write(record)
    session.progress.update(record)
    self.fetched_at = time.perf_counter()

  def _save(self, again: bool = False) -> None:
    # A checkpoint promises that its steps are finite and logged.
    self._write_pending()
    data = {
      'iterator': self.iterator_state,
      'tokens': self.tokens,
      'flops': self.flops,
      'validated': self.validation,
      'validation_due': self.validation_due,
    }
    self.session.save(self.state, data, self.validation if self.validated_step == self.session.step else {}, again=again)

  def _summarize(self, timing: dict[str, Any]) -> dict[str, Any]:
    records = [record for record in read_metrics(self.run.folder) if 'loss' in record]
    last = records[-max(len(records) // 20, 1) :]
    return {
      'steps': self.session.step,
      'tokens': self.tokens,
      'flops': self.flops,
      'rows': self.session.step * self.run.train.batch_size,
      'loss': float(np.mean([r['loss'] for r in last])),  # over the last twentieth: one batch is noise
      'accuracy': float(np.mean([r['accuracy'] for r in last])),
      **timing,
      'tokens_per_second': float(np.median([r['tokens_per_second'] for r in records])),
      'pad_fraction': float(np.mean([r['pad_fraction'] for r in records])),
      'mfu': float(np.median([r['mfu'] for r in records])),
      'mfu_rule': flops.mfu_rule(self.run.train.lora, self.run.model.frozen_layers),
      'peak_flops': self.peak_flops,
      'peak_source': self.peak_source,
      **self.validation,
      **self.run.facts,
    }


def _functions(run: Run) -> step_lib.StepFunctions:
  """Return the jitted functions of a run. Runs that differ only in data, seed, start, length or learning rate share them."""
  train = run.train
  shared = _compiled(run.objective, run.model, without_schedule(train), run.mesh, train.gradient_accumulation_steps, train.lora)
  return shared._replace(init=step_lib.scheduled_init(shared.init, run.train, run.steps))


@functools.lru_cache(maxsize=4)  # small, so that compiled steps of finished runs are freed
def _compiled(
  objective: Objective, model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, gradient_accumulation_steps: int, adapters: LoraConfig
) -> step_lib.StepFunctions:
  return step_lib.build(objective, model, make_optimizer(optimizer, 1), mesh, gradient_accumulation_steps, adapters)
