"""Token ids of requests, the groups that they form, and the names of fields in the errors of templates."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from polar_jax.config import TemplateConfig
from polar_jax.data.conversation_template import ConversationTemplate
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from polar_jax.serve.encoding import Encoder
from polar_jax.serve.requests import Finished, Limits, Parts, RequestError, parse_score

TEMPLATE = Template(TemplateConfig(), ByteTokenizer())


def encoder(template=TEMPLATE, max_length=64, share=True):
  return Encoder(template, 261, max_length, share)


def parts(count=2, prompt='p', reference='r', outputs=None):
  outputs = [f'{i}' for i in range(count)] if outputs is None else outputs
  return Parts(prompt, reference, outputs, 'sft', ['prompt', 'reference', *(f'outputs[{i}]' for i in range(len(outputs)))])


def test_large_groups_are_divided_in_order():
  sources = [parts(3), parts(150), Finished('x[UNUSED_TOKEN_130]', 'text[0]'), parts(0), parts(1)]
  divided = encoder().divide(sources)
  assert max(sum(s.count for s in part) for part in divided) == 64
  items = [item.item.ids.tolist() for part in divided for item in encoder().encode(part)]
  assert items == [item.item.ids.tolist() for item in encoder().encode(sources)]
  assert len(items) == 155 and encoder().divide([]) == []
  with pytest.raises(RequestError, match=r'outputs\[149\] has 88 tokens'):
    for part in encoder().divide([parts(outputs=['x'] * 149 + ['x' * 80])]):
      encoder().encode(part)


def test_sequences_of_one_prompt_and_reference_form_a_group_wherever_they_come_from():
  (text,) = TEMPLATE.candidate_texts('p', 'r', ['finished'])
  items = encoder().encode([parts(2), Finished(text, 'text[0]'), parts(1, reference='other')])
  keys = [item.item.key for item in items]
  assert keys[0] == keys[1] == keys[2] != keys[3]
  assert items[0].item.shared == len(TEMPLATE.tokenizer.encode('p\nr<|reward|>', add_bos=True))
  alone = encoder(share=False).encode([parts(2)])
  assert alone[0].item.key != alone[1].item.key


@pytest.fixture
def chat(tmp_path):
  model = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
  model.add_special_tokens(['<s>', '<t>'])
  model.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 256)])
  model.save(str(tmp_path / 'tokenizer.json'))
  source = '{{ bos_token }}{% for m in messages %}<t>{{ m.role[0] }}{{ m.content }}{% endfor %}'
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'bos_token': '<s>', 'chat_template': source}))
  return ConversationTemplate(TemplateConfig(), open_tokenizer(tmp_path))


def test_models_that_read_conversations(chat):
  work = parse_score({'prompt': 'why', 'outputs': ['so', 'no']}, Limits(9, 99), False, 'm', True)
  parsed = encoder(chat).encode(work.sources)
  assert [item.item.ids.tolist() for item in parsed] == chat.encode_candidates('why', '', ['so', 'no'])
  assert parsed[0].item.key == parsed[1].item.key  # there is no separator, but they are of one group
  (text,) = chat.candidate_texts('why', '', ['so'])
  for finished in (text, '<s>' + text):
    (item,) = encoder(chat).encode([Finished(finished, 'text')])
    assert item.item.ids.tolist() == parsed[0].item.ids.tolist()


def test_errors_of_templates_name_the_fields_of_the_request(chat):
  bodies = [
    ({'prompt': 'why', 'outputs': ['a', [{'content': 'b'}]]}, 'outputs[1]'),
    ({'prompt': [{'content': 'why'}], 'outputs': ['a']}, 'prompt'),
  ]
  for body, field in bodies:
    for request, name in ((body, field), ([body], f'[0].{field}')):
      with pytest.raises(RequestError) as error:
        encoder(chat).encode(parse_score(request, Limits(9, 99), False, 'm', True).sources)
      assert error.value.param == name and str(error.value).startswith(f'{name}[0] has no role')
