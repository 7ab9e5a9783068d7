from __future__ import annotations

import pytest

from polar_jax.data.thinking import strip_thinking


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('<think>a\nb</think>\n\n the\nanswer \n', 'the\nanswer'),
    ('words before <think>a</think>b', 'b'),
    ('<think>a</think>b<think>c</think>d', 'b<think>c</think>d'),
    ('<think>a</think>b</think>c', 'b</think>c'),
    ('<think>a<think>b</think>c', 'c'),
    ('</think>a<think>b</think>c', 'c'),
    ('<think></think>', ''),
    (' <think>unclosed ', ' <think>unclosed '),
    (' opened in the prompt</think>a ', 'a'),
    ('opened in the prompt</think>\n\na</think>b', 'a</think>b'),
    (' plain \n', ' plain \n'),
    ('', ''),
  ],
)
def test_strip_thinking(text, expected):
  assert strip_thinking(text) == expected
