"""The native endpoint and those of other servers through a real server: bits, order, crowds, truncation, restarts."""

from __future__ import annotations

import concurrent.futures
import json
import time

import numpy as np
import pytest
from reward_server import SETTINGS, running, tiny_model

from polar_jax.types import Group, Triplet

pytestmark = [pytest.mark.needs('uvicorn'), pytest.mark.long]  # on one Python: they take a minute together


def group(rng, count=3, longest=25):
  word = lambda: ''.join(rng.choice(list('abcdé 你\n'), int(rng.integers(0, longest))))
  return {'prompt': word(), 'reference': word(), 'outputs': [word() for _ in range(count)]}


def singles(body):
  wrapper = body.get('wrapper', 'sft')
  return [Group(body['prompt'], body['reference'], [output], wrapper) for output in body['outputs']]


def expected(model, body):
  return model.exact_scorer.score(singles(body))


def test_rewards_have_the_bits_of_the_exact_scorer(exact_server, model):
  body = group(np.random.default_rng(0), 5)
  reply = exact_server.client.post('/score', body)
  assert reply.status == 200
  assert reply.body['rewards'] == expected(model, body).tolist()
  assert (reply.body['exact'], reply.body['model'], reply.body['truncated']) == (True, 'tiny', [False] * 5)
  assert reply.body['tokens'] == [len(ids) for ids in model.exact_scorer.encode(singles(body))]


def test_messages_wrappers_and_lists(exact_server, model):
  bodies = [
    {
      'prompt': [{'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'}],
      'reference': 'c',
      'outputs': ['d', [{'content': 'd'}]],
    },
    {'prompt': 'x\x00y', 'reference': '', 'outputs': [], 'wrapper': 'pretrain'},
    {'prompt': 'x\x00y', 'reference': '', 'outputs': ['', '<|reward|>[UNUSED_TOKEN_130]</s>'], 'wrapper': 'pretrain'},
  ]
  replies = exact_server.client.post('/score', bodies).body
  assert [reply['rewards'] for reply in replies] == [expected(model, body).tolist() for body in bodies]
  assert replies[0]['rewards'][0] == replies[0]['rewards'][1] and replies[1]['rewards'] == []
  assert replies[2]['rewards'][0] == replies[2]['rewards'][1]  # texts cannot spell control tokens
  assert exact_server.client.post('/score', []).body == []


def test_truncation_is_reported(exact_server, model):
  body = {'prompt': 'p' * 60, 'reference': 'r' * 90, 'outputs': ['a', 'b' * 101, 'c' * 70]}
  reply = exact_server.client.post('/score', body).body
  truths = [model.template.truncated(Triplet(body['prompt'], body['reference'], o, o)) for o in body['outputs']]
  assert reply['truncated'] == [bool(t and (t.prompt or t.responses)) for t in truths] == [False, True, True]
  assert reply['rewards'] == expected(model, body).tolist()


@pytest.mark.long
@pytest.mark.parametrize('kind', ['exact', 'packed'])
def test_a_crowd_gets_its_own_answers(request, model, kind):
  client = request.getfixturevalue(f'{kind}_server').client
  rng = np.random.default_rng(1)
  prompts = [group(rng, 0) for _ in range(4)]
  bodies = [{**prompts[i % 4], 'outputs': group(rng, int(rng.integers(0, 6)))['outputs']} for i in range(80)]
  with concurrent.futures.ThreadPoolExecutor(20) as pool:
    replies = list(pool.map(lambda body: client.post('/score', body), bodies))
  for body, reply in zip(bodies, replies, strict=True):
    assert reply.status == 200, reply
    wanted = expected(model, body)
    assert reply.body['exact'] == (kind == 'exact') and len(reply.body['rewards']) == len(wanted)
    if kind == 'exact':
      assert reply.body['rewards'] == wanted.tolist()
    else:
      np.testing.assert_allclose(reply.body['rewards'], wanted, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('exact', [True, False])
def test_nothing_is_compiled_after_the_warm_up_and_a_restart_changes_nothing(serve, model, exact):
  bodies = [
    group(np.random.default_rng(seed), count, longest) for seed, count, longest in ((2, 1, 3), (3, 9, 25), (4, 40, 30), (5, 300, 12))
  ]
  rewards = []
  for _ in range(2):
    with serve(exact=exact, max_length=512) as server:
      rewards.append([server.client.post('/score', body).body['rewards'] for body in bodies])
      page = server.client.get('/metrics').body
      assert 'polar_compilations_after_warmup 0.0' in page
      assert 'polar_sequences_total 350.0' in page and 'polar_queue_tokens 0.0' in page
      assert 'polar_requests_total{endpoint="/score",status="200"} 4.0' in page
  if exact:
    assert rewards[0] == rewards[1] == [expected(model, body).tolist() for body in bodies]
  else:
    np.testing.assert_allclose(np.concatenate(rewards[0]), np.concatenate([expected(model, body) for body in bodies]), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('exact', [True, False])
def test_several_devices(exact):
  model = tiny_model(devices=4)
  bodies = [group(np.random.default_rng(seed), 7) for seed in range(4)]
  wanted = [expected(model, body).tolist() for body in bodies]
  with running(model, exact=exact) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
    rewards = list(pool.map(lambda body: server.client.post('/score', body).body['rewards'], bodies))
    assert server.server.metrics.late_compilations == 0
  if exact:
    assert rewards == wanted
  else:
    np.testing.assert_allclose(rewards, wanted, atol=1e-5)


def test_every_dialect_gives_the_same_bits(exact_server, model):
  body = group(np.random.default_rng(6), 4)
  texts = model.template.candidate_texts(body['prompt'], body['reference'], body['outputs'], alone=True)
  ids = [sequence for one in singles(body) for sequence in model.exact_scorer.encode([one])]
  rewards = expected(model, body).tolist()
  post = lambda path, content: exact_server.client.post(path, content).body
  for content in ({'text': texts}, {'text': ['<s>' + text for text in texts]}, {'input_ids': ids}):  # a BOS is never added twice
    assert [item['embedding'][0] for item in post('/classify', content)] == rewards
    assert [item['embedding'][0] for item in post('/encode', content)] == rewards
  assert [item['data'][-1][0] for item in post('/pooling', {'input': texts, 'use_activation': True})['data']] == rewards
  assert [item['probs'][-1] for item in post('/classify', {'input': texts})['data']] == rewards
  assert [item['embedding'][0] for item in post('/v1/embeddings', {'input': ids})['data']] == rewards
  n = len(rewards)
  rlhf = {'query': [body['prompt'] + o for o in body['outputs']], 'prompts': [body['prompt']] * n, 'labels': [body['reference']] * n}
  assert post('/get_reward', rlhf)['rewards'] == rewards
  rows = [{'prompt': body['prompt'], 'response': o, 'label': body['reference']} for o in body['outputs']]
  assert [post('/reward', row) for row in rows] == post('/reward', rows) == rewards


def test_finished_texts_must_end_in_the_reward_token(exact_server):
  reply = exact_server.client.post('/classify', {'text': ['a<|reward|>a\nb[UNUSED_TOKEN_130]', 'a<|reward|>a\nb']})
  assert (reply.status, reply.body['error']['param']) == (400, 'text[1]') and 'does not end in the reward token' in reply.body['error'][
    'message'
  ]
  for path, content, param in (
    ('/pooling', {'input': [[1, 260], [1, 261]]}, 'input[1]'),
    ('/pooling', {'input': [999_999, 260]}, 'input'),
    ('/v1/embeddings', {'input': ['']}, 'input[0]'),
    ('/classify', {'text': ['x' * 300 + '[UNUSED_TOKEN_130]']}, 'text[0]'),
  ):
    reply = exact_server.client.post(path, content)
    assert reply.status in (400, 413) and reply.body['error']['param'] == param
    assert set(reply.body) == {'error'}


def test_one_request_with_a_whole_batch(exact_server, model):
  body = group(np.random.default_rng(8), 1_024, 12)
  texts = model.template.candidate_texts(body['prompt'], body['reference'], body['outputs'], alone=True)
  reply = exact_server.client.post('/classify', {'model': 'POLAR-7B', 'text': texts})
  assert [item['embedding'][0] for item in reply.body] == expected(model, body).tolist()


def test_models_and_description(exact_server):
  from polar_jax.serve.page import files

  client = exact_server.client
  assert client.get('/v1/models').body['data'][0]['id'] == 'tiny'
  assert client.get('/v1/models/tiny').body['max_model_len'] == 256
  assert client.get('/v1/models/other').body['error']['type'] == 'model_not_found'
  assert client.get('/model_info').body == client.get('/get_model_info').body
  assert client.get('/model_info').body['is_generation'] is False
  document = client.get('/openapi.json').body
  assert document['openapi'].startswith('3.1') and 'security' not in document
  served = {route.path.replace(':path', '') for route in exact_server.server.app._app.routes}
  assert set(document['paths']) == served - set(files.PATHS)
  names = {ref.rpartition('/')[2] for ref in _references(document)}
  assert names == set(document['components']['schemas'])


def _references(value):
  if isinstance(value, dict):
    found = [value['$ref']] if '$ref' in value else []
    return found + [ref for item in value.values() for ref in _references(item)]
  return [ref for item in value for ref in _references(item)] if isinstance(value, list) else []


def test_logs_and_request_ids(exact_server):
  text = 'secret words'
  reply = exact_server.client.post('/score', {'prompt': text, 'reference': text, 'outputs': [text]}, headers={'X-Request-Id': 'mine-1'})
  assert reply.headers['x-request-id'] == 'mine-1'
  reply = exact_server.client.post('/score', {'prompt': text, 'outputs': []}, headers={'X-Request-Id': 'no spaces, "please"'})
  assert len(reply.headers['x-request-id']) == 32
  deadline = time.monotonic() + 10
  while not any(line.get('id') == 'mine-1' for line in exact_server.log) and time.monotonic() < deadline:
    time.sleep(0.01)
  line = next(line for line in exact_server.log if line.get('id') == 'mine-1')
  assert (line['endpoint'], line['status'], line['sequences'], line.get('reason')) == ('/score', 200, 1, None)
  assert line['tokens'] > 0 and line['ms'] > 0
  assert 'secret' not in json.dumps(exact_server.log)


def test_a_server_in_a_thread_hands_over_what_ends_it(model, monkeypatch):
  """Instead of leaving its caller waiting for an address."""
  from polar_jax.serve.server import RewardServer

  server = RewardServer(model, SETTINGS, 'tiny', write_log=lambda _: None)

  def fail():
    raise SystemError('no device')
    yield

  monkeypatch.setattr(server.engine._batches, 'warm_up', fail)
  with pytest.raises(SystemError, match='no device'), server.in_thread():
    pytest.fail('there is no server')


def test_the_log_names_each_shape_that_is_compiled(model):
  from polar_jax.serve.server import RewardServer

  lines = []
  with RewardServer(model, SETTINGS, 'tiny', write_log=lines.append).in_thread() as address:
    assert address.startswith('http://127.0.0.1:')
  compiled = [json.loads(line)['shape'] for line in lines if json.loads(line)['event'] == 'compiled']
  assert compiled == ['rows of 128 tokens', 'rows of 256 tokens']
