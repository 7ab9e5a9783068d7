"""What is asked of whom: which policies answer a prompt, and the units of work.

All of it is a function of the run's seed, the names and weights of the policies, and the prompts' ids, whatever was done before: a run that
is started again asks for what is missing, and a policy that joins the pool changes nothing of the others but where it takes their place.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import PoolPrompt, Request, seed_of
from polar_jax.synthesis.store import Store

UNSEEN = 'unseen_prompts'


class Unit(NamedTuple):
  """The requests of one policy for the prompts of one shard."""

  policy: str
  shard: int
  requests: list[Request]


class Plan:
  """The units of a run. Its methods may be called from several threads.

  Args:
    specs: of the policies that are sampled, in any order.
    store: of the prompts and of the units that are finished.
    kinds: of all prompts.
    seed: of the run.
    policies: that answer a prompt; of the held-out ones as many again, for unseen prompts alone.
    samples: of each policy that answers a prompt.
    shard_size: prompts of a unit.
  """

  def __init__(
    self, specs: Sequence[PolicySpec], store: Store, kinds: Sequence[str], *, seed: int, policies: int, samples: int, shard_size: int
  ):
    self._specs, self._store, self._kinds, self._seed = list(specs), store, list(kinds), seed
    self._policies, self._samples, self._size = policies, samples, shard_size
    self._number = {spec.name: number for number, spec in enumerate(self._specs)}
    self._lock = threading.Lock()
    self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # shard -> numbers of its prompts, and policies of each

  @property
  def num_shards(self) -> int:
    """The number of shards of prompts."""
    return math.ceil(self._store.num_prompts() / self._size)

  def answering(self, prompt: PoolPrompt) -> set[str]:
    """Return the names of the policies that answer a prompt, drawn by weight without replacement."""
    groups = [False, True] if prompt.split == UNSEEN else [False]
    out: set[str] = set()
    for held_out in groups:
      eligible = [spec for spec in self._specs if spec.held_out == held_out and spec.accepts(prompt.kind, self._kinds)]
      if len(eligible) > self._policies:
        eligible = sorted(eligible, key=lambda spec: self._key(prompt, spec))[: self._policies]
      out.update(spec.name for spec in eligible)
    return out

  def units(self, policy: str) -> Iterator[Unit]:
    """Yield the units of a policy that are not finished, in their order."""
    for shard in self._missing(policy):
      chosen = set(self._prompts_of(policy, shard).tolist())
      prompts = [prompt for prompt in self._store.prompts(shard * self._size, (shard + 1) * self._size) if prompt.index in chosen]
      yield Unit(policy, shard, self.requests(policy, prompts))

  def missing(self, policy: str) -> int:
    """Return the number of units of a policy that are not finished."""
    return len(self._missing(policy))

  def requests(self, policy: str, prompts: Sequence[PoolPrompt], samples: int | None = None) -> list[Request]:
    """Return the requests for samples of a policy."""
    count = self._samples if samples is None else samples
    return [Request(prompt, i, seed_of(self._seed, policy, prompt.id, i)) for prompt in prompts for i in range(count)]

  def _missing(self, policy: str) -> list[int]:
    """Return the shards of which a policy answers prompts and has not finished its unit."""
    done = self._store.done_units(policy)
    return [shard for shard in range(self.num_shards) if shard not in done and len(self._prompts_of(policy, shard))]

  def _prompts_of(self, policy: str, shard: int) -> np.ndarray:
    """Return the numbers of the prompts of a shard that a policy answers."""
    numbers, policies = self._draws(shard)
    return numbers[(policies == self._number[policy]).any(axis=1)]

  def _key(self, prompt: PoolPrompt, spec: PolicySpec) -> tuple[float, str]:
    """Return an exponential variable of rate `weight`: the smallest of them are a weighted draw without replacement."""
    digest = hashlib.blake2b(f'{self._seed}\0{prompt.id}\0{spec.name}'.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
    uniform = (int.from_bytes(digest, 'big') + 1) / (2**64 + 1)
    return -math.log(uniform) / spec.weight, spec.name

  def _draws(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a shard's prompts, int64 (n,), and the policies that answer each, int16 (n, most), padded with -1.

    Each shard is drawn once: all policies read what a draw costs as many hashes as there are policies. A million prompts take 16 MB.
    """
    with self._lock:
      if shard not in self._drawn:
        prompts = self._store.prompts(shard * self._size, (shard + 1) * self._size)
        policies = np.full((len(prompts), 2 * self._policies), -1, np.int16)
        for row, prompt in enumerate(prompts):
          names = sorted(self.answering(prompt))
          policies[row, : len(names)] = [self._number[name] for name in names]
        self._drawn[shard] = np.array([prompt.index for prompt in prompts], np.int64), policies
      return self._drawn[shard]
