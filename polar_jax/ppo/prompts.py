"""What a policy is asked, in its own tokens, and which tokens end its answers."""

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
from polar_jax.data.template import join_messages
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import Prompt, UserError

_CHUNK = 512  # prompts that a thread renders and tokenises at a time
_PROBE = 'an answer that ends here'


class PolicyPrompts(Sequence[tuple[Prompt, list[int]]]):
  """Random access from a number to a prompt and its token ids for the policy. All are tokenised once, when this is made.

  With a chat template a string is one message of the user, and the template writes the BOS, if its model wants one. Without one
  messages are joined by newlines. A prompt whose metadata holds a 'policy_prompt' is asked that.

  Attributes:
    kept: which of the prompts given each one is.
    dropped: which of the prompts given are longer than `max_prompt` tokens, and left out.
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
    """
    Args:
      tokenizer: the policy's.
      max_prompt: the most tokens of a prompt, BOS and chat template included.
      bos: put BOS, if the tokenizer has one, before the text of a policy without a chat template.
      log: takes one line if prompts are left out.

    Raises:
      UserError: the chat template or the tokenizer refuses a prompt, one has no token, or every one is too long.
    """
    self._prompts = prompts
    self.kept: list[int] = []
    self.dropped: list[int] = []
    self._ids = array.array('i')  # of all kept prompts, behind one another: as lists they would take ten times the memory
    self._ends = array.array('q')
    for i, ids in enumerate(_tokenised(prompts, tokenizer, chat, bos)):
      if not ids:
        raise UserError(f'prompt {i} has no token: the policy has nothing to answer')
      if len(ids) > max_prompt:
        self.dropped.append(i)
        continue
      self.kept.append(i)
      self._ids.extend(ids)
      self._ends.append(len(self._ids))
    if not self.kept:
      raise UserError(f'none of the {len(prompts)} prompts has at most {max_prompt} tokens; raise rft.rollout.max_prompt')
    if self.dropped and log is not None:
      first = ', '.join(map(str, self.dropped[:5])) + (', ...' if len(self.dropped) > 5 else '')
      log(f'left out {len(self.dropped)} of {len(prompts)} prompts with more than {max_prompt} tokens (numbers {first})')

  def __len__(self) -> int:
    return len(self.kept)

  @overload
  def __getitem__(self, index: int) -> tuple[Prompt, list[int]]: ...
  @overload
  def __getitem__(self, index: slice) -> list[tuple[Prompt, list[int]]]: ...
  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    i = range(len(self))[index]
    return self._prompts[self.kept[i]], self._ids[self._ends[i - 1] if i else 0 : self._ends[i]].tolist()


def _tokenised(prompts: Sequence[Prompt], tokenizer: Tokenizer, chat: ChatTemplate | None, bos: bool) -> Iterable[list[int]]:
  """Token ids of each prompt, in order."""

  def encode(start: int) -> list[list[int]]:
    numbers = range(start, min(start + _CHUNK, len(prompts)))
    return tokenizer.encode_batch([_text(i, prompts[i], chat) for i in numbers], add_bos=bos and chat is None)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    try:
      yield from itertools.chain.from_iterable(pool.map(encode, range(0, len(prompts), _CHUNK)))
    finally:
      pool.shutdown(cancel_futures=True)  # an error is not to wait for the prompts behind it


def _text(number: int, prompt: Prompt, chat: ChatTemplate | None) -> str:
  asked = prompt.metadata.get('policy_prompt', prompt.prompt)
  if chat is None:
    return join_messages(asked, f'prompt {number}')
  try:
    return chat.render([{'role': 'user', 'content': asked}] if isinstance(asked, str) else asked)
  except ChatTemplateError as error:
    raise ChatTemplateError(f'prompt {number}: {error}') from error


def open_chat(folder: str | pathlib.Path, chat: str) -> ChatTemplate | None:
  """The chat template of a policy whose tokenizer files are in `folder`, as `rft.rollout.chat` says; None: it is asked plain text.

  Raises:
    ChatTemplateError: the folder has one that cannot be used.
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
  """The tokens that end an answer; the first is the one to put behind a text that is to end.

  Args:
    folder: of the policy's tokenizer files, or None.
    stop: strings separated by spaces, each one special token, and nothing else ends an answer ('': nothing at all). None: the
      token that the chat template puts behind an answer, the tokenizer's EOS, and what generation_config.json (else config.json) in
      `folder` names.
    chat: its chat template, or None.

  Raises:
    UserError: a string is no special token, a file in `folder` gives no ids, or there is no token that ends an answer.
  """
  if stop is not None:
    chosen = {token: tokenizer.special_id(token) for token in stop.split()}
    unknown = [token for token, i in chosen.items() if i is None]
    if unknown:
      raise ConfigError(f"rft.rollout.stop: {unknown[0]!r} is no special token of the policy's tokenizer; give such tokens, space between")
    return _distinct(chosen.values())
  found = [tokenizer.eos_id] if chat is None else [_closing_id(tokenizer, chat), tokenizer.eos_id]
  ids = _distinct(found if folder is None else [*found, *tokenizer_lib.stop_ids(folder, tokenizer)])
  if not ids:
    raise ConfigError('no token ends an answer: the tokenizer has no EOS; name one in rft.rollout.stop')
  return ids


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
  return tuple(dict.fromkeys(i for i in ids if i is not None))


def _closing_id(tokenizer: Tokenizer, chat: ChatTemplate) -> int | None:
  """The special token right behind an answer, if the template accepts a conversation that ends with one."""
  try:
    text = chat.render([{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': _PROBE}], add_generation_prompt=False)
  except ChatTemplateError:
    return None
  _, found, tail = text.rpartition(_PROBE)
  ids = tokenizer.encode(tail.lstrip())[:1] if found else []
  return ids[0] if ids and not tokenizer.decode(ids, skip_special=True) else None
