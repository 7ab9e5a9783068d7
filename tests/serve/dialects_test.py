"""The requests and replies of other servers, as pure functions, and a reading of the replies as the clients of those servers read them."""

from __future__ import annotations

import base64
import struct

import pytest

from polar_jax.serve import dialects
from polar_jax.serve.rendered import RenderedTexts
from polar_jax.serve.requests import Limits, RequestError, Result

FACTS = dialects.Facts(Limits(8, 100), 'tiny', True, 'vllm', RenderedTexts(None))
RESULTS = [Result(-0.5, 7, False), Result(2.25, 9, True)]


def reply(dialect, body, results=RESULTS, facts=FACTS):
  return dialect(body, facts, 'id').render(results)


def refusal(dialect, body, facts=FACTS):
  with pytest.raises(RequestError) as error:
    dialect(body, facts, 'id')
  return error.value.param, str(error.value)


def test_sglang():
  items = reply(dialects.classify, {'model': 'POLAR-7B', 'text': ['a', 'b']})
  assert [item['embedding'][0] for item in items] == [-0.5, 2.25]
  assert [item['meta_info']['prompt_tokens'] for item in items] == [7, 9]
  assert reply(dialects.classify, {'text': 'a'}, RESULTS[:1])['embedding'] == [-0.5]  # a bare text gets a bare object
  assert reply(dialects.classify, {'text': ['a']}, RESULTS[:1])[0]['embedding'] == [-0.5]
  assert reply(dialects.classify, {'text': []}, []) == []
  assert [s.content for s in dialects.classify({'input_ids': [[1, 2], [3]]}, FACTS, '').sources] == [[1, 2], [3]]
  assert dialects.classify({'input_ids': [1, 2.0]}, FACTS, '').sources[0].content == [1, 2]
  assert reply(dialects.classify, {'input_ids': [1, 2]}, RESULTS[:1])['embedding'] == [-0.5]


def test_vllm():
  data = reply(dialects.pooling, {'input': ['a', 'b'], 'use_activation': True})['data']
  assert [item['data'][-1][0] for item in data] == [-0.5, 2.25] and [item['index'] for item in data] == [0, 1]
  body = reply(dialects.classify, {'model': 'm', 'input': 'a', 'use_activation': False}, RESULTS[:1])
  assert body['data'][-1]['probs'][-1] == -0.5 and body['usage']['prompt_tokens'] == 7


def test_lmdeploy():
  data = reply(dialects.pooling, {'input': ['a', 'b']}, facts=FACTS._replace(pooling='lmdeploy'))['data']
  assert [item['data'] for item in data] == [-0.5, 2.25]


def test_embeddings():
  assert [item['embedding'] for item in reply(dialects.embeddings, {'input': ['a', 'b'], 'model': 'x'})['data']] == [[-0.5], [2.25]]
  packed = reply(dialects.embeddings, {'input': ['a', 'b'], 'encoding_format': 'base64'})['data']  # the default of OpenAI's client
  assert [struct.unpack('<f', base64.b64decode(item['embedding'])) for item in packed] == [(-0.5,), (2.25,)]
  assert refusal(dialects.pooling, {'input': 'a', 'encoding_format': 'base64'})[0] == 'encoding_format'


@pytest.mark.parametrize(
  ('dialect', 'body', 'param'),
  [
    (dialects.classify, {}, 'text'),
    (dialects.classify, [], None),
    (dialects.classify, {'text': ['a', 5]}, 'text[1]'),
    (dialects.classify, {'text': [1, 2]}, 'text[0]'),
    (dialects.classify, {'input_ids': ['a']}, 'input_ids[0]'),
    (dialects.pooling, {'text': 'a'}, 'input'),
    (dialects.pooling, {'input': {}}, 'input'),
    (dialects.pooling, {'input': [1, True]}, 'input[1]'),
    (dialects.pooling, {'input': [[1, -1]]}, 'input[0][1]'),
    (dialects.pooling, {'input': [[1, 2.5]]}, 'input[0][1]'),
    (dialects.pooling, {'input': ['x' * 101]}, 'input[0]'),
    (dialects.pooling, {'input': ['x'] * 9}, 'input'),
    (dialects.embeddings, {'input': ['\ud800']}, 'input[0]'),
    (dialects.embeddings, {'input': [], 'encoding_format': {}}, 'encoding_format'),
    (dialects.get_reward, {'query': ['a'], 'prompts': ['a']}, 'labels'),
    (dialects.get_reward, {'query': ['a'], 'prompts': [], 'labels': ['r']}, 'prompts'),
    (dialects.get_reward, {'query': ['ab', 'cd'], 'prompts': ['a', 'x'], 'labels': ['r', 'r']}, 'query[1]'),
    (dialects.get_reward, {'query': ['ab'], 'prompts': ['a'], 'labels': ['']}, 'labels[0]'),
    (dialects.get_reward, {'query': ['ab'], 'prompts': ['a'], 'labels': [7]}, 'labels[0]'),
    (dialects.reward, {'prompt': 'a', 'response': 'b'}, 'label'),
    (dialects.reward, {'prompt': 'a', 'label': 'b'}, 'response'),
    (dialects.reward, [{'prompt': 'a', 'response': 'b', 'label': None}], '[0].label'),
    (dialects.reward, {'prompt': 'a', 'output': 'b', 'reference': 'c', 'wrapper': 'x'}, 'wrapper'),
  ],
)
def test_refusals_name_the_field(dialect, body, param):
  found, message = refusal(dialect, body)
  assert found == param
  assert param is None or param.removeprefix('[0].') in message


def test_openrlhf():
  work = dialects.get_reward(
    {
      'query': ['<s>Q: 1+1\nA: 2</s>', 'p two<|im_end|>\n'],
      'prompts': ['Q: 1+1\nA:', 'p'],
      'labels': ['2', [{'role': 'x', 'content': 'r'}]],
    },
    FACTS,
    '',
  )
  parts = [(s.prompt, s.reference, s.candidates) for s in work.sources]
  assert parts == [('Q: 1+1\nA:', '2', [' 2']), ('p', [{'content': 'r', 'role': 'x'}], [' two'])]
  assert work.render(RESULTS) == {'rewards': [-0.5, 2.25], 'scores': [-0.5, 2.25], 'extra_logs': {}}
  empty = dialects.get_reward({'query': [], 'prompts': [], 'labels': []}, FACTS, '')
  assert empty.sources == [] and empty.render([])['rewards'] == []


def test_slime():
  body = {'prompt': [{'role': 'user', 'content': 'q'}], 'response': 'a<|im_end|>', 'label': 'r', 'more': 1}
  work = dialects.reward(body, FACTS, '')
  assert (work.sources[0].candidates, work.sources[0].reference, work.render(RESULTS)) == (['a'], 'r', -0.5)
  rows = [{'prompt': 'q', 'output': 'a', 'reference': 'r', 'wrapper': 'pretrain'}] * 2
  work = dialects.reward(rows, FACTS, '')
  assert work.sources[1].wrapper == 'pretrain' and work.render(RESULTS) == [-0.5, 2.25]


def test_a_model_without_references_needs_none():
  facts = FACTS._replace(use_reference=False)
  assert dialects.reward({'prompt': 'q', 'response': 'a'}, facts, '').sources[0].reference == ''
  assert dialects.get_reward({'query': ['qa'], 'prompts': ['q']}, facts, '').sources[0].candidates == ['a']
