"""Tokenizer files of checkpoints: copied from checkpoint to checkpoint, and converted from formats that store them differently.

GGUF files store the tokenizer in their metadata and llama2.c in a small binary file; both are converted to the files of a Hugging Face
folder. `write_for_transformers` completes a folder so that transformers, without remote code, gives the same ids as our tokenizers.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import struct
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from polar_jax.checkpoints import sentencepiece_to_bpe
from polar_jax.data.special_tokens import NAMES, TokenizerError, read_json, read_special_tokens
from polar_jax.data.spelling import byte_symbols
from polar_jax.data.tokenizer import SPECIAL_TOKENS, BpeTokenizer, SentencePieceTokenizer, Tokenizer, prefix_of, sentencepiece_proto

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'merges.txt',
  'chat_template.jinja',
  'generation_config.json',
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types, the same in SentencePiece and GGUF
_GGUF_IDS = {'bos': 'bos_token_id', 'eos': 'eos_token_id', 'pad': 'padding_token_id', 'unk': 'unknown_token_id'}
_KINDS = {str: 'a text', int: 'an integer', float: 'a number', bool: 'true or false', list: 'a list'}
_BOS_ID, _EOS_ID = 1, 2  # in llama2.c's files, as in Llama's

# Pre-tokenization regexes by their GGUF names. None: that of GPT-2, which is built into ByteLevel.
_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {'gpt-2': None, 'smollm': None, 'llama-bpe': _LLAMA3_SPLIT, 'qwen2': _LLAMA3_SPLIT.replace(r'\p{N}{1,3}', r'\p{N}')}


def copy_small_files(source_folder: str | pathlib.Path, target_folder: str | pathlib.Path) -> list[str]:
  """Copy a checkpoint's tokenizer files, config.json and *.py (remote code, which is never run). Returns their names."""
  source, target = pathlib.Path(source_folder), pathlib.Path(target_folder)
  names = [name for name in (*TOKENIZER_FILES, 'config.json') if (source / name).is_file()]
  names += sorted(path.name for path in source.glob('*.py') if path.is_file())
  target.mkdir(parents=True, exist_ok=True)
  for name in names:
    if not (target / name).exists() or not (source / name).samefile(target / name):
      shutil.copyfile(source / name, target / name)
  return names


def from_gguf(metadata: Mapping[str, Any], folder: str | pathlib.Path) -> None:
  """Write the tokenizer of a GGUF file to `folder`: tokenizer.json or tokenizer.model, and tokenizer_config.json.

  Args:
    metadata: the file's key-value pairs as plain Python values.
    folder: created if needed.

  Raises:
    TokenizerError: the kind of tokenizer or its pre-tokenization is unknown, or a list is missing or has the wrong length.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tokens = _gguf_list(metadata, 'tokens', str)
  kind = _gguf_value(metadata, 'model', str, None)
  if kind == 'gpt2':
    _byte_level_bpe(metadata, tokens).save(str(folder / 'tokenizer.json'))
  elif kind == 'llama':
    (folder / 'tokenizer.model').write_bytes(_gguf_sentencepiece(metadata, tokens))
  else:
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.model is {repr(kind)[:60]}; supported: 'gpt2', 'llama'. "
      'Set tokenizer.path to a tokenizer file instead'
    )
  settings: dict[str, Any] = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  for name in NAMES:
    if f'tokenizer.ggml.{_GGUF_IDS[name]}' in metadata:  # other tokens are left to the tokenizer itself
      i = _gguf_id(metadata, name)
      settings[f'{name}_token'] = None if i is None else tokens[i]
  settings['add_bos_token'] = _gguf_adds_bos(metadata) and settings.get('bos_token') is not None
  if template := metadata.get('tokenizer.chat_template'):
    if not isinstance(template, str):
      raise TokenizerError(f"the GGUF file's tokenizer.chat_template is {str(template)[:60]}, expected a text; download it again")
    settings['chat_template'] = template
  _write_json(folder / 'tokenizer_config.json', settings)


def _gguf_value(metadata: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
  """Return a field of the tokenizer, which must be of type `kind`; the default if there is none."""
  value = metadata.get(f'tokenizer.ggml.{name}')
  if value is None:
    return default
  if type(value) is not kind:
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.{name} is {str(value)[:60]}, expected {_KINDS[kind]}; set tokenizer.path to a tokenizer file instead"
    )
  return value


def _gguf_list(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> Sequence[Any]:
  """Return a list of the tokenizer whose elements must be of type `kind`, and `length` in number."""
  values = _gguf_value(metadata, name, list, None)
  if values is None or (length is not None and len(values) != length):
    have = 'is missing' if values is None else f'has {len(values)} entries for {length} tokens'
    raise TokenizerError(f"the GGUF file's tokenizer.ggml.{name} {have}; set tokenizer.path to a tokenizer file instead")
  odd = next((value for value in values if type(value) is not kind), None)
  if odd is not None:
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.{name} has {str(odd)[:60]}, expected {_KINDS[kind]}; set tokenizer.path to a tokenizer file instead"
    )
  return values


def _gguf_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Sequence[int]:
  """Return the type of each token."""
  types = _gguf_list(metadata, 'token_type', int, len(tokens))
  if unknown := set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.token_type has {min(unknown)}, expected 1 to 6; set tokenizer.path to a tokenizer file instead"
    )
  return types


def _gguf_id(metadata: Mapping[str, Any], name: str) -> int | None:
  """Return the id of 'bos', 'eos', 'pad' or 'unk'; None if it is absent or out of range, such as -1."""
  i = _gguf_value(metadata, _GGUF_IDS[name], int, -1)
  return i if 0 <= i < len(_gguf_list(metadata, 'tokens', str)) else None


def _gguf_adds_bos(metadata: Mapping[str, Any]) -> bool:
  """Return whether texts begin with BOS. Without the key, they do for Llama and Llama 3 only."""
  default = metadata.get('tokenizer.ggml.model') == 'llama' or metadata.get('tokenizer.ggml.pre') == 'llama-bpe'
  return _gguf_value(metadata, 'add_bos_token', bool, default)


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
  """Return the `tokenizers.Tokenizer` of a GGUF file of kind 'gpt2'."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

  name = _gguf_value(metadata, 'pre', str, None)
  if name not in _SPLITS:
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.pre is {repr(name)[:60]}; supported: {', '.join(_SPLITS)}. "
      'Set tokenizer.path to the tokenizer.json of the original model instead'
    )
  merges = [tuple(merge.split(' ')) for merge in _gguf_list(metadata, 'merges', str)]
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise TokenizerError("the GGUF file's tokenizer.ggml.tokens names a token twice; set tokenizer.path to a tokenizer file instead")
  if bad := next((merge for merge in merges if len(merge) != 2 or not all(token in vocab for token in (*merge, ''.join(merge)))), None):
    raise TokenizerError(
      f"the GGUF file's tokenizer.ggml.merges has {' '.join(bad)[:60]!r}, which is not a pair of tokens that form another; "
      'set tokenizer.path to a tokenizer file instead'
    )
  # As in Llama 3's own file, a word that is a single token is taken without merging.
  bpe = Tokenizer(models.BPE(vocab, merges, ignore_merges=name == 'llama-bpe'))
  split = _SPLITS[name]
  steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if name == 'smollm' else []
  steps += [] if split is None else [pre_tokenizers.Split(Regex(split), 'isolated')]
  steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
  bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
  bpe.decoder = decoders.ByteLevel()
  if name == 'qwen2':
    bpe.normalizer = normalizers.NFC()  # as in Qwen's own file; GGUF has no key for it
  types = _gguf_types(metadata, tokens)
  special = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
  defined = [AddedToken(token, special=False, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
  bpe.add_tokens(special + defined)
  bos = _gguf_id(metadata, 'bos')
  if _gguf_adds_bos(metadata) and bos is not None:
    bpe.post_processor = processors.TemplateProcessing(single=[tokens[bos], '$A'], special_tokens=[(tokens[bos], bos)])
  return bpe


def _gguf_sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> bytes:
  """Return the tokenizer.model of a GGUF file of kind 'llama'."""
  scores, types = _gguf_list(metadata, 'scores', float, len(tokens)), _gguf_types(metadata, tokens)
  model = _sentencepiece_model(zip(tokens, scores, types, strict=True), _gguf_id(metadata, 'bos'), _gguf_id(metadata, 'eos'))
  model.normalizer_spec.add_dummy_prefix = _gguf_value(metadata, 'add_space_prefix', bool, True)
  model.normalizer_spec.remove_extra_whitespaces = _gguf_value(metadata, 'remove_extra_whitespaces', bool, False)
  model.normalizer_spec.precompiled_charsmap = _gguf_charsmap(metadata)
  return model.SerializeToString()


def _gguf_charsmap(metadata: Mapping[str, Any]) -> bytes:
  """Return the normalization of characters, an array of bytes that some files store as signed."""
  values = [] if metadata.get('tokenizer.ggml.precompiled_charsmap') is None else _gguf_list(metadata, 'precompiled_charsmap', int)
  if values and not -128 <= min(values) <= max(values) <= 255:
    raise TokenizerError(
      "the GGUF file's tokenizer.ggml.precompiled_charsmap is not of bytes; set tokenizer.path to a tokenizer file instead"
    )
  return bytes(value % 256 for value in values)


def _sentencepiece_model(pieces: Iterable[tuple[str, float, int]], bos_id: int | None, eos_id: int | None) -> Any:
  """Return a BPE ModelProto without normalization.

  Args:
    pieces: (string, score, type) of every id.
    bos_id: id of BOS, or None.
    eos_id: id of EOS, or None.

  Raises:
    TokenizerError: there is not exactly one unknown token.
  """
  model = sentencepiece_proto()()
  for piece, score, kind in pieces:
    model.pieces.add(piece=piece, score=score, type=kind)
  kinds = [piece.type for piece in model.pieces]
  if kinds.count(UNKNOWN) != 1:
    raise TokenizerError(f'a SentencePiece tokenizer must have one unknown token, not {kinds.count(UNKNOWN)}')
  spec = model.trainer_spec
  spec.model_type = spec.BPE
  spec.vocab_size = len(kinds)
  spec.byte_fallback = BYTE in kinds
  for name, i in (('unk', kinds.index(UNKNOWN)), ('bos', bos_id), ('eos', eos_id), ('pad', None)):
    setattr(spec, f'{name}_id', -1 if i is None else i)
    if i is not None:
      setattr(spec, f'{name}_piece', model.pieces[i].piece)
  model.normalizer_spec.name = 'identity'
  model.normalizer_spec.remove_extra_whitespaces = False
  return model


def from_llama2c(tok_bin_path: str | pathlib.Path, folder: str | pathlib.Path) -> None:
  """Convert llama2.c's tokenizer file to a tokenizer.model and a tokenizer_config.json in `folder`.

  The file contains an int32, the length of the longest token, and for each token a float32 score, an int32 length and its bytes. Ids
  0, 1, 2 are unknown, BOS and EOS; the next 256 are bytes. Its spaces were SentencePiece's U+2581, so we treat a U+2581 in a text as a
  space, while llama2.c would encode it as bytes.

  Raises:
    TokenizerError: the file is truncated or is not a tokenizer file of llama2.c.
  """
  path, folder = pathlib.Path(tok_bin_path), pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  data, position = path.read_bytes(), 4
  pieces: list[tuple[str, float, int]] = []
  try:
    while position < len(data):
      score, length = struct.unpack_from('<fi', data, position)
      position += 8
      text = struct.unpack_from(f'<{length}s', data, position)[0].decode('utf-8')
      position += length
      i = len(pieces)
      kind = UNKNOWN if i == 0 else CONTROL if i <= _EOS_ID else BYTE if i < _EOS_ID + 257 else NORMAL
      if kind == BYTE and text != f'<0x{i - _EOS_ID - 1:02X}>':
        raise ValueError(f'token {i} is {text[:60]!r}, expected byte {i - _EOS_ID - 1}')
      # llama2.c's exporter writes '\n<s>\n' for '<s>'.
      pieces.append((text.strip('\n') if kind == CONTROL else text.replace(' ', '\u2581'), score, kind))
    if len(pieces) < _EOS_ID + 257:
      raise ValueError(f'only {len(pieces)} tokens')
  except (struct.error, ValueError) as error:
    raise TokenizerError(f'{path}: not a tokenizer file of llama2.c: {str(error)[:160]}; download it again') from error
  model = _sentencepiece_model(pieces, _BOS_ID, _EOS_ID)
  model.normalizer_spec.add_dummy_prefix = True
  (folder / 'tokenizer.model').write_bytes(model.SerializeToString())
  named = {'unk_token': pieces[0][0], 'bos_token': pieces[_BOS_ID][0], 'eos_token': pieces[_EOS_ID][0], 'pad_token': None}
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, 'add_bos_token': True, **named}
  _write_json(folder / 'tokenizer_config.json', settings)


def write_for_transformers(
  tokenizer: Tokenizer, folder: str | pathlib.Path, model_family: str, added: Mapping[str, int] | None = None
) -> list[str]:
  """Complete `folder` so that transformers' AutoTokenizer, without remote code, gives the ids of `tokenizer`, including BOS.

  Existing files are kept, except that `added` is merged into tokenizer.json and tokenizer_config.json. A SentencePiece model is
  translated to a tokenizer.json and also copied, for tools that read it directly. There are two limits:
  - a string whose id is taken by an added token ('[UNUSED_TOKEN_131]' for a separator 92528 of InternLM2) becomes ordinary text;
  - AutoTokenizer assumes Qwen's tokenizer for every qwen2 model; for another one, a warning names the class to use.

  Args:
    tokenizer: one of ours. Other tokenizer files in the same folder are copied with its own.
    folder: the folder of the checkpoint; created if needed.
    model_family: the model_type of the folder's config.json, by which transformers chooses its class.
    added: further special tokens and their ids, such as the template's separator if the config gives its id.

  Returns:
    The names of the files written.

  Raises:
    TokenizerError: the tokenizer cannot be translated exactly; the message says why.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  written = _copy_missing(tokenizer, folder)
  path = folder / 'tokenizer.json'
  spec = json.loads(path.read_text('utf-8')) if path.is_file() else None
  changed = spec is None
  spec = _spec_of(tokenizer) if spec is None else spec
  known = {token['content']: token['id'] for token in spec.setdefault('added_tokens', [])}
  new = {token: i for token, i in (added or {}).items() if known.get(token) != i}
  if new:  # tokens found only in tokenizer_config.json would otherwise get ids after the new ones
    for token, (i, special, _) in read_special_tokens(folder).added.items():
      _add_token(spec, token, i, special)
    for token, i in new.items():
      _add_token(spec, token, i, special=True)
    changed = True
  config_path = folder / 'tokenizer_config.json'
  settings, bare = read_json(config_path), not config_path.is_file()
  spec.setdefault('post_processor', None)
  if (spec['post_processor'] is None and tokenizer.prefix_ids) or prefix_of(spec) != tokenizer.prefix_ids:
    spec['post_processor'] = _put_first(spec, tokenizer.prefix_ids)
    changed = True
  if changed:
    path.write_text(json.dumps(spec, ensure_ascii=False), 'utf-8')
    written.append(path.name)
  if model_family == 'qwen2' and not _is_like_qwen(spec):
    warnings.warn(
      "transformers' AutoTokenizer assumes Qwen's tokenizer for every qwen2 model, which is wrong for this one; "
      'load it with PreTrainedTokenizerFast.from_pretrained',
      stacklevel=2,
    )
  if bare:
    settings = _settings_for(tokenizer, path)
  if new and (bare or 'added_tokens_decoder' in settings):  # some transformers classes look for added tokens only there
    entries = {str(token['id']): token for token in spec['added_tokens'] if token['content'] in new}
    settings['added_tokens_decoder'] = settings.get('added_tokens_decoder', {}) | entries
  if bare or new:
    _write_json(config_path, settings)
    written.append(config_path.name)
  return written


def _settings_for(tokenizer: Tokenizer, path: pathlib.Path) -> dict[str, Any]:
  """Return a tokenizer_config.json for the tokenizer.json at `path`."""
  from tokenizers import Tokenizer as Library

  model = Library.from_file(str(path))
  pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id  # as InternLM2 does; batching needs one
  ids = {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, 'pad': pad, 'unk': tokenizer.unk_id}
  named = {f'{name}_token': None if i is None else model.id_to_token(i) for name, i in ids.items()}
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
  return {**settings, 'add_bos_token': bool(tokenizer.prefix_ids), **named}


def _is_like_qwen(spec: Mapping[str, Any]) -> bool:
  """Return whether a tokenizer.json normalizes and pre-tokenizes like Qwen's."""
  steps = (spec['pre_tokenizer'] or {}).get('pretokenizers') or []
  split = {'Regex': _SPLITS['qwen2']}
  return spec['normalizer'] == {'type': 'NFC'} and [step.get('pattern') for step in steps] == [split, None]


def _copy_missing(tokenizer: Tokenizer, folder: pathlib.Path) -> list[str]:
  """Copy the tokenizer's own file and the other files of its folder that `folder` does not have. Returns their names."""
  if not isinstance(tokenizer, BpeTokenizer | SentencePieceTokenizer):
    return []
  own = 'tokenizer.json' if isinstance(tokenizer, BpeTokenizer) else 'tokenizer.model'
  # If the folder has both kinds, only the one the tokenizer was read from is copied.
  names = [name for name in TOKENIZER_FILES if name not in ('tokenizer.json', 'tokenizer.model', 'generation_config.json')]
  files = {own: tokenizer.path, **{name: tokenizer.path.parent / name for name in names}}
  copied = [name for name, path in files.items() if path.is_file() and not (folder / name).exists()]
  for name in copied:
    shutil.copyfile(files[name], folder / name)
  return copied


def _spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
  """Return the tokenizer.json of a byte or SentencePiece tokenizer."""
  if isinstance(tokenizer, SentencePieceTokenizer):
    spec = sentencepiece_to_bpe.translate(tokenizer.path)
    for token, (i, special) in tokenizer.added_tokens().items():
      _add_token(spec, token, i, special)
  else:
    spec = _byte_spec()
  return spec


def _put_first(spec: Mapping[str, Any], prefix: Sequence[int]) -> dict[str, Any] | None:
  """Return the post-processor that puts `prefix` (usually the BOS) before each text. transformers 5 heeds nothing else."""
  if not prefix:
    return None
  vocab = spec['model']['vocab']
  known = vocab.items() if isinstance(vocab, dict) else ((token, i) for i, (token, _) in enumerate(vocab))
  names = {i: token for token, i in known if i in prefix}
  names |= {token['id']: token['content'] for token in spec['added_tokens'] if token['id'] in prefix}
  special = [{'SpecialToken': {'id': names[i], 'type_id': 0}} for i in prefix]
  first, second = ({'Sequence': {'id': x, 'type_id': 0}} for x in 'AB')
  return {
    'type': 'TemplateProcessing',
    'single': [*special, first],
    'pair': [*special, first, *special, second],
    'special_tokens': {names[i]: {'id': names[i], 'ids': [i], 'tokens': [names[i]]} for i in prefix},
  }


def _add_token(spec: dict[str, Any], token: str, i: int, special: bool) -> None:
  """Add a token to a tokenizer.json. A string that had the same id becomes ordinary text, because ids are unique there.

  Args:
    spec: the tokenizer.json, changed in place.
    token: the string.
    i: its id.
    special: whether decoding skips it.

  Raises:
    TokenizerError: the token has another id already, or its id is that of an ordinary token.
  """
  vocab = spec['model']['vocab']
  if not isinstance(vocab, dict):
    raise TokenizerError(f'{token!r} cannot be added to a tokenizer.json of model {spec["model"].get("type")}; add it by hand, with id {i}')
  known = {**vocab, **{entry['content']: entry['id'] for entry in spec['added_tokens']}}
  if known.get(token, i) != i:
    raise TokenizerError(f'the tokenizer has {token!r} with id {known[token]}; it cannot have id {i} too')
  if any(entry['content'] == token for entry in spec['added_tokens']):
    return
  for displaced in [other for other, j in vocab.items() if j == i and other != token]:
    if all(entry['content'] != displaced for entry in spec['added_tokens']):
      raise TokenizerError(f'the id {i} of {token!r} is that of the ordinary token {displaced!r}; a tokenizer.json cannot have both')
    del vocab[displaced]
  kept = [entry for entry in spec['added_tokens'] if entry['id'] != i]
  spec['added_tokens'] = sorted([*kept, sentencepiece_to_bpe.added_token(token, i, special)], key=lambda entry: entry['id'])
  # The library gives added tokens outside the vocabulary new ids, whatever their own: so the vocabulary must contain all of them.
  vocab.update({entry['content']: entry['id'] for entry in spec['added_tokens']})


def _byte_spec() -> dict[str, Any]:
  """Return the tokenizer.json of the byte tokenizer."""
  step = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
  model = {'type': 'BPE', 'vocab': {symbol: b for b, symbol in enumerate(byte_symbols())}, 'merges': []}
  added = [sentencepiece_to_bpe.added_token(token, 256 + i, special=True) for i, token in enumerate(SPECIAL_TOKENS)]
  return {'version': '1.0', 'added_tokens': added, 'normalizer': None, 'pre_tokenizer': step, 'decoder': step, 'model': model}


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + '\n', 'utf-8')
