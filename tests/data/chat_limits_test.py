"""Chat templates are programs of strangers: what loops, grows or crashes ends in one line, and the next template is rendered as usual."""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import threading

import jinja2
import pytest

from polar_jax.data import chat as chat_lib
from polar_jax.data import chat_worker
from polar_jax.data.chat import ChatTemplate, ChatTemplateError

MESSAGES = [{'role': 'user', 'content': 'x'}]
LOOP = '{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}'


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
  """Start workers with a limit of half a second of processor time, and 400 MiB."""
  started = subprocess.Popen

  def start(command, **settings):
    code = (
      'import runpy, sys; from polar_jax.data import chat_worker as w; w.SECONDS, w.MEMORY = 0.5, 400 * 2**20; '
      'import io, os; out = os.fdopen(os.dup(1), "wb"); os.dup2(2, 1); w._limit(); w.serve(sys.stdin.buffer, out)'
    )
    return started([sys.executable, '-c', code], **settings)

  chat_lib._WORKER.stop()
  monkeypatch.setattr(chat_lib.subprocess, 'Popen', start)
  yield
  chat_lib._WORKER.stop()


BOMBS = {
  'loop': LOOP,
  'string': "{{ 'x' * 10 ** 10 }}",
  'list': '{{ [messages] * 10 ** 10 }}',
  'power': '{{ 10 ** (10 ** 10) }}',
  'doubling': "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
  'lipsum': '{{ lipsum(n=99999, max=99999, min=99998) }}',
  'dates': "{{ strftime_now('%A' * 10 ** 8) }}",
  'format': "{{ '%09999999999d' % 1 }}",
  'format method': "{{ '{:>9999999999}'.format('x') }}",
  'center': "{{ 'x' | center(10 ** 10) }}",
  'indent': '{{ messages | tojson(indent=10 ** 10) }}',
  'batch': "{{ [1] | batch(10 ** 10, 'x') | list }}",
  'recursion': '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
  'output': "{% for i in range(20000) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize('bomb', BOMBS)
def test_a_bomb_is_one_line_and_the_next_template_works(bomb):
  with pytest.raises(ChatTemplateError) as error:
    ChatTemplate(BOMBS[bomb], where='here').render(MESSAGES)
  assert str(error.value).startswith('here: ') and len(str(error.value)) <= 500 and '\n' not in str(error.value)
  assert bomb != 'loop' or str(error.value) == 'here: takes more than 5 s'
  assert ChatTemplate('{{ messages[0].content }}y').render(MESSAGES) == 'xy'


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('{% for i in range(3) %}' * 30 + '{% endfor %}' * 30, 'here: not a Jinja template: SyntaxError: too many statically nested blocks'),
    ('{{ ' + '(' * 3000 + '1' + ')' * 3000 + ' }}', 'here: not a Jinja template: '),
    ('{{ ' + '9' * 10_000 + ' }}', 'here: not a Jinja template: '),
    ('{% if %}', 'here: not a Jinja template: line 1: '),
  ],
)
def test_sources_that_do_not_compile(source, message):
  with pytest.raises(ChatTemplateError) as error:
    ChatTemplate(source, where='here')
  assert str(error.value).startswith(message) and len(str(error.value)) <= 500


def test_long_messages_of_a_template_are_cut():
  with pytest.raises(ChatTemplateError, match='here: line 1 of the template: xxx') as error:
    ChatTemplate("{{ raise_exception('x\n' * 10000) }}".replace("'x\n'", "'xxx '"), where='here').render(MESSAGES)
  assert len(str(error.value)) <= 500


def test_one_process_serves_all_renderings():
  template = ChatTemplate('{{ messages[0].content }}')
  first = chat_lib._WORKER._process.pid
  texts: dict[int, str] = {}

  def render(i):
    texts[i] = template.render([{'role': 'user', 'content': f'é{i}' * 50_000}])

  threads = [threading.Thread(target=render, args=(i,)) for i in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert texts == {i: f'é{i}' * 50_000 for i in range(8)} and chat_lib._WORKER._process.pid == first
  assert os.getsid(first) == first  # no signal of the terminal reaches it


@pytest.mark.parametrize(
  ('end', 'reason'),
  [
    (signal.SIGKILL, 'takes more than 60 s, or more memory than there is'),
    (signal.SIGTERM, r'ends the process that renders it \(exit status -15\)'),
  ],
)
def test_a_process_that_dies_is_replaced(end, reason):
  template = ChatTemplate('{{ messages[0].content }}')
  os.kill(chat_lib._WORKER._process.pid, end)
  with pytest.raises(ChatTemplateError, match=f'^chat template: {reason}$'):
    template.render(MESSAGES)
  assert template.render(MESSAGES) == 'x'


def test_the_reply_to_an_interrupted_request_is_not_taken_for_the_next_one(monkeypatch):
  template = ChatTemplate('{{ messages[0].content }}')

  def interrupted(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(chat_lib, '_read', interrupted)
    template.render([{'role': 'user', 'content': 'of the first'}])
  assert template.render(MESSAGES) == 'x'


def test_messages_that_cannot_be_sent_are_refused():
  with pytest.raises(ChatTemplateError, match='must consist of plain values'):
    ChatTemplate('').render([{'role': 'user', 'content': lambda: None}])


def test_the_worker_answers_without_a_process():
  """The same function in this process, where coverage sees it."""
  env = chat_worker.environment()
  assert chat_worker.answer(env, {}, '{{ x }}', {'x': 'é'}) == {'text': 'é'}
  assert chat_worker.answer(env, {}, '{{ x }}', None) == {'text': ''}
  assert chat_worker.answer(env, {}, '{{ 1 + "a" }}', {})['error'].startswith('line 1 of the template: TypeError')
  assert 'more than' in chat_worker.answer(env, {}, '{{ x * 2 }}', {'x': 'x' * chat_worker.MAX_OUTPUT})['error']
  many = dict.fromkeys(map(str, range(chat_worker._CACHED)))
  assert chat_worker.answer(env, many, 'a', {}) == {'text': 'a'} and len(many) == 1


def test_a_stopped_process_has_ended_and_its_pipes_are_closed():
  ChatTemplate('{{ messages[0].content }}')
  process = chat_lib._WORKER._process
  chat_lib._WORKER.stop()
  assert process.returncode is not None and process.stdin.closed and process.stdout.closed and chat_lib._WORKER._process is None
  chat_lib._WORKER.stop()  # there is none
  assert ChatTemplate('{{ messages[0].content }}z').render(MESSAGES) == 'xz'
  assert chat_lib._WORKER._process.pid != process.pid


def test_limits_are_those_of_the_documentation():
  """1 GiB of memory, 5 s of processor time and 16 million characters for each text (docs/checkpoints.md)."""
  assert chat_worker.TOO_LARGE == 'needs more than 1,024 MiB of memory' and chat_worker.SECONDS == 5
  assert chat_worker.TOO_LONG == 'gives a text of more than 16,777,216 characters'


def test_an_output_may_have_the_largest_length(monkeypatch):
  monkeypatch.setattr(chat_worker, 'MAX_OUTPUT', 6)
  env = chat_worker.environment()
  assert chat_worker.answer(env, {}, '{{ x * 2 }}', {'x': 'abc'}) == {'text': 'abcabc'}
  assert chat_worker.answer(env, {}, '{{ x * 2 }}a', {'x': 'abc'}) == {'error': chat_worker.TOO_LONG}


def test_up_to_thirty_two_compiled_templates_are_kept():
  env, compiled = chat_worker.environment(), {}
  for i in range(32):
    assert chat_worker.answer(env, compiled, f'{i}', {}) == {'text': f'{i}'}
  kept = compiled['3']
  assert chat_worker.answer(env, compiled, '3', {}) == {'text': '3'} and len(compiled) == 32 and compiled['3'] is kept
  assert chat_worker.answer(env, compiled, 'one more', None) == {'text': ''} and list(compiled) == ['one more']


def test_messages_of_errors_are_one_line_of_three_hundred_characters():
  line = chat_worker._one_line
  assert line(jinja2.TemplateError('x' * 400)) == 'x' * 300 and line(jinja2.TemplateError('a \n b')) == 'a b'
  assert line(jinja2.TemplateError('x' + ' ' * 598 + 'yz')) == 'x y'  # of the first six hundred
  assert line(jinja2.TemplateError('')) == 'TemplateError: ' and line(ValueError('a')) == 'ValueError: a'
  env = chat_worker.environment()
  assert chat_worker.answer(env, {}, "a\n{{ raise_exception('b') }}", {}) == {'error': 'line 2 of the template: b'}
  assert chat_worker._line(ValueError()) == ''  # raised outside of templates


def test_names_of_namespaces():
  env = chat_worker.environment()
  source = '{% set ns = namespace({"a": 1}, b=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ ns.b }}'
  assert chat_worker.answer(env, {}, source, {}) == {'text': '32'}
  for bad in ('namespace({"_a": 1})', 'namespace(_a=1)', 'namespace([("_a", 1)])'):
    assert "'_a': names that begin with an underscore" in chat_worker.answer(env, {}, '{% set ns = ' + bad + ' %}', {})['error']


def test_replies_follow_requests_until_there_are_no_more(monkeypatch):
  timers = []
  monkeypatch.setattr(chat_worker.signal, 'setitimer', lambda kind, seconds: timers.append((kind, seconds)))
  requests = [pickle.dumps(request) for request in (('{{ x }}', {'x': 'é'}), ('{{', None), ('{{ f() }}', {'f': all_memory}), ('never', {}))]
  replies = io.BytesIO()
  chat_worker.serve(io.BytesIO(b''.join(chat_worker.LENGTH.pack(len(data)) + data for data in requests)), replies)
  replies.seek(0)
  read = []
  while header := replies.read(8):
    read.append(json.loads(replies.read(int.from_bytes(header, 'little'))))
  assert read[0] == {'text': 'é'} and list(read[1]) == ['syntax'] and read[2:] == [{'error': chat_worker.TOO_LARGE}]
  assert timers == [(signal.ITIMER_PROF, chat_worker.SECONDS), (signal.ITIMER_PROF, 0)] * 3


def all_memory():
  raise MemoryError
