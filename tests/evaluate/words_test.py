from __future__ import annotations

import pytest

from polar_jax.evaluate import words


def test_words_are_lower_case_and_without_punctuation():
  assert words.words_of('The "CAT", sat; état_2 ...') == ['the', 'cat', 'sat', 'état_2']
  assert words.words_of('...') == []


@pytest.mark.parametrize(
  ('text', 'found'),
  [
    ('今天下雨。', ['今', '天', '下', '雨']),
    ('東京タワーへGPT-4と行く', ['東', '京', 'タ', 'ワ', 'ー', 'へ', 'gpt', '4', 'と', '行', 'く']),
    ('กขค 12', ['ก', 'ข', 'ค', '12']),
    ('𠀀𠀁x_1', ['𠀀', '𠀁', 'x_1']),
    ('안녕 세계 Привет état', ['안녕', '세계', 'привет', 'état']),  # spaced scripts
  ],
)
def test_letters_of_scripts_without_spaces_are_words(text, found):
  assert words.words_of(text) == found


def test_ngrams_are_all_runs_of_n_and_none_of_a_shorter_sequence():
  assert words.ngrams('abab', 2) == {('a', 'b'), ('b', 'a')}
  assert words.ngrams([1, 2, 3], 3) == {(1, 2, 3)}
  assert words.ngrams([1, 2], 3) == set()


@pytest.mark.parametrize(
  ('a', 'b', 'index'), [('abc', 'bcde', 2 / 5), ('ab', 'ab', 1.0), ('ab', 'a', 1 / 2), ('ab', 'cd', 0.0), ('', 'a', 0.0), ('', '', 0.0)]
)
def test_jaccard_is_the_shared_part_of_the_union(a, b, index):
  assert words.jaccard(set(a), set(b)) == words.jaccard(set(b), set(a)) == index
