"""The client class of the official repository, for code that was written for it: change the import, and the address if need be.

It differs in three ways. It needs no tokenizer, because the server cuts the texts: their parts are sent, not one finished text. It raises
`RewardRequestError` where the official class returns None. And a setting that only the server can have is refused, not ignored.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from polar_jax.serve.adapters.shared import plain
from polar_jax.serve.client import WRAPPERS, RewardClient, RewardRequestError
from polar_jax.types import UserError

_SEPARATOR, _REWARD_TOKEN = '<|reward|>', '[UNUSED_TOKEN_130]'
_KINDS = ('sglang', 'vllm', 'lmdeploy')
_KEYS = ('prompt', 'reference', 'output', 'wrapper')
# Settings of the official class that the server has instead: its default -> what to set there.
_OF_THE_SERVER = {
  'max_length': (16_384, 'template.max_length'),
  'max_response_length': (4_096, 'template.max_response_length'),
  'response_cut_side': ('right', ''),
}


class EncodedText(str):
  """What the official class makes of an example: the text of the template. It remembers the parts, which is what is sent.

  Attributes:
    parts: prompt, reference, output and wrapper.
  """

  parts: Mapping[str, Any]

  def __new__(cls, parts: Mapping[str, Any]) -> EncodedText:
    prompt, reference, output = (_joined(parts[key], key) for key in ('prompt', 'reference', 'output'))
    newline = '' if parts['wrapper'] == 'pretrain' else '\n'
    self = super().__new__(cls, f'{prompt}{newline}{reference}{_SEPARATOR}{prompt}{newline}{output}{_REWARD_TOKEN}')
    self.parts = parts
    return self

  def __reduce__(self) -> tuple[Any, ...]:
    return EncodedText, (self.parts,)


class RewardModelClient:
  """A client with the calls of the official one: `client(client.encode(examples))`.

  Args:
    path: of the model; its last part is the name that is sent along with finished texts.
    max_length: the server's, which no other value than the official default can change.
    max_response_length: the same.
    response_cut_side: the same.
    server_type: 'sglang', 'vllm' or 'lmdeploy', which all mean this server.
    server_address: HOST:PORT; several with commas between them.
    settings: of `RewardClient`.

  Raises:
    UserError: a setting is the server's, or unknown.
  """

  def __init__(
    self,
    path: str,
    max_length: int = 16_384,
    max_response_length: int = 4_096,
    response_cut_side: str = 'right',
    server_type: str = 'sglang',
    server_address: str = '127.0.0.1:30000',
    **settings: Any,
  ):
    given = {'max_length': max_length, 'max_response_length': max_response_length, 'response_cut_side': response_cut_side}
    for name, (default, setting) in _OF_THE_SERVER.items():
      if given[name] != default:
        remedy = f'start the server with --config.{setting}={given[name]}' if setting else 'it always cuts the end of a response'
        raise UserError(f'{name} is {given[name]!r}, which the server decides, not its client: {remedy}, and leave {name} out')
    if server_type not in _KINDS:
      raise UserError(f'server_type is {server_type!r}; it must be one of: {", ".join(_KINDS)}')
    self._name = pathlib.PurePath(path).name
    self._client = RewardClient(server_address, **settings)

  def close(self) -> None:
    """Close the connections."""
    self._client.close()

  def encode(self, data: Any) -> Any:
    """Return an example as a text, or a list of examples as a list of texts. A string in the list is a finished text and stays.

    Args:
      data: a dict with `prompt`, `reference`, `output` and optionally `wrapper`, or a list of dicts and strings.

    Raises:
      TypeError: a key is missing or unknown, as in the official class.
    """
    if isinstance(data, list):
      return [item if isinstance(item, str) else self.encode(item) for item in data]
    if not isinstance(data, dict):
      raise TypeError(f'an example must be a dict, not {type(data).__name__}')
    for key in data:
      if key not in _KEYS:
        raise TypeError(f'an example has the unknown key {key!r}; it may have: {", ".join(_KEYS)}')
    for key in ('prompt', 'reference', 'output'):
      if key not in data:
        raise TypeError(f'an example has no {key!r}')
    if data.get('wrapper', 'sft') not in WRAPPERS:
      raise TypeError(f'an example has the wrapper {data["wrapper"]!r}; it must be one of: {", ".join(WRAPPERS)}')
    return EncodedText({'wrapper': 'sft', **{key: plain(text) for key, text in data.items()}})

  def __call__(self, data: Sequence[Any]) -> list[float]:
    """Return the rewards of encoded texts, in order.

    Raises:
      UserError: an item is neither a text nor an example.
      RewardRequestError: there are no rewards.
    """
    texts = self.encode([data] if isinstance(data, str | dict) else list(data))
    rewards: dict[int, float] = {}
    for wrapper in WRAPPERS:
      chosen = [i for i, text in enumerate(texts) if isinstance(text, EncodedText) and text.parts['wrapper'] == wrapper]
      prompts, references, outputs = ([texts[i].parts[key] for i in chosen] for key in ('prompt', 'reference', 'output'))
      rewards |= zip(chosen, self._client.score_rows(prompts, references, outputs, wrapper), strict=True)
    finished = [i for i in range(len(texts)) if i not in rewards]
    rewards |= zip(finished, self._score_texts([str(texts[i]) for i in finished]), strict=True)
    return [rewards[i] for i in range(len(texts))]

  def _score_texts(self, texts: list[str]) -> list[float]:
    """Return the rewards of texts that someone else has put into the template."""
    if not texts:
      return []
    reply = self._client.post('/classify', {'model': self._name, 'text': texts})
    try:
      rewards = [float(item['embedding'][0]) for item in reply]
    except (TypeError, KeyError, IndexError, ValueError) as error:
      raise RewardRequestError('the reply of /classify has no embeddings; check that the server is one of polar_jax') from error
    if len(rewards) != len(texts):
      raise RewardRequestError(f'the reply of /classify has {len(rewards)} rewards for {len(texts)} texts')
    return rewards


def _joined(text: Any, name: str) -> str:
  if isinstance(text, str):
    return text
  try:
    return '\n'.join(message['content'] for message in text)
  except (TypeError, KeyError) as error:
    raise TypeError(f'{name} must be a string or a list of messages with a content') from error
