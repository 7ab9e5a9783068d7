"""Loops are cut after three copies, and unfinished texts after their last sentence: against a slow search for all runs, and by example."""

# ruff: noqa: RUF001  (Chinese punctuation)

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_jax.synthesis import cleanup

WORDS = st.sampled_from(
  ['a', 'b', 'cat', '-', '|', '0', 'x' * 25, 'ab' * 12, '--' * 14, 'é', '中', '中国', 'ไทย', '<b>', '"a', '\U00020000']
)
SPACES = st.sampled_from([' ', ' ', ' ', '\n', '\u3000', '  ', '\t\n'])


@st.composite
def samples(draw):
  """Texts of a few words with many repetitions, nested ones included."""
  parts: list[str] = []
  for _ in range(draw(st.integers(0, 4))):
    passage = ''.join(draw(WORDS) + draw(SPACES) for _ in range(draw(st.integers(1, 3))))
    if draw(st.booleans()):
      passage = passage.replace(' ', '')
    if draw(st.booleans()):
      passage = passage * draw(st.integers(1, 4)) + draw(WORDS) + ' '
    parts.append(passage * draw(st.integers(1, 7)))
  text = ''.join(parts)[:180]
  return text[: draw(st.integers(len(text) // 2, len(text)))]


def slow_cuts(units, whole, longest, counts):
  """Yield (elements that stay) of every run that is a loop."""
  for end, at_end in ((len(units), False), (whole, True)):
    for period in range(1, end):
      start = 0
      while start < end - period:
        stop = start
        while stop < end - period and units[stop] == units[stop + period]:
          stop += 1
        run = stop + period - start
        loops = (stop + period == end and run > 3 * period) if at_end else (period <= longest and run >= 4 * period)
        if stop > start and loops and counts(start, period, stop + period):
          yield start + 3 * period
        start = max(stop, start + 1)


def is_unspaced(text):
  return any(c in '中国ไทย\U00020000' for c in text)


def slow_loop(text, ended):
  spans = [match.span() for match in re.finditer(r'\S+', text)]
  words = [text[a:b] for a, b in spans]

  def words_count(start, period, end):
    return any(w[0].isalpha() for w in words[start : start + period]) or spans[end - 1][1] - spans[start][0] >= cleanup.MIN_SYMBOLS

  def characters_count(start, period, end):
    passage = text[start : start + period]
    if is_unspaced(passage) and end - start >= 16:
      return True
    return end - start >= cleanup.MIN_SYMBOLS and not any(c.isspace() for c in passage)

  incomplete = not ended and text[-1:].strip() != ''
  cuts = [spans[cut - 1][1] for cut in slow_cuts(words, len(words) - incomplete, cleanup.MAX_WORDS, words_count)]
  if is_unspaced(text) or any(len(word) >= cleanup.MIN_SYMBOLS for word in words):
    cuts += list(slow_cuts(text, len(text), cleanup.MAX_CHARACTERS, characters_count))
  cut = min(cuts, default=len(text))
  return text[:cut].rstrip() if cut < len(text) else None


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(samples(), st.booleans()), max_size=6))
def test_loops_against_a_search_for_all_runs(batch):
  with pytest.MonkeyPatch.context() as patch:
    for name, value in {'MIN_SYMBOLS': 24, 'MAX_WORDS': 3, 'MAX_CHARACTERS': 4, '_AT_ONCE': 40}.items():
      patch.setattr(cleanup, name, value)
    cleaned = cleanup.clean([text for text, _ in batch], [ended for _, ended in batch])
    loops = [slow_loop(text, ended) for text, ended in batch]
  rest = [text if ended else cleanup.trim_ending(text) for text, ended in batch]
  assert cleaned == [b if a is None else a for a, b in zip(loops, rest, strict=True)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from('abc'), min_size=4, max_size=5), st.integers(2, 7), st.integers(0, 3), st.booleans())
def test_loops_of_nested_words(letters, copies, more, ended):
  text = ' '.join((letters * copies + ['z'] * more) * 3)
  assert cleanup.clean([text], [ended])[0] == (slow_loop(text, ended) or (text if ended else cleanup.trim_ending(text)))


@pytest.mark.parametrize(
  ('text', 'kept'),
  [
    ('well the cat sat the cat sat the cat sat the cat sat and then', 'well the cat sat the cat sat the cat sat'),
    ('the cat sat the cat sat the cat sat and then', None),
    ('I see. I see.\nI see.  I see. I see. Yes', 'I see. I see.\nI see.'),
    ('no no no no', 'no no no'),
    ('结果是我不知道。我不知道。我不知道。我不知道。好', '结果是我不知道。我不知道。我不知道。'),
    ('哈哈哈哈哈哈, 谢谢谢谢', None),
    ('| --- | --- | --- | --- | --- |\n| 0 | 0 | 0 | 0 | 0 |', None),
    ('0 ' * 70, '0 0 0'),
    (f'# {"-" * 100}\n', None),
    (f'so {"!" * 200} or', 'so !!!'),
    ('ha' * 64, 'hahaha'),
    ('ha' * 63, None),
    (f'{"</div>" * 20}\n', None),
  ],
)
def test_what_counts_as_a_loop(text, kept):
  assert cleanup.clean([text], [True]) == [text if kept is None else kept]


def test_long_passages_loop_only_up_to_the_end():
  passage = ' '.join(f'w{i}' for i in range(200)) + ' '
  assert cleanup.clean([passage * 4 + 'end', 'So ' + passage * 3 + passage[:60]], [True, False]) == [
    passage * 4 + 'end',
    ('So ' + passage * 3).rstrip(),
  ]
  characters = ''.join(chr(0x4E00 + i) for i in range(300))
  assert cleanup.clean([characters * 4 + '。', '好' + characters * 3 + characters[:50]], [True, True]) == [
    characters * 4 + '。',
    '好' + characters * 3,
  ]


def test_an_incomplete_last_word_does_not_hide_a_loop():
  text = 'the cat sat the cat sat the cat sat the ca'
  assert cleanup.clean([text, text], [False, True]) == ['the cat sat the cat sat the cat sat', text]
  complete = 'the cat sat ' * 3 + 'the '
  assert cleanup.clean([complete], [False]) == ['the cat sat the cat sat the cat sat']


def test_a_loop_within_a_loop_does_not_hide_it():
  at_end = ('c a b ' + 'z a b c a b c a b c a b ' * 3).split()  # its last 11 words are three copies of a b c and a part, too
  in_the_middle = ('q ' + 'x a b a b a b a ' * 4 + 'b and so on').split()  # a b follows four times in the fourth copy alone
  assert cleanup.clean([' '.join(at_end), ' '.join(in_the_middle)], [True, True]) == [' '.join(at_end[:36]), ' '.join(in_the_middle[:25])]


def test_passages_of_several_words_are_looked_for_in_words():
  long_word = ''.join(map(chr, range(0x400, 0x400 + 130)))  # so that characters are searched too
  assert cleanup.clean([f'{long_word} zab{" -ab" * 40}'], [True]) == [f'{long_word} zab -ab -ab -ab']


@pytest.mark.parametrize(
  ('text', 'kept'),
  [
    ('It rained all day. Then the sun', 'It rained all day.'),
    ('He said: "It rained all day." Then the', 'He said: "It rained all day."'),
    ('**It rained all day!** Then', '**It rained all day!**'),
    ('今天下了一整天的雨。然后太阳', '今天下了一整天的雨。'),
    ('他说：“今天下雨了！”然后太阳', '他说：“今天下雨了！”'),
    ('今天下了一整天的雨吗?是的', '今天下了一整天的雨吗?'),
    ('क्या आज बारिश हुई है। फिर धूप', 'क्या आज बारिश हुई है।'),
    ('هل أمطرت اليوم كله؟ ثم', 'هل أمطرت اليوم كله؟'),
    ('It rained all day.', 'It rained all day.'),
    ('It rained all day. \n\n', 'It rained all day.'),
    ('Short. And then there is a long one with', 'Short. And then there is a long one'),
    ('one line\nanother line\nand a', 'one line\nanother line'),
    ('one line\nanother line\n', 'one line\nanother line'),
    ('and so it goes on', 'and so it goes'),
    ('and so it goes ', 'and so it goes'),
    ('1. The first\n2. The second\n3. Th', '1. The first\n2. The second'),
    ('The book is by J. R. R. Tol', 'The book is by J. R. R.'),
    ('It is 3.14159', 'It is 3.14159'),
    ('Visit www.example.com/a.b for', 'Visit www.example.com/a.b'),
    ('Code. More text here:\n```\nx = 1. y', 'Code. More text here:\n```\nx = 1. y'),
    ('Code:\n```\nx = 1\n```\nIt works. But', 'Code:\n```\nx = 1\n```\nIt works.'),
    ('没有标点的中文句子', '没有标点的中文句子'),
    ('  word', '  word'),
    ('So why?... Bec', 'So why?...'),
    ('a ' + '!' * 40 + ' bcd', 'a ' + '!' * 40),
    ('ab." c d', 'ab."'),
    ('今天下了一整天的雨。OK then', '今天下了一整天的雨。'),
    ('So it has         123. Th en', 'So it has         123.'),
    ('   ', ''),
    ('', ''),
  ],
)
def test_unfinished_texts_are_cut_after_a_sentence_a_line_or_a_word(text, kept):
  assert cleanup.clean([text], [False]) == [kept]
  assert cleanup.clean([text], [True]) == [text]


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet='ab.!。" \n1`中\u2028', max_size=40), st.booleans())
def test_results_are_prefixes_and_no_shorter_than_half(text, ended):
  (kept,) = cleanup.clean([text], [ended])
  assert text.startswith(kept) and (not ended or kept == (slow_loop(text, True) or text))
  if slow_loop(text, ended) is None and not ended:
    assert 2 * len(kept) >= len(text.rstrip())


def test_time_is_linear_in_the_length():
  """Texts of many characters, most of them periodic at several scales, on which a search with backtracking would not end."""
  size = 300_000
  thue_morse = ' '.join('ab'[i.bit_count() % 2] for i in range(size // 4))
  nested = (('a ' * 100 + 'b ') * 100 + 'c ') * 15
  texts = ['a' * size, 'a ' * (size // 2), nested, '.' * size + 'x', '.)' * (size // 2) + 'x', '1. ' * (size // 3), thue_morse, '中' * size]
  started = time.process_time()
  lengths = [len(text) for text in cleanup.clean(texts, [False] * len(texts))]
  assert lengths == [3, 5, 5, 3, 6, 8, len(thue_morse) - 2, 3]
  assert time.process_time() - started < 10  # it takes less than one on an idle machine


def test_texts_without_loops_are_left_alone():
  texts = ['The cat sat on the mat, and the dog sat on the rug.', '今天天气很好。', 'x' * 127, '']
  assert cleanup.clean(texts, [True] * 4) == texts
  assert cleanup.clean([], []) == []
  with pytest.raises(ValueError):
    cleanup.clean(['a'], [])
