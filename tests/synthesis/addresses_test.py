"""Several samplers, addresses and threads."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import pytest
from synthesis import server_stand_in as stand_in
from synthesis.server_stand_in import BASE, FakeTime, Server, prompt, quarantined, requests, send, usual

from polar_jax.runtime.preemption import SigtermFlag, StopRequested
from polar_jax.synthesis import server as server_lib
from polar_jax.synthesis.samples import Request
from polar_jax.synthesis.server import Addresses, ServerSampler, Stopped


@pytest.fixture
def make():
  """A function that makes samplers, which are closed after the test."""
  with stand_in.making() as build:
    yield build


@pytest.mark.parametrize('limits, most', [((4, 4), 4), ((3, 8), 3)])
def test_the_limit_holds_for_all_samplers_and_threads_together(make, limits, most):
  with Server(act=send(seconds=0.01)) as server:
    shared = Addresses()
    samplers = [make(server, addresses=shared, max_in_flight=limit, model=f'm{limit}') for limit in limits]
    out, wanted = {}, requests(6, 3)
    threads = [threading.Thread(target=lambda i=i, s=s: out.__setitem__((i, s), s.sample(wanted))) for s in samplers for i in range(3)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert list(out.values()) == [usual(wanted)] * 6 and server.most == most
    assert {body['model'] for body in server.bodies()} == {f'm{limit}' for limit in limits}
    samplers[0].close()  # does not close what is shared
    assert samplers[1].sample(wanted) == usual(wanted)


def test_a_short_call_does_not_wait_for_a_long_one(make):
  with Server(act=send(seconds=0.005)) as server:
    sampler = make(server, max_in_flight=2)
    long = threading.Thread(target=sampler.sample, args=(requests(20, 4),))
    long.start()
    while len(server.requests) < 4:
      time.sleep(0.001)
    sampler.sample(requests(5))
    assert long.is_alive() and len(server.requests) < 40
    long.join()


def test_requests_are_spread_evenly(make):
  with Server(act=send(seconds=0.002)) as one, Server(act=send(seconds=0.002)) as two, Server(act=send(seconds=0.002)) as three:
    sampler = make(one, two, three, one.url + '/v1/', max_in_flight=2)
    assert sampler.sample(requests(30, 2)) == usual(requests(30, 2))
    counts = [len(server.requests) for server in (one, two, three)]
    assert sum(counts) == 60 and max(counts) - min(counts) <= 12
    for i in range(6):  # one at a time: not all to the first
      sampler.sample([Request(prompt(i), 0, i)])
    assert max(len(s.requests) for s in (one, two, three)) <= max(counts) + 3


@pytest.mark.parametrize('fault', ['nobody listens', 'status 500', 'hang'])
def test_another_address_takes_over_without_a_pause(make, fault):
  with (
    Server(act={'status 500': stand_in.error(500, 'no'), 'hang': stand_in.hang}.get(fault)) as bad,
    Server(act=send(seconds=0.002)) as good,
  ):
    if fault == 'nobody listens':
      bad.close()
    fake = FakeTime()
    sampler = make(bad, good, fake=fake, timeout=0.1, max_in_flight=4)
    assert sampler.sample(requests(30, 2)) == usual(requests(30, 2))
    assert fake.slept == 0 and 1 <= sampler.counts()['retries'] <= 4  # those that were in flight there; then it rests
    assert good.most <= 4
    if fault != 'nobody listens':
      bad.act, bad.most = send(seconds=0.002), 0
      fake.now += 100
      assert sampler.sample(requests(30, 2)) == usual(requests(30, 2))
      assert bad.most > 1  # takes its part again


def test_all_addresses_fail(make):
  with Server(act=stand_in.error(500, 'first')) as one, Server(act=stand_in.error(500, 'second')) as two:
    shared = Addresses()
    two.script = [send()] * 5
    make(two, addresses=shared).sample(requests(5))  # the other has more to do, and is asked in turn all the same
    message = quarantined(make(one, two, addresses=shared, patience=2.0), requests())
    assert 'no answer after 8 tries in 2 s' in message and len(one.requests) == len(two.requests) - 5 == 4


def test_a_policy_that_ends_gives_its_places_up(make, caplog):
  def act(handler, body):
    if body['model'] == 'healthy':
      return send()(handler, body)
    return (stand_in.error(401, 'no') if body['prompt'] == 'prompt 3' else stand_in.hang)(handler, body)

  with Server(act=act) as server:
    shared = Addresses()
    sampler = make(server, addresses=shared, max_in_flight=4)
    healthy = make(server, addresses=shared, max_in_flight=4, model='healthy')
    start = time.monotonic()
    quarantined(sampler, requests(400))
    assert healthy.sample(requests(20)) == usual(requests(20))  # waits for none of the requests that hang
    assert time.monotonic() - start < 2
    assert len([b for b in server.bodies() if b['model'] != 'healthy']) <= 5 and sampler.counts()['requests'] == 0
    while server.in_flight:  # the server notices that nobody waits
      assert time.monotonic() - start < 4
      time.sleep(0.01)
  assert not caplog.text  # the address did not fail


@pytest.mark.parametrize('act', [stand_in.hang, stand_in.error(503, 'busy')])
@pytest.mark.parametrize('thread', [False, True])
def test_a_stop_ends_the_wait(make, act, thread):
  with Server(act=act) as server:
    stop = threading.Event()
    sampler = ServerSampler(dataclasses.replace(BASE, base_urls=(server.url,), timeout=100.0, patience=100.0), addresses=Addresses(stop))
    caught = []

    def sample():
      try:
        sampler.sample(requests(3))
      except Stopped as error:
        caught.append(error)

    timer = threading.Timer(0.1, stop.set)
    start = time.monotonic()
    timer.start()
    if thread:
      worker = threading.Thread(target=sample)
      worker.start()
      worker.join()
    else:
      sample()
    assert caught and time.monotonic() - start < 1
    sampler._shared.close()


@pytest.mark.parametrize('act', [stand_in.hang, stand_in.error(503, 'busy')])
def test_sigterm_ends_the_wait(act):
  with Server(act=act) as server:
    sampler = ServerSampler(dataclasses.replace(BASE, base_urls=(server.url,), timeout=100.0, patience=100.0))
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    start = time.monotonic()
    with SigtermFlag(), pytest.raises(StopRequested):
      timer.start()
      sampler.sample(requests(3))
    assert time.monotonic() - start < 1
    sampler.close()


def test_closing_ends_calls_and_threads(make):
  with Server(act=stand_in.hang) as server:
    sampler = make(server)
    threading.Timer(0.1, sampler.close).start()
    with pytest.raises(RuntimeError, match='closed'):
      sampler.sample(requests(3))
    with pytest.raises(RuntimeError, match='closed'):
      sampler.sample(requests(3))
    for thread in sampler._shared._threads:
      thread.join(2)
      assert not thread.is_alive()


def test_an_error_of_the_program_is_not_hidden(make, monkeypatch):
  with Server() as server:
    sampler = make(server)
    monkeypatch.setattr(server_lib, '_parse', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      sampler.sample(requests(3))
