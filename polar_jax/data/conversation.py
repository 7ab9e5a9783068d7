"""Conversations as token ids, through a chat template, in which no text of a message becomes a control token.

Control tokens are removed from the texts of the messages before they are rendered. Where a template joins texts, or cuts something out of
one, a control token may still appear that was in none of them. It is noticed by rendering the messages once more with harmless characters
in place of those that control tokens begin or end with: the control tokens must be the same. A role is part of what a template writes
itself, such as `<|user|>`: roles that are not in common use are refused if they occur in a control token.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from polar_jax.data.chat import ChatTemplate, ChatTemplateError
from polar_jax.data.special_strings import SpecialStrings
from polar_jax.data.tokenizer import Tokenizer

_HARMLESS = '.'
# Templates write control tokens of these on purpose: of Zephyr, Llama 2 and 3, Gemma, ChatGLM, Granite, and those with tools.
_ROLES = frozenset(
  'system developer user human assistant bot gpt model tool tools tool_call tool_response function function_call observation ipython '  # noqa: SIM905
  'environment context document documents available_tools plugin'.split()
)
_PLAIN_ROLE = re.compile(r'[\w .-]{1,64}')


class ConversationEncoder:
  """Renders and tokenizes conversations.

  Args:
    chat: the chat template.
    tokenizer: of the model that reads the conversations. It adds no BOS: the template writes it if its model needs one.
  """

  def __init__(self, chat: ChatTemplate, tokenizer: Tokenizer):
    self._chat, self._tokenizer = chat, tokenizer
    self._control = SpecialStrings(tokenizer.control)
    self._control_ids = frozenset(tokenizer.control.values()) - {tokenizer.unk_id}
    self._edges = {edge for string in self._control.ids for edge in (string[0], string[-1]) if not edge.isalnum()}

  def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> tuple[str, list[int]]:
    """Return the text of a conversation, and its token ids.

    Raises:
      ChatTemplateError: the template refuses the messages, or makes a control token of their texts.
    """
    self._check_roles(messages)
    clean = [_map_texts(message, self._control.remove) for message in messages]
    text = self._chat.render(clean, add_generation_prompt)
    ids = self._tokenizer.encode(text)
    masked = [_map_texts(message, self._masked, keep=('role', 'type')) for message in clean]
    if masked != clean:
      expected = self._chat.render(masked, add_generation_prompt)
      if self._of_control(ids) != self._of_control(self._tokenizer.encode(expected)):
        raise ChatTemplateError(
          f'{self._chat.where}: makes a control token of the texts of the messages where it joins or cuts them: '
          f'{str(clean[-1])[:200]!r}; remove the parts of control tokens from the texts'
        )
    return text, ids

  def _check_roles(self, messages: Sequence[Mapping[str, Any]]) -> None:
    """Reject roles of which a template could make another control token than that of a role."""
    for i, message in enumerate(messages):
      role = message.get('role') if isinstance(message, Mapping) else None
      if not isinstance(role, str) or role in _ROLES:
        continue
      word = unicodedata.normalize('NFKC', role).strip().lower()
      token = next((string for string in self._control.ids if word and word in string.lower()), None)
      if token is not None or not _PLAIN_ROLE.fullmatch(role):
        why = f'could become the control token {token!r}' if token is not None else 'is not a plain word'
        raise ChatTemplateError(f'{self._chat.where}: the role of messages[{i}], {role[:80]!r}, {why}; rename it (system, user, assistant)')

  def _masked(self, text: str) -> str:
    """Return a text with harmless characters in place of those that a control token may begin or end with, in any normal form."""
    forms = {character: character if character.isascii() else unicodedata.normalize('NFKC', character) for character in set(text)}
    dangerous = [character for character, form in forms.items() if not self._edges.isdisjoint(form)]
    return text.translate({ord(character): _HARMLESS for character in dangerous})

  def _of_control(self, ids: Sequence[int]) -> list[int]:
    return [i for i in ids if i in self._control_ids]


def as_messages(text: Any, role: str) -> list[Mapping[str, Any]]:
  """Return a string as one message of `role`, or messages unchanged."""
  return [{'role': role, 'content': text}] if isinstance(text, str) else list(text)


def _map_texts(value: Any, change: Callable[[str], str], keep: tuple[str, ...] = ()) -> Any:
  """Return a message with every string in it changed, at any depth, except for the values of the keys `keep`."""
  if isinstance(value, str):
    return change(value)
  if isinstance(value, Mapping):
    return {key: item if key in keep else _map_texts(item, change, keep) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_map_texts(item, change, keep) for item in value]
  return value
