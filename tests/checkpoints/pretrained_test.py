"""Tests of opening every kind of checkpoint: description, parameters, tokenizer and template."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optional import gguf

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer, config_json, exporter, families, tokenizer_files
from polar_jax.checkpoints.formats.storage import CheckpointFileError
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import ConfigError, MeshConfig, ModelConfig, TemplateConfig
from polar_jax.data.spelling import byte_symbols
from polar_jax.data.tokenizer import SPECIAL_TOKENS, ByteTokenizer
from polar_jax.model.heads import HEADS, abstract_model
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.types import UserError

KINDS = {'reward': RewardModel, 'lm': LanguageModel, 'value': ValueModel}
MODEL = ModelConfig(vocab_size=261, num_layers=2, d_model=24, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, v_head_init='normal')
LLAMA = dataclasses.replace(MODEL, family='llama', rope_theta=700.0)
ONE, FSDP2_TENSOR4 = (1, 1, 1, 1), (1, 2, 4, 1)


def mesh_of(sizes=ONE):
  return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def random_params(model: ModelConfig, head: str, dtype=jnp.bfloat16):
  """Return parameters with a float32 head, as reward models are stored."""
  make = lambda: nnx.to_pure_dict(nnx.state(KINDS[head](model, rngs=nnx.Rngs(params=3)), nnx.Param))
  params = jax.tree.map(lambda x: x.astype(dtype), jax.jit(make)())
  return params | ({'v_head': params['v_head'].astype(jnp.float32)} if 'v_head' in params else {})


def save_run(folder: pathlib.Path, params, model: ModelConfig, head: str, **settings) -> pathlib.Path:
  fields = {f'model.{name}': value for name, value in dataclasses.asdict(model).items()}
  checkpointer.save_params(folder, params, {'objective': HEADS[head].objective, **fields, **settings})
  return folder


def save_hugging_face(folder: pathlib.Path, params, model: ModelConfig, head: str, reward_token_id=None) -> pathlib.Path:
  """Write a folder with our exporter, which exporter_test.py compares with an independent one."""
  exporter.write_weights(params, families.stored_tensors(model, head), folder, None, 10**9)
  exporter.write_config(folder, model, head, dtype='bfloat16', reward_token_id=reward_token_id, special_ids={})
  return folder


def save_gguf(file: pathlib.Path) -> dict[str, np.ndarray]:
  """Write a GGUF file of LLAMA's shape, tied, with a byte tokenizer. Returns its tensors."""
  m, rng = LLAMA, np.random.default_rng(0)
  q, kv = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
  shapes = {'token_embd': (m.vocab_size, m.d_model), 'output_norm': (m.d_model,)}
  per_layer = {'attn_norm': (m.d_model,), 'attn_q': (q, m.d_model), 'attn_k': (kv, m.d_model), 'attn_v': (kv, m.d_model)}
  per_layer |= {'attn_output': (m.d_model, q), 'ffn_norm': (m.d_model,), 'ffn_gate': (m.d_ff, m.d_model)}
  per_layer |= {'ffn_up': (m.d_ff, m.d_model), 'ffn_down': (m.d_model, m.d_ff)}
  shapes |= {f'blk.{i}.{name}': shape for i in range(m.num_layers) for name, shape in per_layer.items()}
  tensors = {name: rng.normal(size=shape).astype(np.float32 if 'norm' in name else np.float16) for name, shape in shapes.items()}
  writer = gguf.GGUFWriter(file, 'llama')
  writer.add_block_count(m.num_layers)
  writer.add_context_length(m.max_position)
  writer.add_embedding_length(m.d_model)
  writer.add_feed_forward_length(m.d_ff)
  writer.add_head_count(m.num_heads)
  writer.add_head_count_kv(m.num_kv_heads)
  writer.add_rope_freq_base(m.rope_theta)
  writer.add_layer_norm_rms_eps(m.norm_eps)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  writer.add_token_list([*byte_symbols()[:255], 'zz', *SPECIAL_TOKENS])  # byte 255 does not occur in UTF-8
  writer.add_token_types([1] * 256 + [3] * len(SPECIAL_TOKENS))
  writer.add_token_merges(['z z'])
  writer.add_bos_token_id(257)
  writer.add_add_bos_token(True)  # a byte-level BPE adds none otherwise
  writer.add_eos_token_id(258)
  for name, array in tensors.items():
    writer.add_tensor(f'{name}.weight', array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return tensors


def save_llama2c(file: pathlib.Path) -> np.ndarray:
  """Write a file of LLAMA's shape, tied. Returns its embedding table."""
  m, rng = LLAMA, np.random.default_rng(0)
  kv = m.num_kv_heads * m.head_dim
  layer = m.d_model * (2 + 2 * m.d_model + 2 * kv + 3 * m.d_ff)
  total = m.vocab_size * m.d_model + m.num_layers * layer + m.d_model + 16 * m.head_dim
  weights = rng.normal(size=total).astype(np.float32)
  header = struct.pack('<7i', m.d_model, m.d_ff, m.num_layers, m.num_heads, m.num_kv_heads, m.vocab_size, 16)
  file.write_bytes(header + weights.tobytes())
  return weights[: m.vocab_size * m.d_model].reshape(m.vocab_size, m.d_model)


def equal(a, b):
  def same(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))

  jax.tree.map(same, a, b)


def in_float32(params):
  return jax.tree.map(lambda x: x.astype(jnp.float32), params)


@pytest.mark.long
@pytest.mark.parametrize(
  ('save', 'head', 'model'),
  [(save_run, 'reward', MODEL), (save_run, 'lm', LLAMA), (save_hugging_face, 'reward', MODEL), (save_hugging_face, 'value', LLAMA)],
)
def test_open_pretrained_folders(tmp_path, save, head, model):
  params = random_params(model, head)
  opened = open_pretrained(str(save(tmp_path, params, model, head)))
  assert (opened.kind, opened.head, opened.path) == ('run' if save is save_run else 'hugging_face', head, tmp_path)
  assert opened.compute_like(model) == model
  mesh = mesh_of(FSDP2_TENSOR4)
  abstract = sharding.abstract_params(abstract_model(model, head), mesh)
  for dtype in (None, 'float32'):
    read = opened.params(mesh, dtype)
    equal(read, params if dtype is None else in_float32(params))
    jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(f'{x.sharding}, not {a.sharding}'), read, abstract)
  other = opened.params(mesh, 'float32', head='reward' if head == 'lm' else 'lm')
  assert list(other) == ['decoder']
  equal(other['decoder'], in_float32(params['decoder']))
  equal(opened.params(mesh, head=head), params)
  assert [s.name for s in opened.stored()] == [s.name for s in families.stored_tensors(model, head)]


@pytest.mark.needs('gguf')
def test_open_pretrained_gguf(tmp_path):
  tensors = save_gguf(tmp_path / 'model.gguf')
  opened = open_pretrained(tmp_path / 'model.gguf')
  assert (opened.kind, opened.head, opened.reward_token_id) == ('gguf', 'lm', None)
  assert opened.compute_like(LLAMA) == dataclasses.replace(LLAMA, tie_embeddings=True)
  params = opened.params(mesh_of(FSDP2_TENSOR4))
  assert list(params) == ['decoder']
  equal(params['decoder']['embedding'], tensors['token_embd'])
  equal(params['decoder']['layers']['mlp_norm'], np.stack([tensors[f'blk.{i}.ffn_norm'] for i in range(2)]))
  equal(params['decoder']['layers']['w_up'], np.stack([tensors[f'blk.{i}.ffn_up'].T for i in range(2)]))
  equal(opened.params(mesh_of(), 'bfloat16')['decoder']['norm'], tensors['output_norm'].astype(jnp.bfloat16))
  text = 'héllo<|reward|> [UNUSED_TOKEN_130]'
  assert opened.tokenizer().encode(text, add_bos=True) == ByteTokenizer().encode(text, add_bos=True)
  assert opened.assets is opened.assets and (opened.assets / 'tokenizer.json').is_file() and tmp_path not in opened.assets.parents


def test_open_pretrained_llama2c(tmp_path):
  embedding = save_llama2c(tmp_path / 'stories.bin')
  opened = open_pretrained(tmp_path / 'stories.bin')
  wanted = dataclasses.replace(LLAMA, tie_embeddings=True, rope_theta=10_000.0, max_position=16)
  assert (opened.kind, opened.head, opened.compute_like(LLAMA)) == ('llama2c', 'lm', wanted)
  equal(opened.params(mesh_of())['decoder']['embedding'], embedding)
  with pytest.raises(ConfigError, match=r'stories.bin: no tokenizer next to it; copy tok261.bin or tokenizer.bin there'):
    opened.tokenizer()
  pieces = ['<unk>', '\n<s>\n', '\n</s>\n', *(f'<0x{b:02X}>' for b in range(256)), ' a', 'b']
  records = b''.join(struct.pack('<fi', -i, len(p.encode())) + p.encode() for i, p in enumerate(pieces))
  (tmp_path / 'tok261.bin').write_bytes(struct.pack('<i', 8) + records)
  assert opened.tokenizer().encode('ab', add_bos=True) == [1, 259, 260]


def test_tokenizer_of_folders(tmp_path):
  tokenizer_files.write_for_transformers(ByteTokenizer(), tmp_path / 'run/assets', 'llama')
  run = save_run(tmp_path / 'run', random_params(MODEL, 'reward'), MODEL, 'reward', tokenizer='0123456789abcdef')
  assert open_pretrained(run).tokenizer().encode('a<|reward|>') == [97, 259]
  assert open_pretrained(run).tokenizer().path == run / 'assets/tokenizer.json'
  folder = save_hugging_face(tmp_path / 'hf', random_params(LLAMA, 'lm'), LLAMA, 'lm')
  with pytest.raises(UserError, match=r'hf contains neither a tokenizer.json nor a tokenizer.model'):
    open_pretrained(folder).tokenizer()
  tokenizer_files.write_for_transformers(ByteTokenizer(), folder, 'llama')
  assert open_pretrained(folder).tokenizer().path == folder / 'tokenizer.json'


def test_tokenizer_of_runs_without_files(tmp_path):
  params = random_params(MODEL, 'reward')
  byte = save_run(tmp_path / 'byte', params, MODEL, 'reward', tokenizer='byte')
  assert isinstance(open_pretrained(byte).tokenizer(), ByteTokenizer)
  lost = save_run(tmp_path / 'lost', params, MODEL, 'reward', tokenizer='0123456789abcdef')
  with pytest.raises(ConfigError, match=r'lost: has no tokenizer files; set tokenizer.kind and tokenizer.path'):
    open_pretrained(lost).tokenizer()


def test_template_from_checkpoint_and_config(tmp_path):
  trained = TemplateConfig(max_length=500, rule='client', separator='|', separator_id=9, reward_token_id=7)
  settings = {f'template.{name}': value for name, value in dataclasses.asdict(trained).items()}
  run = open_pretrained(save_run(tmp_path / 'run', random_params(MODEL, 'reward'), MODEL, 'reward', use_reference=True, **settings))
  assert run.template(TemplateConfig()) == trained
  wanted = TemplateConfig(max_length=600, reward_token_id=8, max_response_length=5, use_reference=False)
  assert run.template(wanted) == dataclasses.replace(wanted, rule='client', separator='|', separator_id=9)


def test_template_of_run_without_reference(tmp_path):
  """Earlier versions stored the config's template, and separately that the run left the reference out."""
  settings = {'template.use_reference': True, 'use_reference': False}
  run = open_pretrained(save_run(tmp_path, random_params(MODEL, 'reward'), MODEL, 'reward', **settings))
  assert run.template(TemplateConfig()) == TemplateConfig(use_reference=False)


def test_template_reward_token_of_hugging_face_folder(tmp_path):
  opened = open_pretrained(save_hugging_face(tmp_path, random_params(MODEL, 'reward'), MODEL, 'reward', reward_token_id=77))
  assert opened.reward_token_id == 77
  assert opened.template(TemplateConfig()) == TemplateConfig(reward_token_id=77)
  assert opened.template(TemplateConfig(reward_token_id=5)).reward_token_id == 5


def test_compute_like_takes_compute_settings_from_the_config(tmp_path):
  opened = open_pretrained(save_hugging_face(tmp_path, random_params(LLAMA, 'lm'), LLAMA, 'lm'))
  how = {'compute_dtype': 'bfloat16', 'remat': 'full', 'scan_unroll': 2, 'attention': 'chunked'}
  config = ModelConfig(vocab_size=5, num_layers=9, rope_theta=1.0, v_head_init='normal', **how)
  assert opened.compute_like(config) == dataclasses.replace(LLAMA, **how)


def test_open_pretrained_refuses_other_files(tmp_path):
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(ConfigError, match=r'neither a run of polar_jax \(a folder with checkpoints/\) nor .*; it contains: notes.txt$'):
    open_pretrained(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ConfigError, match='no checkpoint to start from in'):
    open_pretrained(tmp_path)
  (tmp_path / 'm.safetensors').touch()
  with pytest.raises(ConfigError, match=r'm.safetensors: a file must be a .gguf or a llama2.c .bin; for a Hugging Face .* the folder'):
    open_pretrained(tmp_path / 'm.safetensors')
  (tmp_path / 'pytorch_model.bin').write_bytes(b'PK\x03\x04' + bytes(100))
  with pytest.raises(CheckpointFileError, match=r'pytorch_model.bin: is not a llama2.c file'):
    open_pretrained(tmp_path / 'pytorch_model.bin')


@pytest.mark.needs('gguf')
def test_open_pretrained_refuses_truncated_gguf(tmp_path):
  for name in ('m.gguf', 'empty.gguf'):
    (tmp_path / name).write_bytes(b'GGUF' if name == 'm.gguf' else b'')
    with pytest.raises(CheckpointFileError, match=name):
      open_pretrained(tmp_path / name)


@pytest.mark.needs('gguf')
def test_open_pretrained_reads_no_tensor(tmp_path, monkeypatch):
  folder = save_hugging_face(tmp_path / 'hf', random_params(LLAMA, 'lm'), LLAMA, 'lm')
  save_gguf(tmp_path / 'm.gguf')
  monkeypatch.setattr('polar_jax.checkpoints.formats.storage.read_array', lambda *_: pytest.fail('a tensor was read'))
  monkeypatch.setattr('polar_jax.checkpoints.formats.gguf.read_array', lambda *_: pytest.fail('a tensor was read'))
  for path in (folder, tmp_path / 'm.gguf'):
    assert open_pretrained(path).model.family == 'llama'


def test_exported_value_model_reads_as_reward(tmp_path):
  folder = save_hugging_face(tmp_path, random_params(MODEL, 'value'), MODEL, 'value')
  config = json.loads((folder / 'config.json').read_text())
  assert config_json.from_json(config, '').head == open_pretrained(folder).head == 'reward'  # internlm2 has one class for both
