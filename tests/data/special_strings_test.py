"""Strings that are one id each, and their removal."""

from __future__ import annotations

from polar_jax.data.special_strings import SpecialStrings


def test_only_text_between_the_strings_is_tokenized():
  strings = SpecialStrings({'<a>': 7, '<b>': 8, '': 9})
  assert strings.ids == {'<a>': 7, '<b>': 8}
  assert strings.encode('<a>xy<b><a>', lambda part: [-len(part)]) == [7, -2, 8, 7]  # nothing for the empty parts
  assert strings.encode('', lambda part: [-len(part)]) == [0]  # a whole text, if empty, is
  assert strings.split('x<a>y<b>') == ['x', '<a>', 'y', '<b>', '']
  assert strings.occur_in('x<b>') and not strings.occur_in('<a<b')


def test_without_strings_every_text_is_plain():
  none = SpecialStrings({'': 3})
  assert none.remove('<a>') == '<a>' and none.split('<a>') == ['<a>'] and not none.occur_in('<a>')
  assert none.encode('ab', lambda part: part.encode()) == [97, 98]


def test_removal_is_of_the_longest_string_first():
  strings = SpecialStrings({'<a>': 1, '<a>>': 2, 'x<a>': 3})
  assert strings.remove('1<a>>2') == '12' and strings.remove('1x<a>2') == '12' and strings.remove('1<a>2') == '12'
  assert strings.remove('1<<a>a>2') == '12' and strings.remove('1<x<a>a>2') == '12'
