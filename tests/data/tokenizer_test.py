from __future__ import annotations

import concurrent.futures
import json
import pickle
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from polar_jax.config import TokenizerConfig
from polar_jax.data import tokenizer as tokenizer_lib

TEXTS = ['', ' a  b\n\tc ', 'naïve 日本語 🦊 e\u0301', 'x<|reward|>y[UNUSED_TOKEN_130]', '<s>hello</s>', '<|rew', '\x00\r\n']


@pytest.fixture(scope='module')
def bpe_path(tmp_path_factory):
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=list(tokenizer_lib.SPECIAL_TOKENS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(['the quick brown fox jumps over the lazy dog and the cat'] * 20, trainer)
  bpe.post_processor = processors.TemplateProcessing(single='<s> $A </s>', special_tokens=[('<s>', 1), ('</s>', 2)])
  bpe.enable_truncation(4)  # must not survive loading
  bpe.enable_padding(length=4)
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  bpe.save(str(path))
  return path


@pytest.fixture
def bpe(bpe_path):
  return tokenizer_lib.BpeTokenizer(bpe_path)


@pytest.fixture
def piece(data_folder):
  return tokenizer_lib.SentencePieceTokenizer(data_folder / 'tokenizers/internlm2/tokenizer.model')


def check_interface(tokenizer):
  assert isinstance(tokenizer, tokenizer_lib.Tokenizer)
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode(text, add_bos=True) == [tokenizer.bos_id, *ids]
    assert tokenizer.decode(ids, skip_special=False) == text
    if tokenizer.is_exact(text):
      assert tokenizer.decode(ids) == text
      assert len(ids) <= len(text.encode())
  for add_bos in (False, True):
    assert tokenizer.encode_batch(TEXTS, add_bos=add_bos) == [tokenizer.encode(text, add_bos) for text in TEXTS]
  assert tokenizer.encode_batch([]) == []
  assert tokenizer.decode([]) == ''
  assert tokenizer.decode(tokenizer.encode('<s>hello</s>')) == 'hello'
  assert tokenizer.special_id('<s>') == tokenizer.bos_id
  assert tokenizer.special_id('</s>') == tokenizer.eos_id
  assert tokenizer.special_id('no such token') is None
  assert tokenizer.encode('a[UNUSED_TOKEN_130]b')[1:-1] == [tokenizer.special_id('[UNUSED_TOKEN_130]')]


def test_of_two_special_strings_the_longer_wins():
  specials = tokenizer_lib.SpecialStrings({'<a': 1, '<a>': 2})
  assert specials.encode('x<a><a', lambda part: part.encode()) == [120, 2, 1]
  assert tokenizer_lib.SpecialStrings({}).encode('<a', lambda part: part.encode()) == [60, 97]


def test_bytes():
  tokenizer = tokenizer_lib.ByteTokenizer()
  check_interface(tokenizer)
  assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (261, 256, 257, 258, None)
  assert tokenizer.encode('é<pad>', add_bos=True) == [257, 0xC3, 0xA9, 256]
  assert tokenizer.encode('x<|reward|>y[UNUSED_TOKEN_130]') == [120, 259, 121, 260]
  assert tokenizer.decode([0xC3, 257, 65]) == '\ufffdA'
  assert tokenizer.decode([259, 65]) == 'A' == tokenizer.decode([256, 65, 260])
  assert tokenizer.decode([256, 255, 65, 260], skip_special=False) == '<pad>\ufffdA[UNUSED_TOKEN_130]'
  assert tokenizer.is_exact('é')
  assert not tokenizer.is_exact('a</s>')


def test_bpe(bpe):
  check_interface(bpe)
  assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
  assert bpe.special_id('<|reward|>') == 3
  assert bpe.special_id('the') is None  # a merge, not a special token
  assert len(bpe.encode('the quick brown fox jumps over')) > 4  # the file's truncation is off
  assert bpe.decode(bpe.encode('a<|reward|>b')) == 'ab'
  assert bpe.is_exact('the 🦊')
  assert not bpe.is_exact('the <s>')


@pytest.mark.parametrize(
  'change',
  [
    {'normalizer': {'type': 'NFC'}},
    {'decoder': None},
    {'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}},
    {'pre_tokenizer': {'type': 'Whitespace'}},
    {'pre_tokenizer': None},
  ],
)
def test_a_tokenizer_that_may_change_text_is_not_exact(bpe_path, tmp_path, change):
  spec = {**json.loads(bpe_path.read_text()), **change}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  assert not tokenizer_lib.BpeTokenizer(tmp_path / 'tokenizer.json').is_exact('the')


def test_a_tokenizer_without_all_bytes_is_exact_where_it_has_them(bpe_path, tmp_path):
  spec = json.loads(bpe_path.read_text())
  del spec['model']['vocab']['ñ']
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  tokenizer = tokenizer_lib.BpeTokenizer(tmp_path / 'tokenizer.json')
  assert tokenizer.is_exact('the') and not tokenizer.is_exact('\U00040000')  # U+40000 begins with the byte F1


def test_bpe_takes_special_tokens_from_the_config_next_to_it(bpe_path, tmp_path):
  copy = tmp_path / 'tokenizer.json'
  copy.write_bytes(bpe_path.read_bytes())
  settings = {'bos_token': None, 'eos_token': {'content': '<|reward|>'}, 'pad_token': '<s>'}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  tokenizer = tokenizer_lib.BpeTokenizer(copy)
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, 3, 1)
  # The post-processor adds its token all the same, as in transformers.
  assert tokenizer.encode('cat', add_bos=True) == [1, *tokenizer.encode('cat')]
  assert tokenizer.encode_batch(['cat'], add_bos=True) == [[1, *tokenizer.encode('cat')]]


@pytest.mark.data
def test_qwen(data_folder):
  tokenizer = tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(data_folder / 'tokenizers/qwen3/tokenizer.json')), None)
  assert tokenizer.bos_id is None
  assert tokenizer.special_id('<|im_start|>') == 151644
  ids = tokenizer.encode('<|im_start|>hello', add_bos=True)
  assert ids[0] == 151644
  assert tokenizer.decode(ids) == 'hello'
  assert not tokenizer.is_exact('e')  # NFC


@pytest.mark.data
def test_sentencepiece(piece):
  check_interface(piece)
  assert (piece.vocab_size, piece.bos_id, piece.eos_id, piece.pad_id) == (92544, 1, 2, None)
  assert piece.special_id('[UNUSED_TOKEN_130]') == 92527
  assert piece.special_id('<|reward|>') is None
  assert piece.encode('a<s>b') == [*piece.encode('a'), 1, *piece.encode('b')]


@pytest.mark.data
def test_sentencepiece_added_tokens(data_folder, tmp_path):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'<|reward|>': 92528, '<|plain|>': 92600}))
  added = {'92601': {'content': '<|x|>', 'special': True}}
  settings = {'pad_token': '</s>', 'additional_special_tokens': ['<|reward|>'], 'added_tokens_decoder': added}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  tokenizer = tokenizer_lib.SentencePieceTokenizer(path)
  assert tokenizer.pad_id == 2
  assert tokenizer.vocab_size == 92602
  ids = tokenizer.encode('a<|reward|>b<|plain|>c<|x|>')
  assert ids[1::2] == [92528, 92600, 92601]
  assert tokenizer.decode(ids) == 'ab<|plain|>c'
  assert tokenizer.decode(ids, skip_special=False) == 'a<|reward|>b<|plain|>c<|x|>'


def test_pickle_is_a_path_and_first_use_is_thread_safe(bpe, bpe_path):
  bpe.encode('warm')
  blob = pickle.dumps(bpe)
  assert len(blob) < 500
  words = ['the', 'quick', 'brown', 'fox', 'lazy', 'dog', 'cat']
  texts = [' '.join(random.Random(i).choices(words, k=20)) for i in range(200)]
  fresh = pickle.loads(blob)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(fresh.encode, texts)) == [bpe.encode(text) for text in texts]


def test_load_tokenizer(bpe_path, tmp_path):
  assert isinstance(tokenizer_lib.load_tokenizer(TokenizerConfig('byte'), None), tokenizer_lib.ByteTokenizer)
  assert tokenizer_lib.load_tokenizer(TokenizerConfig('trained'), bpe_path).special_id('<|reward|>') == 3
  assert tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(bpe_path)), None).path == bpe_path
  with pytest.raises(tokenizer_lib.TokenizerError, match='synthesize stage'):
    tokenizer_lib.load_tokenizer(TokenizerConfig('trained'), None)
  with pytest.raises(tokenizer_lib.TokenizerError, match=r'gone\.json.*synthesize stage'):
    tokenizer_lib.load_tokenizer(TokenizerConfig('trained'), tmp_path / 'gone.json')
  with pytest.raises(tokenizer_lib.TokenizerError, match=r'gone\.model: no such'):
    tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(tmp_path / 'gone.model')), None)
  with pytest.raises(tokenizer_lib.TokenizerError, match=r"unknown suffix '\.txt'"):
    tokenizer_lib.load_tokenizer(TokenizerConfig('file', 'vocab.txt'), None)
  with pytest.raises(tokenizer_lib.TokenizerError, match=r'tokenizer\.path must name'):
    tokenizer_lib.load_tokenizer(TokenizerConfig('file'), None)
  with pytest.raises(tokenizer_lib.TokenizerError, match='this stage has no checkpoint'):
    tokenizer_lib.load_tokenizer(TokenizerConfig('checkpoint'), None)


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer.model'])
def test_damaged_file_is_named(tmp_path, name):
  (tmp_path / name).write_bytes(b'{"not": "a tokenizer"')
  tokenizer = tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(tmp_path / name)), None)
  with pytest.raises(tokenizer_lib.TokenizerError, match=name):
    tokenizer.encode('a')


def test_a_bpe_without_some_bytes_refuses_text_it_would_drop(tmp_path):
  from polar_jax.miniature import vocabulary

  path = tmp_path / 'tokenizer.json'
  vocabulary.train_tokenizer(['plain text\n' * 20], 300).save(str(path))
  tokenizer = tokenizer_lib.BpeTokenizer(path)
  assert tokenizer.decode(tokenizer.encode('text plain\n')) == 'text plain\n' and tokenizer.is_exact('text plain')
  tokenizer._loaded = tokenizer._model._replace(speller=None)  # its bytes suffice, which is faster
  for text, character in (('na\u00efve', '\u00ef'), ('a\tb', '\\t'), ('\u65e5\u672c', '\u65e5')):
    with pytest.raises(tokenizer_lib.TokenizerError, match='no token for') as error:
      tokenizer.encode(text)
    assert character in str(error.value) and 'tokenizer.kind=byte' in str(error.value)


@pytest.mark.data
def test_a_folder_is_opened_by_its_content(bpe_path, data_folder, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  piece = tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(tmp_path)))
  assert isinstance(piece, tokenizer_lib.SentencePieceTokenizer) and piece.bos_id == 1
  (tmp_path / 'tokenizer.json').write_bytes(bpe_path.read_bytes())
  assert isinstance(tokenizer_lib.open_tokenizer(tmp_path), tokenizer_lib.BpeTokenizer)
  assert isinstance(tokenizer_lib.open_tokenizer(tmp_path / 'tokenizer.model'), tokenizer_lib.SentencePieceTokenizer)
  (tmp_path / 'empty').mkdir()
  for names, held in (((), 'nothing'), (('vocab.json', 'model.safetensors'), r'model\.safetensors, vocab\.json')):
    for name in names:
      (tmp_path / 'empty' / name).write_text('')
    with pytest.raises(tokenizer_lib.TokenizerError, match=rf'empty contains neither a tokenizer\.json nor a .*, but: {held}'):
      tokenizer_lib.load_tokenizer(TokenizerConfig('file', str(tmp_path / 'empty')))
  for i in range(30):
    (tmp_path / 'empty' / f'a{i}').write_text('')
  with pytest.raises(tokenizer_lib.TokenizerError, match='and 12 more'):
    tokenizer_lib.open_tokenizer(tmp_path / 'empty')
  with pytest.raises(tokenizer_lib.TokenizerError, match=r"gone: unknown suffix ''"):
    tokenizer_lib.open_tokenizer(tmp_path / 'gone')


def ids_of(tokenizer):
  return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id


def write_json(path, value):
  path.write_text(json.dumps(value))


def llama3_like(path):
  """Names, regular expression and post-processor as in Llama 3's file, over bytes alone."""
  bpe = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [], ignore_merges=True))
  bpe.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(r'\p{N}{1,3}| ?\p{L}+|\s+'), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  bpe.decoder = decoders.ByteLevel()
  bpe.add_special_tokens(['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'])
  template = processors.TemplateProcessing(single='<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 256)])
  bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
  bpe.save(str(path))


def test_llama3_style(tmp_path):
  llama3_like(tmp_path / 'tokenizer.json')
  tokenizer = tokenizer_lib.open_tokenizer(tmp_path)
  assert ids_of(tokenizer) == (256, None, None, None)  # from the post-processor, because no file defines more
  assert len(tokenizer.encode('a 1')) == 3 and tokenizer.encode('a 1', add_bos=True)[0] == 256
  assert tokenizer.is_exact('a 1é')
  write_json(tmp_path / 'tokenizer_config.json', {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>', 'add_bos_token': False})
  end = {'content': '<|end_of_text|>'}
  write_json(tmp_path / 'special_tokens_map.json', {'eos_token': end, 'pad_token': end})
  assert ids_of(tokenizer_lib.open_tokenizer(tmp_path)) == (256, 258, 257, None)
  write_json(tmp_path / 'tokenizer_config.json', {'bos_token': None, 'eos_token': None, 'pad_token': '[PAD]'})
  # null in the newer file, a token in the older one; a token that has no id at all stays unknown
  tokenizer = tokenizer_lib.open_tokenizer(tmp_path)
  assert ids_of(tokenizer) == (None, 257, None, None) and tokenizer.vocab_size == 259


def test_tokens_that_only_the_config_files_define(tmp_path):
  llama3_like(tmp_path / 'tokenizer.json')
  write_json(tmp_path / 'added_tokens.json', {'<|reward|>': 259, '<plain>': 260})
  decoder = {'262': {'content': '<y>'}, '261': {'content': '<x>', 'special': False, 'rstrip': True}, '256': '<|begin_of_text|>'}
  settings = {'additional_special_tokens': [{'content': '<|reward|>'}, '<y>'], 'unk_token': '!', 'added_tokens_decoder': decoder}
  write_json(tmp_path / 'tokenizer_config.json', settings)
  tokenizer = tokenizer_lib.open_tokenizer(tmp_path)
  ids = tokenizer.encode('a<|reward|><plain>b<x>  c<y>')
  assert ids[1:3] == [259, 260] and ids[4:] == [261, *tokenizer.encode('c'), 262]
  assert tokenizer.decode(ids) == 'a<plain>b<x>c'
  assert (
    tokenizer.unk_id == tokenizer.special_id('!') == tokenizer.control['!'] == tokenizer.encode('a!')[1]
  )  # named, and therefore special, as in transformers
  write_json(tmp_path / 'added_tokens.json', {'<|reward|>': 300})
  with pytest.raises(tokenizer_lib.TokenizerError, match=r"lacks the token '<x>', which has the id 261 in .* would get the id 259"):
    tokenizer_lib.open_tokenizer(tmp_path).encode('a')


@pytest.mark.data
def test_polar_style(data_folder, tmp_path):
  (tmp_path / 'tokenizer.model').write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  entry = {'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False, 'special': True}
  decoder = {str(i): {'content': token, **entry} for i, token in ((0, '<unk>'), (1, '<s>'), (2, '</s>'), (92538, '<|im_start|>'))}
  settings = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>', 'auto_map': {}, 'added_tokens_decoder': decoder}
  for separator_id in (92528, 92527):  # its own, or that of [UNUSED_TOKEN_130], as in the older internlm2-1_8b-reward
    decoder[str(separator_id)] = {'content': '<|reward|>', **entry}
    write_json(tmp_path / 'tokenizer_config.json', settings)
    tokenizer = pickle.loads(pickle.dumps(tokenizer_lib.open_tokenizer(tmp_path)))
    assert ids_of(tokenizer) == (1, 2, 2, 0)
    assert tokenizer.special_id('<|reward|>') == separator_id and tokenizer.special_id('[UNUSED_TOKEN_130]') == 92527
    assert tokenizer.encode('a<|reward|>b[UNUSED_TOKEN_130]')[1::2] == [separator_id, 92527]
    assert tokenizer.decode(tokenizer.encode('a<|reward|>b<|im_start|>')) == 'ab'
    del decoder[str(separator_id)]
  write_json(tmp_path / 'tokenizer_config.json', {'bos_token': None, 'eos_token': '[UNUSED_TOKEN_145]'})
  tokenizer = tokenizer_lib.open_tokenizer(tmp_path)
  assert ids_of(tokenizer) == (None, 92542, None, 0)
  assert tokenizer.encode('a', add_bos=True) == tokenizer.encode('a')
  assert tokenizer.decode(tokenizer.encode('a[UNUSED_TOKEN_145]')) == 'a'
  write_json(tmp_path / 'added_tokens.json', {'<|x|>': 92544})
  write_json(tmp_path / 'tokenizer_config.json', {'added_tokens_decoder': {'92544': {'content': '<|x|>', 'rstrip': True}}})
  with pytest.raises(tokenizer_lib.TokenizerError, match='sets lstrip, rstrip or single_word'):
    tokenizer_lib.open_tokenizer(tmp_path).encode('a')


@pytest.mark.data
def test_an_ordinary_piece_is_no_special_token(piece):
  assert len(piece.encode('the')) == len(piece.encode('###')) == 1
  assert piece.special_id('the') is None and piece.special_id('###') is None


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('tokenizer_config.json', '{', r'tokenizer_config\.json: not JSON'),
    ('tokenizer_config.json', '[]', 'must contain a JSON object, not list'),
    ('tokenizer_config.json', '{"bos_token": 3}', 'bos_token: a token must be a string, null or an object with a content, not 3'),
    ('tokenizer_config.json', '{"added_tokens_decoder": {"x": "a"}}', "added_tokens_decoder 'x' must give a token for an id"),
    ('tokenizer_config.json', '{"added_tokens_decoder": {"3": null}}', "added_tokens_decoder '3' must give"),
    ('special_tokens_map.json', '{"additional_special_tokens": [1]}', r'special_tokens_map\.json: additional_special_tokens: a token'),
    ('added_tokens.json', '{"a": "3"}', 'added_tokens.json: \'a\' must have an id, not "3"'),
  ],
)
def test_damaged_config_files_are_named(bpe_path, tmp_path, name, content, message):
  (tmp_path / 'tokenizer.json').write_bytes(bpe_path.read_bytes())
  (tmp_path / name).write_text(content)
  with pytest.raises(tokenizer_lib.TokenizerError, match=message):
    tokenizer_lib.open_tokenizer(tmp_path).encode('a')


def test_stop_ids(tmp_path, bpe):
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (2,)
  write_json(tmp_path / 'config.json', {'eos_token_id': 7})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (7,)
  write_json(tmp_path / 'generation_config.json', {'eos_token_id': None})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (7,)
  write_json(tmp_path / 'generation_config.json', {'eos_token_id': [128001, 128009, 128001]})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (128001, 128009)
  write_json(tmp_path / 'generation_config.json', {'eos_token_id': -1})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (7,)
  for bad in ('</s>', [True], 2.0):
    write_json(tmp_path / 'generation_config.json', {'eos_token_id': bad})
    with pytest.raises(tokenizer_lib.TokenizerError, match=r'generation_config\.json: eos_token_id must be an id or a list of ids'):
      tokenizer_lib.stop_ids(tmp_path, bpe)


def test_what_a_post_processor_puts_before_a_text():
  special = {'<s>': {'id': '<s>', 'ids': [5, 6], 'tokens': ['<s>', '<t>']}, '</s>': {'id': '</s>', 'ids': [7], 'tokens': ['</s>']}}
  token = lambda name: {'SpecialToken': {'id': name, 'type_id': 0}}
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  template = lambda *single: {'type': 'TemplateProcessing', 'single': list(single), 'pair': [], 'special_tokens': special}
  prefix = lambda step, added=(): tokenizer_lib.prefix_of({'post_processor': step, 'added_tokens': list(added)})
  assert prefix(template(token('<s>'), token('</s>'), text, token('</s>'))) == (5, 6, 7)
  assert prefix(template(text, token('</s>'))) == () == prefix({'type': 'ByteLevel'})
  for kind in ('BertProcessing', 'RobertaProcessing'):
    assert prefix({'type': kind, 'sep': ['</s>', 7], 'cls': ['<s>', 5]}) == (5,)
  assert prefix({'type': 'Sequence', 'processors': [{'type': 'ByteLevel'}, template(token('<s>'), text)]}) == (5, 6)
  own = [{'content': string, 'id': i} for i, string in enumerate(tokenizer_lib.SPECIAL_TOKENS)]
  assert prefix(None, own) == (1,) and prefix(None, own[:-1]) == () == prefix(None)
  assert prefix(None, [{**entry, 'id': entry['id'] + 1} for entry in own]) == ()


def test_stop_ids_may_be_zero(tmp_path, bpe):
  write_json(tmp_path / 'config.json', {'eos_token_id': [0, -1, 3]})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (0, 3)
  write_json(tmp_path / 'config.json', {'eos_token_id': []})
  assert tokenizer_lib.stop_ids(tmp_path, bpe) == (2,)


def test_up_to_twenty_names_of_a_folder_are_listed(tmp_path):
  names = [f'a{i:02}' for i in range(22)]
  for count, ending in ((20, ', '.join(names[:20])), (22, ', '.join(names[:20]) + ' and 2 more')):
    for name in names[:count]:
      (tmp_path / name).write_text('')
    with pytest.raises(tokenizer_lib.TokenizerError) as error:
      tokenizer_lib.open_tokenizer(tmp_path)
    assert str(error.value).endswith(f'but: {ending}')


class PanicException(BaseException):
  """As the tokenizers library raises it."""


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (RuntimeError('x' * 300 + '\nmore'), 'x' * 160),
    (Exception('first\nsecond'), 'first'),
    (ValueError(), r'ValueError\(\)'),
    (PanicException('p'), 'p'),
  ],
)
def test_whatever_a_library_raises_is_a_damaged_file(bpe_path, error, reason):
  class Failing(tokenizer_lib.BpeTokenizer):
    def _load(self):
      raise error

  with pytest.raises(tokenizer_lib.TokenizerError, match=rf'tokenizer\.json: not a readable tokenizer file: {reason}; download it again'):
    Failing(bpe_path).encode('a')


@pytest.mark.parametrize('error', [KeyboardInterrupt(), ImportError('no library'), tokenizer_lib.TokenizerError('own')])
def test_other_errors_of_loading_are_passed_on(bpe_path, error):
  class Failing(tokenizer_lib.BpeTokenizer):
    def _load(self):
      raise error

  with pytest.raises(type(error)) as caught:
    Failing(bpe_path).encode('a')
  assert caught.value is error


@pytest.mark.parametrize(('error', 'reason'), [(Exception('x' * 300 + '\nmore'), 'x' * 200), (ValueError(), 'ValueError()')])
def test_text_that_the_library_refuses_is_named_with_its_reason(bpe, error, reason):
  class Failing:
    def encode(self, text, add_special_tokens):
      raise error

  bpe._loaded = bpe._model._replace(model=Failing())
  with pytest.raises(tokenizer_lib.TokenizerError) as caught:
    bpe.encode('a' * 50)
  expected = f"tokenizer.json cannot tokenize '{'a' * 40}': {reason}; use tokenizer.kind=byte, or another tokenizer file"
  assert str(caught.value).endswith(expected)


def test_unknown_text_is_what_its_own_string_does_not_explain():
  class Some:
    unk_id, control = 3, {'<unk>': 3, '<s>': 4}

  unknown = tokenizer_lib.holds_unknown
  assert unknown(Some(), 'ab', [7, 3]) and not unknown(Some(), 'ab', [7, 8]) and not unknown(Some(), 'a<unk>', [7, 3])
  assert unknown(Some(), '<unk>b', [3, 3]) and not unknown(Some(), '<unk><s><unk>', [3, 4, 3])
  Some.unk_id = None
  assert not unknown(Some(), 'ab', [7, 3])


def test_characters_are_unknown_alone_or_only_together(bpe_path):
  class Pairs(tokenizer_lib.BpeTokenizer):
    unk_id, control, prefix_ids = 9, {}, (1,)

    def _encode(self, text):
      return [9 if 'b' in text or 'xx' in text else 5]

  with pytest.warns(UserWarning, match=r"tokenizer\.json has no token for 'b' \(in 'abb'\), which becomes its unknown token") as caught:
    assert Pairs(bpe_path).encode('abb', add_bos=True) == [1, 9]
  assert caught[0].filename == __file__
  with pytest.warns(UserWarning, match=rf"has no token for '{'x' * 40}' \(in '{'x' * 40}'\)"):
    Pairs(bpe_path).encode('x' * 50)


def test_the_size_is_one_more_than_the_largest_id_and_defaults_name_tokens(tmp_path):
  model = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 1, '<none>': 2}, unk_token='<none>'))
  model.add_special_tokens(['<none>', '</s>', '<pad>', '<s>'])
  model.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = tokenizer_lib.open_tokenizer(tmp_path)
  ids = {token: model.token_to_id(token) for token in ('<s>', '</s>', '<pad>', '<none>')}
  assert ids_of(tokenizer) == tuple(ids.values()) and tokenizer.vocab_size == 6 == max(ids.values()) + 1
  assert tokenizer.control == ids and tokenizer.prefix_ids == ()
