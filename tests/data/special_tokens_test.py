"""What the small files next to a tokenizer define, and what is refused in them."""

from __future__ import annotations

import json
import re

import pytest

from polar_jax.data.special_tokens import AddedToken, TokenizerError, read_special_tokens

CONFIG, MAP, ADDED = 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'


def read(folder, **files):
  for name, value in files.items():
    (folder / f'{name}.json').write_text(json.dumps(value))
  return read_special_tokens(folder)


def test_without_files_nothing_is_defined(tmp_path):
  assert read(tmp_path) == ({}, frozenset(), {}, None)


def test_the_newer_file_has_precedence_unless_it_has_null(tmp_path):
  found = read(
    tmp_path,
    tokenizer_config={'bos_token': '<a>', 'eos_token': None, 'pad_token': '', 'add_bos_token': False},
    special_tokens_map={'bos_token': '<b>', 'eos_token': {'content': '<e>'}, 'unk_token': None},
  )
  assert found.named == {'bos': '<a>', 'eos': '<e>', 'pad': None, 'unk': None} and found.adds_bos is False
  assert read(tmp_path, tokenizer_config={'add_bos_token': True}).adds_bos is True
  assert read(tmp_path, tokenizer_config={'add_bos_token': None}).adds_bos is None


def test_lists_of_special_tokens_have_several_forms(tmp_path):
  found = read(
    tmp_path,
    tokenizer_config={'additional_special_tokens': ['<x>', {'content': '<y>'}, None, ''], 'extra_special_tokens': {'image': '<i>'}},
    special_tokens_map={'additional_special_tokens': None, 'extra_special_tokens': ['<z>']},
  )
  assert found.marked == {'<x>', '<y>', '<i>', '<z>'} and found.named == {} and found.added == {}


def test_added_tokens_are_in_the_order_of_their_ids(tmp_path):
  decoder = {
    '12': {'content': '<d>', 'special': True, 'lstrip': 1, 'rstrip': False, 'other': True},
    '9': {'content': '<e>', 'special': False},
    '8': '<f>',
    '7': {'content': '<g>'},
  }
  found = read(
    tmp_path,
    added_tokens={'<d>': 3, '<p>': 11, '<s>': 10, '<m>': 0, '<last>': 2**31 - 1},
    tokenizer_config={'eos_token': '<s>', 'additional_special_tokens': ['<m>', '<f>'], 'added_tokens_decoder': decoder},
  )
  assert list(found.added.items()) == [
    ('<m>', AddedToken(0, True, {})),
    ('<g>', AddedToken(7, False, {})),
    ('<f>', AddedToken(8, True, {})),
    ('<e>', AddedToken(9, False, {})),
    ('<s>', AddedToken(10, True, {})),
    ('<p>', AddedToken(11, False, {})),
    ('<d>', AddedToken(12, True, {'lstrip': True, 'rstrip': False})),
    ('<last>', AddedToken(2**31 - 1, False, {})),
  ]
  assert all(type(token.special) is bool for token in found.added.values())


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    (CONFIG, {'additional_special_tokens': 'x'}, 'additional_special_tokens must be a list of tokens, not "x"'),
    (MAP, {'extra_special_tokens': 3}, 'extra_special_tokens must be a list of tokens, not 3'),
    (CONFIG, {'added_tokens_decoder': [1]}, 'added_tokens_decoder must be an object of tokens by id, not [1]'),
    (CONFIG, {'added_tokens_decoder': {'12345678901': '<x>'}}, "added_tokens_decoder '12345678901' must give a token for an id"),
    (CONFIG, {'added_tokens_decoder': {'-1': '<x>'}}, "added_tokens_decoder '-1' must give a token for an id"),
    (CONFIG, {'add_bos_token': 'yes'}, 'add_bos_token must be true, false or null, not "yes"'),
    (CONFIG, {'add_bos_token': 1}, 'add_bos_token must be true, false or null, not 1'),
    (MAP, {'eos_token': [1]}, 'eos_token: a token must be a string, null or an object with a content, not [1]'),
    (CONFIG, {'pad_token': {'content': 1}}, 'pad_token: a token must be'),
    (ADDED, {'<x>': True}, "'<x>' must have an id, not true"),
    (ADDED, {'<x>': -1}, "'<x>' must have an id, not -1"),
    (ADDED, {'<x>': 2**31}, "'<x>' must have an id, not 2147483648"),
  ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, value, message):
  (tmp_path / name).write_text(json.dumps(value))
  with pytest.raises(TokenizerError, match=f'{re.escape(name)}: {re.escape(message)}'):
    read_special_tokens(tmp_path)
