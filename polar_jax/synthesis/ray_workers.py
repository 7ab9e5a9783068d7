"""Units on a Ray cluster: by actors, each of which is a process that keeps its policy open, and its CPUs and GPUs reserved.

There are as many as the nodes that are alive have room for, but no more than there are units. Nodes may join and leave: the units of an
actor that is lost are given to another one, and give the same samples there.

Plain tasks would not do, because the process of a task that holds a GPU ends with the task, and a large model takes minutes to load. Nor
would Ray Data: it reads one table from end to end, while units come policy by policy, depend on what was given up before, and are stored
one at a time.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from typing import Any

from absl import logging

from polar_jax.config import PoolConfig
from polar_jax.runtime import ray_cluster
from polar_jax.synthesis.plan import Unit
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, QuarantineError, Request, Sample
from polar_jax.synthesis.workers import Attempt, Tasks, Watch, sample_unit
from polar_jax.types import UserError, one_line

_AHEAD = 2  # units of an actor, so that it does not wait for this process
_TRIES = 10  # of a unit whose actor is lost; after that its policy is assumed to be the cause
_POLL_SECONDS = 1.0
_BETWEEN_WARNINGS = 60.0  # seconds


def run(config: PoolConfig, tasks: Tasks, watch: Watch) -> Generator[Attempt, None, None]:
  """Sample units on the cluster. See `workers.run`."""
  ray_cluster.check('synthesize.backend')
  with ray_cluster.connected(config.ray_address) as ray:
    actors = _Actors(ray, config)
    try:
      yield from actors.run(tasks, watch)
    finally:
      actors.close()


class _Sampler:
  """The program of an actor."""

  def start(self) -> None:
    """Return when the process runs."""

  def sample(self, spec: PolicySpec, requests: Sequence[Request]) -> tuple[list[Sample | Failure], dict[str, int]]:
    """See `workers.sample_unit`."""
    return sample_unit(spec, requests)


@dataclasses.dataclass(eq=False)
class _Task:
  """A unit, and how often it was begun."""

  spec: PolicySpec
  unit: Unit
  tries: int = 0


@dataclasses.dataclass(eq=False)
class _Actor:
  """An actor, the policy that it has open, and the units that it has been given."""

  handle: Any
  spec: PolicySpec | None = None
  is_ready: bool = False
  tasks: list[_Task] = dataclasses.field(default_factory=list)


class _Actors:
  """The actors of a run."""

  def __init__(self, ray: Any, config: PoolConfig):
    self._ray, self._config = ray, config
    self._class = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_restarts=0, max_task_retries=0)(_Sampler)
    self._actors: list[_Actor] = []
    self._waiting: collections.deque[_Task] = collections.deque()
    self._references: dict[Any, tuple[_Actor, _Task | None]] = {}  # of calls; None: of `start`
    self._given_up: set[str] = set()  # policies
    self._known_room, self._looked = 0, -math.inf
    self._failed_starts, self._next_warning = 0, time.monotonic() + _BETWEEN_WARNINGS

  def run(self, tasks: Tasks, watch: Watch) -> Generator[Attempt, None, None]:
    """Yield what comes of all units."""
    more = True
    while more or self._waiting or any(actor.tasks for actor in self._actors):
      while more and len(self._waiting) < _AHEAD * max(1, len(self._actors)):
        task = next(tasks, None)
        more = task is not None
        if task is not None and task[0].name not in self._given_up:
          self._waiting.append(_Task(*task))
      self._resize()
      self._give()
      ready, _ = self._ray.wait([*self._references], timeout=_POLL_SECONDS) if self._references else ([], [])
      watch()
      for reference in ready:
        # A reference is unknown if its actor was found to be lost by another one.
        if reference in self._references and (attempt := self._take(reference, *self._references.pop(reference))) is not None:
          if isinstance(attempt.results, QuarantineError):  # the others would fail too
            self._given_up.add(attempt.unit.policy)
            self._waiting = collections.deque(task for task in self._waiting if task.unit.policy != attempt.unit.policy)
          yield attempt

  def _resize(self) -> None:
    """Start actors as long as there are nodes and units for more."""
    room = self._room()
    if not room and time.monotonic() > self._next_warning:
      self._next_warning = time.monotonic() + _BETWEEN_WARNINGS
      logging.warning(
        'no node of the Ray cluster has cpus=%g and gpus=%g; waiting for one (synthesize.cpus, synthesize.gpus)',
        self._config.cpus,
        self._config.gpus,
      )
    units = len(self._waiting) + sum(len(actor.tasks) for actor in self._actors)
    while len(self._actors) < min(max(1, room), units):  # one that has no room yet shows a cluster that grows what is asked for
      actor = _Actor(self._class.remote())
      self._actors.append(actor)
      self._references[actor.handle.start.remote()] = actor, None

  def _room(self) -> int:
    """Return the number of actors for which the nodes that are alive are large enough, as it was a second ago at most."""
    if (now := time.monotonic()) < self._looked + _POLL_SECONDS:
      return self._known_room
    room = 0
    for node in self._ray.nodes():
      wanted = [(self._config.cpus, 'CPU'), (self._config.gpus, 'GPU')]
      limits = [node['Resources'].get(name, 0.0) / count for count, name in wanted if count]
      room += int(min(limits, default=1.0) + 1e-6) if node['Alive'] else 0
    self._known_room, self._looked = room, now
    return room

  def _give(self) -> None:
    """Give the units that wait to actors that have few. An actor with GPUs has one policy, because it gives memory back when it ends."""
    for actor in list(self._actors):
      while actor.is_ready and len(actor.tasks) < _AHEAD and (task := self._suiting(actor)) is not None:
        self._waiting.remove(task)
        actor.spec = task.spec
        actor.tasks.append(task)
        task.tries += 1
        self._references[actor.handle.sample.remote(task.spec, task.unit.requests)] = actor, task
      if actor.is_ready and self._waiting and not actor.tasks:  # it has another policy open
        self._end(actor)

  def _suiting(self, actor: _Actor) -> _Task | None:
    is_free = not self._config.gpus or actor.spec is None
    return next((task for task in self._waiting if is_free or task.spec == actor.spec), None)

  def _take(self, reference: Any, actor: _Actor, task: _Task | None) -> Attempt | None:
    """Return what came of a call, None if it was the start of an actor, or if its unit has to be done again.

    Raises:
      UserError: actors do not start, or a policy has a setting that it cannot have.
    """
    errors = self._ray.exceptions
    try:
      result = self._ray.get(reference)
    except errors.RayTaskError as error:
      if task is None:
        raise UserError(f'Ray could not start a process: {one_line(str(error))}') from error
      actor.tasks.remove(task)
      if isinstance(error.cause, UserError) and not isinstance(error.cause, QuarantineError):
        raise error.cause from error
      return Attempt(task.unit, QuarantineError(one_line(str(error.cause))), {})
    except errors.RayError as error:
      return self._lose(actor, task, error)
    if task is None:
      actor.is_ready, self._failed_starts = True, 0
      return None
    actor.tasks.remove(task)
    return Attempt(task.unit, *result)

  def _lose(self, actor: _Actor, task: _Task | None, error: Exception) -> Attempt | None:
    """Have the units of an actor that was lost done again. Returns the attempt of one that was tried too often."""
    reason = one_line(str(error))
    if task is None:
      self._failed_starts += 1
      if self._failed_starts >= _TRIES:
        raise UserError(f'Ray could not start a process in {_TRIES} tries: {reason}') from error
    logging.warning('an actor of the Ray cluster was lost, and its %d units are done again: %s', len(actor.tasks), reason)
    tasks = list(actor.tasks)
    self._end(actor)
    # Only the first one was at work.
    for other in tasks[1:]:
      other.tries -= 1
    if tasks and tasks[0].tries >= _TRIES:
      self._waiting.extendleft(reversed(tasks[1:]))
      return Attempt(tasks[0].unit, QuarantineError(f'Ray lost {_TRIES} processes that sampled it: {reason}'), {})
    self._waiting.extendleft(reversed(tasks))
    return None

  def _end(self, actor: _Actor) -> None:
    """End an actor, whether or not it lives, and forget its calls."""
    self._actors.remove(actor)
    actor.tasks.clear()
    for reference in [reference for reference, (other, _) in self._references.items() if other is actor]:
      del self._references[reference]
    self._ray.kill(actor.handle)

  def close(self) -> None:
    """End all actors, with what they do."""
    for actor in list(self._actors):
      self._end(actor)
