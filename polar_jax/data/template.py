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

In one respect we are stricter. Where the official rule drops a control token, the text around it may join to another one
(`<|rew</s>ard|>`), and so may the end of a prompt and the beginning of a response. Here no text of a prompt, reference or candidate ever
becomes a control token, the separator or the reward token.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from polar_jax.config import TemplateConfig
from polar_jax.data.special_strings import SpecialStrings
from polar_jax.data.tokenizer import Tokenizer, holds_unknown
from polar_jax.types import Text, Triplet, UserError

WRAPPERS = ('sft', 'pretrain')
_RESERVED = 4  # separator, reward token and two newlines; the final BOS is not counted (official rule)
_ROUNDS = 8  # in which a text must have lost its control tokens; two suffice for all but odd normalizers


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


class Truncated(NamedTuple):
  """What of an example is cut off."""

  responses: bool  # the end of the reference or of a candidate
  prompt: bool  # the beginning of the prompt


class Encoded(NamedTuple):
  """A sequence that the model reads."""

  ids: list[int]
  truncated: Truncated


class Template:
  """Converter of triplets and candidates to token ids. It has no state but its settings, and can be pickled and shared by threads.

  An id in the configuration has precedence over the tokenizer's. If the tokenizer does not convert the string to that id, the template
  treats the string as a special token: the text before and after it is tokenized separately, as a tokenizer with that added token does
  (no merge crosses it), and a content that happens to contain it loses it in the decoding step.

  Attributes:
    separator_id: id of the separator; None: it is tokenized as ordinary text.
    reward_token_id: id at which the reward is read; None only with a chat template (conversation_template.py).
    reads_roles: whether messages differ from their contents joined by newlines.
  """

  reads_roles = False

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
    self.reward_token_id: int | None = reward_token_id
    self.separator_id = own_separator if config.separator_id is None else config.separator_id
    added = {}
    if self.separator_id is None:
      _warn_of_textual_separator(config.separator)
    elif self.separator_id != own_separator:
      added[config.separator] = self.separator_id
    if reward_token_id != own_reward:
      added[config.reward_token] = reward_token_id
    self._added = SpecialStrings(added)
    own = {config.reward_token: reward_token_id} | ({} if self.separator_id is None else {config.separator: self.separator_id})
    self._own_ids = frozenset(own.values())
    self._forbidden = SpecialStrings({**tokenizer.control, **own})
    # Characters that the tokenizer cannot spell become the unknown token, which is no sign of a control token.
    self._forbidden_ids = frozenset(self._forbidden.ids.values()) - {tokenizer.unk_id}
    self._forbidden_but_unknown = SpecialStrings({string: i for string, i in self._forbidden.ids.items() if i in self._forbidden_ids})

  def encode(self, triplet: Triplet) -> tuple[list[int], list[int]]:
    """Return the token ids of (prompt, reference, prompt, candidate) for the chosen and for the rejected candidate.

    Raises:
      TemplateError: a field is neither a string nor a list of messages, or the wrapper is unknown.
    """
    candidates = {'chosen': triplet.chosen, 'rejected': triplet.rejected}
    chosen, rejected = self._sequences(triplet.prompt, triplet.reference, candidates, triplet.wrapper)
    return chosen.ids, rejected.ids

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
    return [sequence.ids for sequence in self.encode_with_truncation(prompt, reference, candidates, wrapper, alone)]

  def encode_with_truncation(
    self, prompt: Text, reference: Text, candidates: Sequence[Text], wrapper: str = 'sft', alone: bool = False
  ) -> list[Encoded]:
    """Return what `encode_candidates` returns, with what was cut off of each candidate, its reference and its prompt.

    Arguments and errors are those of `encode_candidates`.
    """
    return self._sequences(prompt, reference, numbered(candidates), wrapper, alone)

  def encode_finished(self, text: str) -> list[int]:
    """Return the token ids of a text that some `candidate_texts` returned, as the official servers tokenize it.

    Special tokens in it are read as such. What precedes a text, such as a BOS, is added unless the text begins with it already.

    Raises:
      UserError: the tokenizer has no token for a character.
    """
    (ids,) = self._encode_texts([text])
    prefix = list(self.tokenizer.prefix_ids)
    n = len(prefix)
    return ids[n:] if n and ids[n : 2 * n] == prefix else ids

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
    # Each sequence has what precedes a text, a newline before the candidate, and the reward token, which a client's tokenizer may not know.
    return sum(len(self.tokenizer.prefix_ids) + context + 1 + size(candidate) + size(c.reward_token) for candidate in candidates)

  def truncated(self, triplet: Triplet) -> Truncated | None:
    """Return what of an example is cut off; None without tokenizing, if it is certain that the model reads every text as it is.

    Raises:
      TemplateError: as in `encode`.
    """
    texts = [join_messages(triplet.prompt, 'prompt')]
    if self.config.use_reference:
      texts.append(join_messages(triplet.reference, 'reference'))
    texts += [join_messages(triplet.chosen, 'chosen'), join_messages(triplet.rejected, 'rejected')]
    if self._certainly_uncut(texts):
      return None
    prompt, *responses = map(len, self._encode_texts(texts))
    longest = self.config.max_response_length
    rooms = self._prompt_rooms([min(length, longest) for length in responses])
    return Truncated(max(responses) > longest, prompt > min(rooms))

  def candidate_texts(
    self, prompt: Text, reference: Text, candidates: Sequence[Text], wrapper: str = 'sft', alone: bool = False
  ) -> list[str]:
    """Return the texts that `encode_candidates` encodes, with the reward token as text, for servers that tokenize and add the BOS.

    Arguments are those of `encode_candidates`.

    Raises:
      TemplateError: an input is neither a string nor a list of messages, or the wrapper is unknown.
    """
    texts = [join_messages(candidate, name) for name, candidate in numbered(candidates).items()]
    return [text + self.config.reward_token for text, _, _ in self._encoded(prompt, reference, texts, wrapper, alone)]

  def _sequences(self, prompt: Text, reference: Text, candidates: Mapping[str, Text], wrapper: str, alone: bool = False) -> list[Encoded]:
    """Return the token ids of each candidate; `candidates` are by the names that messages give them."""
    texts = [join_messages(candidate, name) for name, candidate in candidates.items()]
    encoded = self._encoded(prompt, reference, texts, wrapper, alone)
    assert self.reward_token_id is not None
    if self.config.rule == 'trainer':
      return [Encoded([*ids, self.reward_token_id], truncated) for _, ids, truncated in encoded]
    sequences = self._encode_texts([text + self.config.reward_token for text, _, _ in encoded])
    for (text, _, _), ids in zip(encoded, sequences, strict=True):
      if ids[-1] != self.reward_token_id or ids.count(self.reward_token_id) != 1 + (self.reward_token_id == self.separator_id):
        raise TemplateError(f'the text {shortened(text)} forms another token with the reward token after it; remove its end')
    return [Encoded(ids, truncated) for ids, (_, _, truncated) in zip(sequences, encoded, strict=True)]

  def _encoded(
    self, prompt: Text, reference: Text, candidates: list[str], wrapper: str, alone: bool
  ) -> list[tuple[str, list[int], Truncated]]:
    """Return the text of each candidate, without the reward token, its token ids, and what was cut off."""
    all_parts = self._parts(prompt, reference, candidates, wrapper, alone)
    texts = [self.config.separator.join(parts) for parts, _ in all_parts]
    out = [(text, ids, cut) for text, ids, (_, cut) in zip(texts, self._encode_texts(texts), all_parts, strict=True)]
    for c, (parts, truncated) in enumerate(all_parts):
      if self._has_own_tokens_only(out[c][1], len(parts)):
        continue
      text = self.config.separator.join(map(self._without_control_tokens, parts))
      (ids,) = self._encode_texts([text])
      if not self._has_own_tokens_only(ids, len(parts)):
        raise TemplateError(f'the text {shortened(text)} forms a control token with the separator next to it; remove it from the text')
      out[c] = text, ids, truncated
    return out

  def _has_own_tokens_only(self, ids: list[int], parts: int) -> bool:
    """Return whether the only control tokens in `ids` are those of the template: what precedes a text, and separators."""
    prefix = self.tokenizer.prefix_ids
    separators = 0 if self.separator_id is None else parts - 1
    present = self._forbidden_ids.intersection(ids)
    expected = [*prefix, *[self.separator_id] * separators]
    return present <= set(expected) and all(ids.count(i) == expected.count(i) for i in present)

  def _without_control_tokens(self, text: str) -> str:
    """Return a text that becomes no control token, by removing all that would, until none is left."""
    for _ in range(_ROUNDS):
      text = self._forbidden.remove(text)
      (ids,) = self._encode_texts([text])
      own = ids[len(self.tokenizer.prefix_ids) :]
      if self._forbidden_ids.isdisjoint(own):
        return text
      text = self._decode(own)
    raise TemplateError(f'the tokenizer makes a control token of the text {shortened(text)} each time it is removed; remove it yourself')

  def _parts(self, prompt: Text, reference: Text, candidates: list[str], wrapper: str, alone: bool) -> list[tuple[list[str], Truncated]]:
    """Return the texts between separators of each candidate, (prompt, reference), if used, and (prompt, candidate), and what was cut."""
    check_wrapper(wrapper)
    if not candidates:
      return []
    c = self.config
    texts = [join_messages(prompt, 'prompt')]
    if c.use_reference:
      texts.append(join_messages(reference, 'reference'))
    texts += candidates
    whole = [texts[0]] * len(candidates), texts[1:], [Truncated(False, False)] * len(candidates)
    prompts, answers, truncated = whole if self._certainly_uncut(texts) else self._cut(texts, alone)
    out = []
    for prompt_text, candidate, cut in zip(prompts, answers[-len(candidates) :], truncated, strict=True):
      first = [self._join(prompt_text, answers[0], wrapper)] if c.use_reference else []
      out.append(([*first, self._join(prompt_text, candidate, wrapper)], cut))
    return out

  def _cut(self, texts: list[str], alone: bool) -> tuple[list[str], list[str], list[Truncated]]:
    """Truncate the texts (prompt, reference if used, candidates).

    Returns:
      (a prompt for each candidate, the other texts, what was cut off for each candidate).
    """
    encoded = self._encode_texts(texts)
    cut = [ids[: self.config.max_response_length] for ids in encoded[1:]]
    rooms = self._prompt_rooms([len(ids) for ids in cut])
    if self.config.rule == 'trainer' and not alone:
      rooms = [min(rooms)] * len(rooms)
    prompts = {room: self._text_of(_last(encoded[0], room), encoded[0], texts[0]) for room in set(rooms)}
    answers = [self._text_of(*answer) for answer in zip(cut, encoded[1:], texts[1:], strict=True)]
    too_long = [len(ids) > self.config.max_response_length for ids in encoded[1:]]
    reference_cut = self.config.use_reference and too_long[0]
    lost = [Truncated(reference_cut or c, len(encoded[0]) > room) for c, room in zip(too_long[-len(rooms) :], rooms, strict=True)]
    return [prompts[room] for room in rooms], answers, lost

  def _text_of(self, kept: list[int], ids: list[int], text: str) -> str:
    """Return the text of the ids that truncation kept, without control tokens.

    Args:
      kept: the first or last of `ids`, or all of them.
      ids: those of `text`, with what precedes a text.
      text: the whole text.
    """
    if not holds_unknown(self.tokenizer, text, ids):
      return self._decode(kept)
    # Decoding without special tokens would drop what the tokenizer cannot spell, as if it were not there.
    if len(kept) == len(ids):
      return self._forbidden.remove(text)
    kept = [i for i in kept if i not in self._forbidden_ids]
    return self._forbidden_but_unknown.remove(self.tokenizer.decode(kept, skip_special=False))

  def _certainly_uncut(self, texts: list[str]) -> bool:
    """Return True only if `_cut` is certain to leave the pieces unchanged, which saves tokenizing them: a third of the work."""
    if not all(self.tokenizer.is_exact(text) and not self._added.occur_in(text) for text in texts):
      return False
    # What precedes a text, and the largest possible number of bytes.
    prefix = len(self.tokenizer.prefix_ids)
    prompt, *answers = (prefix + (len(text) if text.isascii() else 4 * len(text)) for text in texts)
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
    return [[*self.tokenizer.prefix_ids, *self._added.encode(text, self.tokenizer.encode)] for text in texts]

  def _decode(self, ids: list[int]) -> str:
    """Return the text of `ids` without control tokens, nor those that it would spell without them."""
    return self._forbidden.remove(self.tokenizer.decode([i for i in ids if i not in self._own_ids], skip_special=True))


@functools.cache
def _warn_of_textual_separator(separator: str) -> None:
  """Warn once per process, because a run creates several templates with the same settings."""
  warnings.warn(
    f'template.separator {separator!r} is not a token of this tokenizer and is tokenized as ordinary text; '
    'set template.separator_id if the model was trained with a single token',
    stacklevel=3,
  )


def numbered(candidates: Sequence[Text]) -> dict[str, Text]:
  """Return candidates by the names that messages give them."""
  return {f'candidates[{i}]': candidate for i, candidate in enumerate(candidates)}


def shortened(text: str) -> str:
  """Return the beginning of a text, quoted on one line."""
  return repr(text[:60]) + ('...' if len(text) > 60 else '')


def _last(ids: list[int], count: int) -> list[int]:
  """Return the last `count` ids, and none if there is no room (where the official slice `ids[-0:]` keeps all of them)."""
  return ids[max(len(ids) - count, 0) :]
