"""The check that a model has an embedding for every token of a tokenizer. Out of range, JAX would read another row without an error."""

from __future__ import annotations

import itertools

from polar_jax.data.special_tokens import TokenizerError
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer

_MAX_NAMED = 3  # tokens in a message
_MAX_DECODED = 10_000  # ids that are looked at to name them: a tokenizer may leave out most of them


class VocabularyError(TokenizerError):
  """A tokenizer or a template has ids for which a model has no embedding. The message names them."""


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, model: str, source: str | None = None) -> None:
  """Check that every id of a tokenizer is below `vocab_size`.

  Args:
    tokenizer: the tokenizer.
    vocab_size: rows of the model's embedding.
    model: name of the model in the message.
    source: name of the tokenizer in the message; None: its path.

  Raises:
    VocabularyError: there are ids beyond the embedding.
  """
  size = tokenizer.vocab_size
  if size <= vocab_size:
    return
  decoded = ((i, tokenizer.decode([i], skip_special=False)) for i in itertools.islice(range(vocab_size, size), _MAX_DECODED))
  named = [f'{text[:40]!r} ({i})' for i, text in itertools.islice(((i, text) for i, text in decoded if text), _MAX_NAMED)]
  source = source or str(getattr(tokenizer, 'path', 'the byte tokenizer'))
  raise VocabularyError(
    f'{model}: its embedding has {vocab_size} rows, but {source} has ids up to {size - 1}, such as {", ".join(named) or size - 1}; '
    'use the tokenizer that belongs to this model, or remove these tokens from its file'
  )


def check_template(template: Template, vocab_size: int, model: str) -> None:
  """Check that the tokenizer of a template, and the ids that its settings name, are below `vocab_size`.

  Raises:
    VocabularyError: an id is beyond the embedding.
  """
  for name, i in (('reward_token_id', template.reward_token_id), ('separator_id', template.separator_id)):
    if getattr(template.config, name) is not None and i is not None and i >= vocab_size:
      raise VocabularyError(f'{model}: its embedding has {vocab_size} rows, but template.{name} is {i}; set it to an id of this model')
  check_tokenizer(template.tokenizer, vocab_size, model)
