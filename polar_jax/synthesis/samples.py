"""What a policy of a pool is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from polar_jax.types import UserError

PREFIX, INSTRUCTION = 'prefix', 'instruction'  # kinds of prompts


@dataclasses.dataclass(frozen=True)
class PoolPrompt:
  """A prompt that policies of a pool continue or answer.

  Attributes:
    id: names the prompt, and nothing else of the run: a digest of its text, or the id that its row has.
    text: the beginning of a document, or an instruction.
    kind: PREFIX or INSTRUCTION.
    source: the file that it is from.
    index: its place in the run.
    split: of the triplets that are made of it, as far as the prompt decides it: 'train', 'validation' or 'unseen_prompts'.
  """

  id: str
  text: str
  kind: str
  source: str
  index: int
  split: str


class Request(NamedTuple):
  """A request for one sample."""

  prompt: PoolPrompt
  sample: int  # number of the sample, from 0
  seed: int  # below 2^31, a function of the run's seed, the policy's name, the prompt's id and the number


class Sample(NamedTuple):
  """One answer to a prompt."""

  text: str
  ended: bool  # whether the policy ended it; False: the limit of its length did
  tokens: int  # as the policy counts them; 0 if unknown


class Failure(NamedTuple):
  """Why there is no answer to one request, although the policy answers others."""

  reason: str


class QuarantineError(UserError):
  """A policy cannot be sampled any more. What it gave before is kept. The message is one line, without the policy's name.

  Attributes:
    status: of HTTP, if a server refused the request.
  """

  def __init__(self, message: str, status: int | None = None):
    super().__init__(message)
    self.status = status


class Sampler(Protocol):
  """Samples one policy."""

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request, in order. The answer depends on nothing but the request.

    Raises:
      QuarantineError: the policy does not answer.
    """

  def counts(self) -> dict[str, Any]:
    """Return counts for the data card: `requests`, `retries`, `prompt_tokens` and `tokens`, as far as they are known."""


def seed_of(seed: int, policy: str, prompt_id: str, sample: int) -> int:
  """Return the seed of a request, the same on every machine and in every run with the same seed."""
  digest = hashlib.sha256(f'{seed}\0{policy}\0{prompt_id}\0{sample}'.encode('utf-8', 'surrogatepass')).digest()
  return int.from_bytes(digest[:4], 'big') >> 1
