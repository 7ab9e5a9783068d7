from __future__ import annotations

import json
import pickle
import random
import re
import warnings

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from polar_jax.config import TemplateConfig
from polar_jax.data import template as template_lib
from polar_jax.data import tokenizer as tokenizer_lib
from polar_jax.types import Triplet

WORDS = ['the', 'fox', ' ', '\n', 'jumps', 'over', '3.14', 'naïve', '日本', '🦊', 'e\u0301', '\t', '.', '  ', 'lazy', '▁', '<s>', '</s>']
SPECIAL = ['<|reward|>', '[UNUSED_TOKEN_130]']


class Oracle:
  """The two official rules, implemented from their description with an encode and a decode function."""

  def __init__(self, encode, decode, bos, config, reward_id):
    self.encode, self.decode, self.bos, self.c, self.reward_id = encode, decode, bos, config, reward_id

  def rows(self, prompt, reference, candidates, wrapper):
    def text(value):
      return value if isinstance(value, str) else '\n'.join(message['content'] for message in value)

    def tokens(value):
      return [self.bos, *self.encode(value)]

    def cat(p, answer):
      if wrapper == 'pretrain':
        return p + answer
      if self.c.rule == 'trainer' and len(answer) == 0:
        return p
      return p + '\n' + answer

    ref = tokens(text(reference))[: self.c.max_response_length]
    cands = [tokens(text(candidate))[: self.c.max_response_length] for candidate in candidates]
    if self.c.use_reference:
      room = [(self.c.max_length - 4 - len(ref) - len(cand)) // 2 for cand in cands]
    else:
      room = [self.c.max_length - 4 - len(cand) for cand in cands]
    out = []
    for k, cand in enumerate(cands):
      limit = min(room) if self.c.rule == 'trainer' else room[k]
      kept = tokens(text(prompt))
      while len(kept) > max(limit, 0):
        kept.pop(0)
      p = self.decode(kept)
      whole = cat(p, self.decode(cand))
      if self.c.use_reference:
        whole = cat(p, self.decode(ref)) + self.c.separator + whole
      if self.c.rule == 'client':
        out.append(tokens(whole + self.c.reward_token))
      else:
        out.append([*tokens(whole), self.reward_id])
    return out


def byte_functions():
  names = ['<pad>', '<s>', '</s>', '<|reward|>', '[UNUSED_TOKEN_130]']

  def encode(text):
    out, data = [], text.encode()
    while data:
      for i, name in enumerate(names):
        if data.startswith(name.encode()):
          out.append(256 + i)
          data = data[len(name) :]
          break
      else:
        out.append(data[0])
        data = data[1:]
    return out

  return encode, lambda ids: bytes(i for i in ids if i < 256).decode(errors='replace'), 257, 260


def piece_functions(path, separator_id):
  """Control strings and the separator split the text and are dropped by decoding; so is [UNUSED_TOKEN_130], a piece of the model."""
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ids = {'<unk>': 0, '<s>': 1, '</s>': 2, '<|reward|>': separator_id}

  def encode(text):
    out = []
    for part in re.split(r'(<unk>|<s>|</s>|<\|reward\|>)', text):
      out += [ids[part]] if part in ids else model.encode(part)
    return out

  return encode, lambda tokens: model.decode([i for i in tokens if i not in (*ids.values(), 92527)]), 1, 92527


@pytest.fixture(scope='module')
def bpe_path(tmp_path_factory):
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=360,
    special_tokens=list(tokenizer_lib.SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(['the fox jumps over the lazy dog\n3.14 naïve\n\nfox over\nthe'] * 20, trainer)
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  bpe.save(str(path))
  return path


def random_text(rng, length):
  words = WORDS + SPECIAL * (rng.random() < 0.3)
  return rng.choice(['', ' ']).join(rng.choices(words, k=rng.choice([0, 1, length, length])))


def random_value(rng, length):
  if rng.random() < 0.6:
    return random_text(rng, length)
  return [{'role': rng.choice(['user', 'assistant']), 'content': random_text(rng, length // 2)} for _ in range(rng.randint(1, 3))]


def check_against_oracle(tokenizer, functions, rows, seed, **settings):
  rng = random.Random(seed)
  encode, decode, bos, reward_id = functions
  cut = 0
  for _ in range(rows):
    config = TemplateConfig(
      max_length=rng.choice([16, 24, 40, 80, 300, 16_384]),
      max_response_length=rng.choice([1, 5, 12, 80, 4_096]),
      rule=rng.choice(['trainer', 'client']),
      use_reference=rng.random() < 0.8,
      **settings,
    )
    template = template_lib.Template(config, tokenizer)
    oracle = Oracle(encode, decode, bos, config, reward_id)
    wrapper = rng.choice(['sft', 'pretrain'])
    prompt, reference, chosen, rejected, *more = (random_value(rng, rng.choice([3, 10, 25])) for _ in range(rng.randint(4, 7)))
    expected = oracle.rows(prompt, reference, [chosen, rejected], wrapper)
    alone = [oracle.rows(prompt, reference, [candidate], wrapper)[0] for candidate in (chosen, rejected)]
    assert template.encode_candidates(prompt, reference, [chosen, rejected], wrapper, alone=True) == alone
    assert list(template.encode(Triplet(prompt, reference, chosen, rejected, wrapper))) == expected
    candidates = [chosen, rejected, *more]
    assert template.encode_candidates(prompt, reference, candidates, wrapper) == oracle.rows(prompt, reference, candidates, wrapper)
    cut += config.max_length < 100
  assert rows / 3 < cut < rows


def test_bytes_against_oracle():
  check_against_oracle(tokenizer_lib.ByteTokenizer(), byte_functions(), 300, seed=0)


def test_bpe_against_oracle(bpe_path):
  raw = tokenizers.Tokenizer.from_file(str(bpe_path))
  functions = (lambda text: raw.encode(text).ids, raw.decode, 1, 4)
  check_against_oracle(tokenizer_lib.BpeTokenizer(bpe_path), functions, 300, seed=1)


@pytest.mark.data
def test_sentencepiece_against_oracle(data_folder):
  path = data_folder / 'tokenizers/internlm2/tokenizer.model'
  check_against_oracle(tokenizer_lib.SentencePieceTokenizer(path), piece_functions(path, 92528), 300, seed=2, separator_id=92528)


def bytes_template(**settings):
  return template_lib.Template(TemplateConfig(**settings), tokenizer_lib.ByteTokenizer())


def test_by_hand():
  chosen, rejected = bytes_template().encode(Triplet('p', 'r', 'c', '', 'sft'))
  assert chosen == [257, *b'p\nr', 259, *b'p\nc', 260]
  assert rejected == [257, *b'p\nr', 259, *b'p', 260]  # no newline before an empty candidate
  assert bytes_template(rule='client').encode(Triplet('p', 'r', 'c', '', 'sft'))[1] == [257, *b'p\nr', 259, *b'p\n', 260]
  assert bytes_template().encode(Triplet('p', 'r', 'c', 'd', 'pretrain'))[1] == [257, *b'pr', 259, *b'pd', 260]
  assert bytes_template(use_reference=False).encode(Triplet('p', 'r', 'c', 'd'))[0] == [257, *b'p\nc', 260]
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  assert bytes_template().encode_candidates(messages, 'r', ['c'])[0] == [257, *b'a\nb\nr', 259, *b'a\nb\nc', 260]
  assert bytes_template().encode_candidates('p', 'r', []) == []


def test_texts_by_hand():
  assert bytes_template().candidate_texts('p', 'r', ['c', ''], 'sft') == [
    'p\nr<|reward|>p\nc[UNUSED_TOKEN_130]',
    'p\nr<|reward|>p[UNUSED_TOKEN_130]',
  ]
  assert bytes_template(rule='client').candidate_texts('p', 'r', [''], 'pretrain') == ['pr<|reward|>p[UNUSED_TOKEN_130]']
  assert bytes_template(use_reference=False).candidate_texts('p', 'r', ['c']) == ['p\nc[UNUSED_TOKEN_130]']
  assert bytes_template().candidate_texts('p', 'r', []) == []
  with pytest.raises(template_lib.TemplateError, match=r'candidates\[1\] must be'):
    bytes_template().candidate_texts('p', 'r', ['a', None])


def check_texts_encode_to_the_sequences(tokenizer, seed, **settings):
  rng = random.Random(seed)
  for _ in range(200):
    sizes = {'max_length': rng.choice([24, 80, 16_384]), 'max_response_length': rng.choice([5, 12, 4_096])}
    template = template_lib.Template(TemplateConfig(rule=rng.choice(['trainer', 'client']), **sizes, **settings), tokenizer)
    prompt, reference, *candidates = (random_value(rng, rng.choice([3, 25])) for _ in range(5))
    for alone in (False, True):
      arguments = (prompt, reference, candidates, rng.choice(['sft', 'pretrain']), alone)
      texts = template.candidate_texts(*arguments)
      assert tokenizer.encode_batch(texts, add_bos=True) == template.encode_candidates(*arguments)


def test_a_server_that_tokenizes_the_texts_sees_the_same_sequences(bpe_path):
  check_texts_encode_to_the_sequences(tokenizer_lib.ByteTokenizer(), 3)
  check_texts_encode_to_the_sequences(tokenizer_lib.BpeTokenizer(bpe_path), 4)


@pytest.mark.data
def test_a_server_with_the_official_tokenizer_sees_the_same_sequences(data_folder, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  added = {'92528': {'content': '<|reward|>', 'special': True}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': added}))
  check_texts_encode_to_the_sequences(tokenizer_lib.open_tokenizer(tmp_path), 5)


def test_prompt_room_is_shared_by_the_trainer_and_not_by_the_client():
  row = Triplet('abcdefgh', 'r', 'c', 'cccccc', 'sft')
  # room: (24 - 4 - 2 - 2) // 2 = 8 for chosen, (24 - 4 - 2 - 7) // 2 = 5 for rejected; the BOS of the prompt is its ninth token
  trainer = bytes_template(max_length=24).encode(row)
  client = bytes_template(max_length=24, rule='client').encode(row)
  assert [bytes(ids[1 : ids.index(10)]) for ids in trainer] == [b'defgh', b'defgh']
  assert [bytes(ids[1 : ids.index(10)]) for ids in client] == [b'abcdefgh', b'defgh']


@pytest.mark.parametrize('answer', ['r' * 6, 'r' * 7, 'r' * 9])  # room for 0 tokens, then for a negative number
def test_no_room_leaves_an_empty_prompt(answer):
  row = Triplet('prompt', answer[:5], answer, answer, 'sft')
  for ids in bytes_template(max_length=16).encode(row):
    assert bytes(i for i in ids if i < 256) == f'\n{answer[:5]}\n{answer}'.encode()


def test_configured_ids_win_and_stand_for_their_strings():
  settings = {'separator_id': 900, 'reward_token_id': 901}
  template = bytes_template(**settings)
  assert (template.separator_id, template.reward_token_id) == (900, 901)
  row = Triplet('p', 'r', 'c<|reward|>[UNUSED_TOKEN_130]d', 'e', 'pretrain')  # content loses the special strings
  assert template.encode(row)[0] == [257, *b'pr', 900, *b'pcd', 901]
  assert bytes_template(rule='client', **settings).encode(row)[0] == [257, *b'pr', 900, *b'pcd', 901]


def test_separator_and_reward_token_may_be_the_same():
  for rule in ('trainer', 'client'):
    template = bytes_template(rule=rule, separator='[UNUSED_TOKEN_130]')
    assert template.encode(Triplet('p', 'r', 'c[UNUSED_TOKEN_130]', 'd')) == (
      [257, *b'p\nr', 260, *b'p\nc', 260],
      [257, *b'p\nr', 260, *b'p\nd', 260],
    )


def test_a_text_must_lose_its_control_tokens_in_eight_rounds():
  class Stubborn(tokenizer_lib.ByteTokenizer):
    """Makes a control token of a text `rounds` times."""

    rounds = 0

    def encode_batch(self, texts, add_bos=False):
      found = super().encode_batch(texts, add_bos)
      if self.rounds:
        self.rounds -= 1
        found[0].append(258)
      return found

  template = template_lib.Template(TemplateConfig(), tokenizer := Stubborn())
  tokenizer.rounds = 7
  assert template._without_control_tokens('ab') == 'ab' and tokenizer.rounds == 0
  tokenizer.rounds = 8
  with pytest.raises(template_lib.TemplateError, match="makes a control token of the text 'ab' each time it is removed"):
    template._without_control_tokens('ab')


def test_separator_that_is_no_token_is_text_with_one_warning_per_process():
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for separator in ('#', '##', '#', '##', '#'):
      template = bytes_template(separator=separator)
      chosen, _ = template.encode(Triplet('p', 'r', 'c', 'd'))
      assert template.separator_id is None
      assert chosen == [257, *f'p\nr{separator}p\nc'.encode(), 260]
    bytes_template()
  assert len(caught) == 2
  assert all(issubclass(warning.category, UserWarning) and 'template.separator_id' in str(warning.message) for warning in caught)
  assert all(warning.filename == __file__ or 'template_test' in warning.filename for warning in caught)


@pytest.mark.data
def test_where_the_id_of_the_separator_comes_from(data_folder, tmp_path):
  """The separator id comes from the checkpoint's tokenizer files, from the configuration, or from nowhere."""
  (tmp_path / 'tokenizer.model').write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  row = Triplet('p', 'r', 'c', 'd')
  bare = tokenizer_lib.open_tokenizer(tmp_path)

  def encoded(tokenizer, **settings):
    template = template_lib.Template(TemplateConfig(**settings), tokenizer)
    return template.separator_id, template.encode(row)[0]

  def expected(*separator):
    return [1, *bare.encode('p\nr'), *separator, *bare.encode('p\nc'), 92527]

  template_lib._warn_of_textual_separator.cache_clear()
  with pytest.warns(UserWarning, match='tokenized as ordinary text') as caught:
    assert encoded(bare) == (None, [1, *bare.encode('p\nr<|reward|>p\nc'), 92527])
    assert encoded(bare)[0] is None
  assert len(caught) == 1
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert encoded(bare, separator_id=92530) == (92530, expected(92530))
    added = {'92528': {'content': '<|reward|>', 'special': True}}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': added}))
    assert encoded(tokenizer_lib.open_tokenizer(tmp_path)) == (92528, expected(92528))
    assert encoded(tokenizer_lib.open_tokenizer(tmp_path), separator_id=92530) == (92530, expected(92530))


def test_texts_that_need_no_cut_are_tokenized_once(monkeypatch):
  template = bytes_template()
  monkeypatch.setattr(template, '_cut', None)
  assert template.encode(Triplet('é', 'r', 'c', 'd', 'pretrain'))[0] == [257, *'ér'.encode(), 259, *'éc'.encode(), 260]
  with pytest.raises(TypeError):  # a special string may be lost in the round trip
    template.encode(Triplet('<s>', 'r', 'c', 'd'))


def test_reward_token_must_be_a_token():
  with pytest.raises(template_lib.TemplateError, match=r'template\.reward_token_id'):
    bytes_template(reward_token='<score>')
  assert bytes_template(reward_token='<score>', reward_token_id=7).encode(Triplet('p', 'r', 'c', 'd'))[0][-1] == 7


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'wrapper': 'chat'}, "wrapper is 'chat'.*sft, pretrain"),
    ({'prompt': None}, 'prompt must be a string or a list of messages, not null'),
    ({'reference': 3}, 'reference must be .* not int'),
    ({'chosen': []}, 'chosen is an empty list'),
    ({'chosen': ['hi']}, r'chosen\[0\] must be a message'),
    ({'rejected': [{'role': 'user', 'content': 'a'}, {'role': 'user'}]}, r'rejected\[1\] is a message without content'),
    ({'rejected': [{'content': [{'type': 'text'}]}]}, r'rejected\[0\].content must be a string, not list'),
  ],
)
def test_bad_input_names_the_field(row, message):
  good = {'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd'}
  with pytest.raises(template_lib.TemplateError, match=message):
    bytes_template().encode(Triplet(**{**good, **row}))


def test_bad_candidate_is_named():
  with pytest.raises(template_lib.TemplateError, match=r'candidates\[1\] must be'):
    bytes_template().encode_candidates('p', 'r', ['a', None])


def test_pickle(bpe_path):
  template = template_lib.Template(TemplateConfig(max_length=30), tokenizer_lib.BpeTokenizer(bpe_path))
  row = Triplet('the lazy fox ' * 5, 'over', 'jumps', 'dog')
  assert pickle.loads(pickle.dumps(template)).encode(row) == template.encode(row)


def test_the_bound_is_the_number_of_bytes_of_all_text():
  """With the BOS, and the reward token as text."""
  for prompt, reference, use_reference in (('é', 'rr', True), ('', 'r', True), ('é', 'rrrr', False)):
    first = f'{prompt}\n{reference}<|reward|>' if use_reference else ''
    expected = sum(1 + len(f'{first}{prompt}\n{answer}[UNUSED_TOKEN_130]'.encode()) for answer in ('c', 'dd'))
    template = bytes_template(use_reference=use_reference)
    assert template.most_tokens(Triplet(prompt, reference, 'c', 'dd')) == expected
  assert bytes_template().most_tokens(Triplet('p', 'r', 'c', '</s>')) is None
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    template = bytes_template(separator=' | ')
  assert template.most_tokens(Triplet('p', 'r', 'c', 'd')) == 2 * (1 + len('p\nr | p\nc[UNUSED_TOKEN_130]'))


def test_what_is_cut_is_told_by_numbers_of_tokens():
  # Two-byte letters: a text may have four bytes for each as far as is known without tokenizing.
  cut = lambda row, **settings: bytes_template(**settings).truncated(row)
  for long in range(3):
    answers = ['r', 'c', 'd']
    for text, expected in (('ééé', False), ('éééx', True)):
      answers[long] = text
      assert cut(Triplet('p', *answers), max_response_length=7) == (expected, False)
  row = lambda prompt: Triplet(prompt, 'r', 'c', 'cccccc')  # rooms of the prompt: (24 - 4 - 2 - 2) // 2 = 8, (24 - 4 - 2 - 7) // 2 = 5
  assert cut(row('éé'), max_length=24) == (False, False) and cut(row('ééa'), max_length=24) == (False, True)
  assert cut(row('abcd'), max_length=24) is None and cut(row('abcde'), max_length=24) == (False, True)
  # A response takes no more room than what is kept of it: (40 - 4 - 2 - 5) // 2 = 14
  for prompt, expected in (('p' * 13, False), ('p' * 14, True)):
    assert cut(Triplet(prompt, 'r', 'c' * 30, 'd' * 30), max_length=40, max_response_length=5) == (True, expected)
  assert cut(Triplet('p', 'r' * 9, 'c', 'é'), max_response_length=4, use_reference=False) == (False, False)


@pytest.mark.parametrize('field', ['prompt', 'reference', 'chosen', 'rejected'])
def test_what_only_measures_texts_names_bad_ones_as_well(field):
  row = Triplet(**{'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'd', field: 3})
  for measure in (bytes_template().truncated, bytes_template().most_tokens):
    with pytest.raises(template_lib.TemplateError, match=rf'^{field} must be a string or a list of messages, not int'):
      measure(row)


def test_texts_that_just_fit_are_tokenized_once(monkeypatch):
  def encodes(row, **settings):
    template = bytes_template(**settings)
    monkeypatch.setattr(template, '_cut', None)
    try:
      return bool(template.encode(row))
    except TypeError:
      return False

  for long in range(3):
    for text, expected in (('rrrr', True), ('rrrrr', False), ('é', True), ('éa', False)):  # at most five tokens with the BOS
      answers = ['r', 'c', 'd']
      answers[long] = text
      assert encodes(Triplet('p', *answers), max_response_length=5) is expected
  for prompt, expected in (('abcd', True), ('abcde', False)):
    assert encodes(Triplet(prompt, 'r', 'c', 'cccccc'), max_length=24) is expected


def test_texts_share_the_room_of_the_prompt_by_default():
  template = bytes_template(max_length=24)
  ends = ['<|reward|>defgh\nc[UNUSED_TOKEN_130]', '<|reward|>defgh\ncccccc[UNUSED_TOKEN_130]']
  assert [text.partition('\nr')[2] for text in template.candidate_texts('abcdefgh', 'r', ['c', 'cccccc'])] == ends
  alone = template.candidate_texts('abcdefgh', 'r', ['c', 'cccccc'], alone=True)
  assert [text.partition('\nr')[2] for text in alone] == [ends[0].replace('defgh', 'abcdefgh'), ends[1]]


def test_a_text_is_quoted_by_its_beginning():
  assert template_lib.shortened('a\n') == "'a\\n'" and template_lib.shortened('b' * 60) == repr('b' * 60)
  assert template_lib.shortened('b' * 60 + 'c') == repr('b' * 60) + '...'
