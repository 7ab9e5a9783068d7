"""Text that a tokenizer cannot spell is refused or reported, and never dropped silently, whatever the kind of its model."""

from __future__ import annotations

import pickle
import warnings

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from polar_jax.config import TemplateConfig
from polar_jax.data import spelling
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import TokenizerError, open_tokenizer

LETTERS = [*'abcdefghij\n', 'ab']
SPECIAL = ['<|reward|>', '[UNUSED_TOKEN_130]']


def saved(folder, model, pre_tokenizer=None, normalizer=None, specials=SPECIAL):
  library = tokenizers.Tokenizer(model)
  if pre_tokenizer is not None:
    library.pre_tokenizer = pre_tokenizer
  if normalizer is not None:
    library.normalizer = normalizer
  library.decoder = decoders.WordPiece(cleanup=False) if getattr(model, 'continuing_subword_prefix', None) else decoders.Fuse()
  library.add_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
  library.save(str(folder / 'tokenizer.json'))
  return open_tokenizer(folder)


def vocab(*more, prefix='', suffix=''):
  return {token: i for i, token in enumerate([*LETTERS, *more, *(prefix + c + suffix for c in LETTERS if prefix or suffix)])}


def bytes_of(text):
  return [f'<0x{byte:02X}>' for byte in text.encode()]


NO_UNKNOWN = {
  'bpe': lambda f: saved(f, models.BPE(vocab(), [('a', 'b')])),
  'bpe split at spaces': lambda f: saved(f, models.BPE(vocab(), [('a', 'b')]), pre_tokenizers.Whitespace()),
  'bpe in lower case': lambda f: saved(f, models.BPE(vocab(), []), normalizer=normalizers.Lowercase()),
  'bpe with prefixes': lambda f: saved(f, models.BPE(vocab(prefix='##'), [], continuing_subword_prefix='##')),
  'bpe with some bytes': lambda f: saved(f, models.BPE(vocab(*bytes_of('é')), [], byte_fallback=True)),
  'byte level that normalizes': lambda f: saved(
    f, models.BPE({**vocab(), 'Ċ': 99}, []), pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()
  ),
  'word level': lambda f: saved(f, models.WordLevel({'ab': 0, 'a': 1, 'b': 2, 'c': 3}, unk_token='<none>'), pre_tokenizers.Whitespace()),
  'unigram': lambda f: saved(f, models.Unigram([(token, -1.0) for token in LETTERS])),
  'word piece': lambda f: saved(f, models.WordPiece({'ab': 0, 'a': 1, 'b': 2, 'c': 3}, unk_token='<none>'), pre_tokenizers.Whitespace()),
}


@pytest.mark.parametrize('kind', NO_UNKNOWN)
def test_without_an_unknown_token_such_text_is_refused(tmp_path, kind):
  tokenizer = pickle.loads(pickle.dumps(NO_UNKNOWN[kind](tmp_path)))
  assert tokenizer.encode('ab') and tokenizer.encode('ab<|reward|>c')
  for text in ('ab日c', '日', 'ab<|reward|>z日'):
    with pytest.raises(TokenizerError, match=r'tokenizer\.json') as error:
      tokenizer.encode(text)
    assert len(str(error.value)) <= 500 and '\n' not in str(error.value) and 'another tokenizer file' in str(error.value)
  template = Template(TemplateConfig(), tokenizer)
  with pytest.raises(TokenizerError):
    template.encode_candidates('ab', 'a日', ['c'])
  assert template.encode_candidates('ab', 'a', ['c'])


def test_bpe_spells_what_it_can(tmp_path):
  for number, (model, text) in enumerate(
    [
      (models.BPE(vocab(*bytes_of('é')), [], byte_fallback=True), 'aé'),
      (models.BPE(vocab(prefix='##'), [], continuing_subword_prefix='##'), 'abc'),
      (models.BPE(vocab('日本'), [], ignore_merges=True), '日本'),
    ]
  ):
    (tmp_path / str(number)).mkdir()
    assert saved(tmp_path / str(number), model).encode(text)


def sentencepiece(folder):
  model = sentencepiece_model_pb2.ModelProto()
  for piece, kind in [('<unk>', 2), ('<s>', 3), ('</s>', 3), ('[UNUSED_TOKEN_130]', 4), ('\u2581', 1), *((c, 1) for c in 'abcdefghij')]:
    model.pieces.add(piece=piece, score=-1.0, type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = False, False
  (folder / 'tokenizer.model').write_bytes(model.SerializeToString())
  return open_tokenizer(folder)


UNKNOWN = {
  'bpe': lambda f: saved(f, models.BPE(vocab('<unk>'), [], unk_token='<unk>'), specials=['<unk>', *SPECIAL]),
  'word level': lambda f: saved(
    f, models.WordLevel({c: i for i, c in enumerate([*'abc', '<unk>'])}, unk_token='<unk>'), pre_tokenizers.Split('', 'isolated'),
    specials=['<unk>', *SPECIAL],
  ),
  'unigram': lambda f: saved(f, models.Unigram([('<unk>', 0.0), *((t, -1.0) for t in LETTERS)], unk_id=0), specials=['<unk>', *SPECIAL]),
  'sentencepiece': sentencepiece,
}  # fmt: skip


@pytest.mark.parametrize('kind', UNKNOWN)
def test_with_an_unknown_token_such_text_stays_unknown_and_is_reported_once(tmp_path, kind):
  tokenizer = UNKNOWN[kind](tmp_path)
  unknown = tokenizer.unk_id
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert unknown not in tokenizer.encode('abc') and tokenizer.encode('a<unk>').count(unknown) == 1
  with pytest.warns(UserWarning, match="no token for '日'.*becomes its unknown token") as caught:
    assert tokenizer.encode('a日b').count(unknown) == 1
    tokenizer.encode('a日b')
  assert len(caught) == 1
  template = Template(TemplateConfig(max_response_length=6, separator_id=None if kind != 'sentencepiece' else 50), tokenizer)
  # As much of it reaches the model as is there; what a text spells `<unk>` itself is a control token like any other.
  (ids,) = template.encode_candidates('a', 'b日', ['日c日'], 'pretrain')
  assert ids.count(unknown) == 3
  assert template.encode_candidates('a', 'b', ['abc日abcabcabc'], 'pretrain')[0].count(unknown) == 1
  assert template.encode_candidates('a', 'b<unk>', ['c'], 'pretrain')[0].count(unknown) == 0


def test_a_speller_is_made_only_where_text_may_be_dropped():
  byte_names = {f'<0x{byte:02X}>': byte for byte in range(256)}
  letters = {symbol: i for i, symbol in enumerate(spelling.byte_symbols())}
  one_less = lambda vocabulary: dict(list(vocabulary.items())[1:])

  def needed(vocabulary, steps=None, **model):
    spec = {'model': {'type': 'BPE', 'vocab': vocabulary} | model, 'normalizer': None, 'pre_tokenizer': steps, 'added_tokens': []}
    return spelling.speller(None, spec) is not None

  by_bytes = {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'}, {'type': 'ByteLevel'}]}
  assert needed({'a': 0}) and not needed({'a': 0}, unk_token='a') and not needed({'a': 0}, type='Unigram')
  assert not needed(byte_names, byte_fallback=True) and needed(one_less(byte_names), byte_fallback=True) and needed(byte_names)
  assert not needed(letters, by_bytes) and needed(one_less(letters), by_bytes) and needed(letters)
  assert needed(letters, by_bytes, end_of_word_suffix='</w>') and needed(letters, by_bytes, continuing_subword_prefix='##')


def test_only_a_plain_byte_level_bpe_has_an_alphabet_that_is_reproduced():
  step = {'type': 'ByteLevel', 'add_prefix_space': False}
  split = {'type': 'Split', 'behavior': 'Isolated'}

  def alphabet(steps=step, normalizer=None, decoder='ByteLevel', **model):
    vocabulary = {spelling.byte_symbols()[byte]: byte for byte in b'ab\n'}
    spec = {'model': {'type': 'BPE', 'vocab': vocabulary} | model, 'pre_tokenizer': steps}
    return spelling.byte_alphabet(spec | {'normalizer': normalizer, 'decoder': decoder and {'type': decoder}})

  chain = lambda *steps: {'type': 'Sequence', 'pretokenizers': [*steps]}
  assert alphabet() == alphabet(chain(split, {'type': 'Digits'}, step)) == b'\nab'
  for changed in ({'dropout': 0.1}, {'continuing_subword_prefix': '##'}, {'end_of_word_suffix': '</w>'}, {'type': 'WordPiece'}):
    assert alphabet(**changed) is None
  for steps in (None, split, step | {'add_prefix_space': True}, chain(split | {'behavior': 'Removed'}, step), chain(step, split)):
    assert alphabet(steps) is None
  assert alphabet(normalizer={'type': 'NFC'}) is None and alphabet(decoder='BPEDecoder') is None and alphabet(decoder=None) is None


def test_bytes_have_the_symbols_of_the_library():
  symbols = spelling.byte_symbols()
  library = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  assert len(symbols) == 256 and set(symbols) == set(library.alphabet())
  for character in map(chr, [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0x10000, 0x110000, 0x10000)]):
    ((word, _),) = library.pre_tokenize_str(character)
    assert word == ''.join(symbols[byte] for byte in character.encode())


def test_a_word_is_spelled_by_symbols_of_their_places():
  def spells(vocabulary, word, **model):
    tokens = {token: i for i, token in enumerate(vocabulary)}
    return spelling.Speller(None, {'model': {'vocab': tokens} | model, 'added_tokens': []})._spells(word)

  by_end = lambda word: spells(['a', 'b</w>'], word, end_of_word_suffix='</w>')
  assert [by_end(word) for word in ('ab', 'aab', 'b', 'ba', 'a', 'abb')] == [True, True, True, False, False, False]
  by_start = lambda word: spells(['a', '##b'], word, continuing_subword_prefix='##')
  assert [by_start(word) for word in ('ab', 'abb', 'a', 'b', 'ba')] == [True, True, True, False, False]
  by_bytes = lambda word, **model: spells(['a', *bytes_of('é')], word, **model)
  assert by_bytes('aé', byte_fallback=True) and not by_bytes('aé') and not by_bytes('ê', byte_fallback=True)
  assert spells(['日本'], '日本', ignore_merges=True) and not spells(['日本'], '日本') and not spells(['日本'], '日', ignore_merges=True)
