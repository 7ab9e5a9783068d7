"""Types that travel between packages, and the glossary of names.

Shape letters (suffixes of array names):
  B  rows of a batch            T  tokens of a row, as queries    S  tokens of a row, as keys
  P  pairs in a row             C  candidates of a pair: 0 chosen, 1 rejected
  Q  tokens picked from a row, such as its reward tokens
  D  model width                F  feed-forward width             L  layers
  N  query heads                K  key/value heads                G  N / K
  H  head dimension             V  vocabulary
  R  rollouts of a PPO step; in (R, T) arrays T counts the tokens of the response alone

Words:
  trajectory  a policy's continuation of, or response to, a prompt
  triplet     one prompt with a reference, a chosen and a rejected trajectory. In pre-training, reference and chosen are two
              samples of one policy and rejected is a sample of another; in fine-tuning they are ranked by preference
  list        one prompt and reference with ranked candidates: a triplet with any number of them, where its C counts them
  group       one prompt and reference with any number of candidates to score
  example     a record of a data set: a triplet, or a prompt of reinforcement fine-tuning
  segment     a triplet or (part of) a group as one run of tokens that holds the shared prefix once (`polar_jax.data.layout`)
  row         a fixed number of token positions of a batch; holds one or more segments, then padding
  interval    the keys [start, end) that a query token may attend to
  rollout     a response that the policy being trained samples; a step of PPO samples R of them
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MAX_MESSAGE = 500  # characters


def one_line(text: str) -> str:
  """Return a text as one line of at most `MAX_MESSAGE` characters. The middle is left out, because the advice is at the end."""
  line = ' '.join(text.split())
  if len(line) <= MAX_MESSAGE:
    return line
  return f'{line[: MAX_MESSAGE // 2]} ... {line[5 - MAX_MESSAGE // 2 :]}'


class UserError(ValueError):
  """An input of the user (a setting, a file, an example) cannot be used. The message is one line with the remedy.

  It is short whatever it quotes: see `one_line`.
  """

  def __str__(self) -> str:
    return one_line(super().__str__())


Text = str | list[dict[str, Any]]  # a string, or messages whose `content`s are joined by newlines
Interval = tuple[Any, Any]  # start_BT, end_BT: each query sees the keys [start, end)


@dataclasses.dataclass(frozen=True)
class Triplet:
  """An example of every ranking data set: for pre-training, fine-tuning and evaluation alike."""

  prompt: Text
  reference: Text
  chosen: Text
  rejected: Text
  wrapper: str = 'sft'  # 'sft': a newline between prompt and trajectory; 'pretrain': nothing
  category: str = ''
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # provenance: policies, sampled token ids, source


@dataclasses.dataclass(frozen=True)
class RankedList(Triplet):
  """A ranking of any number of candidates, for training. As a triplet it is its best candidate, `chosen`, and its worst, `rejected`.

  Attributes:
    candidates: all candidates, best first.
    ranks: of each candidate, from 0; candidates of equal rank are not compared with each other.

  Raises:
    UserError: there are no two ranks, or they are not in order, one for each candidate.
  """

  candidates: Sequence[Text] = ()
  ranks: Sequence[int] = ()

  def __post_init__(self) -> None:
    """Check the ranks."""
    if (
      len(self.ranks) != len(self.candidates)
      or [*self.ranks] != sorted(self.ranks)
      or not self.ranks
      or not 0 == self.ranks[0] < self.ranks[-1]
    ):
      raise UserError(
        f'a ranked list has {len(self.candidates)} candidates and ranks {[*self.ranks]}; ranks must be one per candidate, from 0 up, best '
        'candidate first, and at least two must differ'
      )


@dataclasses.dataclass(frozen=True)
class Group:
  """Any number of candidates for one prompt and reference: the unit of scoring in evaluation, PPO and serving."""

  prompt: Text
  reference: Text
  candidates: Sequence[Text]
  wrapper: str = 'sft'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """An example of a data set for reinforcement fine-tuning."""

  prompt: Text
  reference: Text
  answer: str = ''  # what a rule compares with, if not the reference itself
  category: str = ''  # `ability` in the official files
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  other_reference: Text = ''  # by another policy, for the control of PPO; empty: the control uses another prompt's reference


class Rollouts(NamedTuple):
  """Responses sampled from a policy. Arrays are numpy and hold 0 after the end of a response."""

  prompts: Sequence[Sequence[int]]  # token ids of each rollout's prompt
  tokens_RT: Any  # int32
  length_R: Any  # int32, at least 1, the stop token included
  logprob_RT: Any  # float32: log-probability of each token at the sampling temperature, before top-p and top-k
  stopped_R: Any  # bool: True if a stop token ended the response, False if the limit of tokens did


class PairBatch(NamedTuple):
  """Rows of triplets. Arrays are numpy on the host and jax on devices; padding has empty intervals (start = end)."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, in the original sequence: the input of rotary embeddings
  start_BT: Any  # int32
  end_BT: Any  # int32
  reward_index_BPC: Any  # int32, index of each reward token in its row
  pair_mask_BP: Any  # float32, 1 for a real pair, 0 for padding
  index_BP: Any  # int32, which example of the data set this is; -1 for padding
  margin_BP: Any = None  # float32, by which the rewards are to differ; None: the loss has no margins
  weight_BP: Any = None  # float32, of the example in means; None: all count alike

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT)]


class RankedBatch(NamedTuple):
  """Rows of ranked lists, laid out like groups: a token of a candidate sees its own tail [start, end) and the prefix of its list."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, in the original sequence
  start_BT: Any  # int32
  end_BT: Any  # int32
  prefix_start_BT: Any  # int32; empty intervals for the tokens of a prefix
  prefix_end_BT: Any  # int32
  reward_index_BPC: Any  # int32, index of each reward token in its row, best candidate first
  rank_BPC: Any  # int32, from 0; -1 for padding
  pair_mask_BP: Any  # float32, 1 for a real list, 0 for padding
  index_BP: Any  # int32, which example of the data set this is; -1 for padding
  weight_BP: Any = None  # float32, of the example in means; None: all count alike

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT), (self.prefix_start_BT, self.prefix_end_BT)]


class GroupBatch(NamedTuple):
  """Rows of groups. A token of a candidate sees its own tail [start, end) and the prefix that its group shares."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, in the original sequence
  start_BT: Any  # int32
  end_BT: Any  # int32
  prefix_start_BT: Any  # int32; empty intervals for the tokens of a prefix
  prefix_end_BT: Any  # int32
  reward_index_BQ: Any  # int32, index of each reward token in its row
  index_BQ: Any  # int32, which candidate of the call this is; -1 for padding

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT), (self.prefix_start_BT, self.prefix_end_BT)]


class SequenceBatch(NamedTuple):
  """Rows of one sequence each, from its first token on: the batch of exact scoring."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32
  start_BT: Any  # int32
  end_BT: Any  # int32
  reward_index_B: Any  # int32, index of the reward token; 0 for a row of padding

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT)]


class PolicyBatch(NamedTuple):
  """Rows of prompts with their responses. The values of a response token are stored where it is predicted: one token before it.

  Responses to one prompt share it: a token of a response sees its own tail [start, end) and the prefix.
  """

  tokens_BT: Any  # int32
  positions_BT: Any  # int32, in the original sequence
  start_BT: Any  # int32
  end_BT: Any  # int32
  prefix_start_BT: Any  # int32; empty intervals where nothing is shared
  prefix_end_BT: Any  # int32
  target_BT: Any  # int32, the next token
  rollout_BT: Any  # int32, which rollout the target belongs to; -1 where the target is not a token of a response
  target_index_BT: Any  # int32, which token of its response the target is

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT), (self.prefix_start_BT, self.prefix_end_BT)]


class TextBatch(NamedTuple):
  """Windows of text for next-token prediction."""

  tokens_BT: Any  # int32
  positions_BT: Any  # int32
  start_BT: Any  # int32
  end_BT: Any  # int32
  target_BT: Any  # int32
  target_mask_BT: Any  # float32
  index_B: Any  # int32, which window of the corpus this is; -1 for padding

  @property
  def intervals(self) -> list[Interval]:
    """The keys that each token sees."""
    return [(self.start_BT, self.end_BT)]
