"""The PPO loop: prompts -> answers -> text -> rewards -> advantages -> updates. Resumes bit for bit, saves atomically, stops cleanly."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax import sharding
from polar_jax.checkpoints.checkpointer import Checkpointer
from polar_jax.data import pipeline
from polar_jax.data.template import join_messages
from polar_jax.ppo import advantages, diagnostics, experience, measure, rows
from polar_jax.ppo.experience import Experience
from polar_jax.ppo.learner import ActorTargets, CriticTargets, Learner
from polar_jax.ppo.rewards import shaping
from polar_jax.ppo.rewards.http import RewardServerError
from polar_jax.ppo.rewards.python import RewardFunctionError
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import PpoState, Run
from polar_jax.runtime import distributed, heartbeat
from polar_jax.runtime.preemption import Preempted, SigtermFlag
from polar_jax.train.goodput import Clock
from polar_jax.train.metrics import SAMPLES, SUMMARY, MetricsLog, Progress, StepLog, fetch_logs, keep_logs, read_metrics
from polar_jax.train.optimizer import learning_rate_schedule
from polar_jax.train.profile import Profiler
from polar_jax.train.step import TrainState
from polar_jax.train.trainer import NonFiniteError, TrainedRun
from polar_jax.types import Prompt, Rollouts, UserError

_weights = jax.jit(advantages.loss_weights, static_argnames='mode')
_kl = jax.jit(advantages.kl, static_argnames='estimator')


def train(run: Run) -> TrainedRun:
  """Tune a policy to the last step, resuming from the newest checkpoint. Return its parameters and the summary, as in `summary.json`.

  Raises:
    NonFiniteError: an update went wrong, naming the step.
    Preempted: after SIGTERM, once the state is saved.
    UserError: a reward is not finite, or the reward server or function fails; in these two cases the last step is saved first.
  """
  distributed.agree(run.name, run.fingerprint)
  with jax.set_mesh(run.mesh), contextlib.closing(Trainer(run)) as trainer, distributed.leaving_when_lost():
    return trainer.run_to_end()


class Trainer:
  """One run and everything that it holds."""

  def __init__(self, run: Run):
    self.run, c, self.clock = run, run.config, Clock()
    self.rollouts_per_step = c.prompts_per_step * c.num_generations
    self.actor, self.critic = run.actor(), run.critic()
    self.engine = RolloutEngine(run.model, run.mesh, c.rollout, run.stop_ids)
    self.row_length = run.row_length
    self.order = pipeline.global_order(len(run.prompts), run.seed)
    # All at once: one by one they would queue behind the running step.
    self.rates = [np.asarray(learning_rate_schedule(o, run.updates)(jnp.arange(run.updates))) for o in (c.actor, c.critic)]
    self.checkpointer = Checkpointer(run.home, run.checkpointing, 'evaluation_raw', best_is_lower=False)
    self._start()
    fetch_logs(run.folder, run.home, self.step)
    self.metrics = MetricsLog(run.folder, self.step if self.resumed else -1)
    self.clock.go_on(self.earlier, self.metrics.lost)
    self.profiler = Profiler(run.profile, run.folder, run.log)
    self.samples = StepLog(run.folder, self.step if self.resumed else -1, SAMPLES)
    self.history = [row for row in read_metrics(run.folder) if 'step_seconds' in row]
    self.progress = Progress(run.name, run.steps, self.step, c.log_every)

  def _start(self) -> None:
    """The newest checkpoint, or the beginning."""
    run, c = self.run, self.run.config
    self.step, self.tokens, self.evaluated, self.earlier = 0, 0, dict[str, float](), dict[str, float]()
    self.kl_coef, self.base_length = c.kl_coef, None
    self.normalizer = shaping.Normalizer(c.reward.normalize)
    self.resumed = self.checkpointer.latest is not None
    start = run.start() if run.needs_reference or not self.resumed else None
    as_reference = jax.jit(lambda p: jax.tree.map(lambda a: a.astype(run.model.compute_dtype), p))
    self.reference = as_reference(start) if run.needs_reference else None
    if self.resumed:
      abstract = PpoState.join(self.actor.abstract, self.critic.abstract if self.critic else None)
      state, saved = self.checkpointer.restore(abstract, run.fingerprint)
      self.actor_state, self.critic_state = state.part()
      self.step, self.tokens, self.kl_coef, self.base_length = (saved[k] for k in ('step', 'tokens', 'kl_coef', 'base_length'))
      self.normalizer = shaping.Normalizer.from_json(saved['normalizer'])
      self.evaluated, self.earlier = saved['evaluated'], saved.get('seconds', {})
      run.log(f'{run.name}: resumed from step {self.step} of {run.steps}')
    else:
      keys = jax.random.split(jax.random.key(run.seed))
      self.actor_state = self.actor.init(keys[0], start)
      # The critic begins as the policy with a value head (official recipe).
      self.critic_state = self.critic.init(keys[1], {'decoder': start['decoder']}) if self.critic and start else None

  def run_to_end(self) -> TrainedRun:
    run, started, first = self.run, time.perf_counter(), self.step
    alarmed = False
    with SigtermFlag() as stop:
      self.clock.lap('start')
      if not self.resumed:
        self._evaluate()
        self.clock.lap('evaluate')
      while self.step < run.steps and not alarmed:
        self.profiler.before(self.step - first)
        with self._saving_if_rewards_fail():
          row, batch_of_samples = self.one_step()
        self.clock.lap('compile' if self.step == first else 'step')
        row['goodput'] = self.clock.goodput
        self.step += 1
        self.profiler.after(self.step - first, row)
        heartbeat.at(run.name, self.step)
        self.history.append(row)
        self.metrics.write(row)
        for sample in batch_of_samples:
          self.samples.write(sample)
        self.metrics.flush()  # steps take long, and somebody may be watching
        self.progress.update(row)
        alarmed = self._sound_alarms()
        every = run.config.evaluate_every
        if self.step == run.steps or alarmed or (every is not None and self.step % every == 0):
          self._evaluate()
          self.clock.lap('evaluate')
        if self.step < run.steps and self.step % run.checkpointing.every_steps == 0:
          self._save()
          self.clock.lap('save')
        if stop.is_set() and self.step < run.steps and not alarmed:
          self._save()
          self.checkpointer.wait()
          raise Preempted(run.name, self.step)
      if first < self.step or not self.resumed:
        self._save()
      self.checkpointer.wait()
      summary = self._summary(time.perf_counter() - started, self.step - first)
      if stop.is_set():  # too late to cut this run short, but the next stage must not start
        raise Preempted(run.name, self.step)
    return TrainedRun(self.actor_state.params, summary)

  def one_step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, samples) of one step; only its last part, the updates, changes the state of the models."""
    run, c, clock = self.run, self.run.config, _Clock()
    prompts, rollouts = self._answer()
    outputs = measure.texts(rollouts, run.tokenizer, run.stop_ids)
    clock.lap('rollout')
    scores = self._score(prompts, outputs, rollouts)
    clock.lap('reward')
    batches = rows.pack(rollouts, range(len(outputs)), self.row_length, experience.rows_of_batch(c, run.mesh))
    made = self._experience(rollouts, batches, scores.shaped_R)
    clock.lap('logprobs')
    learned = self._update(rollouts, batches, made)
    clock.lap('update')
    self.tokens += int(rollouts.length_R.sum())
    row: dict[str, Any] = {
      'stage': run.name,
      'step': self.step + 1,
      **scores.metrics,
      **measure.answers(prompts, outputs, rollouts),
      **self._measure(rollouts, made, scores),
      **learned,
      'kl_coef': self.kl_coef,
      'prompts': sum(map(len, rollouts.prompts)),
      'tokens': int(rollouts.length_R.sum()),
      'total_tokens': self.tokens,
      **clock.seconds,
      'step_seconds': clock.total,
      'tokens_per_second': float(rollouts.length_R.sum()) / clock.total,
    }
    if c.kl_target is not None and c.kl_in != 'none':
      self.kl_coef = advantages.next_kl_coef(self.kl_coef, row['kl'], c.kl_target, c.kl_horizon, len(outputs))
    if c.method == 'sft':
      return row, []
    seed = (run.seed, self.step)
    return row, diagnostics.sample_rows(self.step + 1, prompts, outputs, scores.raw_R, scores.shuffled_R, rollouts.length_R, seed)

  def _answer(self) -> tuple[list[Prompt], Rollouts]:
    """The prompts of this step, each `samples` times one after another, and an answer to each."""
    run, c = self.run, self.run.config
    places = [self.order(self.step * c.prompts_per_step + i)[0] for i in range(c.prompts_per_step)]
    chosen = [run.prompts[i] for i in places for _ in range(c.num_generations)]
    prompts, ids = [p for p, _ in chosen], [i for _, i in chosen]
    if c.method == 'sft':
      return prompts, _references(prompts, ids, run)
    return prompts, self.engine.generate(self.actor_state.params, ids, (run.seed, self.step))

  def _score(self, prompts: Sequence[Prompt], outputs: Sequence[str], rollouts: Rollouts) -> measure.Scores:
    run, c = self.run, self.run.config
    if c.method == 'sft':  # references are imitated whatever they earn
      nothing_R = np.zeros(len(outputs), np.float32)
      return measure.Scores(nothing_R, nothing_R, None, {})
    shuffle = (run.seed, self.step) if self.step % c.shuffled_every == 0 else None
    return measure.score(run.reward, c, self.normalizer, prompts, outputs, rollouts, shuffle)

  def _experience(self, rollouts: Rollouts, batches: Sequence[Any], score_R: np.ndarray) -> Experience:
    """Log-probabilities under the policy and its start, values, and the advantages that follow from them."""
    run, c = self.run, self.run.config
    ask = functools.partial(experience.read, batches=batches, mesh=run.mesh, rollouts=rollouts)
    mask_RT, zeros_RT = rows.token_mask(rollouts), np.zeros(rollouts.tokens_RT.shape, np.float32)
    old_RT, entropy_RT = rollouts.logprob_RT, zeros_RT
    if c.recompute_logprobs or c.method == 'sft':
      old_RT, entropy_RT = ask(self.actor.read, self.actor_state.params, outputs=2)
    reference_RT = ask(self.actor.read, self.reference, outputs=2)[0] if self.reference is not None else old_RT
    value_RT = ask(self.critic.read, self.critic_state.params, outputs=1)[0] if self.critic else zeros_RT
    if c.method == 'sft':
      # With advantage 1 and a ratio of 1 the policy's gradient is that of the log-likelihood.
      return Experience(mask_RT, old_RT, reference_RT, entropy_RT, value_RT, mask_RT, zeros_RT)
    kl_RT = _kl(old_RT, reference_RT, estimator=c.kl_estimator)
    group_R = np.repeat(np.arange(c.prompts_per_step, dtype=np.int32), c.num_generations)
    found = experience.estimate(c, c.prompts_per_step, score_R, kl_RT, value_RT, mask_RT, group_R, np.float32(self.kl_coef))
    advantage_RT, return_RT = jax.device_get(found)
    return Experience(mask_RT, old_RT, reference_RT, entropy_RT, value_RT, advantage_RT, return_RT)

  def _update(self, rollouts: Rollouts, batches: Sequence[Any], made: Experience) -> dict[str, float]:
    """All updates of a step. Returns the means of their metrics."""
    run, c = self.run, self.run.config
    total, found = self.rollouts_per_step, list[dict[str, float]]()
    for epoch in range(c.update_epochs):
      shuffled = np.random.default_rng([run.seed, self.step, epoch]).permutation(total)
      size = c.mini_batch_size or total
      for low in range(0, total, size):
        which = sorted(shuffled[low : low + size].tolist())
        part = batches if len(which) == total else rows.pack(rollouts, which, self.row_length, len(batches[0].tokens_BT))
        found.append(self._one_update(which, part, made))
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
      raise NonFiniteError(f'{run.name}: step {self.step + 1}: {", ".join(bad)} is not finite; nothing was saved since the last checkpoint')
    return means

  def _one_update(self, which: Sequence[int], batches: Sequence[Any], made: Experience) -> dict[str, float]:
    c, number = self.run.config, int(self.actor_state.step)
    inside_RT = made.mask_RT * np.isin(np.arange(len(made.mask_RT)), which)[:, None]
    weight_RT = np.asarray(_weights(inside_RT, mode=c.loss_mean))
    out: dict[str, float] = {}
    if self.step >= c.critic_warmup or not self.critic:
      known = (made.old_logprob_RT, made.reference_logprob_RT, made.advantage_RT, weight_RT)
      self.actor_state, sums, norm = self._learn(self.actor, self.actor_state, batches, known, ActorTargets)
      out |= {**sums, 'grad_norm': norm, 'learning_rate': float(self.rates[0][min(number, len(self.rates[0]) - 1)])}
    if self.critic and self.critic_state:
      number = int(self.critic_state.step)
      expected = (made.value_RT, made.return_RT, weight_RT)
      self.critic_state, sums, norm = self._learn(self.critic, self.critic_state, batches, expected, CriticTargets)
      out |= {**sums, 'critic_grad_norm': norm, 'critic_learning_rate': float(self.rates[1][min(number, len(self.rates[1]) - 1)])}
    return out

  def _learn(
    self, model: Learner, state: TrainState, batches: Sequence[Any], values: Sequence[np.ndarray], targets: type
  ) -> tuple[TrainState, dict[str, float], float]:
    """One step of an optimizer: (state, sums of metrics, norm of the gradients)."""
    grads, sums = model.zeros(state.params)
    for batch in batches:
      placed = targets(*(rows.place(value_RT, batch) for value_RT in values))
      batch, placed = sharding.put_global((batch, placed), self.run.mesh)
      grads, sums = model.accumulate(grads, sums, state.params, batch, placed, np.float32(self.kl_coef))
    state, norm = model.apply(state, grads)
    sums, norm = jax.device_get((sums, norm))
    return state, {name: float(value) for name, value in sums.items()}, float(norm)

  def _measure(self, rollouts: Rollouts, made: Experience, scores: measure.Scores) -> dict[str, float]:
    """Figures of a step that need the models' outputs."""
    c, count = self.run.config, float(made.mask_RT.sum())
    out: dict[str, float] = {}
    if self.reference is not None:
      difference_RT = (made.old_logprob_RT - made.reference_logprob_RT) * made.mask_RT
      out |= {'kl': float(difference_RT.sum()) / count, 'kl_answer': float(difference_RT.sum(axis=1).mean())}
    if c.method == 'sft':
      return out | {'nll': -float((made.old_logprob_RT * made.mask_RT).sum()) / count}
    if c.recompute_logprobs:
      mismatch_RT = np.abs(made.old_logprob_RT - rollouts.logprob_RT) * made.mask_RT
      out['rollout_mismatch'] = float(mismatch_RT.sum()) / count
    if self.critic:
      out['explained_variance'] = diagnostics.explained_variance(made.return_RT, made.value_RT, made.mask_RT)
    out['advantage_std'] = float(made.advantage_RT[made.mask_RT > 0].std())
    if self.base_length is None:
      self.base_length = float(rollouts.length_R.mean())
    slope, adjusted = diagnostics.length_regression(scores.raw_R, rollouts.length_R, self.base_length)
    return out | {'length_slope': slope, 'length_free': adjusted}

  def _sound_alarms(self) -> bool:
    """Says which alarms are up; True if the run is to stop."""
    messages = diagnostics.Alarms(self.run.config.alarms).check(self.history)
    for message in messages:
      self.run.log(f'{self.run.name}: {message}')
    if messages:
      self.metrics.write({'stage': self.run.name, 'step': self.step, 'alarms': messages})
    return bool(messages) and self.run.config.alarms.action == 'stop'

  def _evaluate(self) -> None:
    run = self.run
    if run.held_out is None or not len(run.held_out):
      return
    with self._saving_if_rewards_fail():
      found = measure.evaluate(run, self.actor_state.params)
    self.evaluated = {f'evaluation_{name}': value for name, value in found.items()}
    row = {'stage': run.name, 'step': self.step, **self.evaluated}
    self.metrics.write(row)
    run.log(f'{run.name}: step {self.step}: held-out prompts: ' + ', '.join(f'{name} {value:.4f}' for name, value in found.items()))

  @contextlib.contextmanager
  def _saving_if_rewards_fail(self) -> Iterator[None]:
    """Save the last complete step if the reward server or the reward function fails, before the error is raised."""
    try:
      yield
    except (RewardServerError, RewardFunctionError):
      if self.step > 0:
        self._save()
        self.checkpointer.wait()
      raise

  def _save(self) -> None:
    self.metrics.flush()
    self.samples.flush()
    keep_logs(self.run.folder, self.run.home)
    data = {
      'step': self.step,
      'tokens': self.tokens,
      'kl_coef': self.kl_coef,
      'base_length': self.base_length,
      'normalizer': self.normalizer.to_json(),
      'evaluated': self.evaluated,
      'seconds': self.clock.seconds,
    }
    self.checkpointer.save(self.step, PpoState.join(self.actor_state, self.critic_state), data, self.run.fingerprint, self.evaluated)

  def _summary(self, seconds: float, steps: int) -> dict[str, Any]:
    path = self.run.folder / SUMMARY
    if jax.process_index() != 0:  # whose disk need not have the metrics
      return {}
    if steps == 0 and path.exists():
      return json.loads(path.read_text())
    read = read_metrics(self.run.folder)
    measured = [row for row in read if any(name.startswith('evaluation_') for name in row)]
    evaluation = [{k.removeprefix('evaluation_'): v for k, v in row.items() if k.startswith('evaluation_')} for row in measured]
    trained = [row for row in read if 'tokens_per_second' in row]
    last = trained[-max(len(trained) // 20, 1) :]
    shown = ('reward', 'raw', 'nll', 'shuffled_gap', 'kl', 'entropy', 'length', 'truncated', 'clip_fraction', 'explained_variance')
    summary = {
      'steps': self.step,
      'answers': self.step * self.rollouts_per_step,
      'tokens': self.tokens,
      'seconds': seconds,
      'seconds_by_part': {part: round(value, 3) for part, value in self.clock.seconds.items()},
      'goodput': self.clock.goodput,
      **{name: float(np.mean([row[name] for row in last])) for name in shown if all(name in row for row in last)},
      'alarms': [message for row in read for message in row.get('alarms', [])],
    }
    if evaluation:
      summary |= {'evaluation_before': evaluation[0], 'evaluation_after': evaluation[-1]}
    path.write_text(json.dumps(summary, indent=2) + '\n')
    keep_logs(self.run.folder, self.run.home)
    return summary

  def close(self) -> None:
    self.profiler.close()
    self.progress.close()
    self.metrics.close()
    self.samples.close()
    self.checkpointer.close()


def _references(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], run: Run) -> Rollouts:
  """The references as if they were answers, each with the token that ends one, cut at `max_new` tokens."""
  width = run.config.rollout.max_new
  if not run.stop_ids:
    raise UserError('rft.method is sft, and no token ends an answer: set rft.rollout.stop')
  texts = run.tokenizer.encode_batch([join_messages(p.reference, 'reference') for p in prompts])
  whole = [[*text, run.stop_ids[0]] for text in texts]
  tokens, length = np.zeros((len(whole), width), np.int32), np.array([min(len(w), width) for w in whole], np.int32)
  for r, sequence in enumerate(whole):
    tokens[r, : length[r]] = sequence[:width]
  stopped = np.array([len(w) <= width for w in whole])
  return Rollouts(ids, tokens, length, np.zeros(tokens.shape, np.float32), stopped)


class _Clock:
  """Seconds of each phase of a step. A phase ends when its results are on the host."""

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self._started = self._last = time.perf_counter()

  def lap(self, phase: str) -> None:
    now = time.perf_counter()
    self.seconds[f'seconds_{phase}'], self._last = now - self._last, now

  @property
  def total(self) -> float:
    return time.perf_counter() - self._started
