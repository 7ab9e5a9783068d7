"""The PPO loop: prompts -> responses -> text -> rewards -> advantages -> updates. Resumes bit for bit, saves atomically, stops cleanly."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax import sharding
from polar_jax.data import layout, pipeline
from polar_jax.data.template import join_messages
from polar_jax.model import lora
from polar_jax.ppo import advantages, metrics
from polar_jax.ppo.alarms import Alarms
from polar_jax.ppo.experience import Experience, estimate_advantages, micro_batch_rows, run_forward
from polar_jax.ppo.learner import ActorTargets, CriticTargets, ModelFunctions
from polar_jax.ppo.rewards import shaping
from polar_jax.ppo.rewards.http import RewardServerError
from polar_jax.ppo.rewards.python import RewardFunctionError
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import PpoState, Run
from polar_jax.runtime import distributed
from polar_jax.runtime.clock import Clock
from polar_jax.runtime.compiled import Executables, bytes_of_a_device, executables
from polar_jax.train import memory as memory_lib
from polar_jax.train.metrics import SAMPLES, read_metrics
from polar_jax.train.optimizer import learning_rate_schedule
from polar_jax.train.session import NonFiniteError, Session
from polar_jax.train.step import TrainState
from polar_jax.train.trainer import TrainedRun
from polar_jax.types import PolicyBatch, Prompt, Rollouts, UserError

_weights = jax.jit(advantages.loss_weights, static_argnames='mode')
_kl = jax.jit(advantages.kl, static_argnames='estimator')


def train(run: Run) -> TrainedRun:
  """Train a policy to the last step, resuming from the newest checkpoint. Return its parameters and the summary, as in `summary.json`.

  Raises:
    NonFiniteError: a metric of an update is not finite; the message names the step.
    Preempted: after SIGTERM, once the state is saved.
    UserError: a reward is not finite, or the reward server or function fails; if one of those fails, the last step is saved first.
  """
  distributed.agree(run.name, run.fingerprint)
  session = Session(run, 'evaluation_raw', best_is_lower=False)
  with jax.set_mesh(run.mesh), contextlib.closing(session), distributed.leaving_when_lost():
    return Trainer(run, session).run_to_end()


class Trainer:
  """The state of one run: models, optimizers, logs and checkpoints. Whoever opens the session closes it."""

  def __init__(self, run: Run, session: Session):
    self.run, self.session, c = run, session, run.config
    self.rollouts_per_step = c.prompts_per_step * c.num_generations
    critic = run.critic()
    self.actor, self.critic = _ahead_of_time(run.actor()), critic and _ahead_of_time(critic)
    session.check_space((self.actor.abstract, self.critic.abstract if self.critic else None))
    self.engine = RolloutEngine(run.model, run.mesh, c.rollout, run.stop_ids, c.lora)
    self.row_length = run.row_length
    self.order = pipeline.global_order(len(run.prompts), run.seed)
    # All rates at once: computed one by one, each would wait for the running step.
    self.rates = [np.asarray(learning_rate_schedule(o, run.updates)(jnp.arange(run.updates))) for o in (c.actor, c.critic)]
    self._restore_or_init()
    session.open_logs(c.log_every, self.evaluation_due)
    self.metrics, self.samples = session.metrics, session.open_log(SAMPLES)
    self.history = [record for record in read_metrics(run.folder) if 'step_seconds' in record]

  @property
  def step(self) -> int:
    """Steps taken, including those of earlier starts."""
    return self.session.step

  @property
  def actor_params(self) -> dict[str, Any]:
    """All parameters of the policy."""
    return lora.join(self.actor_state.params, self.run.base)

  @property
  def _critic_base(self) -> dict[str, Any]:
    """The parameters under the critic's adapters: those of the policy but for its vocabulary projection. Empty without adapters."""
    return {name: value for name, value in self.run.base.items() if name == 'decoder'}

  def _restore_or_init(self) -> None:
    """Restore the newest checkpoint, or initialize the state where there is none."""
    run, c = self.run, self.run.config
    self.tokens, self.evaluated = 0, dict[str, float]()
    self.evaluation_due = self.alarmed = False  # saved, so that an evaluation that SIGTERM stopped is repeated
    self.kl_coef, self.base_length = c.kl_coef, None
    self.normalizer = shaping.Normalizer(c.reward.normalize)
    initial = run.initial_params() if not run.base and (run.needs_reference or not self.session.resumed) else None
    cast = jax.jit(lambda p: jax.tree.map(lambda a: a.astype(run.model.compute_dtype), p))
    self.reference_policy = cast(initial) if initial and run.needs_reference else None
    if self.session.resumed:
      abstract = PpoState.join(self.actor.abstract, self.critic.abstract if self.critic else None)
      state, saved = self.session.restore(abstract)
      self.actor_state, self.critic_state = state.split()
      self.tokens, self.kl_coef, self.base_length = (saved[k] for k in ('tokens', 'kl_coef', 'base_length'))
      self.normalizer = shaping.Normalizer.from_json(saved['normalizer'])
      self.evaluated = saved['evaluated']
      self.evaluation_due, self.alarmed = (saved.get(k, False) for k in ('evaluation_due', 'alarmed'))  # older checkpoints have none
    else:
      keys = jax.random.split(jax.random.key(run.seed))
      self.actor_state = self.actor.init(keys[0], initial)
      # The critic is initialized as the policy with a value head (official recipe).
      self.critic_state = self.critic.init(keys[1], {'decoder': initial['decoder']} if initial else None) if self.critic else None
    if run.base and run.needs_reference:  # the same base under adapters of zeros, which change nothing
      self.reference_policy = lora.join(self.actor.zeros(self.actor_state.params)[0], run.base)

  def run_to_end(self) -> TrainedRun:
    """Run all remaining steps, with their evaluations and checkpoints. Return the parameters and the summary."""
    run, session, clock = self.run, self.session, self.session.clock
    with session.running():
      if not session.is_complete:
        with session.saving_if_stopped(self._save):
          self._check_memory()
      if not session.resumed or self.evaluation_due:
        self._evaluate()
        clock.lap('evaluate')
      if session.resumed and self.evaluation_due:
        self.evaluation_due = False
        self._save(again=True)
      while not session.is_complete and not self.alarmed:
        session.profiler.before(session.steps_taken)
        with self._saving_if_rewards_fail(), session.saving_if_stopped(self._save):
          record, samples = self.one_step()
        clock.lap('compile' if session.steps_taken == 0 else 'step')
        record['goodput'] = clock.goodput
        session.advance()
        session.profiler.after(session.steps_taken, record)
        self.history.append(record)
        self.metrics.write(record)
        for sample in samples:
          self.samples.write(sample)
        self.metrics.flush()  # steps take long, so each one shows at once
        session.progress.update(record)
        self.alarmed = self._check_alarms()
        every = run.config.evaluate_every
        self.evaluation_due = session.is_complete or self.alarmed or (every is not None and self.step % every == 0)
        if self.evaluation_due:
          self._evaluate()
          clock.lap('evaluate')
        self.evaluation_due = False
        if session.is_save_due:
          self._save()
          clock.lap('save')
        session.stop_if_preempted(self._save, finished=session.is_complete or self.alarmed)
      return TrainedRun(self.actor_params, session.finish(self._save, self._summarize))

  def _check_memory(self) -> None:
    """Check that the responses being decoded, the gradients of a micro-batch, which are compiled for it, and saves fit the memory.

    Raises:
      ConfigError: they do not.
      StopRequested: SIGTERM arrived.
    """
    run, fits = self.run, list[memory_lib.Fit]()
    if run.config.method != 'sft':
      c = run.config.rollout
      what = f'{run.name}: decoding {self.engine.concurrent} responses of {c.max_prompt} + {c.max_new} tokens at a time'
      fits.append(memory_lib.check(what, self.engine.memory(self.actor.abstract_params), run.mesh, run.log, self._fewer))
    rows, length = micro_batch_rows(run.config, run.mesh), self.row_length
    placed = sharding.batch_sharding(run.mesh)
    shape = lambda kind, dtype: kind._make([jax.ShapeDtypeStruct((rows, length), dtype, sharding=placed)] * len(kind._fields))
    for name, model, targets in (('the policy', self.actor, ActorTargets), ('the critic', self.critic, CriticTargets)):
      if model is None:
        continue
      params, grads = model.abstract_params, model.abstract.params
      sums = jax.eval_shape(model.zeros, grads)[1]
      accumulate, inputs = cast(Executables, model.accumulate), (shape(PolicyBatch, np.int32), shape(targets, np.float32))
      memory = accumulate.prepare(grads, sums, params, *inputs, np.float32(0))
      what = f'{run.name}: a micro-batch of {name} of {rows} x {length} tokens'
      fits.append(memory_lib.check(what, memory, run.mesh, run.log, self._smaller, extra=bytes_of_a_device(grads)))
    state = PpoState.join(self.actor_state, self.critic_state)
    memory_lib.check_save(run.name, state, run.checkpointing.asynchronous, fits, run.log)

  def _smaller(self, fit: memory_lib.Fit) -> list[str]:
    """Return what to change so that a micro-batch fits."""
    c, model = self.run.config, self.run.model
    out = [f'set rft.micro_batch_rows to less than {c.micro_batch_rows}'] if c.micro_batch_rows > 1 else []
    out += [f"model.remat to 'full' (now '{model.remat}')"] if model.remat != 'full' else []
    return [*out, 'a smaller policy, or free memory']

  def _fewer(self, fit: memory_lib.Fit) -> list[str]:
    """Return what to change so that the responses that are decoded at a time fit."""
    c = self.run.config.rollout
    out = [f'set rft.rollout.max_concurrent to less than {self.engine.concurrent}'] if self.engine.concurrent > 1 else []
    out += [f'set rft.rollout.max_prompt ({c.max_prompt}) or max_new ({c.max_new}) to less']
    return [*out, 'a smaller policy, or free memory']

  def one_step(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one step and return its (metrics, samples). Only its last part, the updates, changes the state of the models."""
    run, c, clock = self.run, self.run.config, Clock()
    prompts, rollouts = self._generate()
    responses = metrics.response_texts(rollouts, run.tokenizer, run.stop_ids)
    clock.lap('rollout')
    scores = self._score(prompts, responses, rollouts)
    clock.lap('reward')
    batches = layout.policy_batches(rollouts, range(len(responses)), self.row_length, micro_batch_rows(c, run.mesh))
    experience = self._collect_experience(rollouts, batches, scores.shaped_R)
    clock.lap('logprobs')
    update_metrics = self._update(rollouts, batches, experience)
    clock.lap('update')
    self.tokens += int(rollouts.length_R.sum())
    record: dict[str, Any] = {
      'stage': run.name,
      'step': self.step + 1,
      **scores.metrics,
      **metrics.describe(prompts, responses, rollouts),
      **self._experience_metrics(rollouts, experience, scores),
      **update_metrics,
      'kl_coef': self.kl_coef,
      'prompts': sum(map(len, rollouts.prompts)),
      'tokens': int(rollouts.length_R.sum()),
      'total_tokens': self.tokens,
      **{f'seconds_{phase}': seconds for phase, seconds in clock.seconds.items()},
      'step_seconds': clock.elapsed,
      'tokens_per_second': float(rollouts.length_R.sum()) / clock.elapsed,
    }
    if 'shuffled' in record:
      first = next((r['shuffled'] for r in self.history if 'shuffled' in r), record['shuffled'])
      record['shuffled_rise'] = record['shuffled'] - first
    if c.kl_target is not None and c.kl_in != 'none':
      self.kl_coef = advantages.next_kl_coef(self.kl_coef, record['kl'], c.kl_target, c.kl_horizon, len(responses))
    if c.method == 'sft':
      return record, []
    seed = (run.seed, self.step)
    return record, metrics.sample_records(self.step + 1, prompts, responses, scores.raw_R, scores.shuffled_R, rollouts.length_R, seed)

  def _generate(self) -> tuple[list[Prompt], Rollouts]:
    """Return the prompts of this step, each repeated `num_generations` times, and one response to each entry."""
    run, c = self.run, self.run.config
    numbers = [self.order(self.step * c.prompts_per_step + i)[0] for i in range(c.prompts_per_step)]
    chosen = [run.prompts[i] for i in numbers for _ in range(c.num_generations)]
    prompts, ids = [p for p, _ in chosen], [i for _, i in chosen]
    if c.method == 'sft':
      return prompts, _reference_rollouts(prompts, ids, run)
    return prompts, self.engine.generate(self.actor_params, ids, (run.seed, self.step))

  def _score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Rollouts) -> metrics.Scores:
    run, c = self.run, self.run.config
    if c.method == 'sft':  # references are imitated whatever their reward
      zeros_R = np.zeros(len(responses), np.float32)
      return metrics.Scores(zeros_R, zeros_R, None, {})
    shuffle = (run.seed, self.step) if self.step % c.shuffled_every == 0 else None
    return metrics.score(run.reward, c, self.normalizer, prompts, responses, rollouts, shuffle)

  def _collect_experience(self, rollouts: Rollouts, batches: Sequence[Any], score_R: np.ndarray) -> Experience:
    """Compute log-probabilities under the policy and the reference policy, values, and the advantages that follow from them."""
    run, c = self.run, self.run.config
    forward = functools.partial(run_forward, batches=batches, mesh=run.mesh, rollouts=rollouts)
    mask_RT, zeros_RT = layout.response_mask(rollouts), np.zeros(rollouts.tokens_RT.shape, np.float32)
    old_RT, entropy_RT = rollouts.logprob_RT, zeros_RT
    if c.recompute_logprobs or c.method == 'sft':
      old_RT, entropy_RT = forward(self.actor.forward, self.actor_params, outputs=2)
    reference_RT = forward(self.actor.forward, self.reference_policy, outputs=2)[0] if self.reference_policy is not None else old_RT
    value_RT = zeros_RT
    if self.critic and self.critic_state:
      value_RT = forward(self.critic.forward, lora.join(self.critic_state.params, self._critic_base), outputs=1)[0]
    if c.method == 'sft':
      # With an advantage of 1 and a ratio of 1 the policy gradient is that of the log-likelihood.
      return Experience(mask_RT, old_RT, reference_RT, entropy_RT, value_RT, mask_RT, zeros_RT)
    kl_RT = _kl(old_RT, reference_RT, estimator=c.kl_estimator)
    group_R = np.repeat(np.arange(c.prompts_per_step, dtype=np.int32), c.num_generations)
    estimate = estimate_advantages(c, c.prompts_per_step, score_R, kl_RT, value_RT, mask_RT, group_R, np.float32(self.kl_coef))
    advantage_RT, return_RT = jax.device_get(estimate)
    return Experience(mask_RT, old_RT, reference_RT, entropy_RT, value_RT, advantage_RT, return_RT)

  def _update(self, rollouts: Rollouts, batches: Sequence[Any], experience: Experience) -> dict[str, float]:
    """Run all updates of a step and return the means of their metrics."""
    run, c = self.run, self.run.config
    total, updates = self.rollouts_per_step, list[dict[str, float]]()
    for epoch in range(c.update_epochs):
      shuffled = np.random.default_rng([run.seed, self.step, epoch]).permutation(total)
      size = c.mini_batch_size or total
      for low in range(0, total, size):
        which = sorted(shuffled[low : low + size].tolist())
        part = batches if len(which) == total else layout.policy_batches(rollouts, which, self.row_length, len(batches[0].tokens_BT))
        updates.append(self._one_update(which, part, experience))
    means = {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
      raise NonFiniteError(f'{run.name}: step {self.step + 1}: {", ".join(bad)} is not finite; nothing was saved since the last checkpoint')
    return means

  def _one_update(self, which: Sequence[int], batches: Sequence[Any], experience: Experience) -> dict[str, float]:
    """Update actor and critic once, on the rollouts `which` that `batches` hold."""
    c, number = self.run.config, int(self.actor_state.step)
    inside_RT = experience.mask_RT * np.isin(np.arange(len(experience.mask_RT)), which)[:, None]
    weight_RT = np.asarray(_weights(inside_RT, mode=c.loss_mean))
    out: dict[str, float] = {}
    if self.step >= c.critic_warmup or not self.critic:
      arrays: tuple[np.ndarray, ...] = (experience.old_logprob_RT, experience.reference_logprob_RT, experience.advantage_RT, weight_RT)
      self.actor_state, sums, norm = self._take_step(self.actor, self.actor_state, self.run.base, batches, arrays, ActorTargets)
      out |= {**sums, 'grad_norm': norm, 'learning_rate': float(self.rates[0][min(number, len(self.rates[0]) - 1)])}
    if self.critic and self.critic_state:
      number = int(self.critic_state.step)
      arrays = (experience.value_RT, experience.return_RT, weight_RT)
      self.critic_state, sums, norm = self._take_step(self.critic, self.critic_state, self._critic_base, batches, arrays, CriticTargets)
      out |= {**sums, 'critic_grad_norm': norm, 'critic_learning_rate': float(self.rates[1][min(number, len(self.rates[1]) - 1)])}
    return out

  def _take_step(
    self,
    model: ModelFunctions,
    state: TrainState,
    base: dict[str, Any],
    batches: Sequence[Any],
    arrays: Sequence[np.ndarray],
    targets: type,
  ) -> tuple[TrainState, dict[str, float], float]:
    """Take one step of an optimizer.

    Args:
      model: the actor's or the critic's functions.
      state: donated.
      base: parameters under its adapters; empty without.
      batches: micro-batches of the update.
      arrays: (R, T), in the order of the fields of `targets`.
      targets: `ActorTargets` or `CriticTargets`.

    Returns:
      (state, sums of metrics, norm of the gradients).
    """
    grads, sums = model.zeros(state.params)
    params = lora.join(state.params, base)
    for batch in batches:
      placed = targets(*(layout.scatter_values(array_RT, batch) for array_RT in arrays))
      batch, placed = sharding.put_global((batch, placed), self.run.mesh)
      grads, sums = model.accumulate(grads, sums, params, batch, placed, np.float32(self.kl_coef))
    state, norm = model.apply(state, grads)
    sums, norm = jax.device_get((sums, norm))
    return state, {name: float(value) for name, value in sums.items()}, float(norm)

  def _experience_metrics(self, rollouts: Rollouts, experience: Experience, scores: metrics.Scores) -> dict[str, float]:
    """Return the metrics of a step that need the outputs of the models."""
    c, mask_RT = self.run.config, experience.mask_RT
    count = float(mask_RT.sum())
    out: dict[str, float] = {}
    if self.reference_policy is not None:
      difference_RT = (experience.old_logprob_RT - experience.reference_logprob_RT) * mask_RT
      out |= {'kl': float(difference_RT.sum()) / count, 'kl_answer': float(difference_RT.sum(axis=1).mean())}
    if c.method == 'sft':
      return out | {'nll': -float((experience.old_logprob_RT * mask_RT).sum()) / count}
    if c.recompute_logprobs:
      mismatch_RT = np.abs(experience.old_logprob_RT - rollouts.logprob_RT) * mask_RT
      out['rollout_mismatch'] = float(mismatch_RT.sum()) / count
    if self.critic:
      out['explained_variance'] = metrics.explained_variance(experience.return_RT, experience.value_RT, mask_RT)
    out['advantage_std'] = float(experience.advantage_RT[mask_RT > 0].std())
    if self.base_length is None:
      self.base_length = float(rollouts.length_R.mean())
    slope, adjusted = metrics.length_regression(scores.raw_R, rollouts.length_R, self.base_length)
    return out | {'length_slope': slope, 'length_free': adjusted}

  def _check_alarms(self) -> bool:
    """Log the alarms that the last step raised, and return whether the run is to stop."""
    messages = Alarms(self.run.config.alarms).check(self.history)
    for message in messages:
      self.run.log(f'{self.run.name}: {message}')
    if messages:
      self.metrics.write({'stage': self.run.name, 'step': self.step, 'alarms': messages})
    return bool(messages) and self.run.config.alarms.action == 'stop'

  def _evaluate(self) -> None:
    """Measure the policy on held-out prompts, if there are any, and log the result."""
    run = self.run
    if run.held_out is None or not len(run.held_out):
      return
    with self._saving_if_rewards_fail(), self.session.saving_if_stopped(self._save):
      result = metrics.evaluate(run, self.actor_params)
    self.evaluated = {f'evaluation_{name}': value for name, value in result.items()}
    self.metrics.write({'stage': run.name, 'step': self.step, **self.evaluated})
    run.log(f'{run.name}: step {self.step}: held-out prompts: ' + ', '.join(f'{name} {value:.4f}' for name, value in result.items()))

  @contextlib.contextmanager
  def _saving_if_rewards_fail(self) -> Iterator[None]:
    """Save the last complete step if the reward server or the reward function fails, before the error is raised."""
    try:
      yield
    except (RewardServerError, RewardFunctionError):
      if self.step > 0:
        self._save()
        self.session.checkpointer.wait()
      raise

  def _save(self, again: bool = False) -> None:
    data = {
      'tokens': self.tokens,
      'kl_coef': self.kl_coef,
      'base_length': self.base_length,
      'normalizer': self.normalizer.to_json(),
      'evaluated': self.evaluated,
      'evaluation_due': self.evaluation_due,
      'alarmed': self.alarmed and self.evaluation_due,  # a run that stopped for an alarm goes on when it is started again
    }
    self.session.save(PpoState.join(self.actor_state, self.critic_state), data, self.evaluated, again=again)

  def _summarize(self, timing: dict[str, Any]) -> dict[str, Any]:
    records = read_metrics(self.run.folder)
    evaluated = [record for record in records if any(name.startswith('evaluation_') for name in record)]
    evaluations = [{k.removeprefix('evaluation_'): v for k, v in record.items() if k.startswith('evaluation_')} for record in evaluated]
    trained = [record for record in records if 'tokens_per_second' in record]
    last = trained[-max(len(trained) // 20, 1) :]
    shown = ('reward', 'raw', 'nll', 'shuffled_gap', 'kl', 'entropy', 'length', 'truncated', 'clip_fraction', 'explained_variance')
    summary = {
      'steps': self.step,
      'responses': self.step * self.rollouts_per_step,
      'tokens': self.tokens,
      **timing,
      **{name: float(np.mean([record[name] for record in last])) for name in shown if all(name in record for record in last)},
      'alarms': [message for record in records for message in record.get('alarms', [])],
      **self.run.facts,
    }
    if evaluations:
      summary |= {'evaluation_before': evaluations[0], 'evaluation_after': evaluations[-1]}
    return summary


def _reference_rollouts(prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], run: Run) -> Rollouts:
  """Return the references as if the policy had sampled them, each with a stop token at its end, cut at `max_new` tokens."""
  width = run.config.rollout.max_new
  if not run.stop_ids:
    raise UserError('rft.method is sft, but no token ends a response; set rft.rollout.stop')
  texts = run.tokenizer.encode_batch([join_messages(p.reference, 'reference') for p in prompts])
  whole = [[*text, run.stop_ids[0]] for text in texts]
  tokens, length = np.zeros((len(whole), width), np.int32), np.array([min(len(w), width) for w in whole], np.int32)
  for r, sequence in enumerate(whole):
    tokens[r, : length[r]] = sequence[:width]
  stopped = np.array([len(w) <= width for w in whole])
  return Rollouts(ids, tokens, length, np.zeros(tokens.shape, np.float32), stopped)


def _ahead_of_time(functions: ModelFunctions) -> ModelFunctions:
  """Return functions that are compiled where SIGTERM is noticed, and whose memory is known."""
  run = executables
  return functions._replace(forward=run(functions.forward), accumulate=run(functions.accumulate), apply=run(functions.apply))
