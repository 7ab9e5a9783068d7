"""The endpoint /template, and the texts of tokens."""

from __future__ import annotations

import pytest

from polar_jax.config import TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.serve.requests import Limits, RequestError
from polar_jax.serve.tokens import describe, token_texts

LIMITS = Limits(100, 1_000)


def test_the_tokens_are_those_of_the_template():
  template = Template(TemplateConfig(), ByteTokenizer())
  body = {'prompt': 'p', 'reference': 'r', 'outputs': ['é', 'b']}
  reply = describe(body, LIMITS, template)
  expected = template.encode_candidates('p', 'r', ['é', 'b'], alone=True)
  assert [[token['id'] for token in sequence['tokens']] for sequence in reply['sequences']] == expected
  first = reply['sequences'][0]
  assert [token['text'] for token in first['tokens']] == ['<s>', 'p', '\n', 'r', '<|reward|>', 'p', '\n', '', 'é', '[UNUSED_TOKEN_130]']
  parts = ['control', *['context'] * 3, 'control', *['own'] * 4, 'control']
  assert [token['part'] for token in first['tokens']] == parts
  assert first['truncated'] == {'responses': False, 'prompt': False}
  assert describe(body | {'outputs': []}, LIMITS, template) == {'sequences': []}


def test_what_is_cut_off_is_named():
  template = Template(TemplateConfig(max_length=40, max_response_length=6), ByteTokenizer())
  cut = lambda prompt, output: describe({'prompt': prompt, 'reference': 'r', 'outputs': [output]}, LIMITS, template)['sequences'][0][
    'truncated'
  ]
  assert cut('p', 'o' * 9) == {'responses': True, 'prompt': False}
  assert cut('p' * 99, 'o') == {'responses': False, 'prompt': True}


def test_a_model_without_references_has_no_context():
  template = Template(TemplateConfig(use_reference=False), ByteTokenizer())
  (sequence,) = describe({'prompt': 'p', 'outputs': ['a']}, LIMITS, template)['sequences']
  assert {token['part'] for token in sequence['tokens']} == {'own', 'control'}


@pytest.mark.parametrize(
  ('body', 'expected'),
  [
    ([{'prompt': 'p', 'reference': 'r', 'outputs': ['a']}], 'not a list'),
    ({'prompt': 'p', 'reference': 'r'}, 'outputs is missing'),
    ({'prompt': 'p', 'reference': 'r', 'outputs': ['a'] * 65}, 'outputs has 65 items'),
    ({'prompt': 'p', 'reference': 'r', 'outputs': ['a'], 'x': 1}, 'unknown keys: x'),
  ],
)
def test_the_body_is_that_of_score(body, expected):
  with pytest.raises(RequestError, match=expected):
    describe(body, LIMITS, Template(TemplateConfig(), ByteTokenizer()))


class Words:
  """A tokenizer like SentencePiece: it drops a space at the beginning."""

  def decode(self, ids):
    return ''.join(f' w{i}' for i in ids).lstrip(' ')


def test_spaces_before_tokens_are_kept():
  assert token_texts(Words(), [0, 5, 6, 7, 1, 8, 9], {0: '<s>', 1: '<|reward|>'}) == ['<s>', 'w5', ' w6', ' w7', '<|reward|>', 'w8', ' w9']


def test_bytes_that_form_no_character_are_shown():
  ids = [0xFF, *'a€'.encode(), 0xE2, 0x82]
  texts = token_texts(ByteTokenizer(), ids, {})
  assert texts == ['', '\ufffda', '', '', '€', '', '\ufffd']


@pytest.mark.needs('uvicorn')
def test_the_endpoint(exact_server):
  client = exact_server.client
  reply = client.post('/template', {'prompt': 'p', 'reference': 'r', 'outputs': ['a']})
  assert reply.status == 200 and len(reply.body['sequences'][0]['tokens']) == 9
  refused = client.post('/template', {'prompt': 'p', 'reference': 'r', 'outputs': 'a'})
  assert refused.status == 400 and refused.body['error']['param'] == 'outputs'
