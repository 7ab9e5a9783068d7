"""Metrics of a PPO step and of an evaluation: the text of responses, their rewards and their properties.

Several of them show reward hacking, which a reward alone does not. A reward model that uses its reference must score a response lower
under another reference (`other_references`). A reward that rises because responses grow shows in its regression on
length. A policy that collapses shows in the share of distinct n-grams (and in the entropy) before its responses lose all content.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax.config import RftConfig
from polar_jax.data.template import join_messages
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo.rewards import shaping
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.ppo.run import Run
from polar_jax.types import Prompt, Rollouts, Text

# Chinese and Japanese are written without spaces: each of their characters counts as a word.
_CJK = r'\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff'
_WORD = re.compile(rf'[{_CJK}]|[^\W{_CJK}]+')

Seed = int | Sequence[int]


class Scores(NamedTuple):
  """Rewards of a step's responses.

  Attributes:
    raw_R: the weighted sum of the sources, before shaping.
    shaped_R: what PPO maximizes.
    shuffled_R: the weighted sum under other references; None if it was not measured, or there is only one prompt.
    metrics: means, for the log.
  """

  raw_R: np.ndarray
  shaped_R: np.ndarray
  shuffled_R: np.ndarray | None
  metrics: dict[str, float]


def response_texts(rollouts: Rollouts, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> list[str]:
  """Return the text of each response, which the reward reads: without the stop token that ended it and without special tokens."""
  out = []
  for tokens, length in zip(rollouts.tokens_RT, rollouts.length_R, strict=True):
    ids = tokens[:length].tolist()
    out.append(tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids, skip_special=True))
  return out


def score(
  reward: RewardSum,
  config: RftConfig,
  normalizer: shaping.Normalizer,
  prompts: Sequence[Prompt],
  responses: Sequence[str],
  rollouts: Rollouts,
  shuffle: tuple[int, ...] | None,
) -> Scores:
  """Score the responses of a step and, as a control, the same responses under other references.

  Args:
    reward: the sources and their weights.
    config: of the run; it shapes the rewards.
    normalizer: with `running`, updated by these rewards.
    prompts: the prompt of each response; responses to one prompt are adjacent.
    responses: texts.
    rollouts: their tokens.
    shuffle: seed of the control; None: leave it out.
  """
  components = reward.components(prompts, responses)
  raw_R = reward.total(components)
  reference_R = None
  if config.reward.normalize == 'reference':
    references = [join_messages(p.reference, 'reference') for p in prompts]
    reference_R = reward.total(reward.components(prompts, references))
  shuffled_R = None
  if shuffle is not None:
    others = other_references(prompts, shuffle)
    shuffled_R = None if others is None else reward.total(reward.components(others, responses))
  group_R = np.repeat(np.arange(len(prompts) // config.num_generations), config.num_generations)
  shaped_R, metrics = shaping.shape(
    raw_R,
    normalizer=normalizer,
    group_R=group_R,
    reference_score_R=reference_R,
    length_R=rollouts.length_R,
    stopped_R=rollouts.stopped_R,
    max_new=config.rollout.max_new,
    config=config.reward,
  )
  metrics = {'reward': float(shaped_R.mean()), 'raw': float(raw_R.mean()), 'raw_std': float(raw_R.std()), **metrics}
  metrics |= {name: float(values.mean()) for name, values in components.items()}
  if shuffled_R is not None:
    metrics |= {'shuffled': float(shuffled_R.mean()), 'shuffled_gap': float(raw_R.mean() - shuffled_R.mean())}
  return Scores(raw_R, shaped_R, shuffled_R, metrics)


def describe(prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Rollouts) -> dict[str, float]:
  """Return properties of responses that do not depend on their reward: length, truncation, overlap with references, variety."""
  references = [join_messages(p.reference, 'reference') for p in prompts]
  return {
    'length': float(rollouts.length_R.mean()),
    'truncated': float(1 - rollouts.stopped_R.mean()),
    'empty': float(np.mean([not text for text in responses])),
    'overlap': float(overlap(responses, references).mean()),
    'distinct_1': distinct(responses, 1),
    'distinct_2': distinct(responses, 2),
  }


def evaluate(run: Run, params: Any) -> dict[str, float]:
  """Return reward and properties of the greedy responses to the first `rft.evaluate_prompts` held-out prompts."""
  assert run.held_out is not None
  chosen = [run.held_out[i] for i in range(min(len(run.held_out), run.config.evaluate_prompts))]
  prompts = [prompt for prompt, _ in chosen]
  greedy = dataclasses.replace(run.config.rollout, temperature=0.0)
  rollouts = RolloutEngine(run.model, run.mesh, greedy, run.stop_ids, run.config.lora).generate(params, [ids for _, ids in chosen], (0,))
  responses = response_texts(rollouts, run.tokenizer, run.stop_ids)
  components = run.reward.components(prompts, responses)
  means = {name: float(values.mean()) for name, values in components.items()}
  properties = describe(prompts, responses, rollouts)
  return {'raw': float(run.reward.total(components).mean()), **means, **{k: properties[k] for k in ('length', 'truncated', 'overlap')}}


def words(text: str) -> list[str]:
  """Return the lower-cased words of a text, without punctuation."""
  return _WORD.findall(text.lower())


def overlap(responses: Sequence[str], references: Sequence[Text]) -> np.ndarray:
  """Return the share of each response's words that occur in its reference.

  A word counts at most as often as it occurs in the reference, so that repeating one word of it gains nothing.

  Returns:
    (n,) float64 from 0 to 1; 0 for a response without words.
  """
  shares = np.zeros(len(responses))
  for i, (response, reference) in enumerate(zip(responses, references, strict=True)):
    own = collections.Counter(words(response))
    shared = own & collections.Counter(words(join_messages(reference, f'references[{i}]')))
    shares[i] = shared.total() / own.total() if own else 0.0
  return shares


def distinct(responses: Sequence[str], n: int) -> float:
  """Return the distinct n-grams of words over all responses, as a share of all their n-grams (distinct-n, Li et al. 2016).

  It falls with the amount of text: compare equal numbers of responses of similar lengths. No n-gram crosses from one response to the
  next.

  Returns:
    From 0 to 1; 0 if no response has n words.
  """
  if n < 1:
    raise ValueError(f'n is {n}; an n-gram has at least one word')
  seen: set[tuple[str, ...]] = set()
  total = 0
  for response in responses:
    own = words(response)
    grams = list(zip(*(own[i:] for i in range(n)), strict=False))
    seen.update(grams)
    total += len(grams)
  return len(seen) / total if total else 0.0


def length_regression(score_R: np.ndarray, length_R: np.ndarray, base_length: float) -> tuple[float, float]:
  """Return how scores depend on length within a batch, and the mean score at the length of the run's first step.

  The mean score is moved along the least-squares line of score over length to `base_length`. Far from the lengths of the batch this
  extrapolates: read it as a direction.

  Args:
    score_R: scores of the responses of one step.
    length_R: their lengths in tokens.
    base_length: tokens, the mean length of the run's first step.

  Returns:
    (slope in score per token, adjusted mean score); the slope is 0 when all lengths are equal.
  """
  score, length = (np.asarray(x, dtype=np.float64) for x in (score_R, length_R))
  if score.ndim != 1 or score.shape != length.shape or not score.size:
    raise ValueError(f'scores {score.shape} and lengths {length.shape} must hold one number per response, for at least one response')
  centered = length - length.mean()
  variance = centered @ centered
  slope = float(centered @ (score - score.mean()) / variance) if np.ptp(length) else 0.0
  return slope, float(score.mean() + slope * (base_length - length.mean()))


def explained_variance(return_RT: np.ndarray, value_RT: np.ndarray, mask_RT: np.ndarray) -> float:
  """Return the share of the returns' variance that the critic predicts: 1 - Var(return - value) / Var(return) over response tokens.

  Returns:
    At most 1; 0 for a critic that predicts a constant, below 0 for one that is worse than that. 0 if the returns do not vary.
  """
  mask = np.asarray(mask_RT, dtype=bool)
  returns, values = (np.asarray(x, dtype=np.float64)[mask] for x in (return_RT, value_RT))
  if not returns.size or not np.ptp(returns):
    return 0.0
  return float(1 - np.var(returns - values) / np.var(returns))


def other_references(prompts: Sequence[Prompt], seed: Seed) -> list[Prompt] | None:
  """Give each prompt the reference by another policy that it has, or else, if one has none, that of another prompt of the batch.

  Args:
    prompts: the prompt of each rollout, or each prompt once.
    seed: of the shuffle.

  Returns:
    One prompt per entry; None if references would be shuffled and there are fewer than two distinct prompts.
  """
  if all(prompt.other_reference for prompt in prompts):
    return [dataclasses.replace(prompt, reference=prompt.other_reference) for prompt in prompts]
  return shuffled_references(prompts, seed)


def shuffled_references(prompts: Sequence[Prompt], seed: Seed) -> list[Prompt] | None:
  """Give each prompt the reference and the rule's answer of another prompt of the batch.

  Entries with the same prompt text are one prompt, however many references it has, and no prompt keeps a reference of its own. Equal
  entries stay equal, so that they can still be scored as one group. Two prompts may share a reference text; that one can come back.

  Args:
    prompts: the prompt of each rollout, or each prompt once.
    seed: the same seed and prompts give the same references.

  Returns:
    One prompt per entry; None if there are fewer than two distinct prompts.
  """
  entries_of: dict[str, list[int]] = {}
  for i, prompt in enumerate(prompts):
    entries_of.setdefault(join_messages(prompt.prompt, f'prompts[{i}].prompt'), []).append(i)
  if len(entries_of) < 2:
    return None
  groups = list(entries_of.values())
  order = np.random.default_rng(seed).permutation(len(groups))
  out = list(prompts)
  for receiver, giver in zip(order, np.roll(order, 1), strict=True):  # along a cycle, so that no group receives its own
    offered = _distinct_references([prompts[i] for i in groups[giver]])
    kinds = _distinct_references([prompts[i] for i in groups[receiver]])
    for i in groups[receiver]:
      reference, answer = offered[kinds.index((prompts[i].reference, prompts[i].answer)) % len(offered)]
      out[i] = dataclasses.replace(prompts[i], reference=reference, answer=answer)
  return out


def _distinct_references(prompts: Sequence[Prompt]) -> list[tuple[Text, str]]:
  """Return the distinct (reference, answer) of some prompts, in order. Messages are not hashable."""
  out: list[tuple[Text, str]] = []
  for prompt in prompts:
    if (prompt.reference, prompt.answer) not in out:
      out.append((prompt.reference, prompt.answer))
  return out


def sample_records(
  step: int,
  prompts: Sequence[Prompt],
  responses: Sequence[str],
  scores: np.ndarray,
  shuffled: np.ndarray | None,
  lengths: np.ndarray,
  seed: Seed,
  max_records: int = 4,
) -> list[dict[str, Any]]:
  """Return records for samples.jsonl: the responses with the highest and the lowest score, and others drawn at random.

  Args:
    step: of the run.
    prompts: of each response, with the reference that it was scored against.
    responses: texts.
    scores: raw scores.
    shuffled: scores under other references; None: not measured, and left out of the records.
    lengths: of the responses in tokens.
    seed: the same seed gives the same records.
    max_records: of the step.

  Returns:
    {step, pick, prompt, reference, output, score, shuffled, length}, highest score first, with whole texts.
  """
  records = []
  for i, pick in _pick(np.asarray(scores, dtype=np.float64), seed, max_records):
    record = {
      'step': int(step),
      'pick': pick,
      'prompt': join_messages(prompts[i].prompt, f'prompts[{i}].prompt'),
      'reference': join_messages(prompts[i].reference, f'prompts[{i}].reference'),
      'output': responses[i],
      'score': float(scores[i]),
      **({} if shuffled is None else {'shuffled': float(shuffled[i])}),
      'length': int(lengths[i]),
    }
    records.append(record)
  return records


def _pick(scores: np.ndarray, seed: Seed, count: int) -> list[tuple[int, str]]:
  """Return (index, reason) of at most `count` scores, highest first."""
  order = [int(i) for i in np.argsort(-scores, kind='stable')]
  reasons = dict.fromkeys(order[: min(count, 1)], 'highest')
  if count > 1 and len(order) > 1:
    reasons[order[-1]] = 'lowest'
  middle = np.array(order[1:-1], dtype=np.int64)
  extra = min(max(count - 2, 0), len(middle))
  reasons.update(dict.fromkeys(np.random.default_rng(seed).choice(middle, extra, replace=False).tolist() if extra else [], 'random'))
  return [(i, reasons[i]) for i in order if i in reasons]
