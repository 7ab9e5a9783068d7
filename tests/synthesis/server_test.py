from __future__ import annotations

import dataclasses
import datetime
import email.utils
import logging
import random
import re
import threading

import pytest
from synthesis import server_stand_in as stand_in
from synthesis.server_stand_in import BASE, FakeTime, Server, prompt, quarantined, reply_to, requests, send, text_of, usual

from polar_jax.config import ConfigError
from polar_jax.synthesis import addresses as addresses_lib
from polar_jax.synthesis.samples import Failure, QuarantineError, Request, Sample
from polar_jax.synthesis.server import ServerSampler

KEY = 'sk-geheim"/0815'


@pytest.fixture
def make():
  """A function that makes samplers, which are closed after the test."""
  with stand_in.making() as build:
    yield build


# What is sent, and what is read.


@pytest.mark.parametrize('tail', ['', '/', '/v1', '/v1/'])
def test_a_request_to_continue_text(make, tail):
  with Server() as server:
    text = ' Ünïcode \u2028 \x00 "quoted"\\ 🦜 '
    assert make(server.url + tail).sample([Request(prompt(0, text), 3, 2**31 - 1)]) == [Sample(text_of(text, 2**31 - 1), True, 7)]
  ((path, headers, body),) = server.requests
  assert path == '/v1/completions' and 'Authorization' not in headers and headers['Content-Type'] == 'application/json'
  assert headers['Host'] == server.url.removeprefix('http://')
  assert body == {
    'model': 'zoo/m-1b',
    'prompt': text,
    'max_tokens': 64,
    'temperature': 0.7,
    'top_p': 0.9,
    'seed': 2**31 - 1,
    'n': 1,
    'stream': False,
  }


@pytest.mark.parametrize('system', [None, 'Be brief.'])
def test_a_request_to_chat(make, system):
  with Server() as server:
    assert make(server, chat=True, system=system, top_k=40).sample(requests()) == usual(requests())
  ((path, _, body),) = server.requests
  expected = [{'role': 'system', 'content': system}] if system else []
  assert path == '/v1/chat/completions' and 'prompt' not in body and body['top_k'] == 40
  assert body['messages'] == [*expected, {'role': 'user', 'content': 'prompt 0'}]


@pytest.mark.parametrize(
  'reply, sample',
  [
    ({'choices': [{'text': 'a', 'finish_reason': 'length'}]}, Sample('a', False, 0)),
    ({'choices': [{'text': 'a', 'finish_reason': None}], 'usage': None}, Sample('a', True, 0)),
    ({'choices': [{'text': 'a'}], 'usage': {'completion_tokens': None, 'prompt_tokens': -1}}, Sample('a', True, 0)),
    ({'choices': [{'text': 'a'}], 'usage': {'completion_tokens': True, 'prompt_tokens': 1.5}}, Sample('a', True, 0)),
    ({'choices': [{'text': None}]}, Sample('', True, 0)),
    ({'choices': [{'text': ' a\ud83d b\udc00\n😀'}]}, Sample(' a\ufffd b\ufffd\n😀', True, 0)),
  ],
)
def test_replies_to_text(make, reply, sample):
  with Server(act=send(reply)) as server:
    sampler = make(server)
    assert sampler.sample(requests()) == [sample]
  assert sampler.counts() == {'requests': 1, 'retries': 0, 'failures': 0, 'prompt_tokens': 0, 'tokens': 0}


@pytest.mark.parametrize(
  'message, text',
  [
    ({'content': 'a', 'reasoning_content': 'hmm'}, 'a'),
    ({'content': None, 'reasoning_content': 'hmm'}, ''),
    ({'role': 'assistant'}, ''),
  ],
)
def test_replies_to_chat(make, message, text):
  with Server(act=send({'choices': [{'message': message, 'finish_reason': 'stop'}]})) as server:
    assert make(server, chat=True).sample(requests()) == [Sample(text, True, 0)]


def test_answers_have_the_order_of_the_requests_and_are_counted(make):
  delay = random.Random(0)
  with Server(act=lambda handler, body: send(seconds=delay.random() / 50)(handler, body)) as server:
    sampler, wanted = make(server), requests(10, 6)
    assert sampler.sample(wanted) == usual(wanted)
    assert sampler.sample([]) == []
  assert sampler.counts() == {'requests': 60, 'retries': 0, 'failures': 0, 'prompt_tokens': 300, 'tokens': 420}
  assert sorted((body['prompt'], body['seed']) for body in server.bodies()) == sorted((r.prompt.text, r.seed) for r in wanted)


def test_connections_are_kept_and_used_again(make):
  with Server() as server:
    sampler = make(server, max_in_flight=3)
    for _ in range(3):
      sampler.sample(requests(4, 5))
    assert 1 <= server.connections <= 3


# Failures that pass.

FAULTS = {
  'hang_up': stand_in.hang_up,
  'reset': stand_in.reset,
  'hang': stand_in.hang,
  'trickle': stand_in.trickle,
  'cut off': stand_in.cut_off,
  'empty': send(raw=b''),
  'half': send(raw=b'{"choices": [{"te'),
  'html': send(raw=b'<html>'),
  'bytes': send(raw=b'"\xff"'),
  'repeated key': send(raw=b'{"choices": [{"text": "a", "text": "b"}]}'),
  'no object': send(['choices']),
  'no choices': send({'text': 'a'}),
  'no choice': send({'choices': []}),
  'two choices': send(lambda body: {'choices': reply_to(body)['choices'] * 2}),
  'choice of text': send({'choices': ['a']}),
  'choice without text': send({'choices': [{'message': {'content': 'a'}}]}),
  'text of parts': send({'choices': [{'text': [{'type': 'text', 'text': 'a'}]}]}),
  'aborted': send(lambda body: reply_to(body, 'answ', 'abort')),
  'failed': send(lambda body: reply_to(body, 'answ', 'error')),
  **{f'status {status}': stand_in.error(status, 'busy') for status in (408, 429, 500, 502, 503, 504, 529)},
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_that_passes_changes_no_sample(make, name):
  with Server([FAULTS[name]] * 2) as server:
    fake = FakeTime()
    sampler = make(server, fake=fake, timeout=0.1 if name in ('hang', 'trickle') else 5.0)
    assert sampler.sample(requests()) == usual(requests())
    first, *retries = server.bodies()
    assert retries == [first, first] and sampler.counts()['retries'] == 2
    assert 0.25 + 0.5 <= fake.slept <= 0.5 + 1 + 0.01


@pytest.mark.parametrize('name', ['hang', 'half', 'aborted', 'choice without text', 'status 503', 'reset'])
def test_a_fault_that_lasts_ends_the_policy(make, name):
  with Server(act=FAULTS[name]) as server:
    fake = FakeTime()
    message = quarantined(make(server, fake=fake, patience=20.0, timeout=0.05 if name == 'hang' else 5.0), requests())
  (tries,) = re.findall(re.escape(f'{server.url}/v1/completions: no answer after ') + r'(\d+) tries in 20 s: ', message)
  assert int(tries) == len(server.requests) and 7 <= int(tries) <= 9  # pauses of up to 0.5, 1, 2, 4, 8, 10 s, each at least half of that
  assert 'start the server' in message and fake.slept == pytest.approx(20)
  said = {'hang': 'no reply within 0.05 s', 'half': '(reply: {"choices": [{"te)', 'aborted': 'finish_reason abort'}
  assert said.get(name, '') in message


def test_the_time_limit_bounds_the_parts_of_a_reply_together(make):
  with Server(act=stand_in.trickle) as server:
    assert 'no whole reply within 0.1 s' in quarantined(make(server, patience=0, timeout=0.1), requests())


def test_chat_without_a_message_is_no_answer(make):
  with Server(act=send({'choices': [{'text': 'a'}]})) as server:
    assert 'a choice without message' in quarantined(make(server, chat=True, patience=0), requests())


def test_an_address_where_nobody_listens_until_the_server_starts(make):
  port = stand_in.free_port()
  fake, servers = FakeTime(), []

  def sleep(seconds):
    FakeTime.sleep(fake, seconds)
    if fake.slept > 3 and not servers:
      servers.append(Server(port=port))

  fake.sleep = sleep
  assert make(f'127.0.0.1:{port}', fake=fake).sample(requests()) == usual(requests())
  servers[0].close()
  assert 'refused' in quarantined(make(f'127.0.0.1:{port}', patience=1), requests())


def test_pauses_are_those_of_the_request_and_not_all_equal():
  def pauses(key):
    fake, address = FakeTime(), addresses_lib.Address('a')
    call = addresses_lib.Call([address], [key], None, None, 1_000, fake.clock)
    job, out = call.ready[0], []
    for _ in range(8):
      call._retry(job, address, addresses_lib.TemporaryError('x'), fake.now)
      out.append(call.delayed.pop()[0] - fake.now)
    return out

  assert pauses(5) == pauses(5) and len({pauses(key)[0] for key in range(20)}) == 20
  for i, full in enumerate((0.5, 1, 2, 4, 8, 10, 10, 10)):
    assert all(full / 2 <= pauses(key)[i] <= full for key in range(20))


def in_(seconds, form=lambda when: email.utils.format_datetime(when, usegmt=True)):
  return form(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds))


@pytest.mark.parametrize('status', [429, 503])
@pytest.mark.parametrize(
  'wish, low, high',
  [
    (lambda: '7', 7, 7.2),
    (lambda: '2.5', 2.5, 2.7),
    (lambda: in_(20), 18, 20.2),
    (lambda: in_(20, lambda when: when.strftime('%a, %d %b %Y %H:%M:%S -0000')), 18, 20.2),
    (lambda: in_(-20), 0.25, 0.7),
    (lambda: '100000', 60, 60.2),
    (lambda: '-5', 0.25, 0.7),
    (lambda: 'nan', 0.25, 0.7),
    (lambda: 'soon', 0.25, 0.7),
    (lambda: '', 0.25, 0.7),
  ],
)
def test_a_wish_to_wait_is_honored(make, status, wish, low, high):
  with Server([stand_in.error(status, 'busy', Retry_After=wish())]) as server:
    fake = FakeTime()
    assert make(server, fake=fake, patience=100.0).sample(requests()) == usual(requests())
  assert low - 0.01 <= fake.slept <= high


def test_patience_counts_from_the_first_failure_of_each_request(make):
  """Many requests that fail once each, one after another, are no reason to give up."""
  fake, seen = FakeTime(), set()

  def act(handler, body):
    new = body['prompt'] not in seen
    seen.add(body['prompt'])
    (stand_in.error(500, 'hiccup') if new else send())(handler, body)

  with Server(act=act) as server:
    sampler = make(server, fake=fake, max_in_flight=1, patience=1.0)
    for i in range(6):
      sampler.sample([Request(prompt(i), 0, i)])
  assert fake.slept > 1.5 and sampler.counts()['retries'] == 6


def test_random_faults_change_no_sample(make):
  lock, numbers = threading.Lock(), random.Random(3)
  names = [name for name in FAULTS if name not in ('hang', 'trickle')]

  def act(handler, body):
    with lock:
      fault = numbers.choice(names) if numbers.random() < 0.3 else None
    (FAULTS[fault] if fault else send())(handler, body)

  wanted = requests(20, 4)
  with Server(act=act) as one, Server(act=act) as two, Server() as well:
    healthy = make(well).sample(wanted)
    assert make(one, patience=1_000.0).sample(wanted) == healthy == usual(wanted)
    sampler = make(one, two, patience=1_000.0)
    assert sampler.sample(wanted) == healthy and sampler.counts()['retries'] > 10


# Failures that do not pass.


@pytest.mark.parametrize('status', [401, 403])
def test_a_key_that_is_refused(make, monkeypatch, status):
  with Server(act=stand_in.error(status, f'wrong key {KEY}')) as server:
    message = quarantined(make(server), requests())
    assert message.endswith('set api_key_env to the name of the environment variable that holds an API key')
    monkeypatch.setenv('ZOO_KEY', f'{KEY}\n')
    message = quarantined(make(server, api_key_env='ZOO_KEY'), requests())
  assert message == (f'{server.url}/v1/completions: status {status}: wrong key ***; check the API key in the environment variable ZOO_KEY')
  assert [headers.get('Authorization') for _, headers, _ in server.requests] == [None, f'Bearer {KEY}']


@pytest.mark.parametrize(
  'status, advice',
  [
    (404, "check that the server serves /v1/completions, and a model with the name 'zoo/m-1b'"),
    (307, 'redirects are not followed: give the address that it leads to'),
    (405, 'check that it is the address of an OpenAI-compatible server'),
  ],
)
def test_a_status_that_no_retry_changes(make, status, advice):
  with Server(act=stand_in.error(status, 'no', Location='/v1/completions')) as server:
    message = quarantined(make(server), requests())
  assert message == f'{server.url}/v1/completions: status {status}: no; {advice}' and len(server.requests) == 1


@pytest.mark.parametrize('status', [400, 413, 422])
def test_a_prompt_that_is_refused_is_the_failure_of_its_request(make, status):
  def act(handler, body):
    too_long = stand_in.error(status, 'too long:\n' + 'x' * 200)
    (too_long if body['prompt'] in ('prompt 1', 'prompt 2') else send())(handler, body)

  with Server(act=act) as server:
    sampler = make(server)
    answers = sampler.sample(requests(4))
    assert answers[::3] == usual(requests(4))[::3]
    reason = f'the server refuses the request with status {status}: too long: ' + 'x' * 67 + '...'
    assert answers[1:3] == [Failure(reason)] * 2
    assert len(server.requests) == 4 and sampler.counts()['failures'] == 2
    # One prompt that is too long is not the policy's fault, however many samples are wanted; nor are two requests enough to say so.
    assert sampler.sample(requests(2, 5)[5:]) == [Failure(reason)] * 5
    assert sampler.sample(requests(3)[1:]) == [Failure(reason)] * 2
    message = quarantined(sampler, requests(3, 2)[2:])
  assert 'all 4 requests failed, the first because the server refuses' in message and message.endswith("against the server's limits")


@pytest.mark.parametrize(
  'raw, said',
  [
    (b'{"error": {"message": "m1"}}', 'm1'),
    (b'{"error": "m2"}', 'm2'),
    (b'{"message": "m3"}', 'm3'),
    (b'{"detail": "m4"}', 'm4'),
    (b'{"detail": [{"loc": 1}]}', '{"detail": [{"loc": 1}]}'),
    (b'plain\x1b[0m', 'plain?[0m'),
    (b'', 'empty'),
  ],
)
def test_the_message_of_a_server(make, raw, said):
  with Server(act=send(status=400, raw=raw)) as server:
    assert make(server).sample(requests()) == [Failure(f'the server refuses the request with status 400: {said}')]


def test_a_prompt_that_cannot_be_sent(make):
  with Server() as server:
    wanted = [*requests(3), Request(prompt(7, 'ab\ud83d'), 0, 9)]
    reason = 'the prompt has a lone surrogate (character 2), which no request can carry'
    assert make(server).sample(wanted) == [*usual(wanted[:3]), Failure(reason)]
    assert make(server).sample(wanted[3:] * 5) == [Failure(reason)] * 5
  assert len(server.requests) == 3


def test_the_same_answer_to_every_seed(make):
  cached = send(lambda body: reply_to(body, f'answer to {body["prompt"]}'))
  with Server(act=cached) as server:
    message = quarantined(make(server), requests(3, 2))
    assert 'gives the same answer to every seed, for each of 3 prompts; check that the server honors `seed`' in message
    assert server.url in message
    for sampler, wanted in (
      (make(server, temperature=0.0), requests(3, 2)),  # nothing is drawn
      (make(server), requests(2, 4)),  # too few prompts
      (make(server), requests(5, 1)),  # one sample each
      (make(server), requests(3, 1) * 2),  # the same seeds
    ):
      assert len(sampler.sample(wanted)) == len(wanted)
    server.script = [send()]  # one sample of one prompt differs
    assert len(make(server, max_in_flight=1).sample(requests(3, 2))) == 6


def test_empty_answers(make):
  with Server(act=send(lambda body: reply_to(body, ''))) as server:
    message = quarantined(make(server), requests(3))
    assert 'all 3 answers are empty; check that chat=False suits the model' in message
    assert make(server).sample(requests(1, 4)) == [Sample('', True, 7)] * 4  # one prompt with nothing to say
    server.act = send(lambda body: reply_to(body, 'a' if body['prompt'] == 'prompt 0' else ''))
    assert len(make(server).sample(requests(3, 2))) == 6  # empty answers are no sign of a cache


# Settings and secrets.


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'api_key_env': 'ZOO_KEY'}, 'environment variable ZOO_KEY, which api_key_env names, is not set'),
    ({'base_urls': ()}, 'at least one address'),
    ({'max_in_flight': 0}, 'max_in_flight >= 1, not 0'),
    ({'system': 'x'}, 'has no system prompt; set chat=true'),
    ({'system': 'x\ud83d', 'chat': True}, 'system of a policy has a lone surrogate'),
    ({'base_urls': ('ftp://host',)}, "'ftp://host' of a policy must be HOST:PORT"),
    ({'base_urls': ('http://host:80x',)}, 'must be HOST:PORT'),
    ({'base_urls': ('http://ho st',)}, 'must be HOST:PORT'),
    ({'base_urls': ('http://host/?a=1',)}, 'must be HOST:PORT'),
  ],
)
def test_settings_that_cannot_work(settings, message):
  with pytest.raises(ConfigError, match=message.replace('?', r'\?')) as caught:
    ServerSampler(dataclasses.replace(BASE, **{'base_urls': ('http://host:1',)} | settings))
  assert '\n' not in str(caught.value)


def test_the_key_is_in_no_message(make, monkeypatch, caplog):
  with pytest.raises(ConfigError) as caught:
    make(f'http://user:{KEY.replace("/", "")}@host')
  assert 'geheim' not in str(caught.value)
  for bad in (f'{KEY} {KEY}', f'{KEY}\n{KEY}', f'{KEY}é'):
    monkeypatch.setenv('ZOO_KEY', bad)
    with pytest.raises(ConfigError, match='variable ZOO_KEY does not hold an API key') as caught:
      make('http://host', api_key_env='ZOO_KEY')
    assert 'geheim' not in str(caught.value)
  monkeypatch.setenv('ZOO_KEY', KEY)
  echoes = [
    stand_in.error(400, 'x' * 70 + KEY),
    stand_in.error(503, KEY),
    send(raw=f'"{KEY}'.encode()),
    send([KEY]),
    send([KEY], status=500),
    send([KEY.replace('"', '%22').replace('/', '%2F')], status=500),
    send({'choices': KEY}),
    send(raw=f'Bearer {KEY}'.encode(), status=404),
  ]
  with caplog.at_level(logging.DEBUG, 'absl'):
    for echo in echoes:
      with Server(act=echo) as server:
        sampler = make(server, api_key_env='ZOO_KEY', patience=0)
        try:
          (answer,) = sampler.sample(requests())
          said = answer.reason
        except QuarantineError as error:
          said = str(error)
        assert 'geheim' not in said and '*' in said
        assert 'geheim' not in repr(sampler._config)
  assert 'geheim' not in caplog.text and 'prompt 0' not in caplog.text
