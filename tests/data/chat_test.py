from __future__ import annotations

import json
import os
import pathlib
import pickle
import resource
import subprocess
import sys
import time
import types

import jinja2
import pytest
from optional import transformers

from polar_jax.data import chat as chat_lib
from polar_jax.data import chat_worker
from polar_jax.types import UserError

CONVERSATIONS = [
  [{'role': 'user', 'content': 'Hi'}],
  [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': ' two  spaces \n'}, {'role': 'assistant', 'content': ''}],
  [
    {'role': 'user', 'content': 'naïve 日本語 🦊 <b>&\'"</b>'},
    {'role': 'assistant', 'content': 'e\u0301'},
    {'role': 'user', 'content': '<|im_end|>'},
  ],
  [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': '<think>\nhm\n</think>\n\nyes'}, {'role': 'user', 'content': 'y'}],
  [
    {'role': 'user', 'content': 'call'},
    {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'f', 'arguments': {'é': [1, None, '<']}}}]},
    {'role': 'tool', 'content': '42'},
    {'role': 'user', 'content': [{'type': 'text', 'text': 'part'}]},
  ],
]
TOOLS = [{'type': 'function', 'function': {'name': 'f', 'description': 'désc <&>', 'parameters': {'b': 1, 'a': [True]}}}]

TEMPLATES = {
  'loops and whitespace': """
    {%- for message in messages %}
      {% if loop.first and message.role != 'system' %}
  <<first>>
      {% endif %}
      {% if message.role == 'tool' %}{% continue %}{% endif %}
      {% if loop.index0 > 2 %}{% break %}{% endif %}
      {{- '[' ~ loop.index ~ '/' ~ messages|length ~ '] ' + message['role'] + ': ' }}
      {{ message.content }}
    {% endfor %}
  {% if add_generation_prompt %}{{ bos_token }}go{% endif %}
""",
  'namespace, set, macro, slices': """
{%- macro show(m, tag='t') %}<{{ tag }}>{{ m.content|default('none')|string|trim }}</{{ tag }}>{% endmacro -%}
{%- set ns = namespace(n=0, last=none, self='s') -%}
{%- for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% set ns.last = m %}{{ show(m, tag=m.role) }}{% endfor -%}
{{ ns.n }} {{ ns.self }} {{ ns.last.role }} {{ messages[1:]|map(attribute='role')|join(',') }} {{ dict(a=1, **{'b': 2}) }}
{{- 'x'.upper() }} {{ range(3)|list }} {{ 'abc'[-1] }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }}
""",
  'tojson': '{{ messages|tojson }}\n{{ messages[0]|tojson(indent=2, sort_keys=true) }}\n{{ messages|tojson(ensure_ascii=true) }}'
  "{{ tools|tojson(separators=(',', ':')) if tools else 'no tools' }}{{ documents is none }}",
  'generation': '{% for m in messages %}{% set x = 1 %}{{ m.role }}\n{% if m.role == "assistant" %}\n  {% generation %}\n'
  '  {% set x = 2 %}\n'
  '{{ m.content }}{{ eos_token }}{{ loop.index }}\n  {% endgeneration %}\n{% endif %}{{ x }}{% endfor %}',
  'variables': "{{ enable_thinking is defined }} {{ tools is defined }} {{ unk_token is defined }} {{ bos_token|default('no bos') }}"
  "{{ strftime_now('%Y')|length }}{{ pad_token }}{{ missing }}",
  'raises': "{% if messages[0].role == 'system' %}{{ raise_exception('no system role, please') }}{% endif %}{{ messages[0].content }}",
  'turns of user and model': """
{{- bos_token|default('<bos>') }}
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}
  {%- if (m.role == 'user') == (loop.index0 % 2 == 1) %}{{ raise_exception('user and assistant must take turns') }}{% endif %}
  {%- set role = 'model' if m.role == 'assistant' else m.role %}
  {{- '<start_of_turn>' ~ role ~ '\\n' ~ (system if loop.first else '') }}
  {%- if m.content is string %}{{ m.content|trim }}
  {%- elif m.content is iterable %}
    {%- for part in m.content %}{{ '<start_of_image>' if part.type == 'image' else part.text|trim }}{% endfor %}
  {%- else %}{{ raise_exception('no content') }}{% endif %}
  {{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
""",
  'type error': "{{ 'a' + (messages|length if messages|length > 1 else 'b') }}",
}


@pytest.fixture(scope='module')
def qwen(data_folder):
  return transformers.AutoTokenizer.from_pretrained(data_folder / 'tokenizers/qwen3', local_files_only=True)


def both(template, tokenizer, conversation, source=None, **variables):
  """Return our rendering and that of transformers; None where one raises."""
  try:
    theirs = tokenizer.apply_chat_template(conversation, chat_template=source, tokenize=False, **variables)
  except (jinja2.TemplateError, TypeError, ValueError):
    theirs = None
  try:
    ours = template.render(conversation, **variables)
  except UserError as error:
    assert '\n' not in str(error)
    ours = None
  return ours, theirs


@pytest.mark.needs('transformers')
@pytest.mark.data
def test_qwen_equals_transformers(qwen, data_folder):
  template = chat_lib.ChatTemplate.from_folder(data_folder / 'tokenizers/qwen3')
  rendered = 0
  for conversation in CONVERSATIONS:
    for variables in ({}, {'enable_thinking': False}, {'tools': TOOLS}):
      for add_generation_prompt in (False, True):
        ours, theirs = both(template, qwen, conversation, add_generation_prompt=add_generation_prompt, **variables)
        assert ours == theirs
        rendered += ours is not None
  assert rendered >= 24


@pytest.mark.needs('transformers')
@pytest.mark.data
@pytest.mark.parametrize('name', TEMPLATES)
def test_every_feature_equals_transformers(qwen, name):
  # All renderings share the template object, so nothing of one may leak into the next.
  tokens = {key: value for key, value in qwen.special_tokens_map.items() if isinstance(value, str)}
  template = pickle.loads(pickle.dumps(chat_lib.ChatTemplate(TEMPLATES[name], tokens)))
  rendered = 0
  for conversation in CONVERSATIONS:
    for variables in ({}, {'tools': TOOLS, 'enable_thinking': True}, {'bos_token': '<BOS>'}):
      for add_generation_prompt in (False, True):
        ours, theirs = both(template, qwen, conversation, TEMPLATES[name], add_generation_prompt=add_generation_prompt, **variables)
        assert ours == theirs
        rendered += ours is not None
  assert rendered >= 6


def write(folder, **files):
  for name, content in files.items():
    (folder / name.replace('__', '.')).write_text(content if isinstance(content, str) else json.dumps(content))
  return folder


def test_files_in_which_a_template_is_found(tmp_path):
  messages = [{'role': 'user', 'content': 'é'}]
  settings = {'bos_token': {'content': '<s>'}, 'eos_token': None, 'pad_token': '<pad>'}
  source = '{{ bos_token }}|{{ eos_token is defined }}|{{ pad_token }}|{{ messages[0].content }}|{{ add_generation_prompt }}'
  write(tmp_path, tokenizer_config__json={**settings, 'chat_template': source})
  assert chat_lib.ChatTemplate.from_folder(tmp_path).render(messages) == '<s>|False|<pad>|é|True'
  named = [{'name': 'tool_use', 'template': 'tools'}, {'name': 'default', 'template': 'default {{ bos_token }}'}]
  write(tmp_path, tokenizer_config__json={**settings, 'chat_template': named})
  assert chat_lib.ChatTemplate.from_folder(tmp_path).render(messages) == 'default <s>'
  write(tmp_path, chat_template__jinja='{{ bos_token }} from its own file\n')
  assert chat_lib.ChatTemplate.from_folder(tmp_path).render(messages) == '<s> from its own file'


def test_bad_templates_are_one_line(tmp_path):
  messages = [{'role': 'user', 'content': 'x'}]
  with pytest.raises(chat_lib.NoChatTemplateError, match='has no chat template'):
    chat_lib.ChatTemplate.from_folder(tmp_path)
  for value, message in (
    ('{% for m in messages %}', r'tokenizer_config\.json: chat_template: not a Jinja template: line 1: .*endfor'),
    ([{'name': 'rag', 'template': ''}], "no template named 'default', only: rag"),
    (3, 'must be a string or a list'),
  ):
    write(tmp_path, tokenizer_config__json={'chat_template': value})
    with pytest.raises(chat_lib.ChatTemplateError, match=message) as error:
      chat_lib.ChatTemplate.from_folder(tmp_path)
    assert '\n' not in str(error.value)
  for source, message in (
    ("a\n{{ raise_exception('only\nusers') }}", r'here: line 2 of the template: only users$'),
    ('{{ messages[3].content }}', 'line 1 of the template: .*no element 3'),
    ("{{ 'a' + 1 }}", 'TypeError: '),
    ('{{ messages.append(1) }}', 'unsafe|not safely'),
    ("{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", 'unsafe'),
    ('{% set ns = namespace() %}{% set ns.__len__ = 1 %}', 'underscore'),
    ("{% set ns = namespace({'__class__': 1}) %}", 'underscore'),
    ('{{ dict.fromkeys([1]) }}', 'fromkeys'),
  ):
    with pytest.raises(chat_lib.ChatTemplateError, match=message) as error:
      chat_lib.ChatTemplate(source, where='here').render(messages)
    assert '\n' not in str(error.value)
  for bad, message in (([], 'no messages'), (['x'], r'messages\[0\] must be a message')):
    with pytest.raises(chat_lib.ChatTemplateError, match=message):
      chat_lib.ChatTemplate('').render(bad)


def test_whether_a_folder_has_a_template_usable_or_not(tmp_path):
  assert not chat_lib.ChatTemplate.exists(tmp_path)
  for value, expected in ((None, False), ('{{', True), (3, True), ('', True)):
    write(tmp_path, tokenizer_config__json={'chat_template': value})
    assert chat_lib.ChatTemplate.exists(tmp_path) is expected
  write(tmp_path, tokenizer_config__json={}, chat_template__jinja='{{')
  assert chat_lib.ChatTemplate.exists(tmp_path)


def test_null_keys_of_messages_are_absent_and_variables_replace_tokens():
  source = '{{ messages[0].name is defined }}{{ bos_token }}{{ tools }}{{ documents }}{{ add_generation_prompt }}'
  template = chat_lib.ChatTemplate(source, {'bos_token': '<s>'})
  assert template.render([{'role': 'user', 'name': None}]) == 'False<s>NoneNoneTrue'
  assert template.render([{'role': 'user', 'name': 'n'}], add_generation_prompt=False, bos_token='b', tools=[]) == 'Trueb[]NoneFalse'
  assert chat_lib.ChatTemplate('x').special_tokens == {} and chat_lib.ChatTemplate('x').where == 'chat template'


def test_a_reply_that_does_not_come_in_time_is_none():
  receiver, sender = os.pipe()
  with os.fdopen(receiver, 'rb') as stdout:
    process, later = types.SimpleNamespace(stdout=stdout), time.monotonic() + 30
    os.write(sender, b'abcd')
    assert chat_lib._read(process, 3, later) == b'abc' and chat_lib._read(process, 0, later) == b''
    started = time.monotonic()
    assert chat_lib._read(process, 2, started + 0.2) is None  # of which one is there
    assert 0.1 < time.monotonic() - started < 20
    os.write(sender, b'ef')
    assert chat_lib._read(process, 2, started) == b'ef'  # what is there is read even after the deadline
    os.close(sender)
    assert chat_lib._read(process, 1, later) is None


def test_a_forked_process_leaves_the_worker_to_its_parent():
  code = """
import os
from polar_jax.data import chat
template = chat.ChatTemplate('{{ messages[0].content }}')
child = os.fork()
if child:
  os.waitpid(child, 0)
print(template.render([{'role': 'user', 'content': 'child' if child == 0 else 'parent'}]), chat._WORKER._process.pid, flush=True)
"""
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  run = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
  (child, own), (parent, first) = (line.split() for line in run.stdout.splitlines())
  assert (child, parent) == ('child', 'parent') and own != first


def test_the_worker_has_its_limits_and_needs_no_path_of_this_process(monkeypatch):
  root = pathlib.Path(__file__).parents[2]
  monkeypatch.setattr(sys, 'path', [path for path in sys.path if path and pathlib.Path(path).resolve() != root])
  worker = chat_lib._Worker()
  assert worker.ask(pickle.dumps(('{{ x }}', {'x': 'y'}))) == {'text': 'y'}
  limits = [resource.prlimit(worker._process.pid, kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CORE)]
  worker.stop()
  assert limits == [chat_worker.MEMORY, 0]


def test_a_reply_is_awaited_in_milliseconds_until_the_deadline(monkeypatch):
  timeouts = []
  poll = types.SimpleNamespace(register=lambda *_: None, poll=timeouts.append)
  monkeypatch.setattr(chat_lib.select, 'poll', lambda: poll)
  monkeypatch.setattr(chat_lib.time, 'monotonic', lambda: 10.0)
  with open(os.devnull, 'rb') as stdout:
    for deadline in (10.25, 9.0):
      assert chat_lib._read(types.SimpleNamespace(stdout=stdout), 1, deadline) is None
  assert timeouts == [250.0, 0.0]


def test_a_reply_that_comes_in_parts_is_read_up_to_its_end(monkeypatch):
  receiver, sender = os.pipe()
  parts = [b'ab', b'cdef']
  monkeypatch.setattr(
    chat_lib.select, 'poll', lambda: types.SimpleNamespace(register=lambda *_: None, poll=lambda _: os.write(sender, parts.pop(0)))
  )
  with os.fdopen(receiver, 'rb') as stdout:
    assert chat_lib._read(types.SimpleNamespace(stdout=stdout), 3, time.monotonic() + 30) == b'abc'
    assert os.read(receiver, 9) == b'def'
  os.close(sender)
