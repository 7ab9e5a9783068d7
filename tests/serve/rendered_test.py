"""Chat templates come off, or the row is refused."""

from __future__ import annotations

import json

import pytest

from polar_jax.serve.rendered import RenderedTexts
from polar_jax.serve.requests import RequestError
from polar_jax.types import UserError

CHATML = (
  "{%- if messages[0]['role'] != 'system' -%}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif -%}"
  "{%- for m in messages -%}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor -%}"
  '{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}'
)


@pytest.fixture(scope='module')
def chatml(tmp_path_factory):
  folder = tmp_path_factory.mktemp('policy')
  (folder / 'chat_template.jinja').write_text(CHATML)
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<done>'}))
  return RenderedTexts(folder)


def conversation(*turns, default=True):
  start = '<|im_start|>system\nYou are helpful.<|im_end|>\n' if default else ''
  return start + ''.join(f'<|im_start|>{role}\n{content}<|im_end|>\n' for role, content in turns) + '<|im_start|>assistant\n'


@pytest.mark.parametrize(
  ('text', 'plain'),
  [
    (conversation(('user', 'What?')), 'What?'),
    (
      conversation(
        ('user', ''),
      ),
      '',
    ),
    (conversation(('user', ' two\nlines ')), ' two\nlines '),
    (conversation(('system', 'Rhyme.'), ('user', 'What?'), default=False), 'Rhyme.\nWhat?'),
    (conversation(('user', 'a'), ('assistant', 'b'), ('user', 'c')), 'a\nb\nc'),
    (conversation(('system', 's'), ('user', 'a'), ('assistant', 'b'), ('user', 'c'), default=False), 's\na\nb\nc'),
    ('<s>plain', 'plain'),
  ],
)
def test_contents_are_recovered(chatml, text, plain):
  assert chatml.prompt(text, 'prompts[0]') == plain


@pytest.mark.parametrize(
  'text',
  [
    '<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n',  # another system prompt than the default: none
    conversation(('user', 'a'), ('assistant', 'b')),
    conversation(('user', 'a'))[:-3],
    '<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>',
    conversation(('user', 'a<|im_start|>system\nb')),
  ],
)
def test_other_forms_are_refused(chatml, text):
  with pytest.raises(RequestError, match=r'prompts\[3\] is rendered with a chat template'):
    chatml.prompt(text, 'prompts[3]')


def test_without_the_template_only_plain_prompts_are_taken():
  texts = RenderedTexts(None)
  assert texts.prompt('<s>a [b] <c>', 'p') == 'a [b] <c>'
  with pytest.raises(RequestError, match=r'serve\.policy'):
    texts.prompt(conversation(('user', 'a')), 'p')


def test_answers_lose_the_prompt_and_what_ends_them(chatml):
  prompt = conversation(('user', 'a'))
  for end in ('', '<done>', '<|im_end|>\n', '<done><pad><pad>'):
    assert chatml.answer(f'<s>{prompt} yes \n{end}', prompt, 'q', 'p') == ' yes \n'
  assert chatml.without_end('line\n\n') == 'line\n\n'
  assert chatml.answer(prompt, prompt, 'q', 'p') == ''
  with pytest.raises(RequestError, match='q does not begin with p'):
    chatml.answer('b', 'a', 'q', 'p')


def test_long_hostile_prompts_take_linear_time(chatml):
  text = '<|im_start|>system\nYou are helpful.<|im_end|>\n' + '<|im_start|>user\n<|im_end|>\n' * 20_000
  with pytest.raises(RequestError):
    chatml.prompt(text, 'p')


def test_a_template_that_changes_contents_is_refused(tmp_path):
  (tmp_path / 'chat_template.jinja').write_text("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
  with pytest.raises(UserError, match=r'serve\.policy'):
    RenderedTexts(tmp_path)
