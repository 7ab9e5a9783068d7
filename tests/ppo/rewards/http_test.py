from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import threading
import time
import zlib

import numpy as np
import pytest

from polar_jax.config import ConfigError, RewardConfig, TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.ppo.rewards.http import HttpReward, RewardServerError
from polar_jax.ppo.rewards.sources import RewardError
from polar_jax.runtime.preemption import SigtermFlag, StopRequested
from polar_jax.types import Prompt, UserError

TEMPLATE = Template(TemplateConfig(), ByteTokenizer())
KINDS = ('sglang', 'vllm', 'lmdeploy')


def score_of(text):
  """Return a number between -4 and 4 that depends on every byte."""
  return zlib.crc32(text.encode()) / 2**29 - 4


def official(kind, texts):
  """Return the reply of a server of a kind to a list of texts (and of sglang to a bare string)."""
  if kind == 'sglang':
    if isinstance(texts, str):
      return {'embedding': [score_of(texts)]}
    return [{'embedding': [score_of(t)], 'meta_info': {'id': 'x', 'prompt_tokens': 3}} for t in texts]
  item = (lambda s: [[9.5], [-7.25], [s]]) if kind == 'vllm' else (lambda s: s)
  data = [{'index': i, 'object': 'pooling', 'data': item(score_of(t))} for i, t in enumerate(texts)]
  return {'id': 'pool-1', 'object': 'list', 'created': 1, 'model': 'm', 'data': data, 'usage': {'prompt_tokens': 3}}


class Server:
  """A reward server in a thread. `script` holds what happens to the next requests: functions of (handler, texts, usual reply)."""

  def __init__(self, kind, script=(), port=0):
    self.kind, self.script, self.requests = kind, list(script), []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        outer.requests.append((self.path, body))
        texts = body['text' if outer.kind == 'sglang' else 'input']
        act = outer.script.pop(0) if outer.script else send()
        with contextlib.suppress(ConnectionError):
          act(self, texts, official(outer.kind, texts))

      def log_message(self, *_):
        pass

    self.http = http.server.ThreadingHTTPServer(('127.0.0.1', port), Handler)
    self.http.daemon_threads = True
    self.port = self.http.server_address[1]
    self.address = f'127.0.0.1:{self.port}'
    threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

  def close(self):
    self.http.shutdown()
    self.http.server_close()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()


def send(change=lambda answer: answer, status=200, raw=None):
  def act(handler, texts, answer):
    content = json.dumps(change(answer)).encode() if raw is None else raw
    handler.send_response(status)
    handler.send_header('Content-Length', str(len(content)))
    if status // 100 == 3:
      handler.send_header('Location', '/elsewhere')
    handler.end_headers()
    handler.wfile.write(content)

  return act


def hang(seconds):
  return lambda *_: time.sleep(seconds)


def trickle(handler, texts, answer):
  handler.send_response(200)
  handler.end_headers()
  for _ in range(100):
    handler.wfile.write(b' ')
    handler.wfile.flush()
    time.sleep(0.05)


def cut_off(handler, texts, answer):
  handler.send_response(200)
  handler.send_header('Content-Length', '100000')
  handler.end_headers()
  handler.wfile.write(json.dumps(answer).encode())


def hang_up(handler, texts, answer):
  handler.connection.close()


class FakeTime:
  """A clock that only `sleep` moves; `at` are (second, what happens then)."""

  def __init__(self, *at):
    self.now, self.at, self.pauses = 1_000.0, list(at), []

  def clock(self):
    return self.now

  def sleep(self, seconds):
    assert seconds > 0
    self.now += seconds
    self.pauses.append(seconds)
    while self.at and self.now - 1_000 >= self.at[0][0]:
      self.at.pop(0)[1]()


def free_port():
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return sock.getsockname()[1]


def reward(server, *, fake=None, batch=4, **settings):
  address = server.address if isinstance(server, Server) else server
  kind = server.kind if isinstance(server, Server) else 'sglang'
  config = RewardConfig(**{'source': 'http', 'server': kind, 'address': address, 'checkpoint': 'some/folder/POLAR-7B', **settings})
  times = {'clock': fake.clock, 'sleep': fake.sleep} if fake else {}
  return HttpReward(TEMPLATE, config, batch, **times)


PROMPTS = [Prompt(f'question {i // 3} é', f'reference {i // 3}') for i in range(10)]
RESPONSES = [f'answer {i}' for i in range(10)]
TEXTS = [TEMPLATE.candidate_texts(p.prompt, p.reference, [o])[0] for p, o in zip(PROMPTS, RESPONSES, strict=True)]
EXPECTED = np.array([score_of(text) for text in TEXTS], np.float32)


def check(source):
  got = source.score(PROMPTS, RESPONSES)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, EXPECTED)


@pytest.mark.parametrize('kind', KINDS)
def test_official_servers(kind):
  with Server(kind) as server:
    check(source := reward(server))
    requests = server.requests.copy()
    np.testing.assert_array_equal(source.score(PROMPTS[:1], RESPONSES[:1]), EXPECTED[:1])
    assert reward(server).score([], []).shape == (0,)
    assert len(server.requests) == 4  # one text is a list of one, no text is no request
  field, path = ('text', '/classify') if kind == 'sglang' else ('input', '/pooling')
  assert [body[field] for _, body in requests] == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
  assert {p for p, _ in requests} == {path}
  assert {body.get('model') for _, body in requests} == {'POLAR-7B' if kind == 'sglang' else None}
  assert {body.get('use_activation') for _, body in requests} == {False if kind == 'vllm' else None}
  assert TEXTS[0] == 'question 0 é\nreference 0<|reward|>question 0 é\nanswer 0[UNUSED_TOKEN_130]'


@pytest.mark.parametrize('kind', KINDS)
def test_model_name_and_wrapper_come_from_the_config(kind):
  with Server(kind) as server:
    got = reward(server, server_model='mine', wrapper='pretrain').score([Prompt('p', 'r')], ['c'])
    assert server.requests[0][1]['model'] == 'mine'
  assert got[0] == np.float32(score_of('pr<|reward|>pc[UNUSED_TOKEN_130]'))


def test_each_text_is_built_alone():
  """The prompt is cut for each response as if that were the only one."""
  template = Template(TemplateConfig(max_length=64), ByteTokenizer())
  with Server('sglang') as server:
    source = HttpReward(template, RewardConfig(address=server.address))
    source.score([Prompt('p' * 40, 'r')] * 2, ['c', 'c' * 30])
    texts = server.requests[0][1]['text']
  assert texts == [template.candidate_texts('p' * 40, 'r', [response])[0] for response in ('c', 'c' * 30)]
  assert texts[0].count('p') > texts[1].count('p')


def test_proxies_of_the_environment_are_not_used(monkeypatch):
  for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy'):
    monkeypatch.setenv(name, f'http://127.0.0.1:{free_port()}')
  monkeypatch.delenv('no_proxy', raising=False)
  with Server('vllm') as server:
    check(reward(server, patience=0.0))
    check(reward(server, address=f'http://{server.address}/', patience=0.0))


def test_rewards_are_ordered_by_their_index():
  def backwards(answer):
    return {**answer, 'data': answer['data'][::-1]}

  with Server('lmdeploy', [send(backwards)] * 3) as server:
    check(reward(server))


@pytest.mark.parametrize(
  'failure',
  [
    send(status=500),
    send(status=503, raw=b'loading'),
    send(status=429),
    send(raw=b'<html>gateway</html>'),
    send(raw=b''),
    send(raw=b'\xff\xfe'),
    cut_off,
    hang_up,
    hang(1.0),
    trickle,
  ],
)
def test_a_temporary_failure_loses_and_repeats_nothing(failure):
  fake = FakeTime()
  with Server('sglang', [send(), failure, failure]) as server:  # amid the batches
    check(reward(server, fake=fake, timeout=0.4))
    sent = [body['text'] for _, body in server.requests]
  assert sent == [TEXTS[:4], TEXTS[4:8], TEXTS[4:8], TEXTS[4:8], TEXTS[8:]]
  assert fake.pauses == [0.5, 1.0]


def test_a_server_that_is_down_for_a_minute_is_waited_for():
  """On a clock of its own, with a port that really refuses."""
  port, started = free_port(), []
  fake = FakeTime((60, lambda: started.append(Server('sglang', port=port))))
  check(reward(f'127.0.0.1:{port}', fake=fake, patience=180.0))
  assert 60 <= fake.now - 1_000 < 71
  assert max(fake.pauses) == 10
  started[0].close()


def test_a_server_that_restarts_is_waited_for_in_real_time():
  server = Server('vllm', [send()])
  started = []

  def restart(handler, texts, answer):
    hang_up(handler, texts, answer)
    threading.Thread(target=lambda: (server.close(), time.sleep(1.2), started.append(Server('vllm', port=server.port)))).start()

  server.script.append(restart)
  begun = time.monotonic()
  check(reward(server, patience=30.0))
  assert 1.2 < time.monotonic() - begun < 15
  assert len(server.requests) == 2 and len(started[0].requests) == 2
  started[0].close()


def test_a_server_that_stays_down_is_named():
  address = f'127.0.0.1:{free_port()}'
  fake = FakeTime()
  with pytest.raises(RewardServerError) as caught:
    reward(address, fake=fake, patience=45.0).score(PROMPTS, RESPONSES)
  message = str(caught.value)
  assert f'http://{address}/classify: no rewards after 9 tries in 45 s' in message
  assert 'refused' in message and 'continues from its last checkpoint' in message and '\n' not in message
  assert isinstance(caught.value, UserError)
  assert sum(fake.pauses) == 45  # the last try is at the end of the patience
  with pytest.raises(RewardServerError, match='after 1 tries in 0 s'):
    reward(address, fake=FakeTime(), patience=0.0).score(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
  ('failure', 'message'),
  [
    (send(status=502, raw=b'bad\n  gateway'), 'status 502 .*: bad gateway'),
    (send(raw=b'oops ' * 100), r'a reply that is not JSON \(oops oops .*\.\.\.\)'),
    (hang(0.6), r'no reply within 0.2 s \(rft.reward.timeout\)'),
    (trickle, r'no reply within 0.2 s \(rft.reward.timeout\)'),
  ],
)
def test_the_last_failure_is_in_the_message(failure, message):
  with Server('sglang', [failure] * 9) as server, pytest.raises(RewardServerError, match=f'after 2 tries.*{message}'):
    reward(server, fake=FakeTime(), patience=0.5, timeout=0.2).score(PROMPTS, RESPONSES)


@pytest.mark.parametrize('status', [302, 400, 404])
def test_a_refusal_stops_at_once_with_the_server_s_message(status):
  fake = FakeTime()
  with Server('vllm', [send(lambda _: {'error': 'no model POLAR'}, status)]) as server:
    with pytest.raises(RewardServerError, match=rf'/pooling: refuses the request with status {status} .*no model POLAR'):
      reward(server, fake=fake).score(PROMPTS, RESPONSES)
    assert len(server.requests) == 1 and not fake.pauses


def in_data(change):
  """Changes the list of rewards, wherever a kind keeps it."""
  return lambda answer: change(answer) if isinstance(answer, list) else {**answer, 'data': change(answer['data'])}


def first(value, key='data'):
  return in_data(lambda items: [{**items[0], key: value}, *items[1:]])


@pytest.mark.parametrize(
  ('kind', 'change', 'message'),
  [
    *((kind, in_data(lambda items: items[:-1]), 'the reply has 3 rewards for 4 texts') for kind in KINDS),
    *((kind, in_data(lambda items: [*items, items[0]]), 'the reply has 5 rewards for 4 texts') for kind in KINDS),
    *((kind, lambda _: {'object': 'error', 'message': 'x'}, f'the reply does not have the form of {kind}') for kind in KINDS),
    *((kind, lambda _: None, f'the reply does not have the form of {kind}.*null') for kind in KINDS),
    *((kind, in_data(lambda items: [*items[:2], 1.5, items[3]]), f'reward 2 does not have the form of {kind}') for kind in KINDS),
    *((kind, in_data(lambda items: [{}, *items[1:]]), f'reward 0 does not have the form of {kind}') for kind in KINDS),
    ('sglang', lambda answer: answer[0], 'the reply does not have the form of sglang'),
    ('sglang', first(0.5, 'embedding'), "reward 0 is '0.5', not a list"),
    ('vllm', first(-0.5), "reward 0 is '-0.5', not a list, and does not have the form of vllm"),
    ('vllm', first([1.0, [2.0]]), 'tokens of different forms'),
    ('sglang', first([None], 'embedding'), "reward 0 is 'null', which is not a number"),
    ('sglang', first([True], 'embedding'), "reward 0 is 'true', which is not a number"),
    ('sglang', first([], 'embedding'), 'reward 0 has 0 numbers instead of one'),
    ('sglang', first([0.1] * 4_096, 'embedding'), 'reward 0 has 4096 numbers.*serves a reward model'),
    ('vllm', first([[1.0], ['2.0']]), r"""reward 0 is '"2.0"', which is not a number"""),
    ('vllm', first([]), 'reward 0 has 0 numbers instead of one'),
    ('vllm', first([[1.0], [2.0, 3.0]]), 'reward 0 has 2 numbers instead of one'),
    ('lmdeploy', first([1.0]), 'which is not a number'),
    ('lmdeploy', first(None), "reward 0 is 'null'"),
    ('lmdeploy', first(10**400), 'too large'),
    ('lmdeploy', first(1, 'index'), 'the indices of the rewards are not 0 to 3'),
    ('lmdeploy', first('0', 'index'), 'the indices of the rewards are not 0 to 3'),
  ],
)
def test_a_reply_of_another_form_stops_at_once(kind, change, message):
  fake = FakeTime()
  with Server(kind, [send(change)]) as server:
    with pytest.raises(RewardServerError, match=message) as caught:
      reward(server, fake=fake).score(PROMPTS, RESPONSES)
    assert len(server.requests) == 1 and not fake.pauses
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


def test_a_reply_that_gives_a_key_twice_is_refused():
  raw = b'{"data": [{"index": 0, "data": 2.5, "data": -2.5}]}'
  with Server('lmdeploy', [send(raw=raw)]) as server, pytest.raises(RewardServerError, match="'data' twice in one object") as caught:
    reward(server, fake=FakeTime()).score(PROMPTS[:1], RESPONSES[:1])
  assert len(server.requests) == 1 and len(str(caught.value)) <= 500


@pytest.mark.parametrize(('value', 'shown'), [(float('nan'), 'nan'), (float('-inf'), '-inf'), (1e39, 'inf')])
def test_a_reward_that_is_not_finite_names_prompt_and_response(value, shown):
  change = in_data(lambda items: [items[0], {**items[1], 'data': value}, *items[2:]])
  named = pytest.raises(RewardError, match=rf"gave the reward {shown} .*prompt 5 'question 1 é', response 'answer 5'")
  with Server('lmdeploy', [send(), send(change)]) as server, named:
    reward(server).score(PROMPTS, RESPONSES)


def last_tokens(change):
  return in_data(lambda items: [{**item, 'data': change([row[0] for row in item['data']])} for item in items])


def test_vllm_may_return_the_last_token_alone():
  for change in (lambda numbers: numbers[-1:], lambda numbers: [numbers[-1:]]):
    with Server('vllm', [send(last_tokens(change))] * 3) as server:
      check(reward(server))


def test_a_flat_list_of_several_numbers_is_ambiguous():
  """They may belong to tokens, to labels or to an embedding."""
  refused = pytest.raises(RewardServerError, match='reward 0 has 3 numbers instead of one')
  with Server('vllm', [send(last_tokens(lambda numbers: numbers))]) as server, refused:
    reward(server).score(PROMPTS, RESPONSES)


def sigmoid_of(change=lambda number: 1 / (1 + np.exp(-number))):
  """Applies a function to the rewards of any kind of server, as vLLM does with a sigmoid by default."""

  def item(given):
    if 'embedding' in given:
      return {**given, 'embedding': [change(given['embedding'][0])]}
    data = given['data']
    return {**given, 'data': [[change(row[0])] for row in data] if isinstance(data, list) else change(data)}

  return send(in_data(lambda items: [item(i) for i in items]))


@pytest.mark.parametrize('kind', KINDS)
def test_rewards_that_all_lie_between_0_and_1_are_refused(kind):
  with Server(kind, [sigmoid_of()] * 3) as server, pytest.raises(RewardServerError) as caught:
    reward(server).score(PROMPTS, RESPONSES)
  message = str(caught.value)
  assert 'all 10 rewards lie between 0 and 1' in message and 'as after a sigmoid' in message and server.address in message
  assert len(message) <= 500 and '\n' not in message


def test_remedies_of_squashed_rewards():
  """The two that the message names: a server that obeys the request, and the option."""

  def obey(handler, texts, answer):
    body = server.requests[-1][1]
    (send() if body['use_activation'] is False else sigmoid_of())(handler, texts, answer)

  with Server('vllm', [obey] * 3) as server:
    check(reward(server))
  with Server('vllm', [sigmoid_of()] * 3) as server:
    got = reward(server, unit_interval=True).score(PROMPTS, RESPONSES)
  np.testing.assert_allclose(got, 1 / (1 + np.exp(-EXPECTED)), rtol=1e-6)


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_a_sigmoid_may_round_to_its_ends(value):
  with (
    Server('lmdeploy', [sigmoid_of(lambda _: value)]) as server,
    pytest.raises(RewardServerError, match=r'\(. to .\), as after a sigmoid'),
  ):
    reward(server).score(PROMPTS[:2], RESPONSES[:2])


def test_a_raw_reward_ends_the_check():
  """A later step may well have rewards that lie between 0 and 1."""
  with Server('sglang', [send(), sigmoid_of()]) as server:
    source = reward(server, batch=10)
    source.score(PROMPTS, RESPONSES)
    later = source.score(PROMPTS, RESPONSES)
  assert ((later > 0) & (later < 1)).all()


@pytest.mark.parametrize('address', ['', 'http://', 'ftp://host:1', 'host:port', 'ho st:1', 'host:99999', 'http://host:1?x=1'])
def test_an_invalid_address_is_named(address):
  with pytest.raises(ConfigError, match=r'rft\.reward\.address is .* it must be HOST:PORT'):
    reward(address)


def test_prompts_and_responses_must_have_equal_lengths():
  with pytest.raises(ValueError, match='zip'):
    reward('127.0.0.1:1').score(PROMPTS, RESPONSES[:3])


def test_equal_texts_are_sent_once_and_tie():
  prompts, responses = [Prompt('p', 'r')] * 5, ['a', 'b', 'a', 'c', 'a']
  noisy = send(lambda answer: [{'embedding': [i + 0.5]} for i in range(len(answer))])  # the place in the batch decides
  with Server('sglang', [noisy]) as server:
    rewards = HttpReward(TEMPLATE, RewardConfig(source='http', address=server.address, server='sglang')).score(prompts, responses)
  assert rewards.tolist() == [0.5, 1.5, 0.5, 2.5, 0.5] and len(server.requests[0][1]['text']) == 3


def test_sigterm_does_not_wait_for_a_server():
  def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

  with Server('sglang', [stop]) as server, SigtermFlag(), pytest.raises(StopRequested):
    HttpReward(TEMPLATE, RewardConfig(source='http', address=server.address, server='sglang')).score([Prompt('p', 'r')], ['a'])
