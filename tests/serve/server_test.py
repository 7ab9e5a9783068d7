"""The native endpoint through a real server: bits, order, crowds, errors, limits and the end."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from polar_jax.types import Group

pytestmark = pytest.mark.needs('uvicorn')


def group(rng, count=3, longest=25):
  word = lambda: ''.join(rng.choice(list('abcdé 你\n'), int(rng.integers(0, longest))))
  return {'prompt': word(), 'reference': word(), 'outputs': [word() for _ in range(count)]}


def expected(model, request):
  wrapper = request.get('wrapper', 'sft')
  return model.exact_scorer.score([Group(request['prompt'], request['reference'], [output], wrapper) for output in request['outputs']])


def test_rewards_have_the_bits_of_the_exact_scorer(exact_server, model):
  request = group(np.random.default_rng(0), 5)
  reply = exact_server.client.post('/score', request)
  assert reply.status == 200
  assert reply.body['rewards'] == expected(model, request).tolist()
  assert (reply.body['exact'], reply.body['model'], reply.body['truncated']) == (True, 'tiny', [False] * 5)
  scorer = model.exact_scorer
  assert reply.body['tokens'] == [
    len(ids) for o in request['outputs'] for ids in scorer.encode([Group(request['prompt'], request['reference'], [o])])
  ]


@pytest.mark.parametrize('kind', ['exact', 'packed'])
def test_a_crowd_gets_its_own_answers(request, model, kind):
  client = request.getfixturevalue(f'{kind}_server').client
  rng = np.random.default_rng(1)
  prompts = [group(rng, 0) for _ in range(4)]
  requests = [{**prompts[i % 4], 'outputs': group(rng, int(rng.integers(0, 5)))['outputs']} for i in range(60)]
  with concurrent.futures.ThreadPoolExecutor(20) as pool:
    replies = list(pool.map(lambda body: client.post('/score', body), requests))
  for body, reply in zip(requests, replies, strict=True):
    assert reply.status == 200, reply
    wanted = expected(model, body)
    assert reply.body['exact'] == (kind == 'exact')
    if kind == 'exact':
      assert reply.body['rewards'] == wanted.tolist()
    else:
      np.testing.assert_allclose(reply.body['rewards'], wanted, atol=1e-5)
  page = client.get('/metrics').body
  assert 'polar_compilations_after_warmup 0.0' in page
