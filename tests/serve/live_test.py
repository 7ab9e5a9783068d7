"""The client, PPO and curl's users against a real server."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading

import numpy as np
import pytest
from optional import httpx

from polar_jax.config import RewardConfig
from polar_jax.ppo.rewards.http import HttpReward
from polar_jax.ppo.rewards.sources import ModelReward
from polar_jax.serve import RewardClient, RewardRequestError
from polar_jax.serve.adapters import polar
from polar_jax.types import Prompt

pytestmark = [pytest.mark.needs('uvicorn', 'httpx'), pytest.mark.long]

ROWS = [(f'What is {i % 4}?', [{'role': 'assistant', 'content': f'It is {i % 4}.'}], f'answer {i} é') for i in range(23)]


def columns(rows):
  return tuple(map(list, zip(*rows, strict=True)))


def expected(model, rows, wrapper='sft'):
  examples = [{'prompt': p, 'reference': r, 'output': o, 'wrapper': wrapper} for p, r, o in rows]
  return model.score_batch(examples, exact=True).tolist()


def test_the_client_gets_the_bits_of_exact_scoring(exact_server, model):
  with RewardClient(exact_server.server.address, batch=5) as client:
    assert client.score_rows(*columns(ROWS)) == expected(model, ROWS)
    assert asyncio.run(client.ascore_rows(*columns(ROWS), wrapper='pretrain')) == expected(model, ROWS, 'pretrain')
    assert client.score(*ROWS[0][:2], ['answer 0 é', '']) == expected(model, [ROWS[0], (*ROWS[0][:2], '')])
    assert client.score_one(*ROWS[3]) == expected(model, [ROWS[3]])[0]


def test_an_error_names_the_field(exact_server):
  with RewardClient(exact_server.server.address) as client, pytest.raises(RewardRequestError, match=r'status 400: .*surrogate') as caught:
    client.score('p', 'r', ['a', '\ud800'])
  assert caught.value.status == 400 and 'outputs[1]' in str(caught.value)


def test_a_token_is_sent(serve, model, monkeypatch):
  with serve(token='a-token') as server:
    with RewardClient(server.server.address) as client, pytest.raises(RewardRequestError, match='POLAR_SERVER_TOKEN') as caught:
      client.score('p', 'r', ['a'])
    assert caught.value.status == 401
    monkeypatch.setenv('POLAR_SERVER_TOKEN', 'a-token\n')
    with RewardClient(server.server.address) as client:
      assert client.score('p', 'r', ['a']) == expected(model, [('p', 'r', 'a')])


def test_a_client_waits_for_a_server_that_starts(serve, model):
  with serve(wait=False) as server, RewardClient(server.server.address) as client:
    assert client.score('p', 'r', ['a']) == expected(model, [('p', 'r', 'a')])


@pytest.mark.long
def test_a_restart_costs_a_pause(serve, model):
  with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(1) as pool:
    with serve() as first:
      address = first.server.address
      client = stack.enter_context(RewardClient(address, batch=4))
      assert client.score_rows(*columns(ROWS)) == expected(model, ROWS)
    found = pool.submit(client.score_rows, *columns(ROWS))
    with serve(port=int(address.rpartition(':')[2])):
      assert found.result(60) == expected(model, ROWS)


def test_the_official_class_gets_the_same_rewards_from_parts_and_from_finished_texts(exact_server, model):
  """Finished texts go to the endpoint that the official client uses. They are equal where nothing is cut."""
  client = polar.RewardModelClient('tiny', server_address=exact_server.server.address)
  data = [{'prompt': p, 'reference': r, 'output': o} for p, r, o in ROWS[:5]]
  texts = client.encode(data)
  assert client(texts) == expected(model, ROWS[:5])
  assert client([''.join(text) for text in texts]) == expected(model, ROWS[:5])  # joined, they are strings and no more
  client.close()


def official_rewards(kind, address, texts):
  """Send and read as the official client does, which looks at neither status nor index nor lengths."""
  path, body = ('/classify', {'model': 'POLAR-7B', 'text': texts}) if kind == 'sglang' else ('/pooling', {'input': texts})
  reply = httpx.post(address + path, json=body).json()
  if kind == 'sglang':
    return [item['embedding'][0] for item in reply]
  return [item['data'][-1][0] if kind == 'vllm' else item['data'] for item in reply['data']]


@pytest.mark.parametrize('kind', ['sglang', 'vllm', 'lmdeploy'])
def test_the_official_client(request, serve, model, kind):
  texts = [model.template.candidate_texts(p, r, [o])[0] for p, r, o in ROWS]
  with contextlib.ExitStack() as stack:
    lmdeploy = kind == 'lmdeploy'
    server = stack.enter_context(serve(pooling_dialect=kind)) if lmdeploy else request.getfixturevalue('exact_server')
    assert official_rewards(kind, server.server.address, texts) == expected(model, ROWS)
    with pytest.raises((KeyError, TypeError)):  # never a number
      official_rewards(kind, server.server.address, ['a text without the reward token'])


@pytest.mark.parametrize(('kind', 'dialect'), [('sglang', 'vllm'), ('vllm', 'vllm'), ('lmdeploy', 'lmdeploy')])
def test_ppo_gets_the_rewards_of_a_model_in_process(request, serve, model, kind, dialect):
  """With rft.reward.source=http, from each kind of endpoint."""
  prompts = [Prompt(f'What is {i}?', f'It is {i}.') for i in range(6)]
  responses = [f'answer {i}' for i in range(6)]
  here = ModelReward(model.scorer, RewardConfig()).score(prompts, responses)

  def there(server):
    config = RewardConfig(source='http', server=kind, address=server.server.address.removeprefix('http://'), checkpoint='tiny')
    return HttpReward(model.template, config).score(prompts, responses)

  if dialect == 'vllm':
    found = there(request.getfixturevalue('exact_server'))
  else:
    with serve(pooling_dialect='lmdeploy') as server:
      found = there(server)
  np.testing.assert_allclose(found, here, rtol=0, atol=1e-5)
  exact = model.score_batch(
    [{'prompt': p.prompt, 'reference': p.reference, 'output': r} for p, r in zip(prompts, responses, strict=True)], exact=True
  )
  assert found.tolist() == exact.tolist()


def test_many_threads_at_once(packed_server, model):
  with RewardClient(packed_server.server.address, batch=3, max_in_flight=4) as client:
    found: dict[int, list[float]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: client.score_rows(*columns(ROWS[i:]))})) for i in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  for i, rewards in found.items():
    np.testing.assert_allclose(rewards, expected(model, ROWS[i:]), rtol=0, atol=1e-5)
