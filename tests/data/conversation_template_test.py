"""Reward models that read a conversation: what is rendered, what is refused, and which of the two templates a setting opens."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from polar_jax.config import TemplateConfig
from polar_jax.data.chat import NoChatTemplateError
from polar_jax.data.conversation_template import ConversationTemplate, open_template
from polar_jax.data.template import Template, TemplateError, Truncated
from polar_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from polar_jax.data.vocabulary import VocabularyError
from polar_jax.types import Triplet

BOS, TURN = 256, 257
CHAT = '{{ bos_token }}{% for m in messages %}<t>{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<t>{% endif %}'


@pytest.fixture
def tokenizer(tmp_path):
  """Bytes by their symbols, then `<s>`, which is put before a text, `<t>` and `<r>`, with a chat template next to them."""
  return make(tmp_path, CHAT)


def make(folder, chat):
  model = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
  model.add_special_tokens(['<s>', '<t>', '<r>'])
  model.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', BOS)])
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'bos_token': '<s>', 'chat_template': chat}))
  return open_tokenizer(folder)


def ids(tokenizer, *turns):
  return [BOS, *(i for turn in turns for i in (TURN, *tokenizer.encode(turn)))]


def test_prompt_and_candidate_are_one_conversation_read_at_its_last_token(tokenizer):
  template = ConversationTemplate(TemplateConfig(), tokenizer)
  pair = (ids(tokenizer, 'uwhy', 'aso'), ids(tokenizer, 'uwhy', 'ano'))
  assert template.reads_roles and not template.config.use_reference
  assert (template.separator_id, template.reward_token_id) == (None, None)
  assert template.encode(Triplet('why', 'a reference', 'so', 'no')) == pair
  for alone in (False, True):
    assert template.encode_candidates('why', 'r', ['so', 'no'], 'pretrain', alone) == list(pair)
  asked = [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': 'why'}]
  assert template.encode_candidates(asked, '', [[{'role': 'tool', 'content': 'so'}]]) == [ids(tokenizer, 'sx', 'uwhy', 'tso')]
  with_token = ConversationTemplate(TemplateConfig(reward_token_id=258), tokenizer)
  assert with_token.encode_candidates('why', '', ['so']) == [[*pair[0], 258]]
  assert template.most_tokens(Triplet('p', 'r', 'c', 'd')) is None
  assert template.truncated(Triplet('p', 'r', 'c', 'd')) == Truncated(responses=False, prompt=False)


def test_texts_for_a_server_leave_out_what_it_adds(tokenizer, tmp_path):
  template = ConversationTemplate(TemplateConfig(), tokenizer)
  assert template.candidate_texts('why', 'r', ['so', 'no']) == ['<t>uwhy<t>aso', '<t>uwhy<t>ano']
  with_token = ConversationTemplate(TemplateConfig(reward_token='<r>', reward_token_id=258), tokenizer)
  assert with_token.candidate_texts('why', 'r', ['so']) == ['<t>uwhy<t>aso<r>']
  (tmp_path / 'other').mkdir()
  # The second conversation alone lacks the BOS that the server would add.
  sometimes = make(tmp_path / 'other', "{% if messages[1].content == 'so' %}<s>{% endif %}{{ messages[1].content }}")
  with pytest.raises(TemplateError, match="would put '<s>' before each text"):
    ConversationTemplate(TemplateConfig(), sometimes).candidate_texts('why', 'r', ['so', 'no'])
  assert ConversationTemplate(TemplateConfig(), sometimes).candidate_texts('why', 'r', ['so']) == ['so']


def test_what_cannot_be_a_conversation_is_named(tokenizer):
  template = ConversationTemplate(TemplateConfig(), tokenizer)
  for call in (template.encode_candidates, template.candidate_texts):
    with pytest.raises(TemplateError, match="wrapper is 'chat'"):
      call('p', 'r', ['c'], 'chat')
    with pytest.raises(TemplateError, match=r'candidates\[1\] must be a string or a list of messages, not int'):
      call('p', 'r', ['c', 3])
    with pytest.raises(TemplateError, match='prompt must be a string or a list of messages, not null'):
      call(None, 'r', ['c'])
    with pytest.raises(TemplateError, match=r'prompt\[1\] has no role'):
      call([{'role': 'user', 'content': 'a'}, {'content': 'b'}], 'r', ['c'])
    with pytest.raises(TemplateError, match=r'candidates\[0\]\[0\] has no role'):
      call('p', 'r', [[{'role': 3, 'content': 'b'}]])
  with pytest.raises(NoChatTemplateError, match='the byte tokenizer has no chat template'):
    ConversationTemplate(TemplateConfig(), ByteTokenizer())


def test_a_conversation_may_fill_the_length_and_no_more(tokenizer):
  size = len(ids(tokenizer, 'uwhy', 'aso'))
  assert ConversationTemplate(TemplateConfig(max_length=size), tokenizer).encode_candidates('why', '', ['so'])
  with pytest.raises(TemplateError, match=rf'candidates\[0\]: the conversation has {size} tokens, more than .*\({size - 1}\)'):
    ConversationTemplate(TemplateConfig(max_length=size - 1), tokenizer).encode_candidates('why', '', ['so'])
  with pytest.raises(TemplateError, match=f'has {size + 1} tokens'):  # with the reward token
    ConversationTemplate(TemplateConfig(max_length=size, reward_token_id=258), tokenizer).encode_candidates('why', '', ['so'])


def test_the_setting_decides_which_template_is_opened(tokenizer):
  assert type(open_template(TemplateConfig(chat='always'), tokenizer)) is ConversationTemplate
  for chat in ('auto', 'never'):
    assert type(open_template(TemplateConfig(chat=chat), ByteTokenizer(), 261, 'm')) is Template
  open_template(TemplateConfig(), ByteTokenizer())  # an embedding of any size
  with pytest.raises(VocabularyError, match=r'^some/model: its embedding has 260 rows'):
    open_template(TemplateConfig(), ByteTokenizer(), 260, 'some/model')
  assert open_template(TemplateConfig(chat='always'), tokenizer, 259, 'm').tokenizer is tokenizer
  with pytest.raises(VocabularyError, match=r'^the model: its embedding has 258 rows'):
    open_template(TemplateConfig(chat='always'), tokenizer, 258)
