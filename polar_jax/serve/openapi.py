"""The description of the server's interface, OpenAPI 3.1. It says what requests look like; counts and lengths are limited besides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import polar_jax
from polar_jax.serve.dialects import Facts
from polar_jax.serve.requests import SHORTEST_TIMEOUT

Schema = dict[str, Any]

_STRING: Schema = {'type': 'string'}
_INTEGER: Schema = {'type': 'integer'}
_NUMBER: Schema = {'type': 'number'}
_BOOLEAN: Schema = {'type': 'boolean'}
_RAW = 'Rewards are raw, never passed through a sigmoid or softmax, whatever use_activation says.'
_FINISHED = (
  'Each text is the whole text that the model reads, as the client of POLAR builds it: prompt, newline, reference, separator, prompt, '
  'newline, answer, reward token. Special tokens in it are read as such; a BOS is added unless it is there. Without the reward token '
  'at its end it is refused. Unknown keys are ignored. '
)
_ERRORS = {
  400: 'The request is wrong; the message names the field.',
  401: 'The token is missing or wrong.',
  413: 'The body, a text, a sequence or the number of them is too large.',
  415: 'The body is neither JSON nor gzipped JSON.',
  429: 'The server is busy. Retry-After has the seconds to wait.',
  500: 'The server failed.',
  503: 'The server is starting or ending. Retry-After has the seconds to wait.',
  504: 'The deadline of the request passed.',
}


def document(facts: Facts, has_token: bool) -> dict[str, Any]:
  """Return the description.

  Args:
    facts: of the server.
    has_token: whether requests must carry a token.
  """
  limits = facts.limits
  description = (
    f'{_RAW} A request holds at most {limits.sequences} candidates or texts, of at most {limits.characters} characters each; its body is '
    f'JSON, also gzipped. Headers: X-Request-Timeout, the deadline in seconds, at least {SHORTEST_TIMEOUT}; X-Request-Id, which is '
    'repeated in the answer and in the log.'
  )
  scored = _scoring_paths(facts)
  read = {
    '/health': _get('Whether the server is alive.', _object({'status': _STRING}, ['status']), (500, 503)),
    '/ready': _get('Whether requests are accepted.', _object({'status': _STRING}, ['status']), (500, 503)),
    '/metrics': _get('Metrics in the format of Prometheus.', _STRING, (401, 500), 'text/plain'),
    '/openapi.json': _get('This description.', {'type': 'object'}, (401, 500)),
    '/v1/models': _get('The model, in a list.', _object({'object': _STRING, 'data': _list(_ref('Model'))}, ['object', 'data']), (401, 500)),
    '/v1/models/{model}': _get('The model.', _ref('Model'), (401, 404, 500)),
    '/model_info': _get('The model, as SGLang describes it.', _ref('ModelInfo'), (401, 500)),
    '/get_model_info': _get('The former name of /model_info.', _ref('ModelInfo'), (401, 500)),
  }
  read['/v1/models/{model}']['get']['parameters'] = [{'name': 'model', 'in': 'path', 'required': True, 'schema': _STRING}]
  out: dict[str, Any] = {
    'openapi': '3.1.0',
    'info': {'title': f'Rewards of {facts.model}', 'version': polar_jax.__version__, 'description': description},
    'paths': {**read, **scored},
    'components': {'schemas': _components(facts)},
  }
  if has_token:
    out['components']['securitySchemes'] = {'token': {'type': 'http', 'scheme': 'bearer'}}
    out['security'] = [{'token': []}]
    for path in ('/health', '/ready'):
      out['paths'][path]['get']['security'] = []
  return out


def _scoring_paths(facts: Facts) -> dict[str, Any]:
  usage = {'id': _STRING, 'object': _STRING, 'created': _INTEGER, 'model': _STRING, 'usage': {'type': 'object'}}
  listing = lambda item: _object({**usage, 'data': _list(item)}, [*usage, 'data'])
  embedded = _object({'embedding': _list(_NUMBER), 'meta_info': {'type': 'object'}}, ['embedding', 'meta_info'])
  classified = listing(_object({'index': _INTEGER, 'label': _STRING, 'probs': _list(_NUMBER), 'num_classes': _INTEGER}, ['index', 'probs']))
  pooled = {'type': 'array', 'items': _list(_NUMBER)} if facts.pooling == 'vllm' else _NUMBER
  by_text = {'anyOf': [_first_of({'text': _ref('Texts')}), _first_of({'input_ids': _ref('Ids')}, 'text')]}
  by_text['anyOf'].append(_first_of({'input': _ref('Input')}, 'text', 'input_ids'))
  encodings = lambda *known: {'encoding_format': {'enum': [*known, None]}}
  with_encoding = lambda *known: _object({'input': _ref('Input'), **encodings(*known)}, ['input'])
  sglang = _post(f'SGLang. {_FINISHED}{_RAW} With input in place of text: vLLM.', by_text, {'anyOf': [_one_or_list(embedded), classified]})
  pooling_item = _object({'index': _INTEGER, 'object': _STRING, 'data': pooled}, ['index', 'object', 'data'])
  value = {'anyOf': [_list(_NUMBER), _STRING]}
  embedding = _object({'index': _INTEGER, 'object': _STRING, 'embedding': value}, ['index', 'object', 'embedding'])
  columns = {'query': _list(_STRING), 'prompts': _list(_STRING), 'labels': _list(_ref('Label' if facts.use_reference else 'Text'))}
  both = {'rewards': _list(_NUMBER), 'scores': _list(_NUMBER), 'extra_logs': {'type': 'object'}}
  return {
    '/score': {'post': _post('Rewards of candidates.', _one_or_list(_ref('Group')), _one_or_list(_ref('Rewards')))},
    '/template': {'post': _post('The tokens of candidates, as the model reads them.', _ref('Group'), _ref('Tokens'))},
    '/classify': {'post': sglang, 'put': sglang},
    '/encode': {'post': sglang, 'put': sglang},
    '/pooling': {'post': _post(f'{facts.pooling}. {_FINISHED}{_RAW}', with_encoding('float'), listing(pooling_item))},
    '/v1/embeddings': {'post': _post(f'SGLang and OpenAI. {_FINISHED}{_RAW}', with_encoding('float', 'base64'), listing(embedding))},
    '/get_reward': {
      'post': _post(
        'OpenRLHF. The three lists have the same length. The answer is the query without the prompt before it and the end token after it; '
        'labels are references.',
        _object(columns, ['query', 'prompts', *(['labels'] if facts.use_reference else [])]),
        _object(both, list(both)),
      )
    },
    '/reward': {
      'post': _post('slime: a bare number, or a list of them for a list.', _one_or_list(_ref('Row')), _one_or_list(_NUMBER)),
    },
  }


def _components(facts: Facts) -> dict[str, Schema]:
  message = _object({'role': {'type': ['string', 'null']}, 'content': _STRING}, ['content'])
  own_text = {'anyOf': [_STRING, {**_list({**message, 'additionalProperties': False}), 'minItems': 1}]}
  text = {'anyOf': [_STRING, {**_list(message), 'minItems': 1}]}
  finished = _STRING if facts.reward_token is None else {**_STRING, 'pattern': f'{re.escape(facts.reward_token)}$'}
  ids = {**_list({'type': 'integer', 'minimum': 0, 'maximum': 2**31 - 1}), 'minItems': 1}
  own = _ref('OwnText')
  group = {'prompt': own, 'reference': own, 'outputs': _list(own), 'wrapper': {'enum': ['sft', 'pretrain']}}
  needed = ['prompt', *(['reference'] if facts.use_reference else []), 'outputs']
  outputs = [_first_of({'output': _ref('Text')}), _first_of({'response': _ref('Text')}, 'output', absent=True)]
  references = [_first_of({'reference': _ref('Label')}), _first_of({'label': _ref('Label')}, 'reference', absent=True)]
  row_object = _object({'prompt': _ref('Text'), 'wrapper': group['wrapper']}, ['prompt'])
  row_object['allOf'] = [{'anyOf': outputs}, *([{'anyOf': references}] if facts.use_reference else [])]
  rewards = {'rewards': _list(_NUMBER), 'tokens': _list(_INTEGER), 'truncated': _list(_BOOLEAN), 'exact': _BOOLEAN, 'model': _STRING}
  model = {'id': _STRING, 'object': _STRING, 'created': _INTEGER, 'owned_by': _STRING, 'root': _STRING, 'max_model_len': _INTEGER}
  info = {'model_path': _STRING, 'served_model_name': _STRING, 'tokenizer_path': _STRING, 'is_generation': _BOOLEAN}
  more = {'max_length': _INTEGER, 'exact': _BOOLEAN, 'use_reference': _BOOLEAN, 'pooling_dialect': _STRING}
  token = _object({'id': _INTEGER, 'text': _STRING, 'part': {'enum': ['context', 'own', 'control']}}, ['id', 'text', 'part'])
  cut = _object({'prompt': _BOOLEAN, 'responses': _BOOLEAN}, ['prompt', 'responses'])
  sequence = _object({'tokens': _list(token), 'truncated': cut}, ['tokens', 'truncated'])
  error = {'message': _STRING, 'type': _STRING, 'param': {'type': ['string', 'null']}, 'code': _INTEGER}
  return {
    'Text': {**text, 'description': 'A string, or messages, whose contents are joined by newlines.'},
    'OwnText': {**own_text, 'description': 'The same, but messages have no other keys.'},
    'Group': {**_object(group, needed), 'additionalProperties': False},
    'Row': row_object,
    'Tokens': _object({'sequences': _list(sequence)}, ['sequences']),
    'Rewards': _object(rewards, list(rewards)),
    'Label': {'anyOf': [{**_STRING, 'minLength': 1}, text['anyOf'][1]], 'description': 'A reference: a text that is not empty.'},
    'Texts': {'anyOf': [finished, _list(finished)]},
    'Ids': {'anyOf': [ids, _list(ids)]},
    'Input': {'anyOf': [finished, _list(finished), ids, _list(ids)]},
    'Model': _object(model, list(model)),
    'ModelInfo': _object(info | more, list(info | more)),
    'Error': _object({'error': _object(error, list(error))}, ['error']),
  }


def _get(summary: str, schema: Schema, errors: Sequence[int], kind: str = 'application/json') -> dict[str, Any]:
  good = {'description': 'The answer.', 'content': {kind: {'schema': schema}}}
  return {'get': {'summary': summary, 'responses': {'200': good, **_errors(errors)}}}


def _post(summary: str, request: Schema, reply: Schema) -> dict[str, Any]:
  body = {'required': True, 'content': {'application/json': {'schema': request}}}
  good = {'description': 'The rewards, in the order of the request.', 'content': {'application/json': {'schema': reply}}}
  return {
    'description': summary,
    'requestBody': body,
    'responses': {'200': good, **_errors(_ERRORS)},
  }


def _errors(statuses: Sequence[int] | dict[int, str]) -> dict[str, Any]:
  content = {'application/json': {'schema': _ref('Error')}}
  return {str(status): {'description': _ERRORS.get(status, 'There is no such model.'), 'content': content} for status in statuses}


def _ref(name: str) -> Schema:
  return {'$ref': f'#/components/schemas/{name}'}


def _list(item: Schema) -> Schema:
  return {'type': 'array', 'items': item}


def _first_of(properties: dict[str, Schema], *before: str, absent: bool = False) -> Schema:
  """Return an object that is read by these keys, because those that have precedence are missing, or null."""
  out = _object(properties, list(properties))
  if absent:
    return {**out, 'not': {'anyOf': [{'required': [name]} for name in before]}}
  return {**out, 'properties': {**properties, **{name: {'type': 'null'} for name in before}}}


def _one_or_list(item: Schema) -> Schema:
  return {'anyOf': [item, _list(item)]}


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
  return {'type': 'object', 'properties': properties, 'required': required}
