"""Types that travel between packages, and the glossary of names.

Shape letters (suffixes of array names):
  B  rows of a batch            T  tokens of a row (queries)      S  tokens of a row (keys)
  P  pairs in a row             C  candidates of a pair: 0 chosen, 1 rejected
  Q  tokens picked from a row, such as its reward tokens
  D  model width                F  feed-forward width             L  layers
  N  query heads                K  key/value heads                G  N / K
  H  head dimension             V  vocabulary

Words:
  trajectory  a policy's continuation of, or answer to, a prompt
  triplet     one prompt with a reference, a chosen and a rejected trajectory. In pre-training reference and chosen are two
              samples of one policy and rejected is a sample of another; in fine-tuning they are ranked by preference
  row         a fixed number of token slots of a batch; holds one or more triplets
  interval    the keys [start, end) that a query token may attend to
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


class TextBatch(NamedTuple):
  """Windows of text for next-token prediction."""

  tokens_BT: Any
  positions_BT: Any
  start_BT: Any
  end_BT: Any
  target_BT: Any  # int32
  target_mask_BT: Any  # float32
  index_B: Any  # int32, which window of the corpus this is; -1 for padding
