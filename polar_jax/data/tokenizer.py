"""Tokenizers with one small interface: bytes, a tokenizer.json, a SentencePiece model.

Special strings inside a text become their single ids everywhere, because the official servers tokenize a whole template as text and
rely on it (`<|reward|>`, `[UNUSED_TOKEN_130]`); `control` lists those that the text of a user must not contain. No tokenizer adds an EOS.
On request a tokenizer adds what the model's own adds before a text: that it has a BOS does not mean that it adds one.
"""

from __future__ import annotations

import abc
import importlib
import json
import pathlib
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from polar_jax.config import TokenizerConfig
from polar_jax.data.special_strings import SpecialStrings
from polar_jax.data.special_tokens import NAMES, SpecialTokens, TokenizerError, read_json, read_special_tokens
from polar_jax.data.spelling import Speller, byte_alphabet, speller

PAD, BOS, EOS, SEPARATOR, REWARD = '<pad>', '<s>', '</s>', '<|reward|>', '[UNUSED_TOKEN_130]'
UNK = '<unk>'
SPECIAL_TOKENS = (PAD, BOS, EOS, SEPARATOR, REWARD)  # of the tokenizers of this package: bytes, and the BPE that a run trains


@runtime_checkable
class Tokenizer(Protocol):
  """Text to token ids and back. Implementations are thread-safe and can be pickled."""

  @property
  def vocab_size(self) -> int:
    """One more than the largest id."""

  @property
  def bos_id(self) -> int | None:
    """The beginning-of-sequence id; None: the tokenizer has none (Qwen)."""

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    """The ids that `add_bos` puts before a text, as the model's own tokenizer does: the BOS, or none even if the tokenizer has a BOS."""

  @property
  def eos_id(self) -> int | None:
    """The end-of-sequence id; None: the tokenizer has none."""

  @property
  def pad_id(self) -> int | None:
    """The padding id; None: the tokenizer has none."""

  @property
  def unk_id(self) -> int | None:
    """The id of unknown text; None: the tokenizer has none."""

  @property
  def control(self) -> Mapping[str, int]:
    """The ids of control tokens by their strings: those that decoding with `skip_special` drops."""

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Convert a text to token ids, after `prefix_ids` if `add_bos`.

    Raises:
      UserError: the tokenizer has no token for a character, not even an unknown token.
    """

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    """Convert several texts to token ids."""

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Convert token ids to a text. Ids that do not form valid UTF-8 become U+FFFD; `skip_special` drops special tokens."""

  def is_exact(self, text: str) -> bool:
    """Return True only if decode(encode(text)) is certain to be `text`, with at most as many tokens as UTF-8 bytes."""

  def special_id(self, token: str) -> int | None:
    """Return the id that the string `token` always becomes inside a text; None if it is not a single special or user-defined token."""


class ByteTokenizer:
  """UTF-8 bytes 0..255, then `SPECIAL_TOKENS` from 256 on."""

  vocab_size = 256 + len(SPECIAL_TOKENS)
  pad_id, bos_id, eos_id = 256, 257, 258
  prefix_ids = (bos_id,)
  unk_id = None

  def __init__(self) -> None:
    self._specials = SpecialStrings({token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})

  @property
  def control(self) -> Mapping[str, int]:
    return self._specials.ids

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Convert a text to token ids."""
    ids = self._specials.encode(text, lambda part: part.encode('utf-8'))
    return [self.bos_id, *ids] if add_bos else ids

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    """Convert several texts to token ids."""
    return [self.encode(text, add_bos) for text in texts]

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Convert token ids to a text."""
    if skip_special:
      return bytes(i for i in ids if i < 256).decode('utf-8', errors='replace')
    return b''.join(bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids).decode('utf-8', errors='replace')

  def is_exact(self, text: str) -> bool:
    """Return whether encoding and decoding surely give the same text."""
    return not self._specials.occur_in(text)

  def special_id(self, token: str) -> int | None:
    """Return the id of a special token; None if there is none."""
    return self._specials.ids.get(token)


class _FileTokenizer(abc.ABC):
  """A tokenizer that reads its file on first use, so that it is pickled as a path."""

  def __init__(self, path: str | pathlib.Path):
    self.path = pathlib.Path(path)
    if not self.path.is_file():
      raise TokenizerError(f'{self.path}: no such tokenizer file')
    self._lock = threading.Lock()
    self._loaded: Any = None
    self._warned = False  # of unknown text

  def __reduce__(self) -> tuple:
    return type(self), (self.path,)

  @abc.abstractmethod
  def _load(self) -> Any:
    """Read the file into an object with `specials`, `ids` (of 'bos', 'eos', 'pad', 'unk'), `prefix` and `control`."""

  @property
  def bos_id(self) -> int | None:
    return self._model.ids['bos']

  @property
  def eos_id(self) -> int | None:
    return self._model.ids['eos']

  @property
  def pad_id(self) -> int | None:
    return self._model.ids['pad']

  @property
  def unk_id(self) -> int | None:
    return self._model.ids['unk']

  @property
  def prefix_ids(self) -> tuple[int, ...]:
    return self._model.prefix

  @property
  def control(self) -> Mapping[str, int]:
    return self._model.control

  def encode(self, text: str, add_bos: bool = False) -> list[int]:
    """Convert a text to token ids."""
    ids = self._encode(text)
    if not self._warned and holds_unknown(self, text, ids):
      self._warned = True
      character = next((c for c in text if self.unk_id in self._encode(c)), text[:40])
      warnings.warn(
        f'{self.path} has no token for {character!r} (in {text[:40]!r}), which becomes its unknown token; use another tokenizer if such '
        'text matters. Further unknown text is not reported',
        stacklevel=2,
      )
    return [*self.prefix_ids, *ids] if add_bos else ids

  @abc.abstractmethod
  def _encode(self, text: str) -> list[int]: ...

  def encode_batch(self, texts: Sequence[str], add_bos: bool = False) -> list[list[int]]:
    """Convert several texts to token ids."""
    # The batch call of `tokenizers` uses a thread pool, which costs more than it saves for the few texts of an example, and does not
    # survive a fork.
    return [self.encode(text, add_bos) for text in texts]

  @property
  def _model(self) -> Any:
    if self._loaded is None:
      with self._lock:
        if self._loaded is None:
          try:
            self._loaded = self._load()
          except (ImportError, TokenizerError):
            raise
          except BaseException as error:  # the libraries raise bare Exception and RuntimeError, and a panic of Rust is not even that
            if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
              raise
            reason = (str(error).splitlines() or [repr(error)])[0][:160]
            raise TokenizerError(f'{self.path}: not a readable tokenizer file: {reason}; download it again') from error
    return self._loaded


def holds_unknown(tokenizer: Tokenizer | _FileTokenizer, text: str, ids: Sequence[int]) -> bool:
  """Return whether `ids`, those of `text`, have the unknown token for text that the tokenizer cannot spell, and not for its own string."""
  unknown = tokenizer.unk_id
  if unknown is None or unknown not in ids:
    return False
  spelled = sum(text.count(string) for string, i in tokenizer.control.items() if i == unknown)
  return ids.count(unknown) > spelled


class _Bpe(NamedTuple):
  model: Any
  specials: SpecialStrings
  ids: Mapping[str, int | None]
  size: int
  prefix: tuple[int, ...]
  control: Mapping[str, int]
  alphabet: bytes | None  # the result of byte_alphabet
  speller: Speller | None


class BpeTokenizer(_FileTokenizer):
  """A tokenizer.json of the `tokenizers` package.

  The file does not define which token is BOS; the files next to it do (special_tokens.py). Without them it is the token that the file's
  post-processor prepends, or else `<s>`; the others default to `</s>`, `<pad>` and `<unk>`. Whether BOS is added is decided by the
  post-processor alone, as in transformers 5.
  """

  def _load(self) -> _Bpe:
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(self.path))
    model.no_truncation()  # truncation or padding in the file would silently change lengths
    model.no_padding()
    special = read_special_tokens(self.path.parent)
    self._add_missing(model, special)
    spec = json.loads(model.to_str())
    added = {token.content: i for i, token in model.get_added_tokens_decoder().items()}
    names = {i: token for token, i in added.items()}
    leading = [names[i] for i in prefix_of(spec) if i in names]
    defaults = {'bos': leading[0] if leading else BOS, 'eos': EOS, 'pad': PAD, 'unk': spec['model'].get('unk_token') or UNK}
    ids = {}
    for name in NAMES:
      token = special.named[name] if name in special.named else defaults[name]
      ids[name] = None if token is None else added.get(token)
    size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    control = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    return _Bpe(model, SpecialStrings(added), ids, size, prefix_of(spec), control, byte_alphabet(spec), speller(model, spec))

  def _add_missing(self, model: Any, special: SpecialTokens) -> None:
    """Add the tokens that are defined only in the files next to tokenizer.json, as the Hugging Face tokenizers do.

    A named token without an id that is not in the vocabulary either stays unknown, because a new id would exceed the model's embedding.
    """
    import tokenizers

    known = {token.content for token in model.get_added_tokens_decoder().values()}
    for token in [*special.named.values(), *special.marked]:
      if token is not None and token not in known and token not in special.added and model.token_to_id(token) is not None:
        model.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
    for token, (i, is_special, flags) in special.added.items():
      if token in known:
        continue
      model.add_tokens([tokenizers.AddedToken(token, special=is_special, **{'normalized': not is_special, **flags})])
      if model.token_to_id(token) != i:
        raise TokenizerError(
          f'{self.path} lacks the token {token!r}, which has the id {i} in a file next to it but would get the id '
          f'{model.token_to_id(token)}; add it to the added_tokens of tokenizer.json'
        )

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return self._model.size

  def _encode(self, text: str) -> list[int]:
    model = self._model
    missing = None
    if model.alphabet is not None:
      if unknown := text.encode('utf-8').translate(None, model.alphabet):
        missing = next(c for c in text if any(b in unknown for b in c.encode('utf-8')))
    elif model.speller is not None:
      missing = model.speller.missing(text)
    if missing is not None:
      raise TokenizerError(
        f'{self.path} has no token for {missing[:40]!r} (in {text[:40]!r}...), because it was trained on other text; use '
        'tokenizer.kind=byte, or another tokenizer file'
      )
    try:
      return model.model.encode(text, add_special_tokens=False).ids  # the file's post-processor might add an EOS too
    except Exception as error:  # the library raises bare Exception, such as for a missing unknown token
      reason = (str(error).splitlines() or [repr(error)])[0][:200]
      raise TokenizerError(
        f'{self.path} cannot tokenize {text[:40]!r}: {reason}; use tokenizer.kind=byte, or another tokenizer file'
      ) from error

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Convert token ids to a text."""
    return self._model.model.decode(ids, skip_special_tokens=skip_special)

  def is_exact(self, text: str) -> bool:
    """Return whether encoding and decoding surely give the same text."""
    alphabet = self._model.alphabet
    known = alphabet is not None and not text.encode('utf-8').translate(None, alphabet)
    return known and not self._model.specials.occur_in(text)

  def special_id(self, token: str) -> int | None:
    """Return the id of a special token; None if there is none."""
    return self._model.specials.ids.get(token)


def prefix_of(spec: Mapping[str, Any]) -> tuple[int, ...]:
  """Return the ids that a tokenizer.json puts before a text.

  A file without a post-processor adds none, except for the tokenizers of this package, which are trained without one.
  """
  if spec['post_processor'] is None:
    own = {token['content']: token['id'] for token in spec['added_tokens']}
    is_own = [own.get(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    return (own[BOS],) if is_own else ()
  return tuple(_leading_ids(spec['post_processor']))


def _leading_ids(step: Mapping[str, Any]) -> Iterator[int]:
  kind = step.get('type')
  if kind == 'Sequence':
    for inner in step['processors']:
      yield from _leading_ids(inner)
  elif kind in ('BertProcessing', 'RobertaProcessing'):
    yield step['cls'][1]
  elif kind == 'TemplateProcessing':
    for piece in step['single']:
      if 'SpecialToken' not in piece:
        return
      yield from step['special_tokens'][piece['SpecialToken']['id']]['ids']


def sentencepiece_proto() -> Any:
  """Return the protobuf class of a SentencePiece file. It is created on import, so type checkers cannot see it."""
  return importlib.import_module('sentencepiece.sentencepiece_model_pb2').ModelProto


class _SentencePiece(NamedTuple):
  model: Any
  specials: SpecialStrings
  user_defined: Mapping[str, int]  # pieces that the model never splits, such as [UNUSED_TOKEN_130]
  ids: Mapping[str, int | None]
  prefix: tuple[int, ...]
  control: Mapping[str, int]
  names: Mapping[int, str]  # string of each special id, for decoding; the model itself decodes user-defined pieces
  dropped: frozenset[int]  # ids that decoding with `skip_special` drops


class SentencePieceTokenizer(_FileTokenizer):
  """A SentencePiece tokenizer.model, with the tokens that the files next to it add, if any (special_tokens.py).

  As in the Hugging Face tokenizers of such models, `<s>` and other control pieces inside a text become their ids, and decoding with
  `skip_special` drops control pieces, the unknown piece and added tokens marked special. BOS is added unless a file says otherwise, as
  the tokenizers of Llama and InternLM do.
  """

  def _load(self) -> _SentencePiece:
    import sentencepiece

    sentencepiece.set_min_log_level(2)  # no warning about the harmless null piece in InternLM2's model
    model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
    proto = sentencepiece_proto().FromString(model.serialized_model_proto())
    user_defined = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == piece.USER_DEFINED}
    control = [i for i in range(model.vocab_size()) if model.IsControl(i) or model.IsUnknown(i)]
    strings = {model.IdToPiece(i): i for i in control}
    dropped = set(control)
    special = read_special_tokens(self.path.parent)
    for token, (i, is_special, flags) in special.added.items():
      if any(flags.get(flag) for flag in ('lstrip', 'rstrip', 'single_word')):
        raise TokenizerError(f'{self.path}: the added token {token!r} sets lstrip, rstrip or single_word; use a tokenizer.json instead')
      strings[token] = i
      if is_special:
        dropped.add(i)
    own = (model.bos_id(), model.eos_id(), model.pad_id(), model.unk_id())
    ids = {name: None if i < 0 else i for name, i in zip(NAMES, own, strict=True)}
    for named in {*special.named.values(), *special.marked}:
      if named is not None and (known := strings.get(named, _piece_id(model, named))) is not None:
        strings[named] = known
        dropped.add(known)
    ids |= {name: None if token is None else strings.get(token) for name, token in special.named.items()}
    names = {i: token for token, i in strings.items()}
    prefix = (ids['bos'],) if ids['bos'] is not None and special.adds_bos is not False else ()
    dropped_strings = {token: i for token, i in {**user_defined, **strings}.items() if i in dropped}
    return _SentencePiece(model, SpecialStrings(strings), user_defined, ids, prefix, dropped_strings, names, frozenset(dropped))

  def added_tokens(self) -> dict[str, tuple[int, bool]]:
    """Return the (id, dropped by decoding with `skip_special`) of each control piece and added token."""
    return {token: (i, i in self._model.dropped) for token, i in self._model.specials.ids.items()}

  @property
  def vocab_size(self) -> int:
    """Number of token ids."""
    return max([self._model.model.vocab_size(), *(i + 1 for i in self._model.specials.ids.values())])

  def _encode(self, text: str) -> list[int]:
    return self._model.specials.encode(text, self._model.model.encode)

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Convert token ids to a text. The ids between two added or control tokens are decoded separately."""
    model, names = self._model.model, self._model.names
    if skip_special:
      ids = [i for i in ids if i not in self._model.dropped]
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
    """Return whether encoding and decoding surely give the same text."""
    return False  # a model may normalize, and even without normalization U+2581 becomes a space

  def special_id(self, token: str) -> int | None:
    """Return the id of a special token; None if there is none."""
    return {**self._model.user_defined, **self._model.specials.ids}.get(token)


def _piece_id(model: Any, token: str) -> int | None:
  i = model.PieceToId(token)  # unknown strings have the id of the unknown piece
  return i if model.IdToPiece(i) == token else None


def open_tokenizer(path: str | pathlib.Path) -> Tokenizer:
  """Open a tokenizer.json, a tokenizer.model, or a folder that contains one: a checkpoint's or an `assets/` folder.

  In a folder with both, tokenizer.json has precedence, because the Hugging Face tokenizers use it.

  Raises:
    TokenizerError: the file does not exist, its suffix is unknown, or the folder contains neither file.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    file = next((path / name for name in ('tokenizer.json', 'tokenizer.model') if (path / name).is_file()), None)
    if file is None:
      names = sorted(child.name for child in path.iterdir())
      content = ', '.join(names[:20]) + (f' and {len(names) - 20} more' if len(names) > 20 else '') or 'nothing'
      raise TokenizerError(f'{path} contains neither a tokenizer.json nor a tokenizer.model, but: {content}')
    path = file
  if path.suffix not in ('.json', '.model'):
    raise TokenizerError(f'{path}: unknown suffix {path.suffix!r}; use a tokenizer.json, a tokenizer.model or a folder with one')
  return BpeTokenizer(path) if path.suffix == '.json' else SentencePieceTokenizer(path)


def stop_ids(folder: str | pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Return the ids that end a generated text: from generation_config.json in `folder`, else its config.json, else the tokenizer's EOS.

  Raises:
    TokenizerError: a file has something other than an id or a list of ids.
  """
  for name in ('generation_config.json', 'config.json'):
    path = pathlib.Path(folder) / name
    value = read_json(path).get('eos_token_id')
    if value is None:
      continue
    ids = value if isinstance(value, list) else [value]
    if any(type(i) is not int for i in ids):
      raise TokenizerError(f'{path}: eos_token_id must be an id or a list of ids, not {json.dumps(value)[:60]}')
    if ids := [i for i in ids if i >= 0]:  # GGUF and llama2.c write -1 for none
      return tuple(dict.fromkeys(ids))
  return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def load_tokenizer(config: TokenizerConfig, trained_path: pathlib.Path | None = None) -> Tokenizer:
  """Open the tokenizer that `config` names.

  Kind 'checkpoint' is not handled here: callers that have the checkpoint call `open_tokenizer` with its folder.

  Args:
    config: the kind, and the path for kind 'file'.
    trained_path: the tokenizer.json that the synthesize stage wrote, for kind 'trained'.

  Raises:
    TokenizerError: the file does not exist, its suffix is unknown, or the kind is 'checkpoint'.
  """
  if config.kind == 'byte':
    return ByteTokenizer()
  if config.kind == 'trained':
    if trained_path is None or not pathlib.Path(trained_path).is_file():
      where = f'{trained_path}: no such file' if trained_path else 'its path is not known'
      raise TokenizerError(f"tokenizer.kind is 'trained', but {where}; run the synthesize stage, or set tokenizer.kind and tokenizer.path")
    return BpeTokenizer(trained_path)
  if config.kind == 'checkpoint':
    raise TokenizerError("tokenizer.kind is 'checkpoint', but this stage has no checkpoint; set tokenizer.kind=file and tokenizer.path")
  if config.path is None:
    raise TokenizerError("tokenizer.path must name a tokenizer.json, a tokenizer.model or a folder with one when tokenizer.kind is 'file'")
  return open_tokenizer(config.path)
