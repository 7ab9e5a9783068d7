from __future__ import annotations

import importlib.util

import pytest

from polar_jax.miniature import corpora


def test_load_corpora_four_of_ascii_within_their_limit(library):
  assert [c.name for c in library] == list(corpora.CORPUS_NAMES)
  for corpus in library:
    assert 200_000 < sum(map(len, corpus.documents)) <= corpora.MAX_CHARACTERS
    assert all(d.isascii() and '\t' not in d and d.strip() for d in corpus.documents)
    assert len(set(corpus.documents)) == len(corpus.documents)


def test_part_of_parts_are_disjoint_and_sized(library):
  for corpus in library:
    parts = {p: corpus.part(p) for p in corpora.PARTS}
    assert sum(map(len, parts.values())) == len(corpus.documents)
    assert 0.74 < len(parts['train']) / len(corpus.documents) < 0.86
    assert min(len(parts['prompts']), len(parts['unseen'])) > 0.05 * len(corpus.documents)
  everywhere = {p: {d for c in library for d in c.part(p)} for p in corpora.PARTS}
  assert not everywhere['train'] & everywhere['prompts'] and not everywhere['train'] & everywhere['unseen']


def test_split_source_separates_docstrings_comments_and_code():
  text = '"""Module words."""\n# a note\n# goes on\ndef f(x):\n  """What f\n  does."""\n  return "# not a note"  # aside\n'
  pieces = corpora._split_source(text)
  assert pieces['docstrings'] == ['Module words.', 'What f\ndoes.']
  assert pieces['comments'] == ['a note\ngoes on', 'aside']
  assert pieces['source'] == ['def f(x):\n\n  return "# not a note"']


def test_balanced_no_package_dominates():
  packages = {'big': ['x' * 90 + str(i) for i in range(100)], 'a': ['y' * 90], 'b': ['z' * 90 + str(i) for i in range(100)]}
  kept = corpora._balanced(packages, 2_000, 40)
  big, other = (sum(len(d) for d in kept if d[0] == letter) for letter in 'xz')
  assert sum(map(len, kept)) <= 2_000 and abs(big - other) < 100 and big > 500


def test_load_corpora_names_missing_files(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(corpora.CorpusError, match=r'pydoc_data\.topics'):
    corpora.load_corpora()
