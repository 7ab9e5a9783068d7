"""Requests and replies of other reward servers, which trainers know already. Pure functions; unknown keys are ignored, as those servers do.

    /classify, /encode   SGLang; /classify with `input` in place of `text` answers as vLLM
    /pooling             vLLM or LMDeploy, which cannot be told apart by a request
    /v1/embeddings       SGLang, OpenAI
    /get_reward          OpenRLHF
    /reward              slime, and people

Rewards are always raw, whatever `use_activation` says: a sigmoid would crush their differences.
"""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from polar_jax.serve.rendered import RenderedTexts
from polar_jax.serve.requests import (
  Finished,
  Limits,
  Parts,
  RequestError,
  Result,
  Work,
  check_count,
  check_list,
  check_object,
  check_string,
  check_text,
  check_wrapper,
  join,
  kind_of,
  required,
)
from polar_jax.types import Text


class Facts(NamedTuple):
  """What dialects need to know of the server.

  Attributes:
    limits: of a request.
    model: its name in replies.
    use_reference: whether it reads references.
    pooling: whose reply /pooling gives: 'vllm' or 'lmdeploy'.
    rendered: takes chat templates off.
    reward_token: in which finished texts must end; None: in any.
  """

  limits: Limits
  model: str
  use_reference: bool
  pooling: str
  rendered: RenderedTexts
  reward_token: str | None = None


def classify(body: Any, facts: Facts, request_id: str) -> Work:
  """SGLang's /classify and /encode: `text`, a string or a list of them, or `input_ids`. With `input`, vLLM's /classify."""
  check_object(body, '')
  if body.get('text') is None and body.get('input_ids') is None:
    if body.get('input') is None:
      raise RequestError('text is missing; send the finished texts as text (SGLang), or as input (vLLM)', 'text')
    return _vllm_classify(body, facts, request_id)
  field = 'input_ids' if body.get('text') is None else 'text'
  sources, single = _finished(body[field], field, facts.limits, ids=field == 'input_ids', strings=field == 'text')

  def render(results: Sequence[Result]) -> Any:
    items = [
      {'embedding': [result.reward], 'meta_info': {'id': f'{request_id}-{i}', 'finish_reason': None, 'prompt_tokens': result.tokens}}
      for i, result in enumerate(results)
    ]
    return items[0] if single else items

  return Work(sources, render)


def _vllm_classify(body: dict[str, Any], facts: Facts, request_id: str) -> Work:
  sources, _ = _finished(body['input'], 'input', facts.limits)
  item = lambda i, result: {'index': i, 'label': 'LABEL_0', 'probs': [result.reward], 'num_classes': 1}
  return Work(sources, _listing('classify', item, facts, request_id))


def pooling(body: Any, facts: Facts, request_id: str) -> Work:
  """/pooling of vLLM, with one value for the last token of each text, or of LMDeploy, with a bare number for each text."""
  check_object(body, '')
  _check_encoding(body, ('float',))
  sources, _ = _finished(required(body, 'input'), 'input', facts.limits)
  value: Callable[[float], Any] = (lambda reward: [[reward]]) if facts.pooling == 'vllm' else (lambda reward: reward)
  item = lambda i, result: {'index': i, 'object': 'pooling', 'data': value(result.reward)}
  return Work(sources, _listing('pooling', item, facts, request_id))


def embeddings(body: Any, facts: Facts, request_id: str) -> Work:
  """/v1/embeddings of SGLang and OpenAI: an embedding of one number, the reward."""
  check_object(body, '')
  is_packed = _check_encoding(body, ('float', 'base64')) == 'base64'
  sources, _ = _finished(required(body, 'input'), 'input', facts.limits)

  def item(i: int, result: Result) -> dict[str, Any]:
    value = base64.b64encode(struct.pack('<f', result.reward)).decode() if is_packed else [result.reward]
    return {'object': 'embedding', 'index': i, 'embedding': value}

  return Work(sources, _listing('embd', item, facts, request_id))


def get_reward(body: Any, facts: Facts, _: str) -> Work:
  """OpenRLHF: `query` is prompt and answer, `prompts` the prompt, both rendered for the policy; `labels` are the references."""
  check_object(body, '')
  limits = facts.limits
  columns = {name: check_list(required(body, name), name, limits) for name in ('query', 'prompts')}
  labels = check_list(required(body, 'labels') if facts.use_reference else body.get('labels', columns['query']), 'labels', limits)
  for name, column in (*columns.items(), ('labels', labels)):
    if len(column) != len(columns['query']):
      raise RequestError(f'{name} has {len(column)} items, but query has {len(columns["query"])}', name)
  sources = []
  for i, (query, prompt, label) in enumerate(zip(columns['query'], columns['prompts'], labels, strict=True)):
    fields = (f'prompts[{i}]', f'labels[{i}]', f'query[{i}]')
    reference = _label(label, fields[1], limits, "OpenRLHF sends '' without --data.label_key") if facts.use_reference else ''
    prompt = check_string(prompt, fields[0], limits)
    answer = facts.rendered.answer(check_string(query, fields[2], limits), prompt, fields[2], fields[0])
    sources.append(Parts(facts.rendered.prompt(prompt, fields[0]), reference, [answer], 'sft', fields))

  def render(results: Sequence[Result]) -> Any:
    rewards = [result.reward for result in results]
    return {'rewards': rewards, 'scores': rewards, 'extra_logs': {}}

  return Work(sources, render)


def reward(body: Any, facts: Facts, _: str) -> Work:
  """slime's {prompt, response, label}, or {prompt, reference, output}, or a list of either: a bare number, or a list of them."""
  single = not isinstance(body, list)
  rows = [body] if single else check_list(body, '', facts.limits)
  sources = [_reward_row(row, '' if single else f'[{i}]', facts) for i, row in enumerate(rows)]
  return Work(sources, lambda results: results[0].reward if single else [result.reward for result in results])


def _reward_row(row: Any, field: str, facts: Facts) -> Parts:
  check_object(row, field)
  names = {'output': 'response' if 'output' not in row else 'output', 'reference': 'label' if 'reference' not in row else 'reference'}
  fields = (join(field, 'prompt'), join(field, names['reference']), join(field, names['output']))
  prompt = check_text(required(row, 'prompt', field), fields[0], facts.limits)
  if isinstance(prompt, str):
    prompt = facts.rendered.prompt(prompt, fields[0])
  output = check_text(required(row, names['output'], field), fields[2], facts.limits)
  if isinstance(output, str):
    output = facts.rendered.without_end(output)
  reference: Text = ''
  if facts.use_reference:
    reference = _label(required(row, names['reference'], field), fields[1], facts.limits, 'slime sends the column of --label-key')
  wrapper = check_wrapper(row.get('wrapper', 'sft'), join(field, 'wrapper'))
  return Parts(prompt, reference, [output], wrapper, fields)


def _label(value: Any, field: str, limits: Limits, remark: str) -> Text:
  """Return a label as the reference of a row: an empty one tells that the trainer was given no column of references."""
  if value in ('', None, []):
    raise RequestError(f'{field} is empty, but it must be the reference that the model compares with; {remark}', field)
  return check_text(value, field, limits)


def _finished(value: Any, field: str, limits: Limits, ids: bool = True, strings: bool = True) -> tuple[list[Finished], bool]:
  """Return finished texts or token ids, and whether the value is a single one."""
  what = ' or '.join(['a string or a list of strings'] * strings + ['a list of token ids or of lists of them'] * ids)
  if isinstance(value, str) and strings:
    return [Finished(check_string(value, field, limits), field)], True
  if not isinstance(value, list):
    raise RequestError(f'{field} must be {what}, not {kind_of(value)}', field)
  if ids and value and _is_id(value[0]):
    return [Finished(_ids(value, field), field)], True
  check_count(len(value), field, limits)
  out = []
  for i, item in enumerate(value):
    at = f'{field}[{i}]'
    if isinstance(item, str) and strings:
      out.append(Finished(check_string(item, at, limits), at))
    elif isinstance(item, list) and ids:
      out.append(Finished(_ids(item, at), at))
    else:
      raise RequestError(f'{at} is {kind_of(item)}; {field} must be {what}', at)
  return out, False


def _is_id(value: Any) -> bool:
  """Return whether a number is whole; in JSON, 5.0 is too."""
  return type(value) is int or (type(value) is float and value.is_integer())


def _ids(value: list[Any], field: str) -> list[int]:
  wrong = next((i for i, item in enumerate(value) if not _is_id(item) or not 0 <= item < 2**31), None)
  if wrong is not None:
    raise RequestError(f'{field}[{wrong}] must be a token id', f'{field}[{wrong}]')
  return [int(item) for item in value]


def _check_encoding(body: dict[str, Any], known: Sequence[str]) -> str:
  encoding = 'float' if body.get('encoding_format') is None else body['encoding_format']
  if not isinstance(encoding, str) or encoding not in known:
    raise RequestError(f'encoding_format must be one of: {", ".join(known)}', 'encoding_format')
  return str(encoding)


def _listing(kind: str, item: Callable[[int, Result], dict[str, Any]], facts: Facts, request_id: str) -> Callable[[Sequence[Result]], Any]:
  """Return a renderer of a list object with usage, as OpenAI's interface has them."""

  def render(results: Sequence[Result]) -> Any:
    tokens = sum(result.tokens for result in results)
    return {
      'id': f'{kind}-{request_id}',
      'object': 'list',
      'created': int(time.time()),
      'model': facts.model,
      'data': [item(i, result) for i, result in enumerate(results)],
      'usage': {'prompt_tokens': tokens, 'total_tokens': tokens, 'completion_tokens': 0},
    }

  return render
