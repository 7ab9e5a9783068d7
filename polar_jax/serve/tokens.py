"""What the model reads, token by token, for the endpoint /template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polar_jax.data.template import Template
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.serve.requests import Limits, Parts, RequestError, parse_score
from polar_jax.types import UserError

_MOST = 64  # sequences of a request: their description is a hundred times as large as their rewards
_UNREADABLE = '\ufffd'
_LONGEST_CHARACTER = 8  # tokens that may spell one character together


def describe(body: Any, limits: Limits, template: Template) -> dict[str, Any]:
  """Return the tokens of the sequences that /score would score, given the body of a request to it.

  Args:
    body: of /score, with a single group.
    limits: of the request.
    template: of the model.

  Returns:
    {"sequences": [{"tokens": [{"id", "text", "part"}, ...], "truncated": {"prompt", "responses"}}, ...]}. A part is 'context', up to
    the separator, 'own', or 'control' for the tokens of the template. A token that ends amid a character has the text '', and the token
    that completes it has the character.

  Raises:
    RequestError: the body is wrong, or asks for too many sequences.
  """
  if isinstance(body, list):
    raise RequestError('the body must be an object, not a list')
  (source,) = parse_score(body, limits, template.config.use_reference, '', False).sources
  assert isinstance(source, Parts)
  if source.count > _MOST:
    raise RequestError(f'outputs has {source.count} items; /template takes at most {_MOST}', 'outputs', 413, 'too_large')
  try:
    encoded = template.encode_with_truncation(source.prompt, source.reference, source.candidates, source.wrapper, alone=True)
  except UserError as error:
    raise RequestError(str(error)) from error
  sequences = [{'tokens': _tokens(template, ids), 'truncated': truncated._asdict()} for ids, truncated in encoded]
  return {'sequences': sequences}


def _tokens(template: Template, ids: Sequence[int]) -> list[dict[str, Any]]:
  names = {i: string for string, i in template.tokenizer.control.items()}
  if template.separator_id is not None:
    names[template.separator_id] = template.config.separator
  if template.reward_token_id is not None:
    names[template.reward_token_id] = template.config.reward_token
  texts = token_texts(template.tokenizer, ids, names)
  part, out = 'context', []
  if template.separator_id not in ids[:-1]:
    part = 'own'
  for i, text in zip(ids, texts, strict=True):
    out.append({'id': i, 'text': text, 'part': 'control' if i in names else part})
    if i == template.separator_id:
      part = 'own'
  return out


def token_texts(tokenizer: Tokenizer, ids: Sequence[int], names: dict[int, str]) -> list[str]:
  """Return the text of each token, so that all of them joined are the text of all tokens.

  Args:
    tokenizer: that made the ids.
    ids: of the tokens.
    names: texts of control tokens.
  """
  out: list[str] = []
  before = first = 0  # the last whole text begins at `before`, the text that is not complete at `first`
  for n, i in enumerate(ids):
    if i in names:
      out.append(names[i])
      before = first = n + 1
      continue
    # With the text before it, because some tokenizers drop a space at the beginning.
    known, text = tokenizer.decode(ids[before:first]), tokenizer.decode(ids[before : n + 1])
    text = text[len(known) :] if text.startswith(known) else tokenizer.decode(ids[first : n + 1])
    if text.endswith(_UNREADABLE) and n + 1 - first < _LONGEST_CHARACTER and n + 1 < len(ids) and ids[n + 1] not in names:
      out.append('')
      continue
    out.append(text)
    before, first = first, n + 1
  return out
