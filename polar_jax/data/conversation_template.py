"""The template of reward models of other families: the conversation of prompt and candidate through the model's chat template.

Such a model is a classifier with one label, read at the last token of the rendered conversation. It knows no reference.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.config import TemplateConfig
from polar_jax.data import vocabulary
from polar_jax.data.chat import ChatTemplate, NoChatTemplateError
from polar_jax.data.conversation import ConversationEncoder, as_messages
from polar_jax.data.template import Encoded, Template, TemplateError, Truncated, check_wrapper, join_messages, numbered
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import Text, Triplet


class ConversationTemplate(Template):
  """Converter of (prompt, candidate) to token ids through the chat template next to the tokenizer.

  A string is one message: of the user as a prompt, of the assistant as a candidate. References are ignored, and nothing is cut.
  """

  reads_roles = True

  def __init__(self, config: TemplateConfig, tokenizer: Tokenizer):
    self.config = dataclasses.replace(config, use_reference=False)
    self.tokenizer = tokenizer
    self.separator_id, self.reward_token_id = None, config.reward_token_id
    path = getattr(tokenizer, 'path', None)
    if path is None:
      raise NoChatTemplateError('template.chat is always, but the byte tokenizer has no chat template; use the tokenizer of the checkpoint')
    self._encoder = ConversationEncoder(ChatTemplate.from_folder(pathlib.Path(path).parent), tokenizer)

  def _sequences(self, prompt: Text, reference: Text, candidates: Mapping[str, Text], wrapper: str, alone: bool = False) -> list[Encoded]:
    """Return the token ids of the conversations that end in each candidate; reference, wrapper and `alone` make no difference.

    Raises:
      UserError: an input is neither a string nor messages with roles, the wrapper is unknown, or a conversation is too long.
    """
    check_wrapper(wrapper)
    ids = [self._conversation(prompt, candidate, name)[1] for name, candidate in candidates.items()]
    return [Encoded(of_candidate, Truncated(False, False)) for of_candidate in ids]

  def encode_finished(self, text: str) -> list[int]:
    """Return the token ids of a text that `candidate_texts` returned, with what the tokenizer puts before a text, once."""
    ids, prefix = self.tokenizer.encode(text), list(self.tokenizer.prefix_ids)
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]

  def candidate_texts(
    self, prompt: Text, reference: Text, candidates: Sequence[Text], wrapper: str = 'sft', alone: bool = False
  ) -> list[str]:
    """Return the texts that `encode_candidates` encodes, without what a server that tokenizes them adds itself, such as a BOS.

    Arguments are those of `encode_candidates`.

    Raises:
      UserError: an input is neither a string nor messages with roles, or the server would add what the chat template does not write.
    """
    check_wrapper(wrapper)
    names = {i: string for string, i in self.tokenizer.control.items()}
    added = ''.join(names.get(i, '') for i in self.tokenizer.prefix_ids)
    texts = [self._conversation(prompt, candidate, name)[0] for name, candidate in numbered(candidates).items()]
    if not all(text.startswith(added) for text in texts):
      raise TemplateError(
        f'a server would put {added!r} before each text, which the chat template does not write; score with the model in this process, or '
        'correct the tokenizer of the served model'
      )
    return [text[len(added) :] + (self.config.reward_token if self.reward_token_id is not None else '') for text in texts]

  def most_tokens(self, triplet: Triplet) -> None:
    """Return None: a chat template may write any number of tokens."""

  def truncated(self, triplet: Triplet) -> Truncated:
    """Return that nothing is cut off; a conversation that is too long is an error."""
    return Truncated(False, False)

  def _conversation(self, prompt: Text, candidate: Text, field: str) -> tuple[str, list[int]]:
    """Return the rendered conversation and its token ids."""
    text, ids = self._encoder.render(
      [*_checked(prompt, 'prompt', 'user'), *_checked(candidate, field, 'assistant')], add_generation_prompt=False
    )
    ids = ids if self.reward_token_id is None else [*ids, self.reward_token_id]
    if len(ids) > self.config.max_length:
      raise TemplateError(
        f'{field}: the conversation has {len(ids)} tokens, more than template.max_length ({self.config.max_length}); raise it, or shorten '
        'the texts: a chat template has no rule for cutting them'
      )
    return text, ids


def _checked(text: Text, field: str, role: str) -> list[Mapping[str, Any]]:
  join_messages(text, field)  # raises for anything but a string or messages
  messages = as_messages(text, role)
  for i, message in enumerate(messages):
    if not isinstance(message.get('role'), str):
      raise TemplateError(f'{field}[{i}] has no role, which the chat template needs; give it one, or set template.chat=never')
  return messages


def open_template(config: TemplateConfig, tokenizer: Tokenizer, vocab_size: int | None = None, model: str = 'the model') -> Template:
  """Return the template that a reward model reads: its chat template if `config.chat` is 'always', else POLAR's.

  ('auto' is decided where the checkpoint is known: see `Pretrained.template`.)

  Args:
    config: settings of the template.
    tokenizer: of the model.
    vocab_size: rows of the model's embedding, below which all ids must be; None: not checked.
    model: name of the model in messages.

  Raises:
    VocabularyError: an id of the tokenizer or of the template is beyond the embedding.
    UserError: the tokenizer has no reward token, or its folder no chat template.
  """
  template = ConversationTemplate(config, tokenizer) if config.chat == 'always' else Template(config, tokenizer)
  if vocab_size is not None:
    vocabulary.check_template(template, vocab_size, model)
  return template
