"""POLAR's text template: `prompt nl reference <|reward|> prompt nl candidate [reward]` (paper, section 4.1).

One implementation serves training, evaluation, PPO and serving. It reproduces the rules of the official trainer (XTuner's reward data
set) token for token, and those of the official serving client under the name 'client':

                           trainer                                   client
  prompt is truncated for  all candidates alike (the smallest room)  each candidate separately
  empty candidate, 'sft'   no newline                                newline as for any other
  reward token             appended as an id                         appended as text

Both keep the head of a response and the tail of a prompt. Lengths are those of the separately encoded pieces, BOS included; the
truncated pieces are decoded without special tokens, joined as text and encoded again. The final length may therefore differ from the
budget by a few tokens either way, and it exceeds `max_length` if two responses of `max_response_length` do so by themselves.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

from polar_jax.config import TemplateConfig
from polar_jax.data.tokenizer import SpecialStrings, Tokenizer
from polar_jax.types import Text, Triplet, UserError

WRAPPERS = ('sft', 'pretrain')
_RESERVED = 4  # separator, reward token and two newlines; the final BOS is not counted (official rule)


class TemplateError(UserError):
  """A text, a wrapper or a token of the template cannot be used. The message is one line for the user."""


def join_messages(text: Any, field: str) -> str:
  """Return a string unchanged, or the contents of messages joined by newlines, without roles (the official rule uses no chat template).

  Raises:
    TemplateError: `text` is neither a string nor a list of messages with text; the message names `field`.
  """
  if isinstance(text, str):
    return text
  if not isinstance(text, list):
    raise TemplateError(f'{field} must be a string or a list of messages, not {_kind(text)}')
  if not text:
    raise TemplateError(f"{field} is an empty list of messages; use '' for an empty text")
  for i, message in enumerate(text):
    if not isinstance(message, dict):
      raise TemplateError(f'{field}[{i}] must be a message with a content, not {_kind(message)}')
    if 'content' not in message:
      raise TemplateError(f'{field}[{i}] is a message without content')
    if not isinstance(message['content'], str):
      raise TemplateError(f'{field}[{i}].content must be a string, not {_kind(message["content"])}')
  return '\n'.join(message['content'] for message in text)


def _kind(value: Any) -> str:
  return 'null' if value is None else type(value).__name__


def check_wrapper(wrapper: Any) -> None:
  """Check that `wrapper` is one of WRAPPERS. (The official code treats any other word as 'sft'.)

  Raises:
    TemplateError: it is not.
  """
  if wrapper not in WRAPPERS:
    raise TemplateError(f'wrapper is {wrapper!r}; it must be one of: {", ".join(WRAPPERS)}')


class Template:
  """Converter of triplets and candidates to token ids. It has no state but its settings, and can be pickled and shared by threads.

  An id in the configuration has precedence over the tokenizer's. If the tokenizer does not convert the string to that id, the template
  treats the string as a special token: the text before and after it is tokenized separately, as a tokenizer with that added token does
  (no merge crosses it), and a content that happens to contain it loses it in the decoding step.

  Attributes:
    separator_id: id of the separator; None: it is tokenized as ordinary text.
    reward_token_id: id at which the reward is read.
  """

  def __init__(self, config: TemplateConfig, tokenizer: Tokenizer):
    self.config = config
    self.tokenizer = tokenizer
    own_separator, own_reward = tokenizer.special_id(config.separator), tokenizer.special_id(config.reward_token)
    reward_token_id = own_reward if config.reward_token_id is None else config.reward_token_id
    if reward_token_id is None:
      raise TemplateError(
        f'template.reward_token {config.reward_token!r} is not a token of this tokenizer; set template.reward_token_id to its id, '
        'or template.reward_token to a token that the tokenizer has'
      )
    self.reward_token_id: int = reward_token_id
    self.separator_id = own_separator if config.separator_id is None else config.separator_id
    added = {}
    if self.separator_id is None:
      _warn_of_textual_separator(config.separator)
    elif self.separator_id != own_separator:
      added[config.separator] = self.separator_id
    if reward_token_id != own_reward:
      added[config.reward_token] = reward_token_id
    self._added = SpecialStrings(added)
    self._added_ids = frozenset(added.values())

  def encode(self, triplet: Triplet) -> tuple[list[int], list[int]]:
    """Return the token ids of (prompt, reference, prompt, candidate) for the chosen and for the rejected candidate.

    Raises:
      TemplateError: a field is neither a string nor a list of messages, or the wrapper is unknown.
    """
    candidates = [join_messages(triplet.chosen, 'chosen'), join_messages(triplet.rejected, 'rejected')]
    chosen, rejected = self._sequences(triplet.prompt, triplet.reference, candidates, triplet.wrapper)
    return chosen, rejected

  def encode_candidates(
    self, prompt: Text, reference: Text, candidates: Sequence[Text], wrapper: str = 'sft', alone: bool = False
  ) -> list[list[int]]:
    """Return the token ids of each candidate. The trainer's rule truncates the prompt alike for all, so that they share their prefix.

    Args:
      prompt: the prompt.
      reference: the reference, which is ignored without `use_reference`.
      candidates: the candidates.
      wrapper: 'sft' or 'pretrain'.
      alone: truncate the prompt for each candidate as if there were no other, whatever the rule.

    Raises:
      TemplateError: an input is neither a string nor a list of messages, or the wrapper is unknown.
    """
    texts = [join_messages(candidate, f'candidates[{i}]') for i, candidate in enumerate(candidates)]
    return self._sequences(prompt, reference, texts, wrapper, alone)

  def most_tokens(self, triplet: Triplet) -> int | None:
    """Return a number of tokens that the sequences of a triplet together do not exceed, without tokenizing; None if none is certain.

    Raises:
      TemplateError: a field is neither a string nor a list of messages.
    """
    c = self.config
    contexts = [join_messages(triplet.prompt, 'prompt')] + ([join_messages(triplet.reference, 'reference')] if c.use_reference else [])
    candidates = [join_messages(triplet.chosen, 'chosen'), join_messages(triplet.rejected, 'rejected')]
    if not self._certainly_uncut(contexts + candidates):
      return None
    size = lambda text: len(text.encode('utf-8'))
    context = size(contexts[0]) + sum(size(text) + size(contexts[0]) + size(c.separator) + 1 for text in contexts[1:])
    # Each sequence has a BOS, a newline before the candidate, and the reward token, which a client's tokenizer may not know.
    return sum(1 + context + 1 + size(candidate) + size(c.reward_token) for candidate in candidates)

  def candidate_texts(
    self, prompt: Text, reference: Text, candidates: Sequence[Text], wrapper: str = 'sft', alone: bool = False
  ) -> list[str]:
    """Return the texts that `encode_candidates` encodes, with the reward token as text, for servers that tokenize and add the BOS.

    Arguments are those of `encode_candidates`.

    Raises:
      TemplateError: an input is neither a string nor a list of messages, or the wrapper is unknown.
    """
    texts = [join_messages(candidate, f'candidates[{i}]') for i, candidate in enumerate(candidates)]
    return [text + self.config.reward_token for text in self._texts(prompt, reference, texts, wrapper, alone)]

  def _sequences(self, prompt: Text, reference: Text, candidates: list[str], wrapper: str, alone: bool = False) -> list[list[int]]:
    texts = self._texts(prompt, reference, candidates, wrapper, alone)
    if self.config.rule == 'client':
      return self._encode_texts([text + self.config.reward_token for text in texts])
    return [[*ids, self.reward_token_id] for ids in self._encode_texts(texts)]

  def _texts(self, prompt: Text, reference: Text, candidates: list[str], wrapper: str, alone: bool) -> list[str]:
    """Return the text of each candidate, without the reward token."""
    check_wrapper(wrapper)
    if not candidates:
      return []
    c = self.config
    texts = [join_messages(prompt, 'prompt')]
    if c.use_reference:
      texts.append(join_messages(reference, 'reference'))
    texts += candidates
    prompts, answers = ([texts[0]] * len(candidates), texts[1:]) if self._certainly_uncut(texts) else self._cut(texts, alone)
    out = []
    for prompt_text, candidate in zip(prompts, answers[-len(candidates) :], strict=True):
      text = self._join(prompt_text, candidate, wrapper)
      if c.use_reference:
        text = self._join(prompt_text, answers[0], wrapper) + c.separator + text
      out.append(text)
    return out

  def _cut(self, texts: list[str], alone: bool) -> tuple[list[str], list[str]]:
    """Truncate the texts (prompt, reference if used, candidates): a prompt for each candidate, and the other texts."""
    prompt, *answers = self._encode_texts(texts)
    answers = [ids[: self.config.max_response_length] for ids in answers]
    rooms = self._prompt_rooms([len(ids) for ids in answers])
    if self.config.rule == 'trainer' and not alone:
      rooms = [min(rooms)] * len(rooms)
    prompts = {room: self._decode(_last(prompt, room)) for room in set(rooms)}
    return [prompts[room] for room in rooms], [self._decode(ids) for ids in answers]

  def _certainly_uncut(self, texts: list[str]) -> bool:
    """Return True only if `_cut` is certain to leave the pieces unchanged, which saves tokenizing them: a third of the work."""
    if not all(self.tokenizer.is_exact(text) and not self._added.occur_in(text) for text in texts):
      return False
    # BOS and the largest possible number of bytes.
    prompt, *answers = (1 + (len(text) if text.isascii() else 4 * len(text)) for text in texts)
    return max(answers) <= self.config.max_response_length and prompt <= min(self._prompt_rooms(answers))

  def _prompt_rooms(self, lengths: list[int]) -> list[int]:
    """Return the number of prompt tokens that each candidate leaves room for. Without a reference the prompt occurs only once.

    Args:
      lengths: number of tokens of the reference, if used, and of each candidate.
    """
    reference, copies, candidates = (lengths[0], 2, lengths[1:]) if self.config.use_reference else (0, 1, lengths)
    return [(self.config.max_length - _RESERVED - reference - length) // copies for length in candidates]

  def _join(self, prompt: str, answer: str, wrapper: str) -> str:
    if wrapper == 'pretrain' or (answer == '' and self.config.rule == 'trainer'):
      return prompt + answer
    return f'{prompt}\n{answer}'

  def _encode_texts(self, texts: list[str]) -> list[list[int]]:
    if not any(map(self._added.occur_in, texts)):
      return self.tokenizer.encode_batch(texts, add_bos=True)
    bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
    return [bos + self._added.encode(text, self.tokenizer.encode) for text in texts]

  def _decode(self, ids: list[int]) -> str:
    if self._added_ids:
      ids = [i for i in ids if i not in self._added_ids]
    return self.tokenizer.decode(ids, skip_special=True)


@functools.cache
def _warn_of_textual_separator(separator: str) -> None:
  """Warn once per process, because a run creates several templates with the same settings."""
  warnings.warn(
    f'template.separator {separator!r} is not a token of this tokenizer and is tokenized as ordinary text; '
    'set template.separator_id if the model was trained with a single token',
    stacklevel=3,
  )


def _last(ids: list[int], count: int) -> list[int]:
  """Return the last `count` ids, and none if there is no room (where the official slice `ids[-0:]` keeps all of them)."""
  return ids[max(len(ids) - count, 0) :]
