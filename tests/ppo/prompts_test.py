from __future__ import annotations

import json

import pytest
import tokenizers
from optional import transformers
from tokenizers import decoders, models, pre_tokenizers

from polar_jax.config import ConfigError
from polar_jax.data.chat import ChatTemplate, ChatTemplateError
from polar_jax.data.examples import open_prompts
from polar_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from polar_jax.ppo import prompts as prompts_lib
from polar_jax.ppo.prompts import PolicyPrompts, open_chat, stop_ids
from polar_jax.types import Prompt, UserError

BYTES = ByteTokenizer()
CHAT = (
  "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ '\n' if m.role == 'user' else '</s>' }}{% endfor %}"
  '{% if add_generation_prompt %}a:{% endif %}'
)
TURNS = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'U'}]


def chat():
  return ChatTemplate(CHAT, {'bos_token': '<s>'})


def text(ids):
  return BYTES.decode(ids, skip_special=False)


def test_policy_prompts_with_and_without_a_chat_template():
  rows = [Prompt('Why?', 'r'), Prompt(TURNS, 'r'), Prompt('seen', 'r', metadata={'policy_prompt': TURNS}), Prompt('<s>', 'r')]
  with_chat = PolicyPrompts(rows, BYTES, chat(), 100)
  assert [text(ids) for _, ids in with_chat] == [
    '<s>u:Why?\na:',
    '<s>s:S</s>u:U\na:',
    '<s>s:S</s>u:U\na:',
    '<s>u:\na:',  # the template writes the only control token
  ]
  assert [ids.count(BYTES.bos_id) for _, ids in with_chat] == [1, 1, 1, 1]
  plain = PolicyPrompts(rows, BYTES, None, 100)
  assert [text(ids) for _, ids in plain] == ['<s>Why?', '<s>S\nU', '<s>S\nU', '<s><s>']
  assert [text(ids) for _, ids in PolicyPrompts(rows, BYTES, None, 100, bos=False)] == ['Why?', 'S\nU', 'S\nU', '<s>']
  prompt, ids = plain[2]
  assert prompt is rows[2] and isinstance(ids, list) and type(ids[0]) is int
  assert plain[-1] == plain[3] and plain[1:3] == [plain[1], plain[2]] and len(plain) == 4
  with pytest.raises(IndexError):
    plain[4]


def test_order_is_kept_over_many_chunks_and_threads(monkeypatch):
  monkeypatch.setattr(prompts_lib, '_CHUNK', 3)
  rows = [Prompt('ab' * (i * 7919 % 101), 'r') for i in range(1, 500)]
  read = PolicyPrompts(rows, BYTES, None, 150)
  wanted = [i for i, row in enumerate(rows) if len(row.prompt) + 1 <= 150]
  assert read.longest == max(len(rows[i].prompt) for i in wanted) + 1
  assert read.kept == wanted and sorted(read.kept + read.dropped) == list(range(len(rows)))
  assert [(prompt, text(ids)) for prompt, ids in read] == [(rows[i], '<s>' + rows[i].prompt) for i in wanted]


def test_long_prompts_are_left_out_and_reported():
  lines = []
  rows = [Prompt('x' * n, 'r') for n in (9, 10, 2, 30, 9)]
  read = PolicyPrompts(rows, BYTES, None, 10, log=lines.append)  # nine letters and a BOS
  assert (read.kept, read.dropped, [len(ids) for _, ids in read]) == ([0, 2, 4], [1, 3], [10, 3, 10])
  assert lines == ['left out 2 of 5 prompts with more than 10 tokens (numbers 1, 3)']
  assert read[1] == (rows[2], BYTES.encode('xx', add_bos=True))
  PolicyPrompts([Prompt('x' * 20, 'r')] * 9 + rows, BYTES, None, 10, log=lines.append)
  assert lines[1] == 'left out 11 of 14 prompts with more than 10 tokens (numbers 0, 1, 2, 3, 4, ...)'
  PolicyPrompts(rows, BYTES, None, 31, log=lines.append)
  assert len(lines) == 2
  with pytest.raises(UserError, match=r'all of the 5 prompts have more than 2 tokens; raise rft\.rollout\.max_prompt'):
    PolicyPrompts(rows, BYTES, None, 2)


def test_prompts_that_cannot_be_rendered_are_named():
  strict = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x")
  with pytest.raises(ChatTemplateError, match=r'prompt 1: .*no system role'):
    PolicyPrompts([Prompt('p', 'r'), Prompt(TURNS, 'r')], BYTES, strict, 10)
  with pytest.raises(UserError, match='prompt 1 has no tokens, so the policy has nothing to respond to'):
    PolicyPrompts([Prompt('p', 'r'), Prompt('', 'r')], BYTES, None, 10, bos=False)


def write_tokenizer(folder, **settings):
  """A byte-level BPE without merges, with three added tokens (256, 257, 258)."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  model.add_special_tokens(['<end>', '<turn>', '<other>'])
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<end>', **settings}))
  return open_tokenizer(folder)


def test_stop_ids(tmp_path):
  end, turn, other = 256, 257, 258
  tokenizer = write_tokenizer(tmp_path)
  closing = ChatTemplate('{% for m in messages %}{{ m.content }}\n <turn>\n{% endfor %}')
  assert stop_ids(tokenizer, None, None) == (end,)
  assert stop_ids(tokenizer, None, None, closing) == (turn, end)  # the first ends a response in training text
  assert stop_ids(tokenizer, tmp_path, None) == (end,)
  (tmp_path / 'config.json').write_text(json.dumps({'eos_token_id': other}))
  assert stop_ids(tokenizer, tmp_path, None) == (end, other)
  (tmp_path / 'generation_config.json').write_text(json.dumps({'eos_token_id': [turn, end, other]}))
  assert stop_ids(tokenizer, tmp_path, None) == (end, turn, other)
  assert stop_ids(tokenizer, tmp_path, None, closing) == (turn, end, other)
  # A template that ends a response with plain text, or accepts no response, adds nothing.
  for source in ('{% for m in messages %}{{ m.content }} Bye{% endfor %}', '{{ raise_exception("no") }}', '{{ messages[-1].content }}'):
    assert stop_ids(tokenizer, None, None, ChatTemplate(source)) == (end,)
  assert stop_ids(tokenizer, tmp_path, ' <other>  <turn> ', closing) == (other, turn)
  assert stop_ids(tokenizer, tmp_path, '') == ()
  for given, bad in (('<turn> stop', 'stop'), ('<turn><end>', '<turn><end>')):
    with pytest.raises(ConfigError, match=rf"rft\.rollout\.stop: '{bad}' is not a special token"):
      stop_ids(tokenizer, None, given)
  assert stop_ids(BYTES, None, None) == (BYTES.eos_id,)


def test_no_stop_token_is_an_error(tmp_path):
  tokenizer = write_tokenizer(tmp_path, eos_token=None)
  assert tokenizer.eos_id is None
  with pytest.raises(ConfigError, match=r'no token ends a response.*rft\.rollout\.stop'):
    stop_ids(tokenizer, tmp_path, None)


def test_open_chat(tmp_path):
  write_tokenizer(tmp_path)
  assert open_chat(tmp_path, 'auto') is None and open_chat(tmp_path / 'missing', 'auto') is None
  (tmp_path / 'chat_template.jinja').write_text('{{ messages[0].content }}{{ eos_token }}')
  assert open_chat(tmp_path, 'auto').render(TURNS) == 'S<end>' and open_chat(tmp_path, 'none') is None


@pytest.mark.long
@pytest.mark.needs('transformers')
@pytest.mark.data
def test_real_prompts_equal_transformers(data_folder):
  folder = data_folder / 'tokenizers/qwen3'
  theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  rows = open_prompts(data_folder / 'prompts/gsm8k_train.jsonl.gz', 'train')[:700]
  tokenizer, template = open_tokenizer(folder), open_chat(folder, 'auto')
  read = PolicyPrompts(rows, tokenizer, template, 1024)
  assert len(read) == len(rows)
  for i in range(0, len(rows), 97):
    conversation = [{'role': 'user', 'content': rows[i].prompt}]
    expected = theirs.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert read[i] == (rows[i], expected)
  turn, document = (theirs.convert_tokens_to_ids(token) for token in ('<|im_end|>', '<|endoftext|>'))
  assert stop_ids(tokenizer, None, None, template)[0] == turn and set(stop_ids(tokenizer, folder, None, template)) <= {turn, document}
