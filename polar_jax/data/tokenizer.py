"""Tokenizers behind one small interface: bytes, a tokenizer.json, a SentencePiece model.

Special strings inside a text become their single ids everywhere, because the official servers tokenise a whole template as text
and rely on it (`<|reward|>`, `[UNUSED_TOKEN_130]`). No tokenizer adds an EOS; BOS only when asked.
"""

from __future__ import annotations

import abc
import json
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from polar_jax.config import TokenizerConfig
from polar_jax.types import UserError

PAD, BOS, EOS, SEPARATOR, REWARD = '<pad>', '<s>', '</s>', '<|reward|>', '[UNUSED_TOKEN_130]'
SPECIAL_TOKENS = (PAD, BOS, EOS, SEPARATOR, REWARD)  # of the tokenizers made here (bytes, and the BPE trained on the spot)


class TokenizerError(UserError):
  """A tokenizer file is missing, unreadable or of an unknown kind. The message is one line for the user."""


@runtime_checkable
class Tokenizer(Protocol):
  """Text to token ids and back. Implementations are thread-safe and can be pickled."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""

  @property
  def bos_id(self) -> int | None:
    """None: the tokenizer has no BOS, and `add_bos` adds nothing (Qwen)."""

  @property
  def eos_id(self) -> int | None: ...

  @property
  def pad_id(self) -> int | None: ...

  def encode(self, text: str, add_bos: bool = False) -> list[int]: ...

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]: ...

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Ids that do not form valid UTF-8 become U+FFFD."""

  def is_exact(self, text: str) -> bool:
    """True: decode(encode(text)) is certain to be `text`, and its tokens are at most its UTF-8 bytes. (False promises nothing.)"""

  def special_id(self, token: str) -> int | None:
    """The id that the string `token` always becomes inside a text; None when it is not a single special or user-defined token."""


class SpecialStrings:
  """Strings that become one id wherever they stand in a text; the text between them is tokenised on its own."""

  def __init__(self, ids: Mapping[str, int]):
    self.ids = dict(ids)
    longest_first = sorted(self.ids, key=len, reverse=True)
    self._pattern = re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')') if self.ids else None

  def occur_in(self, text: str) -> bool:
    return self._pattern is not None and self._pattern.search(text) is not None

  def encode(self, text: str, encode_plain: Callable[[str], Iterable[int]]) -> list[int]:
    if self._pattern is None or not self._pattern.search(text):
      return list(encode_plain(text))
    out: list[int] = []
    for i, part in enumerate(self._pattern.split(text)):  # odd parts are the separators themselves
      if i % 2:
        out.append(self.ids[part])
      elif part:
        out.extend(encode_plain(part))
    return out


class ByteTokenizer:
  """UTF-8 bytes 0..255, then `SPECIAL_TOKENS` from 256 on."""

  vocab_size = 256 + len(SPECIAL_TOKENS)
  pad_id, bos_id, eos_id = 256, 257, 258

  def __init__(self) -> None:
    self._specials = SpecialStrings({token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    ids = self._specials.encode(text, lambda part: part.encode('utf-8'))
    return [self.bos_id, *ids] if add_bos else ids

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    return [self.encode(text, add_bos) for text in texts]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    if skip_special:
      return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')
    return b''.join(bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids).decode('utf-8', errors='replace')

  def is_exact(self, text: str) -> bool:
    return not self._specials.occur_in(text)

  def special_id(self, token: str) -> int | None:
    return self._specials.ids.get(token)


class _FileTokenizer(abc.ABC):
  """Reads its file on first use, so that what travels to worker processes is a path."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise TokenizerError(f'{self.path}: no such tokenizer file')
    self._lock = threading.Lock()
    self._loaded: Any = None

  def __reduce__(self) -> tuple:
    return type(self), (self.path,)

  @abc.abstractmethod
  def _load(self) -> Any: ...

  @property
  def _model(self) -> Any:
    if self._loaded is None:
      with self._lock:
        if self._loaded is None:
          try:
            self._loaded = self._load()
          except ImportError:
            raise
          except Exception as error:  # the libraries raise bare Exception and RuntimeError
            raise TokenizerError(f'{self.path}: not a tokenizer file that can be read: {str(error).splitlines()[0]}') from error
    return self._loaded


def _byte_symbols() -> list[str]:
  """The printable character that a byte-level BPE writes for each byte: itself where it is printable, else one past U+0100."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = iter(range(256, 512))
  return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _byte_alphabet(spec: Mapping[str, Any]) -> bytes | None:
  """The bytes that a plain byte-level BPE can write; None for a tokenizer.json that normalises, adds or drops anything.

  A text of these bytes comes back exactly. Of any other the library would drop what it does not know without a word.
  """
  model, steps = spec['model'], spec['pre_tokenizer'] or {}
  steps = steps['pretokenizers'] if steps.get('type') == 'Sequence' else [steps]
  keeps_text = all(step.get('type') == 'Split' and step['behavior'] != 'Removed' for step in steps[:-1])
  bytes_last = steps[-1].get('type') == 'ByteLevel' and not steps[-1]['add_prefix_space']
  plain_bpe = model['type'] == 'BPE' and not any(model.get(key) for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'))
  if spec['normalizer'] is not None or (spec['decoder'] or {}).get('type') != 'ByteLevel' or not (keeps_text and bytes_last and plain_bpe):
    return None
  return bytes(b for b, symbol in enumerate(_byte_symbols()) if symbol in model['vocab'])


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text('utf-8')) if path.is_file() else {}


def _named_token(settings: Mapping[str, Any], name: str) -> str:
  """`bos_token` and its like are a string or {'content': string} in tokenizer_config.json."""
  value = settings.get(name)
  return str(value['content'] if isinstance(value, dict) else value)


class BpeTokenizer(_FileTokenizer):
  """A tokenizer.json of the `tokenizers` package.

  The file does not say which token is BOS: a tokenizer_config.json beside it does, and without one `<s>`, `</s>`, `<pad>` count.
  """

  def _load(self) -> Any:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(self.path))
    model.no_truncation()  # a file may carry a truncation or padding that would silently change lengths
    model.no_padding()
    added = {token.content: i for i, token in model.get_added_tokens_decoder().items()}
    beside = self.path.parent / 'tokenizer_config.json'
    settings = _read_json(beside) if beside.is_file() else {'bos_token': BOS, 'eos_token': EOS, 'pad_token': PAD}
    named = {name: added.get(_named_token(settings, f'{name}_token')) for name in ('bos', 'eos', 'pad')}
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    return model, SpecialStrings(added), named, size, _byte_alphabet(json.loads(model.to_str()))

  @property
  def vocab_size(self) -> int:
    return self._model[3]

  @property
  def bos_id(self) -> int | None:
    return self._model[2]['bos']

  @property
  def eos_id(self) -> int | None:
    return self._model[2]['eos']

  @property
  def pad_id(self) -> int | None:
    return self._model[2]['pad']

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    model, _, named, _, alphabet = self._model
    if alphabet is not None and (unknown := text.encode('utf-8').translate(None, alphabet)):
      character = next(c for c in text if any(b in unknown for b in c.encode('utf-8')))
      raise TokenizerError(
        f'{self.path} has no token for {character!r} (in {text[:40]!r}...): it was trained on other text; use tokenizer.kind=byte, '
        'or another tokenizer file'
      )
    ids = model.encode(text, add_special_tokens=False).ids  # the file's own post-processor might add an EOS too
    return [named['bos'], *ids] if add_bos and named['bos'] is not None else ids

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    # The library's own batch call hands the texts to a thread pool: for a row's few texts that costs more than it saves, and
    # the pool does not survive a fork.
    return [self.encode(text, add_bos) for text in texts]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    return self._model[0].decode(ids, skip_special_tokens=skip_special)

  def is_exact(self, text: str) -> bool:
    alphabet = self._model[4]
    known = alphabet is not None and not text.encode('utf-8').translate(None, alphabet)
    return known and not self._model[1].occur_in(text)

  def special_id(self, token: str) -> int | None:
    return self._model[1].ids.get(token)


class SentencePieceTokenizer(_FileTokenizer):
  """A SentencePiece tokenizer.model, with the added tokens of tokenizer_config.json or added_tokens.json beside it, if any.

  As in the Hugging Face tokenizers of such models, `<s>` and the other control pieces inside a text become their ids, and
  decoding with `skip_special` drops control pieces, the unknown piece and added tokens marked special.
  """

  def _load(self) -> Any:
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # it warns about a harmless null piece in InternLM2's model
    model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
    control = [i for i in range(model.vocab_size()) if model.IsControl(i) or model.IsUnknown(i)]
    strings = {model.IdToPiece(i): i for i in control}
    dropped = set(control)
    settings = _read_json(self.path.parent / 'tokenizer_config.json')
    marked = settings.get('additional_special_tokens') or []
    for token, i in _read_json(self.path.parent / 'added_tokens.json').items():
      strings[token] = int(i)
      if token in marked:
        dropped.add(int(i))
    for i, token in settings.get('added_tokens_decoder', {}).items():
      strings[token['content']] = int(i)
      if token.get('special'):
        dropped.add(int(i))
    pad = strings.get(_named_token(settings, 'pad_token'), model.pad_id())
    names = {i: token for token, i in strings.items()}
    return model, SpecialStrings(strings), names, frozenset(dropped), None if pad < 0 else pad

  @property
  def vocab_size(self) -> int:
    model, specials, *_ = self._model
    return max([model.vocab_size(), *(i + 1 for i in specials.ids.values())])

  @property
  def bos_id(self) -> int | None:
    return None if self._model[0].bos_id() < 0 else self._model[0].bos_id()

  @property
  def eos_id(self) -> int | None:
    return None if self._model[0].eos_id() < 0 else self._model[0].eos_id()

  @property
  def pad_id(self) -> int | None:
    return self._model[4]

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    model, specials, *_ = self._model
    ids = specials.encode(text, model.encode)
    return [model.bos_id(), *ids] if add_bos and model.bos_id() >= 0 else ids

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    return [self.encode(text, add_bos) for text in texts]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """The text between two added or control tokens is decoded on its own."""
    model, _, names, dropped, _ = self._model
    if skip_special:
      ids = [i for i in ids if i not in dropped]
    if not any(i in names for i in ids):
      return model.decode(list(ids))
    out: list[str] = []
    run: list[int] = []
    for i in ids:
      if i in names:
        out += [model.decode(run), names[i]]
        run = []
      else:
        run.append(i)
    return ''.join([*out, model.decode(run)])

  def is_exact(self, text: str) -> bool:
    return False  # a model may normalise, and even the identity turns U+2581 into a space

  def special_id(self, token: str) -> int | None:
    model, specials, *_ = self._model
    if token in specials.ids:
      return specials.ids[token]
    ids = model.encode(token)  # a user-defined piece such as [UNUSED_TOKEN_130] is never split
    return ids[0] if len(ids) == 1 and model.IdToPiece(ids[0]) == token else None


def load_tokenizer(config: TokenizerConfig, trained_path: pathlib.Path | None = None) -> Tokenizer:
  """The tokenizer that `config` names. `trained_path`: the tokenizer.json that the synthesize stage wrote, for kind 'trained'.

  Raises:
    TokenizerError: there is no such file, or its suffix is unknown.
  """
  if config.kind == 'byte':
    return ByteTokenizer()
  if config.kind == 'trained':
    if trained_path is None or not pathlib.Path(trained_path).is_file():
      where = f'{trained_path}: no such file' if trained_path else 'no path to it is known'
      raise TokenizerError(f"tokenizer.kind is 'trained', but {where}; run the synthesize stage, or set tokenizer.kind and tokenizer.path")
    return BpeTokenizer(trained_path)
  if config.path is None:
    raise TokenizerError("tokenizer.path must name a tokenizer.json or tokenizer.model when tokenizer.kind is 'file'")
  suffix = pathlib.Path(config.path).suffix
  if suffix not in ('.json', '.model'):
    raise TokenizerError(f'tokenizer.path {config.path}: unknown suffix {suffix!r}; give a tokenizer.json or a tokenizer.model')
  return BpeTokenizer(config.path) if suffix == '.json' else SentencePieceTokenizer(config.path)
