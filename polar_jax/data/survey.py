"""What a run can learn nothing from, or not all of: pairs that are the same to the model, and texts that are truncated."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polar_jax.data.examples import example_number, examples_at
from polar_jax.data.pipeline import TripletSegments
from polar_jax.data.template import Template, join_messages
from polar_jax.types import Prompt, RankedList, Triplet

_AT_ONCE = 1_024  # examples of one task of a thread
_NAMED, _KEPT = 5, 20  # numbers of examples in a line of the log, and in the report


@dataclasses.dataclass(frozen=True)
class Survey:
  """Numbers of examples (from 1; in a jsonl file the line) by what is wrong with them.

  Attributes:
    examples: how many were looked at.
    same_text: chosen and rejected are the same text.
    same_tokens: their texts differ, but the model reads the same tokens, mostly because truncation cut the difference.
    cut_responses: a reference or a candidate is truncated.
    cut_prompts: the prompt is.
    left_out: the policy does not read the prompt, which is longer than `rft.rollout.max_prompt`.
    limits: (max_response_length, max_length) of the template.
  """

  examples: int
  same_text: list[int]
  same_tokens: list[int]
  cut_responses: list[int]
  cut_prompts: list[int]
  limits: tuple[int, int]
  left_out: Sequence[int] = ()

  def lines(self) -> list[str]:
    """Return a sentence for each kind that occurs, with what to do; none if nothing is wrong."""
    of, (response, whole) = f'of {self.examples:,} examples', self.limits
    sentences = (
      (
        self.same_text,
        f'{of} have the same text as chosen and rejected',
        'nothing can be learned from them and each counts as a tie; remove them',
      ),
      (
        self.same_tokens,
        f'{of} have chosen and rejected texts that the model reads as the same tokens',
        f'nothing can be learned from them and each counts as a tie; if they were cut, raise template.max_response_length ({response})',
      ),
      (
        self.cut_responses,
        f'{of} have a reference or candidate longer than template.max_response_length ({response})',
        'its end is cut off',
      ),
      (
        self.cut_prompts,
        f'{of} have a prompt that does not fit template.max_length ({whole}) with the responses',
        'its beginning is cut off',
      ),
    )
    return [f'{len(numbers):,} {what} (number {_listed(numbers)}): {so}' for numbers, what, so in sentences if numbers]

  def asdict(self) -> dict[str, Any]:
    """Return counts and the first numbers, for the report."""
    kinds = {name: list(getattr(self, name)) for name in ('same_text', 'same_tokens', 'cut_responses', 'cut_prompts', 'left_out')}
    counts = {name: len(numbers) for name, numbers in kinds.items()}
    return {'examples': self.examples, **counts, 'numbers': {name: numbers[:_KEPT] for name, numbers in kinds.items() if numbers}}


def survey(segments: TripletSegments, indices: Sequence[int], threads: int = 1) -> Survey:
  """Look at examples. Those that are certain to be neither truncated nor changed by the tokenizer are not tokenized.

  Args:
    segments: examples with their template.
    indices: which of them.
    threads: that read and tokenize.
  """

  def look(part: Sequence[int]) -> list[tuple[int, tuple[bool, ...]]]:
    return [
      (example_number(segments.source, index), _kinds(triplet, segments.template))
      for index, triplet in zip(part, examples_at(segments.source, part), strict=True)
    ]

  parts = [indices[low : low + _AT_ONCE] for low in range(0, len(indices), _AT_ONCE)]
  with concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool:
    seen = [found for some in pool.map(look, parts) for found in some]
  same_text, same_tokens, responses, prompts = ([number for number, kinds in seen if kinds[kind]] for kind in range(4))
  config = segments.template.config
  return Survey(len(seen), same_text, same_tokens, responses, prompts, (config.max_response_length, config.max_length))


def log_surveys(
  name: str, splits: Mapping[str, tuple[TripletSegments, Sequence[int]]], threads: int, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
  """Log what surveys of the splits of a run find, and return it for the report.

  Args:
    name: of the run.
    splits: by name, the segments of a split and the indices of those that the run reads.
    threads: that read and tokenize.
    log: receives lines.
  """
  out = {}
  for split, (segments, indices) in splits.items():
    found = survey(segments, indices, threads)
    out[split] = found.asdict()
    for line in found.lines():
      log(f'{name}: {split} data: {line}')
  return out


def survey_prompts(prompts: Sequence[Prompt], template: Template | None, left_out: Sequence[int]) -> Survey:
  """Look at prompts of reinforcement fine-tuning: what the reward model reads of prompt and reference, before any response.

  Args:
    prompts: of the data set.
    template: of the reward model; None: the reward is no model, which reads everything.
    left_out: indices of prompts that the policy does not read.
  """
  cut = [None if template is None else template.truncated(Triplet(p.prompt, p.reference, '', '')) for p in prompts]
  numbered = [(example_number(prompts, i), found) for i, found in enumerate(cut) if found is not None]
  responses, whole = ([number for number, found in numbered if found[kind]] for kind in (0, 1))
  limits = (0, 0) if template is None else (template.config.max_response_length, template.config.max_length)
  return Survey(len(prompts), [], [], responses, whole, limits, [example_number(prompts, i) for i in left_out])


def _kinds(triplet: Triplet, template: Template) -> tuple[bool, ...]:
  """Return the attributes of `Survey` that an example counts in: same_text, same_tokens, cut_responses, cut_prompts.

  A ranked list counts if its best candidate with another one, of another rank, does.
  """
  if isinstance(triplet, RankedList):
    others = [candidate for candidate, rank in zip(triplet.candidates, triplet.ranks, strict=True) if rank]
    pairs = [Triplet(triplet.prompt, triplet.reference, triplet.chosen, other, triplet.wrapper) for other in others]
    return tuple(map(any, zip(*(_kinds(pair, template) for pair in pairs), strict=True)))
  same_text = join_messages(triplet.chosen, 'chosen') == join_messages(triplet.rejected, 'rejected')
  cut = template.truncated(triplet)
  if cut is None:
    return same_text, False, False, False
  chosen, rejected = template.encode(triplet)
  return same_text, chosen == rejected and not same_text, cut.responses, cut.prompt


def _listed(numbers: Sequence[int]) -> str:
  return ', '.join(map(str, numbers[:_NAMED])) + (', ...' if len(numbers) > _NAMED else '')
