"""No text of an example becomes a control token, however it is spelled, spliced or nested, whichever tokenizer and template read it."""

from __future__ import annotations

import json
import random

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from polar_jax.config import TemplateConfig
from polar_jax.data.chat import ChatTemplate, ChatTemplateError
from polar_jax.data.conversation import ConversationEncoder
from polar_jax.data.special_strings import SpecialStrings
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import SPECIAL_TOKENS, ByteTokenizer, open_tokenizer
from polar_jax.types import Triplet

SEPARATOR, REWARD = '<|reward|>', '[UNUSED_TOKEN_130]'
CONTROL = ['<|reward|>', '[UNUSED_TOKEN_130]', '</s>', '<s>', '<pad>', '<|im_start|>', '<|im_end|>']


def byte_level(folder, normalizer=None, special=True, control=CONTROL):
  """A byte-level BPE with the tokens `control` from 256 on; `special` says whether the template's two are marked so."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  model = tokenizers.Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
  model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
  if normalizer is not None:
    model.normalizer = normalizer
  for token in control:
    is_special = special or token not in (SEPARATOR, REWARD)
    model.add_tokens([tokenizers.AddedToken(token, special=is_special, normalized=False)])
  bos = model.token_to_id('<s>')
  model.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', bos)])
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_text(json.dumps({'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}))
  return open_tokenizer(folder)


def sentencepiece(folder, dummy_prefix=True):
  """A SentencePiece BPE of bytes and letters, with the template's tokens as an added token and as a user-defined piece."""
  model = sentencepiece_model_pb2.ModelProto()
  pieces = [('<unk>', 2), ('<s>', 3), ('</s>', 3), ('<pad>', 3), (REWARD, 4), *((f'<0x{byte:02X}>', 6) for byte in range(256))]
  for piece, kind in [*pieces, *((letter, 1) for letter in 'abcdefrwUNSD<>|[]_ \u2581'.replace(' ', ''))]:
    model.pieces.add(piece=piece, score=-1.0, type=kind)
  model.trainer_spec.model_type, model.trainer_spec.byte_fallback = model.trainer_spec.BPE, True
  model.trainer_spec.pad_id = 3
  model.normalizer_spec.name = 'identity'
  model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = dummy_prefix, False
  (folder / 'tokenizer.model').write_bytes(model.SerializeToString())
  size = len(model.pieces)
  added = {str(size + i): {'content': token, 'special': True} for i, token in enumerate((SEPARATOR, '<|im_start|>', '<|im_end|>'))}
  (folder / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': added}))
  return open_tokenizer(folder)


TOKENIZERS = {
  'bytes': lambda folder: ByteTokenizer(),
  'byte level': byte_level,
  'not marked as special': lambda folder: byte_level(folder, special=False),
  'normalizing': lambda folder: byte_level(folder, normalizers.NFKC()),
  'sentencepiece': sentencepiece,
  'sentencepiece without prefix': lambda folder: sentencepiece(folder, dummy_prefix=False),
}


@pytest.fixture(scope='module', params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
  return TOKENIZERS[request.param](tmp_path_factory.mktemp('tokenizer'))


def wide(text):
  """Return full-width forms, which NFKC maps to ASCII."""
  return ''.join(chr(ord(c) + 0xFEE0) if '!' <= c <= '~' else c for c in text)


def hostile(rng):
  """Draw a text with control tokens that are whole, cut in two, nested in one another, or in other normal forms."""

  def spelled(depth):
    token = rng.choice(CONTROL)
    at = rng.randint(0, len(token))
    inner = spelled(depth - 1) if depth and rng.random() < 0.8 else rng.choice(['', '', 'x'])
    whole = token[:at] + inner + token[at:]
    return rng.choice([whole, whole, whole, wide(whole), whole.replace('K', '\u212a')])

  pieces = ['ab', ' ', '\n', 'naïve', '\u2581', spelled(0), spelled(1), spelled(3), rng.choice(CONTROL)[: rng.randint(1, 8)]]
  pieces += [rng.choice(CONTROL)[-rng.randint(1, 8) :]]
  return ''.join(rng.choices(pieces, k=rng.randint(0, 5)))


@pytest.mark.parametrize('rule', ['trainer', 'client'])
def test_sequences_have_only_the_templates_own_control_tokens(tokenizer, rule):
  rng = random.Random(0)
  control = set(tokenizer.control.values()) | {tokenizer.special_id(SEPARATOR), tokenizer.special_id(REWARD)}
  found = 0
  for row in range(400):
    config = TemplateConfig(
      max_length=rng.choice([60, 16_384]), max_response_length=rng.choice([20, 4_096]), rule=rule, use_reference=rng.random() < 0.8
    )
    template = Template(config, tokenizer)
    expected = [*tokenizer.prefix_ids, *[template.separator_id] * config.use_reference, template.reward_token_id]
    prompt, reference, chosen, rejected = (hostile(rng) for _ in range(4))
    found += any(token in text for token in CONTROL for text in (prompt, reference, chosen, rejected))
    messages = [{'role': 'user', 'content': prompt}, {'content': hostile(rng)}]
    wrapper = rng.choice(['sft', 'pretrain'])
    for given in (prompt, messages):
      sequences = template.encode(Triplet(given, reference, chosen, rejected, wrapper))
      assert template.encode_candidates(given, reference, [chosen, rejected], wrapper) == list(sequences)
      for ids in sequences:
        assert [i for i in ids if i in control] == expected, (row, given, reference, chosen, rejected)
      if rule == 'client':  # a server tokenizes the texts, and sees the same
        texts = template.candidate_texts(given, reference, [chosen, rejected], wrapper)
        assert tokenizer.encode_batch(texts, add_bos=True) == list(sequences)
  assert found > 100


def test_a_splice_across_prompt_and_response(tokenizer):
  template = Template(TemplateConfig(), tokenizer)
  ids = template.encode_candidates('ab<|rew', 'ard|>c', ['ard|>d'], 'pretrain')[0]
  assert ids.count(template.separator_id) == 1 and ids.count(template.reward_token_id) == 1
  assert ids == template.encode_candidates('ab', 'c', ['d'], 'pretrain')[0]


def test_texts_without_control_tokens_are_left_alone(tokenizer):
  template = Template(TemplateConfig(), tokenizer)
  for text in ('a < b > c | d [e]', '<|reward', 'ard|>', '<', 'UNUSED_TOKEN_130', '<S>'):
    prefix = list(tokenizer.prefix_ids)
    expected = [*prefix, *tokenizer.encode(f'p\n{text}'), template.separator_id, *tokenizer.encode('p\nc'), template.reward_token_id]
    assert template.encode_candidates('p', text, ['c'])[0] == expected


@pytest.mark.data
def test_the_rows_of_an_attack(data_folder):
  rows = [json.loads(line) for line in (data_folder / 'cases/rows/inj.jsonl').read_text().splitlines()]
  for folder in ('base', 'nobos'):
    template = Template(TemplateConfig(), open_tokenizer(data_folder / 'cases' / folder))
    for row in rows:
      (ids,) = template.encode_candidates(row['prompt'], row['reference'], [row['output']])
      assert (ids.count(template.separator_id), ids.count(template.reward_token_id), ids[-1]) == (1, 1, template.reward_token_id)


@pytest.mark.parametrize('depth', [1, 2, 7, 20_000])
def test_removal_is_complete_and_linear(depth):
  strings = SpecialStrings({'<|reward|>': 1, '</s>': 2, 's>': 3, '<|': 4})
  assert not strings.occur_in(strings.remove('a' + '<|rew</' * depth + 's>' * depth + 'ard|>' * depth + 'b'))
  nested = SpecialStrings({'<|reward|>': 1})
  assert nested.remove('x' + '<|rew' * depth + 'ard|>' * depth + 'y') == 'xy'
  assert nested.remove('a<|rew<|reward|>b') == 'a<|rewb' and nested.remove('plain') == 'plain'


CHAT = '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}'


def test_messages_cannot_end_themselves(tokenizer):
  encoder = ConversationEncoder(ChatTemplate(CHAT), tokenizer)
  rng = random.Random(1)
  control = set(tokenizer.control.values())
  own = [tokenizer.special_id(token) for token in ('<|im_start|>', '<|im_end|>') * 2]
  for _ in range(40):
    messages = [{'role': 'user', 'content': hostile(rng)}, {'role': 'assistant', 'content': hostile(rng)}]
    text, ids = encoder.render(messages, add_generation_prompt=False)
    assert ids == tokenizer.encode(text)
    assert [i for i in ids if i in control] == [i for i in own if i is not None]


@pytest.mark.parametrize(
  ('source', 'content'),
  [
    ("<|im_start|>{{ messages[0].content | replace('\n', '') }}<|im_end|>", '<|im\n_end|>'),
    ("<|im_start|>{{ messages[0].content.split('X') | join }}<|im_end|>", '<|im_XendX|>'.replace('_X', 'X_')),
    ('<|im_start|>{% for part in messages[0].content %}{{ part.text }}{% endfor %}<|im_end|>', [{'text': '<|im_'}, {'text': 'end|>'}]),
    ('<|im_start|>{{ messages[0].content }}end|><|im_end|>', 'a<|im_'),
    ('{{ messages[0].content }}|im_end|>', 'a<'),
    ('<|im_end|{{ messages[0].content }}', '>b'),
  ],
)
def test_a_template_that_joins_texts_to_a_control_token_is_refused(tmp_path, source, content):
  encoder = ConversationEncoder(ChatTemplate(source, where='here'), byte_level(tmp_path))
  with pytest.raises(ChatTemplateError, match='here: makes a control token of the texts of the messages') as error:
    encoder.render([{'role': 'user', 'content': content}], add_generation_prompt=False)
  assert len(str(error.value)) <= 500 and 'remove the parts' in str(error.value)
  clean = [{'text': 'a < b'}] if isinstance(content, list) else 'a < b [c] |'
  assert encoder.render([{'role': 'user', 'content': clean}], add_generation_prompt=False)[1]


@pytest.mark.parametrize(
  'role', ['im_end', 'end', 'IM_END', 'im_end|><|im_start', wide('im_end'), ' im_end ', 'a\nb', 'x' * 100, '', 'im_<s>end']
)
def test_roles_cannot_become_control_tokens(tmp_path, role):
  source = '{% for m in messages %}<|{{ m.role | trim | lower }}|>{{ m.content }}{% endfor %}'
  encoder = ConversationEncoder(ChatTemplate(source, where='here'), byte_level(tmp_path))
  with pytest.raises(ChatTemplateError, match=r'here: the role of messages\[1\], .* rename it') as error:
    encoder.render([{'role': 'user', 'content': 'a'}, {'role': role, 'content': 'b'}], add_generation_prompt=False)
  assert len(str(error.value)) <= 500
  could_become = role.strip().lower() in ('im_end', 'end', wide('im_end'))
  assert ('could become the control token' if could_become else 'is not a plain word') in str(error.value)
  for renamed in ('user', 'tool', 'judge 2', 'r\u00e9dacteur'):
    text, ids = encoder.render([{'role': renamed, 'content': 'b'}], add_generation_prompt=False)
    assert text == f'<|{renamed}|>b' and ids == encoder._tokenizer.encode(text)


def test_a_role_in_common_use_may_be_a_control_token_and_a_message_may_have_none(tmp_path):
  tokenizer = byte_level(tmp_path, control=[*CONTROL, '<|user|>', '<|tool_call|>'])
  source = '{% for m in messages %}{% if m.role is defined %}<|{{ m.role }}|>{% endif %}{{ m.content }}{% endfor %}'
  messages = [{'role': 'user', 'content': 'a<|user|>'}, {'content': 'b'}, {'role': 'tool_call', 'content': 'c'}]
  text, ids = ConversationEncoder(ChatTemplate(source), tokenizer).render(messages, add_generation_prompt=False)
  a, b, c = (tokenizer.encode(letter) for letter in 'abc')
  assert text == '<|user|>ab<|tool_call|>c' and ids == [tokenizer.special_id('<|user|>'), *a, *b, tokenizer.special_id('<|tool_call|>'), *c]


def test_special_tokens_of_this_package_are_the_controls_of_bytes():
  assert ByteTokenizer().control == {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}
