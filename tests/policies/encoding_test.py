"""What a model reads of a request: the boundary of a continuation, the cut, windows and stop strings, against slow definitions."""

from __future__ import annotations

import re

import numpy as np
import pytest

from polar_jax.config import ConfigError
from polar_jax.data.tokenizer import BOS, ByteTokenizer, open_tokenizer
from polar_jax.policies.encoding import Encoder, cut, cut_at_stop, windows
from polar_jax.policies.generation import Settings, settings_of
from polar_jax.types import UserError

BYTES = ByteTokenizer()
RNG = np.random.default_rng(0)


def test_a_text_gets_the_bos_of_its_tokenizer_once():
  plain, never, always = Encoder(BYTES), Encoder(BYTES, add_bos=False), Encoder(BYTES, add_bos=True)
  assert plain.encode('ab') == always.encode('ab') == [BYTES.bos_id, 97, 98]
  assert plain.encode(f'{BOS}ab') == always.encode(f'{BOS}ab') == [BYTES.bos_id, 97, 98]
  assert never.encode('ab') == plain.encode('ab', add_special=False) == [97, 98]
  assert plain.prefix_id == BYTES.bos_id


def test_the_prefix_must_be_an_id():
  assert Encoder(BYTES, prefix_id=3).prefix_id == 3
  with pytest.raises(ConfigError, match=r'prefix_token_id is 400; .* less than 261'):
    Encoder(BYTES, prefix_id=400)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation():
  encoder = Encoder(BYTES)
  known, scored = encoder.pair('ab \n', 'cd')
  assert (known, bytes(scored)) == (encoder.encode('ab'), b' \ncd')
  assert Encoder(BYTES, add_bos=False).pair('  ', 'c') == ([BYTES.bos_id], [32, 32, 99])  # nothing is left of the context


def test_a_continuation_without_context_follows_the_prefix():
  assert Encoder(BYTES).pair('', 'ab') == ([BYTES.bos_id], [97, 98])
  assert Encoder(BYTES).pair('', f'{BOS}ab') == ([BYTES.bos_id], [97, 98])
  for context, continuation in (('', ''), ('a', ''), ('', BOS)):
    with pytest.raises(UserError, match='no token of its own'):
      Encoder(BYTES).pair(context, continuation)


@pytest.mark.data
@pytest.mark.parametrize('name', ['qwen3', 'internlm2'])
def test_a_continuation_is_what_the_whole_has_more_than_the_context(data_folder, name):
  tokenizer = open_tokenizer(data_folder / 'tokenizers' / name)
  encoder = Encoder(tokenizer)
  assert encoder.prefix_id == (tokenizer.eos_id if name == 'qwen3' else 1)
  for context, continuation in (('The sky is', ' blue'), ('The sky is ', 'blue'), ('un', 'believable'), ('x = (1', '2)'), ('答案', 'A')):
    known, scored = encoder.pair(context, continuation)
    whole = encoder.encode(context + continuation)
    assert known == encoder.encode(context.rstrip())
    assert scored == whole[len(known) :]
    assert encoder.encode(context.rstrip()) == [*tokenizer.prefix_ids, *tokenizer.encode(context.rstrip())]
  assert encoder.pair('The sky is ', 'blue') == encoder.pair('The sky is', ' blue')


def test_a_long_context_loses_its_beginning():
  for _ in range(200):
    known, scored = RNG.integers(0, 9, RNG.integers(1, 9)).tolist(), RNG.integers(0, 9, RNG.integers(1, 5)).tolist()
    most = int(RNG.integers(len(scored), 12))
    pair = cut(known, scored, most)
    read = (known + scored)[-(most + 1) :]  # all but the last are read
    assert [*pair.context, *pair.scored] == read
    assert list(pair.scored) == scored
    assert pair.truncated == (len(known) + len(scored) > most + 1)
  with pytest.raises(UserError, match='3 tokens, more than max_length=2'):
    cut([1], [1, 2, 3], 2)


@pytest.mark.parametrize('most', [1, 2, 5, 12, 30])
def test_windows_score_every_token_once_with_as_many_before_it_as_there_is_room_for(most):
  for length in range(14):
    ids = list(range(100, 100 + length))
    found = windows(ids, 7, most)
    assert [i for pair in found for i in pair.scored] == ids
    at = 0
    for pair in found:
      read = [*pair.context, *pair.scored]
      assert len(read) - 1 <= most
      assert read == [7, *ids][at + 1 - len(pair.context) : at + 1 + len(pair.scored)]
      at += len(pair.scored)
      assert at == len(ids) or len(pair.scored) == most  # every window but the last is full
    if len(found) > 1:
      assert len(found[-1].context) + len(found[-1].scored) == most + 1


def test_a_text_ends_before_the_first_stop_string():
  letters = 'ab\n'
  for _ in range(300):
    text = ''.join(RNG.choice(list(letters), RNG.integers(0, 9)))
    stops = [''.join(RNG.choice(list(letters), RNG.integers(0, 4))) for _ in range(RNG.integers(0, 3))]
    pattern = '|'.join(re.escape(stop) for stop in stops if stop)
    assert cut_at_stop(text, stops) == (re.split(pattern, text)[0] if pattern else text)


def test_settings_of_requests():
  assert settings_of({}) == Settings((), 256, 0.0, 1.0, None)
  assert settings_of({'until': 'x', 'max_gen_toks': 7, 'max_tokens': 9, 'do_sample': False, 'temperature': 0.7, 'top_p': 0.5}) == Settings(
    ('x',), 7
  )
  assert settings_of({'until': ['a', 'b'], 'temperature': 0.7, 'top_p': 0.5, 'top_k': 4}, 5) == Settings(('a', 'b'), 5, 0.7, 0.5, 4)
  assert settings_of({'do_sample': True, 'top_k': 0}).temperature == 1.0
  assert settings_of({'do_sample': True, 'temperature': 0.0}).temperature == 0.0
  assert settings_of({'num_beams': 1, 'max_new_tokens': '3'}).max_new == 3


@pytest.mark.parametrize(
  ('given', 'named'),
  [
    ({'num_beams': 4}, 'num_beams=4'),
    ({'until': [1]}, r'until is \[1\]'),
    ({'max_gen_toks': 0}, 'at least 1'),
    ({'temperature': -1}, 'temperature'),
    ({'temperature': 'warm'}, 'warm'),
    ({'temperature': 1, 'top_p': 0}, 'top_p'),
  ],
)
def test_settings_that_are_not_supported_are_named(given, named):
  with pytest.raises(UserError, match=named):
    settings_of(given)
