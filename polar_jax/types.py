"""Types that travel between packages, and the glossary of names.

Shape letters (suffixes of array names):
  B  rows of a batch            T  tokens of a row (queries)      S  tokens of a row (keys)
  P  pairs in a row             C  candidates of a pair: 0 chosen, 1 rejected
  Q  tokens picked from a row, such as its reward tokens
  D  model width                F  feed-forward width             L  layers
  N  query heads                K  key/value heads                G  N / K
  H  head dimension             V  vocabulary
  R  rollouts of a PPO step; in (R, T) arrays T counts the tokens of the answer alone

Words:
  trajectory  a policy's continuation of, or answer to, a prompt
  triplet     one prompt with a reference, a chosen and a rejected trajectory. In pre-training reference and chosen are two
              samples of one policy and rejected is a sample of another; in fine-tuning they are ranked by preference
  row         a fixed number of token slots of a batch; holds one or more triplets
  interval    the keys [start, end) that a query token may attend to
  rollout     an answer that the policy being trained samples; a step of PPO samples R of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class UserError(ValueError):
  """Something the user gave (a setting, a file, a row) cannot be used. The message is one line that says what to do."""


Text = str | list[dict[str, Any]]  # a string, or messages whose `content`s are joined by newlines


@dataclasses.dataclass(frozen=True)
class Triplet:
  """One row of every data set: pre-training, fine-tuning and evaluation alike."""

  prompt: Text
  reference: Text
  chosen: Text
  rejected: Text
  wrapper: str = 'sft'  # 'sft': a newline between prompt and trajectory; 'pretrain': nothing
  category: str = ''
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # provenance: policies, sampled token ids, source


@dataclasses.dataclass(frozen=True)
class Group:
  """Any number of candidates for one prompt and reference: what is scored in evaluation, PPO and serving."""

  prompt: Text
  reference: Text
  candidates: Sequence[Text]
  wrapper: str = 'sft'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One row of a data set for reinforcement fine-tuning."""

  prompt: Text
  reference: Text
  answer: str = ''  # what a rule compares with, if that is not the reference itself
  category: str = ''  # the official files' `ability`
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Rollouts(NamedTuple):
  """What a policy answered. Arrays are numpy; behind an answer's end they hold 0."""

  prompts: Sequence[Sequence[int]]  # token ids of each rollout's prompt
  tokens_RT: Any  # int32
  length_R: Any  # int32, at least 1, the stop token included
  logprob_RT: Any  # float32: log-probability of each token at the sampling temperature, before top-p and top-k
  stopped_R: Any  # bool: a stop token ended the answer; False: it was cut at the most tokens allowed


class PairBatch(NamedTuple):
  """Rows of triplets. Arrays are numpy on the host and jax on devices; padding has empty intervals (start = end)."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, of the original sequence: what rotary embeddings see
  start_BT: Any  # int32
  end_BT: Any  # int32
  reward_index_BPC: Any  # int32, where the reward tokens stand
  pair_mask_BP: Any  # float32, 1 for a real pair, 0 for padding
  index_BP: Any  # int32, which row of the data set this is; -1 for padding


class GroupBatch(NamedTuple):
  """Rows of groups: a token of a candidate sees its own part [start, end) and the prefix that its group shares."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, of the original sequence
  start_BT: Any  # int32
  end_BT: Any  # int32
  prefix_start_BT: Any  # int32; empty intervals for the tokens of a prefix
  prefix_end_BT: Any  # int32
  reward_index_BQ: Any  # int32, where the reward tokens stand
  index_BQ: Any  # int32, which candidate of the call this is; -1 for padding


class PolicyBatch(NamedTuple):
  """Rows of prompts with their answers. What belongs to an answer's token stands where it is predicted: one token before it.

  Answers to one prompt share it: a token of an answer sees its own part [start, end) and the prefix.
  """

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, of the sequence
  start_BT: Any  # int32
  end_BT: Any  # int32
  prefix_start_BT: Any  # int32; empty intervals where nothing is shared
  prefix_end_BT: Any  # int32
  target_BT: Any  # int32, the next token
  rollout_BT: Any  # int32, which rollout the target belongs to; -1 where the target is no token of an answer
  answer_BT: Any  # int32, which of the answer's tokens the target is


class TextBatch(NamedTuple):
  """Windows of text for next-token prediction."""

  tokens_BT: Any
  positions_BT: Any
  start_BT: Any
  end_BT: Any
  target_BT: Any  # int32
  target_mask_BT: Any  # float32
  index_B: Any  # int32, which window of the corpus this is; -1 for padding
