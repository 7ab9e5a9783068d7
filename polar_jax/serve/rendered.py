"""Prompts and answers that a trainer has rendered with the chat template of its policy, turned back into plain text.

A POLAR model reads the contents of messages, joined by newlines, so the template has to come off again. Nothing guesses what a template
may have written: the template of the policy itself renders conversations of marked contents, and a prompt must have the same text around
its own contents. What a template adds on its own, such as a default system prompt, is recognized thereby. Without the template, only
prompts without any sign of one are taken.
"""

from __future__ import annotations

import pathlib
import re

from polar_jax.data.chat import ChatTemplate, ChatTemplateError
from polar_jax.data.special_tokens import read_special_tokens
from polar_jax.serve.requests import RequestError
from polar_jax.types import UserError

# Ends of an answer and paddings, as decoded with special tokens.
_ENDS = (
  *('<|im_end|>', '<|endoftext|>', '<|eot_id|>', '<|end_of_text|>', '<|eom_id|>', '</s>', '<end_of_turn>', '<eos>', '<|end|>'),
  *('<|endofturn|>', '<|return|>', '<\uff5cend\u2581of\u2581sentence\uff5c>', '<pad>', '<|pad|>', '[UNUSED_TOKEN_145]'),
)
_STARTS = ('<s>', '<bos>', '<|begin_of_text|>', '<|startoftext|>', '<\uff5cbegin\u2581of\u2581sentence\uff5c>')
_SIGNS = re.compile(
  r'<\|im_(?:start|user)\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|user\|>|<\|assistant\|>|<\|start\|>|<\|turn>|<\uff5cUser\uff5c>|\[UNUSED_TOKEN_146\]'
)
_MARK = 'polarcontent{}x'
_TURNS = 8  # of the user in a conversation


class RenderedTexts:
  """Takes chat templates off.

  Args:
    folder: of the policy, with its chat template; None: the template is unknown.

  Raises:
    ChatTemplateError: the folder has no usable template.
  """

  def __init__(self, folder: str | pathlib.Path | None):
    self._forms: list[list[str]] = []
    self._ends = list(_ENDS)
    if folder is not None:
      named = read_special_tokens(pathlib.Path(folder)).named
      self._ends += [token for name, token in named.items() if name in ('eos', 'pad') and token]
      self._forms = _forms(ChatTemplate.from_folder(folder))

  def prompt(self, text: str, field: str) -> str:
    """Return the contents of a prompt, joined by newlines.

    Raises:
      RequestError: it is rendered with a template, and not with that of the policy.
    """
    bare = _without_starts(text)
    for form in self._forms:
      contents = _match(bare, form)
      if contents is not None:
        return '\n'.join(contents)
    if sign := _SIGNS.search(text):
      advice = (
        'its text is not of the form that the chat template in serve.policy writes for a conversation that ends with the user'
        if self._forms
        else 'name the folder of the policy with serve.policy, so that its chat template can be taken off'
      )
      raise RequestError(f'{field} is rendered with a chat template ({sign[0]} occurs in it): {advice}', field)
    return bare

  def answer(self, query: str, prompt: str, query_field: str, prompt_field: str) -> str:
    """Return what follows a prompt in a query that begins with it, without the token that ends an answer.

    Raises:
      RequestError: the query does not begin with the prompt.
    """
    bare_query, bare_prompt = _without_starts(query), _without_starts(prompt)
    if not bare_query.startswith(bare_prompt):
      raise RequestError(f'{query_field} does not begin with {prompt_field}, so its answer cannot be cut out', query_field)
    return self.without_end(bare_query[len(bare_prompt) :])

  def without_end(self, answer: str) -> str:
    """Return an answer without the tokens that end it, and without padding. Ordinary text, also white space, is kept."""
    text = answer
    while True:
      end = next((end for end in self._ends if text.endswith(end)), None)
      if end is None:
        # A line break after the end token belongs to the template.
        stripped = text.rstrip('\n')
        if stripped == text or not any(stripped.endswith(end) for end in self._ends):
          return text
        text = stripped
      else:
        text = text[: -len(end)]


def _without_starts(text: str) -> str:
  while start := next((start for start in _STARTS if text.startswith(start)), None):
    text = text[len(start) :]
  return text


def _forms(template: ChatTemplate) -> list[list[str]]:
  """Return the texts between contents for conversations that end with the user, the longest conversation first."""
  forms = []
  for turns in range(_TURNS, 0, -1):
    for system in (False, True):  # a default system prompt is no content
      roles = ['system'] * system + ['user', 'assistant'] * (turns - 1) + ['user']
      messages = [{'role': role, 'content': _MARK.format(i)} for i, role in enumerate(roles)]
      try:
        text = _without_starts(template.render(messages))
      except ChatTemplateError:
        continue  # many templates refuse a system prompt
      form = _between(text, len(roles))
      if form is not None:
        forms.append(form)
  if not forms:
    raise UserError(f'serve.policy: {template.where} does not write the contents of messages as they are; leave serve.policy unset')
  return forms


def _between(text: str, count: int) -> list[str] | None:
  """Return the text before, between and after the marked contents; None if the template drops, repeats or reorders one."""
  out = []
  for i in range(count):
    before, mark, text = text.partition(_MARK.format(i))
    if not mark:
      return None
    out.append(before)
  out.append(text)
  # Two contents with nothing between them cannot be told apart.
  return out if 'polarcontent' not in ''.join(out) and all(out[1:-1]) else None


def _match(text: str, form: list[str]) -> list[str] | None:
  """Return the contents of a text of a form; None if it has another one. Each separator is found at its first place: linear time."""
  if not (text.startswith(form[0]) and text.endswith(form[-1])) or len(text) < len(form[0]) + len(form[-1]):
    return None
  rest = text[len(form[0]) : len(text) - len(form[-1])]
  contents = []
  for separator in form[1:-1]:
    content, found, rest = rest.partition(separator)
    if not found:
      return None
    contents.append(content)
  contents.append(rest)
  return None if any(_SIGNS.search(content) for content in contents) else contents
