"""Triplets of the samples of one prompt: two samples of one policy are reference and chosen, a sample of another policy is rejected.

A triplet for training may have several rejected samples, each of another policy; it is then a ranked list.

What is drawn depends on nothing but the seed, the prompt's id, the facts of the policies and the samples of this prompt: not on their
order, nor on other prompts.

Policies that are held out meet each other only, and only on prompts that are unseen too: those triplets are the split 'unseen_policies'.
All others go to the split of their prompt. Whether a training policy is a near twin of one held out is not checked here.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from polar_jax.data.records import Fields, fields_of
from polar_jax.synthesis.samples import INSTRUCTION, PREFIX, PoolPrompt
from polar_jax.types import RankedList, Triplet

PROMPT_SPLITS = ('train', 'validation', 'unseen_prompts')
UNSEEN_POLICIES = 'unseen_policies'
SPLITS = (*PROMPT_SPLITS, UNSEEN_POLICIES)
DIFFICULTIES = ('near_to', 'family', 'other')  # what the policies of a triplet have in common, the hardest first
WRAPPERS = {PREFIX: 'pretrain', INSTRUCTION: 'sft'}  # a continuation follows its prompt without a separator
COUNTS = ('candidates', 'empty', 'held_out', 'equal', 'too_few')
_DRAWS = 4  # of a negative by weight, before all policies are put in an order


class Candidate(NamedTuple):
  """A sample of a policy after clean-up."""

  policy: str
  sample: int
  text: str


Triple = tuple[Candidate, ...]  # reference, chosen, and the rejected ones, of which there is at least one


@dataclasses.dataclass(frozen=True)
class PolicyFacts:
  """What is known of a policy.

  Attributes:
    weight: how often it is drawn, relative to others; positive.
    family: policies of one family are related; '' if it has none.
    size: number of parameters; None if unknown.
    date: when it appeared: an ISO date, a month or a year; None if unknown.
    held_out: no training triplet has a sample of it.
    near_to: names of policies that hardly differ from it: other steps of its training, or its merges and quantizations.
  """

  weight: float
  family: str = ''
  size: float | None = None
  date: str | None = None
  held_out: bool = False
  near_to: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class PairingRules:
  """How triplets are drawn.

  Attributes:
    pairs_per_prompt: triplets of a prompt, in each split that it has, at most.
    near_share: probability that the rejected policy is chosen for being close to the other one: among policies linked by `near_to`, in
      either direction, if there are any, else among its family, else among all. There, the nearest in size, then in date, is taken with
      probability 1/2, else the next with probability 1/2, and so on. Otherwise it is drawn by weight.
    seed: of all draws.
    negatives: rejected samples of a triplet of the split 'train', each of another policy and drawn by weight after the first; fewer
      where there are not as many policies. Other splits have one.
  """

  pairs_per_prompt: int
  near_share: float = 0.0
  seed: int = 0
  negatives: int = 1

  def __post_init__(self) -> None:
    if min(self.pairs_per_prompt, self.negatives) < 1 or not 0 <= self.near_share <= 1:
      raise ValueError(f'pairs_per_prompt and negatives must be positive and near_share in [0, 1], in {self}')


@dataclasses.dataclass(frozen=True)
class Pairing:
  """What is drawn for one prompt.

  Attributes:
    triples: by split, in the order in which they were drawn; splits without any are absent.
    counts: by name of COUNTS: candidates; those left out because they are `empty`, or by a policy that is `held_out` from this prompt;
      pairs of the remaining samples of a split that are `equal` as texts, which meet in no triplet; and splits of the prompt with `too_few`
      different samples for any triplet (that of held-out policies counts only if there are two).
  """

  triples: Mapping[str, list[Triple]]
  counts: Mapping[str, int]


class Pairer:
  """Draws the triplets of any number of prompts. It has no state but what it was made of.

  Args:
    facts: of all policies, by name.
    rules: how triplets are drawn.

  Raises:
    ValueError: a weight is not positive, a date cannot be read, or a family is not valid Unicode.
  """

  def __init__(self, facts: Mapping[str, PolicyFacts], rules: PairingRules):
    for name, fact in facts.items():
      if not (fact.weight > 0 and math.isfinite(fact.weight)):
        raise ValueError(f'policy {name}: its weight must be positive, not {fact.weight}')
    self.facts, self.rules = dict(facts), rules
    self._days = {name: None if fact.date is None else _days(name, fact.date) for name, fact in facts.items()}
    self._names = {name: json.dumps(name) for name in facts}
    self._categories = {name: _encoded(name, fact.family or name) for name, fact in facts.items()}
    self._several_held_out = sum(fact.held_out for fact in facts.values()) > 1
    self.difficulty = functools.cache(self._difficulty)
    self.nearest = functools.cache(self._nearest)

  def pair(self, prompt: PoolPrompt, candidates: Sequence[Candidate]) -> Pairing:
    """Draw the triplets of a prompt.

    Args:
      prompt: the prompt.
      candidates: samples of any policies, in any order.

    Raises:
      ValueError: two samples of a policy have one number, a policy is unknown, or the kind or split of the prompt is.
    """
    if prompt.split not in PROMPT_SPLITS or prompt.kind not in WRAPPERS:
      raise ValueError(f'prompt {prompt.id}: unknown kind or split: {prompt.kind!r}, {prompt.split!r}')
    counts = dict.fromkeys(COUNTS, 0)
    by_split = self._samples(prompt, candidates, counts)
    triples = {}
    for split, samples in by_split.items():
      texts = [candidate.text for of_policy in samples.values() for candidate in of_policy]
      if len(texts) > len(set(texts)):
        counts['equal'] += sum(count * (count - 1) // 2 for count in collections.Counter(texts).values())
      digest = hashlib.blake2b(f'{self.rules.seed}\0{split}\0{prompt.id}'.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
      negatives = self.rules.negatives if split == 'train' else 1
      drawn = _Draw(self, samples, negatives, random.Random(int.from_bytes(digest, 'big'))).triples()
      if drawn:
        triples[split] = drawn
      elif split != UNSEEN_POLICIES or self._several_held_out:
        counts['too_few'] += 1
    return Pairing(triples, counts)

  def _samples(self, prompt: PoolPrompt, candidates: Sequence[Candidate], counts: dict[str, int]) -> dict[str, dict[str, list[Candidate]]]:
    """Return the candidates that can be used by split and policy, both names and numbers in order; counts those that cannot."""
    counts['candidates'] = len(candidates)
    grouped: dict[str, dict[int, Candidate]] = {}
    for candidate in candidates:
      policy, sample, _ = candidate
      of_policy = grouped.get(policy)
      if of_policy is None:
        of_policy = grouped[policy] = {}
      if sample in of_policy:
        raise ValueError(f'prompt {prompt.id}: two samples {sample} of policy {policy}')
      of_policy[sample] = candidate
    unseen = prompt.split == 'unseen_prompts'
    by_split: dict[str, dict[str, list[Candidate]]] = {
      split: {} for split in ((prompt.split, UNSEEN_POLICIES) if unseen else (prompt.split,))
    }
    for policy in sorted(grouped):
      if policy not in self.facts:
        raise ValueError(f'prompt {prompt.id}: there are no facts of policy {policy}')
      samples = [candidate for _, candidate in sorted(grouped[policy].items()) if candidate.text and not candidate.text.isspace()]
      counts['empty'] += len(grouped[policy]) - len(samples)
      held_out = self.facts[policy].held_out
      if held_out and not unseen:
        counts['held_out'] += len(samples)
      elif samples:
        by_split[UNSEEN_POLICIES if held_out else prompt.split][policy] = samples
    return by_split

  def fields(self, prompt: PoolPrompt, triples: Sequence[Triple]) -> list[Fields]:
    """Return what is stored of the triplets of a prompt.

    They are what `records.fields_of` would return for a `Triplet` with these texts, and with these metadata as a dict, at a quarter of the
    cost.
    """
    text, identifier, wrapper = prompt.text.encode(), json.dumps(prompt.id), WRAPPERS[prompt.kind].encode()
    out: list[Fields] = []
    for triple in triples:
      if len(triple) > 3:
        out.append(fields_of(self._ranked_list(prompt, triple)))
        continue
      (policy, first, reference), (_, second, chosen), (other, third, rejected) = triple
      name = self._names[policy]
      metadata = (
        f'{{"chosen_policy": {name}, "chosen_sample": {second}, "difficulty": "{self.difficulty(policy, other)}", '
        f'"prompt_id": {identifier}, "reference_policy": {name}, "reference_sample": {first}, '
        f'"rejected_policy": {self._names[other]}, "rejected_sample": {third}}}'
      )
      texts = (text, reference.encode(), chosen.encode(), rejected.encode(), wrapper, self._categories[policy], metadata.encode())
      out.append((texts, ()))
    return out

  def _ranked_list(self, prompt: PoolPrompt, triple: Triple) -> RankedList:
    reference, chosen, *rejected = triple
    metadata = {'prompt_id': prompt.id, 'reference_sample': reference.sample, 'chosen_sample': chosen.sample}
    metadata |= {'rejected_samples': [candidate.sample for candidate in rejected]}
    metadata |= {'difficulty': self.difficulty(reference.policy, rejected[0].policy)}
    made = example(prompt.text, triple, WRAPPERS[prompt.kind], self._categories[reference.policy].decode())
    assert isinstance(made, RankedList)
    return dataclasses.replace(made, metadata=metadata | dict(made.metadata))

  def _difficulty(self, a: str, b: str) -> str:
    """Return what two policies have in common: one of DIFFICULTIES."""
    one, other = self.facts[a], self.facts[b]
    if b in one.near_to or a in other.near_to:
      return 'near_to'
    return 'family' if one.family and one.family == other.family else 'other'

  def _nearest(self, policy: str) -> list[list[str]]:
    """Return all other policies by DIFFICULTIES, the nearest first."""

    def distance(name: str) -> tuple[float, float, str]:
      sizes, days = (self.facts[policy].size, self.facts[name].size), (self._days[policy], self._days[name])
      size = abs(math.log(sizes[0] / sizes[1])) if sizes[0] and sizes[1] else math.inf
      date = abs(days[0] - days[1]) if days[0] is not None and days[1] is not None else math.inf
      return size, date, name

    others = sorted((name for name in self.facts if name != policy), key=distance)
    return [[name for name in others if self.difficulty(policy, name) == difficulty] for difficulty in DIFFICULTIES]


def example(prompt: str, triple: Triple, wrapper: str, category: str) -> Triplet:
  """Return the example of a triple, with the names of its policies as metadata: a RankedList if several samples are rejected."""
  reference, chosen, *rejected = triple
  texts = (prompt, reference.text, chosen.text, rejected[-1].text, wrapper, category)
  policies: dict[str, Any] = {'reference_policy': reference.policy, 'chosen_policy': chosen.policy}
  if len(rejected) == 1:
    return Triplet(*texts, policies | {'rejected_policy': rejected[0].policy})
  candidates = (chosen.text, *(candidate.text for candidate in rejected))
  policies['rejected_policies'] = [candidate.policy for candidate in rejected]
  return RankedList(*texts, policies, candidates, (0,) + (1,) * len(rejected))


class _Draw:
  """Draws the triplets of one prompt and split.

  Args:
    pairer: facts and rules.
    samples: by policy, in a fixed order.
    negatives: rejected samples of a triplet.
    rng: only its `random` is used, whose numbers are the same in every version of Python.
  """

  def __init__(self, pairer: Pairer, samples: Mapping[str, list[Candidate]], negatives: int, rng: random.Random):
    self._pairer, self._negatives, self._random = pairer, negatives, rng.random
    self._names, self._samples = list(samples), list(samples.values())
    self._weights = [pairer.facts[name].weight for name in self._names]
    self._sums = list(itertools.accumulate(self._weights))
    self._used: set[tuple[str, str, str]] = set()

  def triples(self) -> list[Triple]:
    """Return triples of reference, chosen and rejected, with different texts and no two alike, as many as the rules ask for if there are.

    In every round, each policy with two samples gives one, in an order drawn by weight.
    """
    wanted = self._pairer.rules.pairs_per_prompt
    out: list[Triple] = []
    if len(self._names) < 2:
      return []
    policies = self._by_weight([i for i, samples in enumerate(self._samples) if len(samples) > 1])
    while policies and len(out) < wanted:
      left = []
      for i in policies:
        triple = self._triple(i) if len(out) < wanted else None
        if triple is not None:
          out.append(triple)
          left.append(i)
      policies = left
    return out

  def _triple(self, i: int) -> Triple | None:
    """Draw a triple with reference and chosen of policy i; None if all have been drawn."""
    samples, rejected_of = self._samples[i], self._rejected
    count = len(samples)
    pairs = count * (count - 1)
    first, near = int(self._random() * pairs), self._random() < self._pairer.rules.near_share
    for k in range(pairs):
      a, b = divmod((first + k) % pairs, count - 1)
      reference, chosen = samples[a], samples[b + (b >= a)]
      if reference.text == chosen.text:
        continue
      for j in self._near(i) if near else self._any(i):
        rejected = rejected_of(j, reference.text, chosen.text)
        if rejected is not None:
          return reference, chosen, rejected, *self._more(i, j, (reference.text, chosen.text, rejected.text))
    return None

  def _more(self, i: int, j: int, texts: tuple[str, str, str]) -> list[Candidate]:
    """Draw the rejected samples after the first one: of policies other than i and j, no two of one policy, with texts that differ."""
    out: list[Candidate] = []
    known = {*texts}
    for k in self._by_weight([k for k in range(len(self._names)) if k not in (i, j)]) if self._negatives > 1 else ():
      if len(out) == self._negatives - 1:
        break
      candidate = self._samples[k][int(self._random() * len(self._samples[k]))]
      if candidate.text not in known:
        known.add(candidate.text)
        out.append(candidate)
    return out

  def _rejected(self, j: int, reference: str, chosen: str) -> Candidate | None:
    """Draw a sample of policy j that makes a new triple; None if there is none."""
    samples = self._samples[j]
    first = int(self._random() * len(samples))
    for k in range(first, first + len(samples)):
      candidate = samples[k % len(samples)]
      text = candidate.text
      key = (reference, chosen, text)
      if text != reference and text != chosen and key not in self._used:
        self._used.add(key)
        return candidate
    return None

  def _any(self, i: int) -> Iterator[int]:
    """Yield policies other than i, drawn by weight: a few, with repetitions, then each of them."""
    for _ in range(_DRAWS):
      j = min(bisect.bisect_right(self._sums, self._random() * self._sums[-1]), len(self._sums) - 1)
      if j != i:
        yield j
    yield from self._by_weight([j for j in range(len(self._names)) if j != i])

  def _near(self, i: int) -> Iterator[int]:
    """Yield all policies other than i, the near ones first, as `PairingRules.near_share` says."""
    for group in self._pairer.nearest(self._names[i]):
      rest = [self._places[name] for name in group if name in self._places]
      while rest:
        k = 0
        while k < len(rest) - 1 and self._random() < 0.5:
          k += 1
        yield rest.pop(k)

  @functools.cached_property
  def _places(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self._names)}

  def _by_weight(self, policies: list[int]) -> list[int]:
    """Return policies in a random order: each place is drawn by weight from those that are left (exponential clocks)."""
    clocks = {i: -math.log(1.0 - self._random()) / self._weights[i] for i in policies}
    return sorted(policies, key=clocks.__getitem__)


def _encoded(name: str, category: str) -> bytes:
  """Return a category as it is stored.

  Raises:
    ValueError: it is not valid Unicode.
  """
  try:
    return category.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'policy {name}: its family is not valid Unicode ({error.reason} at character {error.start})') from error


def _days(name: str, date: str) -> int:
  """Return the day of a date, as a number.

  Raises:
    ValueError: the date is neither YYYY, YYYY-MM nor YYYY-MM-DD; the message names the policy.
  """
  try:
    year, month, day = (*map(int, date.split('-')), 1, 1)[:3]
    return datetime.date(year, month, day).toordinal()
  except ValueError as error:
    raise ValueError(f'policy {name}: its date must be YYYY, YYYY-MM or YYYY-MM-DD, not {date!r:.40}') from error
