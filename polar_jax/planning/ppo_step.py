"""Memory per chip of reinforcement fine-tuning, from compiling its functions for a TPU slice.

The functions are those of the trainer, compiled for shapes alone: nothing is allocated, and no TPU runtime starts. The compiler reports
arguments, results and temporaries of each function; the memory that the trainer holds in addition at that time is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import Config, ModelConfig, RftConfig
from polar_jax.data import packing
from polar_jax.model import lora
from polar_jax.model.attention import for_platform
from polar_jax.model.heads import abstract_model
from polar_jax.model.reward_model import group_rewards
from polar_jax.planning.topology import open_slice
from polar_jax.ppo import experience
from polar_jax.ppo.learner import ActorTargets, CriticTargets, ModelFunctions, build_actor, build_critic
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.runtime.chips import GIB
from polar_jax.runtime.compiled import Memory, bytes_of_a_device, compile_call
from polar_jax.scoring.scorer import jit_rewards
from polar_jax.train.step import TrainState
from polar_jax.types import GroupBatch, PolicyBatch

_CANDIDATES = 64  # per scored row, as in `Scorer`
_UPDATES = 1_000  # of a run; only the learning rate schedule depends on it


class Call(NamedTuple):
  """One call of a function in a step of PPO."""

  phase: str
  name: str
  function: Any  # jitted
  args: tuple[Any, ...]
  reads: tuple[str, ...]  # names of held arrays that are its arguments


class Measured(NamedTuple):
  """A call and its memory."""

  phase: str
  name: str
  memory: Memory
  resident: int  # bytes per chip that the trainer holds in addition to the arguments

  @property
  def peak(self) -> int:
    """Memory in use while the function runs."""
    return self.memory.peak + self.resident


class Plan(NamedTuple):
  """The plan of a step.

  Attributes:
    topology: chip and slice.
    mesh: devices along each axis.
    hbm: bytes per chip.
    held: bytes per chip that the trainer holds, by name; those in `PHASE_HOLDS` in some phases only.
    calls: all functions of a step.
  """

  topology: str
  mesh: dict[str, int]
  hbm: int
  held: dict[str, int]
  calls: list[Measured]

  @property
  def phases(self) -> dict[str, int]:
    """Peak memory of each phase, bytes per chip."""
    names = dict.fromkeys(call.phase for call in self.calls)
    return {name: max(call.peak for call in self.calls if call.phase == name) for name in names}

  @property
  def peak(self) -> int:
    """Peak memory of the step, bytes per chip."""
    return max(self.phases.values())

  @property
  def fits(self) -> bool:
    """Whether every function compiles and fits."""
    return self.peak <= self.hbm and not any(call.memory.refused or call.memory.failure for call in self.calls)


# Arrays that are held in one phase only.
PHASE_HOLDS = {
  'rollout': ('sampling weights', 'keys and values'),
  'update actor': ('actor gradients',),
  'update critic': ('critic gradients',),
}
# Call -> the held array that it creates, which is released when the phase ends.
_MAKES = {'prepare': 'sampling weights', 'init_state': 'keys and values'}
# The held arrays that are arguments of a function of all parameters.
_CRITIC = ('critic parameters', 'base')
_ACTOR = ('actor parameters', 'base', 'vocabulary projection of the base')
_PASSING = {name for names in PHASE_HOLDS.values() for name in names}


def plan(config: Config, topology: str, reward: ModelConfig, log: Callable[[str], None] = lambda _: None) -> Plan:
  """Compile every function of a PPO step for a slice and add up the memory.

  Args:
    config: of the run; policy and critic have the shape of `model`.
    topology: chip and slice, such as v5p:4x4x4.
    reward: shape of the reward model; its compute options are those of `config.model`, as in a run.
    log: takes one line of progress.

  Raises:
    ConfigError: the chip is unknown, the slice does not exist, or the mesh does not fit it.
  """
  _, chip, devices = open_slice(topology)
  mesh = sharding.make_mesh(config.mesh, devices)
  builder = _CallBuilder(config, reward, mesh)
  calls = []
  with jax.set_mesh(mesh), for_platform('tpu'):
    for call in builder.calls():
      present = {name: size for name, size in builder.held.items() if name not in _PASSING or name in PHASE_HOLDS.get(call.phase, ())}
      resident = sum(size for name, size in present.items() if name not in call.reads)
      memory, _ = compile_call(call.function.lower(*call.args), sum(present.values()) - resident)
      if call.name in _MAKES:
        builder.held[_MAKES[call.name]] = memory.output or bytes_of_a_device(jax.eval_shape(call.function, *call.args))
      calls.append(Measured(call.phase, call.name, memory, resident))
      log(f'{call.phase}: {call.name}: {calls[-1].peak / GIB:.1f} GiB, compiled in {memory.seconds:.0f} s')
  return Plan(topology, dict(mesh.shape), chip.hbm, builder.held, calls)


class _CallBuilder:
  """The calls of a step in order, and the bytes per chip that the trainer holds (`held`)."""

  def __init__(self, config: Config, reward: ModelConfig, mesh: Mesh):
    self._c, self._model, self._mesh = config.rft, config.model, mesh
    compute = {name: getattr(config.model, name) for name in ('compute_dtype', 'attention', 'remat', 'scan_unroll', 'frozen_layers')}
    self._reward_model = ModelConfig(**{**vars(reward), **compute})
    c = self._c
    self._actor = build_actor(config.model, c, _UPDATES, mesh)
    critic = c.method == 'ppo' and c.advantage == 'gae'
    self._critic = build_critic(config.model, c, _UPDATES, mesh) if critic else None
    abstract = lambda model, head: sharding.abstract_params(abstract_model(model, head), mesh, config.model.compute_dtype)
    # With adapters the reference policy is the base of the policy, which is held once for all models.
    tracked = c.lora.rank is None and (c.track_kl or (c.method == 'ppo' and c.kl_in != 'none'))
    self._start = abstract(config.model, 'lm') if tracked else None
    local = c.reward.model_weight != 0 and c.reward.source == 'model'
    self._reward = abstract(self._reward_model, 'reward') if local else None
    self.held: dict[str, int] = {}
    for name, learner in (('actor', self._actor), ('critic', self._critic)):
      if learner is not None:
        self.held[f'{name} parameters'] = bytes_of_a_device(learner.abstract.params)
        self.held[f'{name} moments'] = bytes_of_a_device(learner.abstract.opt_state)
        self.held[f'{name} gradients'] = bytes_of_a_device(learner.abstract.params)
    base = lora.split(self._actor.abstract_params, c.lora)[1]
    projection = {name: value for name, value in base.items() if name != 'decoder'}
    frozen: dict[str, Any] = {'base': base.get('decoder'), 'vocabulary projection of the base': projection or None}
    for name, params in {**frozen, 'frozen start': self._start, 'reward model': self._reward}.items():
      if params is not None:
        self.held[name] = bytes_of_a_device(params)

  def calls(self) -> Iterator[Call]:
    """Yield the calls of a step."""
    if self._c.method == 'ppo':
      yield from self._rollout()
    if self._reward is not None:
      yield self._scoring()
    yield from self._reading()
    yield from self._learning('actor', self._actor, ActorTargets)
    if self._critic is not None:
      yield from self._learning('critic', self._critic, CriticTargets)

  def _rollout(self) -> Iterator[Call]:
    engine = RolloutEngine(self._model, self._mesh, self._c.rollout, (0,), self._c.lora)
    reads = {'prepare': (*_ACTOR, 'sampling weights', 'keys and values'), 'init_state': ('keys and values',)}
    for name, function, args in engine.calls(self._actor.abstract_params):
      yield Call('rollout', name, function, args, reads.get(name, ('sampling weights', 'keys and values')))

  def _scoring(self) -> Call:
    c = self._c
    shards = sharding.batch_shards(self._mesh)
    rows, length = sharding.round_up(c.reward.rows_per_batch, shards), scored_row_length(c)
    tokens, ends = (self._array((rows, width), jnp.int32) for width in (length, _CANDIDATES))
    batch = GroupBatch(**{name: ends if name.endswith('_BQ') else tokens for name in GroupBatch._fields})
    score = jit_rewards(group_rewards, self._reward_model, self._mesh)
    return Call('reward', 'score', score, (self._reward, batch), ('reward model',))

  def _reading(self) -> Iterator[Call]:
    batch = PolicyBatch(**dict.fromkeys(PolicyBatch._fields, self._tokens(jnp.int32)))
    yield Call('logprobs', 'read actor', self._actor.forward, (self._actor.abstract_params, batch), _ACTOR)
    if self._start is not None:
      yield Call('logprobs', 'read start', self._actor.forward, (self._start, batch), ('frozen start',))
    if self._critic is not None:
      yield Call('logprobs', 'read critic', self._critic.forward, (self._critic.abstract_params, batch), _CRITIC)

  def _learning(self, name: str, learner: ModelFunctions, targets: Any) -> Iterator[Call]:
    state: TrainState = learner.abstract
    batch = PolicyBatch(**dict.fromkeys(PolicyBatch._fields, self._tokens(jnp.int32)))
    known = targets(**dict.fromkeys(targets._fields, self._tokens(jnp.float32)))
    _, sums = jax.eval_shape(learner.zeros, state.params)
    phase, scalar = f'update {name}', jax.ShapeDtypeStruct((), jnp.float32)
    params, grads = f'{name} parameters', f'{name} gradients'
    read = _ACTOR if name == 'actor' else _CRITIC
    # Gradients have the shardings and dtype of the parameters.
    yield Call(phase, 'accumulate', learner.accumulate, (state.params, sums, learner.abstract_params, batch, known, scalar), (*read, grads))
    yield Call(phase, 'apply', learner.apply, (state, state.params), (params, grads, f'{name} moments'))

  def _tokens(self, dtype: Any) -> jax.ShapeDtypeStruct:
    c = self._c
    length = c.row_length or sharding.round_up(c.rollout.max_prompt + c.rollout.max_new, packing.LENGTH_MULTIPLE)
    return self._array((experience.micro_batch_rows(c, self._mesh), length), dtype)

  def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(self._mesh))


def scored_row_length(config: RftConfig) -> int:
  """Return the tokens of a scored row. A run measures its prompts; here prompts have the maximum length, references that of a response."""
  prompt, response = config.rollout.max_prompt, config.rollout.max_new
  # The prompt appears twice, before the reference and before the response, which may be longer in another tokenizer.
  return config.reward.row_length or sharding.round_up(2 * prompt + response + 2 * response, 128)


# Phase -> the option that reduces its memory without changing results.
_SMALLER = {
  'rollout': 'rft.rollout.max_concurrent: fewer responses decoded at a time',
  'reward': 'rft.reward.rows_per_batch: fewer rows scored at a time',
  'logprobs': 'rft.micro_batch_rows: smaller micro-batches',
  'update actor': 'rft.micro_batch_rows: smaller micro-batches',
  'update critic': 'rft.micro_batch_rows: smaller micro-batches',
}


def changes(plan: Plan) -> list[str]:
  """Return what to change if a step does not fit, cheapest first."""
  if plan.fits:
    return []
  always = sum(size for name, size in plan.held.items() if name not in _PASSING)
  large = [phase for phase, peak in plan.phases.items() if peak > plan.hbm]
  smaller = [_SMALLER[phase] for phase in large] if always < plan.hbm else []
  failed = [f'{call.phase}: {call.name} did not compile: {call.memory.failure}' for call in plan.calls if call.memory.failure]
  chips = f'more chips, or larger ones: {always / GIB:.1f} of {plan.hbm // GIB} GiB are held in every phase'
  return [*dict.fromkeys(smaller), *failed, *([chips] if large else [])]


def table(plan: Plan) -> list[str]:
  """Return the plan as Markdown lines, in GiB per chip."""
  show = lambda size: f'{size / GIB:.2f}'
  mesh = ', '.join(f'{axis} {size}' for axis, size in plan.mesh.items() if size > 1)
  lines = [f'{plan.topology}: mesh {mesh or "of one chip"}; {plan.hbm // GIB} GiB a chip', '']
  lines += ['| held | GiB | when |', '|---|---|---|']
  when = {name: phase for phase, names in PHASE_HOLDS.items() for name in names}
  lines += [f'| {name} | {show(size)} | {when.get(name, "always")} |' for name, size in plan.held.items()]
  columns = ('phase', 'function', 'arguments', 'temporary', 'new results', 'code', 'held in addition', 'in all', 'seconds to compile')
  lines += ['', f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
  for call in plan.calls:
    m = call.memory
    parts = [show(x) for x in (m.argument, m.temporary, m.output - m.alias, m.code)] if not m.refused else ['refused'] * 4
    parts = [parts[0], *['not compiled'] * 3] if m.failure else parts
    lines.append(f'| {call.phase} | {call.name} | {" | ".join(parts)} | {show(call.resident)} | {show(call.peak)} | {m.seconds:.0f} |')
  most = max(plan.phases, key=lambda phase: plan.phases[phase])
  failed = any(call.memory.failure for call in plan.calls)
  verdict = 'fits' if plan.fits else 'not known to fit' if failed and plan.peak <= plan.hbm else 'does not fit'
  lines += [f'not compiled: {call.phase}: {call.name}: {call.memory.failure}' for call in plan.calls if call.memory.failure]
  lines += ['', f'peak {show(plan.peak)} of {plan.hbm // GIB} GiB, in phase {most}: {verdict}']
  return lines + [f'to make it fit: {line}' for line in changes(plan)]


def as_json(plan: Plan) -> dict[str, Any]:
  """Return the plan as JSON values, in bytes per chip."""
  return {
    'topology': plan.topology,
    'mesh': plan.mesh,
    'hbm': plan.hbm,
    'held': plan.held,
    'calls': [
      {'phase': call.phase, 'name': call.name, **call.memory._asdict(), 'resident': call.resident, 'peak': call.peak} for call in plan.calls
    ],
    'phases': plan.phases,
    'peak': plan.peak,
    'fits': plan.fits,
    'change': changes(plan),
    'compile_seconds': round(sum(call.memory.seconds for call in plan.calls), 1),
  }
