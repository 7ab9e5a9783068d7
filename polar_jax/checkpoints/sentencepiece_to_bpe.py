"""Translation of a SentencePiece BPE model to a tokenizer.json, which every version of transformers reads without remote code.

SentencePiece merges the adjacent pieces whose merged piece has the highest score, the leftmost first among equals. The `tokenizers`
library merges the pair that comes first in a list of merges. So the list contains every pair of pieces that forms a piece, by descending
score. A list cannot order pairs of equal score by their position in the text. Of those that form the same piece, the one with the
shorter left part comes first, as in SentencePiece wherever a run of one character grew from the left. In the models seen (InternLM2's,
llama2.c's), no two pieces that have the same score can overlap.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from polar_jax.data.special_tokens import TokenizerError
from polar_jax.data.tokenizer import sentencepiece_proto

SPACE = '\u2581'


def translate(path: pathlib.Path) -> dict[str, Any]:
  """Return the tokenizer.json (as a dict) with the ids of the SentencePiece model at `path`.

  Raises:
    TokenizerError: the model is not a BPE, or normalizes or matches in a way that tokenizer.json cannot express exactly.
  """
  model = sentencepiece_proto().FromString(path.read_bytes())
  pieces, spec, normalizer = model.pieces, model.trainer_spec, model.normalizer_spec
  if problem := _inexact(model):
    raise TokenizerError(f'{path} cannot be translated exactly into a tokenizer.json: {problem}')
  vocab = {piece.piece: i for i, piece in enumerate(pieces)}
  if (null := vocab.pop('\0', None)) is not None:
    vocab[f'<unused {null}>'] = null  # SentencePiece encodes U+0000 as a byte although InternLM2's model has a piece for it
  kinds = type(pieces[0])
  steps = [{'type': 'Prepend', 'prepend': SPACE}] if normalizer.add_dummy_prefix else []
  strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if normalizer.add_dummy_prefix else []
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      added_token(piece.piece, i, special=piece.type != kinds.USER_DEFINED)
      for i, piece in enumerate(pieces)
      if piece.type in (kinds.UNKNOWN, kinds.CONTROL, kinds.USER_DEFINED)
    ],
    'normalizer': {'type': 'Sequence', 'normalizers': [*steps, {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE}]},
    'pre_tokenizer': None,
    'post_processor': None,
    'decoder': {
      'type': 'Sequence',
      'decoders': [
        {'type': 'Replace', 'pattern': {'String': SPACE}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
        *strip,
      ],
    },
    'model': {
      'type': 'BPE',
      'dropout': None,
      'unk_token': pieces[spec.unk_id].piece,
      'continuing_subword_prefix': None,
      'end_of_word_suffix': None,
      'fuse_unk': True,
      'byte_fallback': spec.byte_fallback,
      'ignore_merges': False,
      'vocab': vocab,
      'merges': ordered_merges({piece.piece: piece.score for piece in pieces if piece.type == kinds.NORMAL}),
    },
  }


def added_token(token: str, i: int, special: bool) -> dict[str, Any]:
  """Return an entry of a tokenizer.json's `added_tokens`."""
  flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
  return {'id': i, 'content': token, **flags, 'special': special}


def _inexact(model: Any) -> str | None:
  """Return why a tokenizer.json could not give the same ids; None if it can."""
  spec, normalizer, kinds = model.trainer_spec, model.normalizer_spec, {piece.type for piece in model.pieces}
  piece_type = type(model.pieces[0])
  defined = [piece.piece for piece in model.pieces if piece.type == piece_type.USER_DEFINED]
  if spec.model_type != spec.BPE:
    return 'it is not a BPE model'
  if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
    return 'it normalizes characters or spaces'
  if spec.treat_whitespace_as_suffix:
    return 'it marks the ends of words'
  if piece_type.UNUSED in kinds:
    return 'it has unused pieces'
  if defined and normalizer.add_dummy_prefix:
    return 'it has user-defined pieces and adds a space before each text'
  if odd := [piece for piece in defined if SPACE in piece]:
    return f'its user-defined piece {odd[0]!r} contains a space'
  return None


def ordered_merges(scores: Mapping[str, float]) -> list[list[str]]:
  """Return every pair of pieces that forms a piece, in the order described above. `scores`: scores of the pieces that may be merged."""
  pairs = [
    (-score, [piece[:i], piece[i:]])
    for piece, score in scores.items()
    for i in range(1, len(piece))
    if piece[:i] in scores and piece[i:] in scores
  ]
  return [pair for _, pair in sorted(pairs, key=lambda pair: pair[0])]
