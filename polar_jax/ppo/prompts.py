"""Prompts as token ids of the policy, and the tokens that end its responses."""

from __future__ import annotations

import array
import concurrent.futures
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from polar_jax.config import ConfigError
from polar_jax.data import tokenizer as tokenizer_lib
from polar_jax.data.chat import ChatTemplate, ChatTemplateError, NoChatTemplateError
from polar_jax.data.conversation import ConversationEncoder, as_messages
from polar_jax.data.template import join_messages
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import Prompt, Text, UserError

_CHUNK = 512  # prompts that a thread renders and tokenizes at a time
_PROBE = 'a response that ends here'


class PolicyPrompts(Sequence[tuple[Prompt, list[int]]]):
  """A sequence of (prompt, its token ids for the policy). All prompts are tokenized once, by the constructor.

  With a chat template a string becomes one message of the user, and the template writes the BOS if its model needs one; no text of a
  message becomes a control token. Without a template, messages are joined by newlines, and text is read as it is, control tokens included:
  it may have been rendered elsewhere. The policy reads a prompt's metadata 'policy_prompt' instead of the prompt, if there is one.

  Attributes:
    kept: indices of the given prompts that this sequence holds.
    dropped: indices of those that are longer than `max_prompt` tokens.
  """

  def __init__(
    self,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    chat: ChatTemplate | None,
    max_prompt: int,
    *,
    bos: bool = True,
    log: Callable[[str], None] | None = None,
  ):
    """Tokenize the prompts.

    Args:
      prompts: of the data set.
      tokenizer: the policy's.
      chat: the policy's chat template; None: it reads plain text.
      max_prompt: most tokens of a prompt, BOS and chat template included.
      bos: put BOS, if the tokenizer has one, before the text of a policy without a chat template.
      log: gets one line if prompts are left out.

    Raises:
      UserError: the chat template or the tokenizer refuses a prompt, one has no token, or all are too long.
    """
    self._prompts = prompts
    self.kept: list[int] = []
    self.dropped: list[int] = []
    self._ids = array.array('i')  # of all kept prompts, concatenated: lists would take ten times the memory
    self._ends = array.array('q')
    for i, ids in enumerate(_tokenize(prompts, tokenizer, chat, bos)):
      if not ids:
        raise UserError(f'prompt {i} has no tokens, so the policy has nothing to respond to; remove it or give it text')
      if len(ids) > max_prompt:
        self.dropped.append(i)
        continue
      self.kept.append(i)
      self._ids.extend(ids)
      self._ends.append(len(self._ids))
    if not self.kept:
      raise UserError(f'all of the {len(prompts)} prompts have more than {max_prompt} tokens; raise rft.rollout.max_prompt')
    if self.dropped and log is not None:
      first = ', '.join(map(str, self.dropped[:5])) + (', ...' if len(self.dropped) > 5 else '')
      log(f'left out {len(self.dropped)} of {len(prompts)} prompts with more than {max_prompt} tokens (numbers {first})')

  def __len__(self) -> int:
    return len(self.kept)

  @property
  def longest(self) -> int:
    """Number of tokens of the longest prompt."""
    return max(high - low for low, high in zip([0, *self._ends], self._ends, strict=False))

  @overload
  def __getitem__(self, index: int) -> tuple[Prompt, list[int]]: ...
  @overload
  def __getitem__(self, index: slice) -> list[tuple[Prompt, list[int]]]: ...
  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    i = range(len(self))[index]
    return self._prompts[self.kept[i]], self._ids[self._ends[i - 1] if i else 0 : self._ends[i]].tolist()


def _tokenize(prompts: Sequence[Prompt], tokenizer: Tokenizer, chat: ChatTemplate | None, bos: bool) -> Iterable[list[int]]:
  """Yield the token ids of each prompt, in order."""
  conversations = None if chat is None else ConversationEncoder(chat, tokenizer)

  def encode(start: int) -> list[list[int]]:
    numbers = range(start, min(start + _CHUNK, len(prompts)))
    if conversations is None:
      return tokenizer.encode_batch([join_messages(_given(prompts[i]), f'prompt {i}') for i in numbers], add_bos=bos)
    return [_conversation(i, prompts[i], conversations) for i in numbers]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    try:
      yield from itertools.chain.from_iterable(pool.map(encode, range(0, len(prompts), _CHUNK)))
    finally:
      pool.shutdown(cancel_futures=True)  # an error must not wait for later prompts


def _given(prompt: Prompt) -> Text:
  """Return what the policy reads."""
  return prompt.metadata.get('policy_prompt', prompt.prompt)


def _conversation(number: int, prompt: Prompt, conversations: ConversationEncoder) -> list[int]:
  """Return the token ids of a prompt through the chat template."""
  try:
    return conversations.render(as_messages(_given(prompt), 'user'), add_generation_prompt=True)[1]
  except ChatTemplateError as error:
    raise ChatTemplateError(f'prompt {number}: {error}') from error


def open_chat(folder: str | pathlib.Path, chat: str) -> ChatTemplate | None:
  """Open the chat template of a policy whose tokenizer files are in `folder`, unless `rft.rollout.chat` (`chat`) is 'none'.

  Returns:
    The template; None if the policy reads plain text.

  Raises:
    ChatTemplateError: the folder has a template that cannot be used.
  """
  if chat == 'none':
    return None
  try:
    return ChatTemplate.from_folder(folder)
  except NoChatTemplateError:
    return None


def stop_ids(
  tokenizer: Tokenizer, folder: str | pathlib.Path | None, stop: str | None, chat: ChatTemplate | None = None
) -> tuple[int, ...]:
  """Return the tokens that end a response; the first is the one to append to a complete text.

  Args:
    tokenizer: the policy's.
    folder: with its tokenizer files, or None.
    stop: special tokens separated by spaces; only these end a response ('': none does). None: the token that the chat template
      puts after a response, the tokenizer's EOS, and those that generation_config.json (else config.json) in `folder` names.
    chat: the policy's chat template, or None.

  Raises:
    UserError: a string is not a special token, a file in `folder` has no valid ids, or no token ends a response.
  """
  if stop is not None:
    chosen = {token: tokenizer.special_id(token) for token in stop.split()}
    unknown = [token for token, i in chosen.items() if i is None]
    if unknown:
      raise ConfigError(
        f"rft.rollout.stop: {unknown[0]!r} is not a special token of the policy's tokenizer; name special tokens, separated by spaces"
      )
    return _distinct(chosen.values())
  own = [tokenizer.eos_id] if chat is None else [_closing_id(tokenizer, chat), tokenizer.eos_id]
  ids = _distinct(own if folder is None else [*own, *tokenizer_lib.stop_ids(folder, tokenizer)])
  if not ids:
    raise ConfigError('no token ends a response, because the tokenizer has no EOS; name one in rft.rollout.stop')
  return ids


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
  return tuple(dict.fromkeys(i for i in ids if i is not None))


def _closing_id(tokenizer: Tokenizer, chat: ChatTemplate) -> int | None:
  """Return the special token right after a response, if the template renders one."""
  try:
    text = chat.render([{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': _PROBE}], add_generation_prompt=False)
  except ChatTemplateError:
    return None
  _, probe, tail = text.rpartition(_PROBE)
  ids = tokenizer.encode(tail.lstrip())[:1] if probe else []
  return ids[0] if ids and not tokenizer.decode(ids, skip_special=True) else None
