"""Damaged checkpoints of every format: each is read, or refused with one line that says what is wrong.

The damage is random but seeded. `POLAR_FUZZ=2000 python -m pytest tests/checkpoints/fuzz_test.py` tries that many for each format.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from fuzzing import changed_value

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer, families, importer, peft, tokenizer_files
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import LoraConfig, MeshConfig, ModelConfig
from polar_jax.data.spelling import byte_symbols
from polar_jax.data.tokenizer import SPECIAL_TOKENS, ByteTokenizer, sentencepiece_proto, stop_ids
from polar_jax.model import heads, lora
from polar_jax.types import UserError

ROUNDS = int(os.environ.get('POLAR_FUZZ', '120'))
MODEL = ModelConfig(
  family='llama', vocab_size=263, num_layers=2, d_model=8, d_ff=12, num_heads=2, num_kv_heads=1, head_dim=4, tie_embeddings=True
)
SHAPES = {s.name: s.shape for s in families.stored_tensors(MODEL, 'lm')}
ODD = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 10**400, 0.5, 1e-320, 1e308, float('nan'), '', 'x', '\ud800', 'llama', [], {}, [[]])
ODD += ({'a': None}, [1, 'x'], ['llama'], 'y' * 3_000, 'model.safetensors', '../x', 'a\0b', 'F64')
INTEGERS = (0, 1, 2, 7, 8, 9, 12, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
  """Return bytes with some bits flipped, a piece cut out or doubled, or an integer of 4 or 8 bytes replaced. Mostly near the start."""
  at = int(rng.integers(len(data) + 1) if rng.random() < 0.3 else min(rng.integers(1_200), len(data)))
  end = min(len(data), at + int(rng.choice([1, 4, 8, 40, 1_000])))
  kind = int(rng.integers(5))
  if kind == 0:
    changed = bytearray(data)
    for i in rng.integers(at, end + 1, 3).tolist():
      if i < len(data):
        changed[i] ^= 1 << int(rng.integers(8))
    return bytes(changed)
  if kind == 1:
    return data[:at]
  if kind == 2:
    return data[:at] + data[end:]
  if kind == 3:
    return data[:end] + data[at:]
  value, size = INTEGERS[int(rng.integers(len(INTEGERS)))], int(rng.choice([4, 8]))
  return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, 'little') + data[at + size :]


def damage(file: pathlib.Path, rng: np.random.Generator) -> None:
  data = file.read_bytes()
  if file.suffix == '.json' and rng.random() < 0.8:
    data = json.dumps(changed_value(json.loads(data), ODD, rng)).encode('utf-8', 'surrogatepass')
  elif file.suffix == '.safetensors' and rng.random() < 0.6:
    length = int.from_bytes(data[:8], 'little')
    header = json.dumps(changed_value(json.loads(data[8 : 8 + length]), ODD, rng)).encode('utf-8', 'surrogatepass')
    data = len(header).to_bytes(8, 'little') + header + data[8 + length :]
  else:
    data = flipped(data, rng)
  file.write_bytes(data)


def tensors(dtype=np.float32) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def hugging_face(folder: pathlib.Path) -> pathlib.Path:
  """Two files with an index, a tokenizer.json and the small files around it."""
  folder.mkdir()
  names = list(SHAPES)
  shards = {'model-1.safetensors': names[:9], 'model-2.safetensors': names[9:]}
  held = tensors()
  for file, some in shards.items():
    safetensors.numpy.save_file({name: held[name] for name in some}, folder / file)
  index = {'metadata': {}, 'weight_map': {name: file for file, some in shards.items() for name in some}}
  config = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': 263,
    'hidden_size': 8,
    'intermediate_size': 12,
    'num_hidden_layers': 2,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'max_position_embeddings': 64,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1e4,
    'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
    | {'original_max_position_embeddings': 32},
    'layer_types': ['full_attention'] * 2,
    'tie_word_embeddings': True,
    'hidden_act': 'silu',
    'eos_token_id': [258],
  }
  for name, value in (('model.safetensors.index.json', index), ('config.json', config), ('generation_config.json', {'eos_token_id': 258})):
    (folder / name).write_text(json.dumps(value))
  tokenizer_files.write_for_transformers(ByteTokenizer(), folder, 'llama', {'<more>': 261})
  (folder / 'special_tokens_map.json').write_text(json.dumps({'bos_token': {'content': '<s>'}, 'additional_special_tokens': ['<more>']}))
  (folder / 'added_tokens.json').write_text(json.dumps({'<last>': 262}))
  return folder


def with_sentencepiece(folder: pathlib.Path) -> pathlib.Path:
  hugging_face(folder)
  for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json'):
    (folder / name).unlink()
  model = sentencepiece_proto()()
  for i, piece in enumerate(['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), 'a', 'b', 'ab', '\u2581']):
    model.pieces.add(piece=piece, score=-i, type=2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1)
  model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
  (folder / 'tokenizer.model').write_bytes(model.SerializeToString())
  return folder


def with_torch(folder: pathlib.Path) -> pathlib.Path:
  import torch

  hugging_face(folder)
  for file in folder.glob('model*'):
    file.unlink()
  torch.save({name: torch.from_numpy(array) for name, array in tensors().items()}, folder / 'pytorch_model.bin')
  return folder


def llama2c(folder: pathlib.Path) -> pathlib.Path:
  folder.mkdir()
  size = sum(int(np.prod(shape)) for shape in SHAPES.values()) + 16 * 4
  weights = np.random.default_rng(0).normal(size=size).astype(np.float32)
  (folder / 'm.bin').write_bytes(struct.pack('<7i', 8, 12, 2, 2, 1, 263, 16) + weights.tobytes())
  tokens = [b'<unk>', b'\n<s>\n', b'\n</s>\n', *(b'<0x%02X>' % b for b in range(256)), b'a', b'b', b'ab', b' ']
  (folder / 'tokenizer.bin').write_bytes(struct.pack('<i', 7) + b''.join(struct.pack('<fi', 0.5, len(t)) + t for t in tokens))
  return folder / 'm.bin'


def adapters(folder: pathlib.Path) -> pathlib.Path:
  """A folder of PEFT whose base is next to it."""
  base, config = hugging_face(folder.parent / 'base'), LoraConfig(rank=2, targets=('wq', 'w_down'))
  rng, shapes = np.random.default_rng(0), nnx.to_pure_dict(nnx.state(heads.abstract_model(MODEL, 'lm', config), nnx.Param))
  trained, _ = lora.split(jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes), config)
  arrays = peft.tensors(trained, MODEL, 'lm', config, None)
  peft.write(folder, arrays, MODEL, 'lm', config, base=str(base), base_digest=None, reward_token_id=None)
  return folder


def gguf_text(text: str) -> bytes:
  return struct.pack('<Q', len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
  """A value with its type, as llama.cpp writes it."""
  if isinstance(value, list):
    return struct.pack('<IIQ', 9, *struct.unpack('<I', gguf_value(value[0])[:4]), len(value)) + b''.join(gguf_value(v)[4:] for v in value)
  if isinstance(value, bool):
    return struct.pack('<I?', 7, value)
  if isinstance(value, int):
    return struct.pack('<Ii', 5, value) if value < 0 else struct.pack('<II', 4, value)
  if isinstance(value, float):
    return struct.pack('<If', 6, value)
  return struct.pack('<I', 8) + gguf_text(value)


GGUF_NAMES = {
  'embed_tokens': 'token_embd',
  'input_layernorm': 'attn_norm',
  'q_proj': 'attn_q',
  'k_proj': 'attn_k',
  'v_proj': 'attn_v',
  'o_proj': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'gate_proj': 'ffn_gate',
  'up_proj': 'ffn_up',
  'down_proj': 'ffn_down',
}
GGUF_FIELDS = {
  'general.architecture': 'llama',
  'general.alignment': 32,
  'llama.block_count': 2,
  'llama.context_length': 64,
  'llama.embedding_length': 8,
  'llama.feed_forward_length': 12,
  'llama.attention.head_count': 2,
  'llama.attention.head_count_kv': 1,
  'llama.rope.freq_base': 1e4,
  'llama.rope.scaling.type': 'none',
  'llama.rope.scaling.factor': 2.0,
  'llama.attention.layer_norm_rms_epsilon': 1e-5,
  'tokenizer.chat_template': '{{ x }}',
  'tokenizer.ggml.bos_token_id': 257,
  'tokenizer.ggml.eos_token_id': 258,
  'tokenizer.ggml.add_bos_token': True,
}
BPE_FIELDS = {
  'tokenizer.ggml.model': 'gpt2',
  'tokenizer.ggml.pre': 'gpt-2',
  'tokenizer.ggml.tokens': [*byte_symbols(), *SPECIAL_TOKENS, 'ab', 'cd'],
  'tokenizer.ggml.token_type': [1] * 256 + [3] * 5 + [1] * 2,
  'tokenizer.ggml.merges': ['a b', 'c d'],
}
SENTENCEPIECE_FIELDS = {
  'tokenizer.ggml.model': 'llama',
  'tokenizer.ggml.tokens': ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), 'a', 'b', 'ab', '\u2581'],
  'tokenizer.ggml.token_type': [2, 3, 3] + [6] * 256 + [1] * 4,
  'tokenizer.ggml.scores': [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0],
}
GGUF_ODD = (
  -1,
  0,
  1,
  3,
  2**31 - 1,
  2**32 - 1,
  0.0,
  -1.5,
  1e38,
  float('nan'),
  float('inf'),
  True,
  '',
  'x',
  'llama',
  'y' * 3_000,
  [1],
  ['a'],
  [0.5],
)


def gguf_bytes(fields: dict[str, Any], extra: Sequence[tuple[str, tuple[int, ...]]] = (), kind: int = 0) -> bytes:
  """A file of float32 tensors, by the format's description alone. `kind`: type that the header claims for matrices."""
  held, at = [], 0
  for name, shape in SHAPES.items():
    part = name.split('.')[-2]
    theirs = 'output_norm' if name == 'model.norm.weight' else GGUF_NAMES[part]
    held.append((f'blk.{name.split(".")[2]}.{theirs}.weight' if 'layers' in name else f'{theirs}.weight', shape))
  infos = b''
  for name, shape in [*held, *extra]:
    infos += gguf_text(name) + struct.pack('<I', len(shape)) + struct.pack(f'<{len(shape)}Q', *reversed(shape))
    infos += struct.pack('<IQ', kind if len(shape) == 2 else 0, at)
    at += -(-min(math.prod(shape), 64) * 4 // 32) * 32 if name == 'rope_freqs.weight' else -(-math.prod(shape) * 4 // 32) * 32
  pairs = b''.join(gguf_text(name) + gguf_value(value) for name, value in fields.items())
  header = b'GGUF' + struct.pack('<IQQ', 3, len(held) + len(extra), len(fields)) + pairs + infos
  return header + bytes(-len(header) % 32) + np.random.default_rng(0).normal(size=at // 4).astype(np.float32).tobytes()


def gguf(folder: pathlib.Path, more: dict[str, Any] = BPE_FIELDS) -> pathlib.Path:
  folder.mkdir()
  (folder / 'm.gguf').write_bytes(gguf_bytes(GGUF_FIELDS | more))
  return folder / 'm.gguf'


def damage_fields(file: pathlib.Path, rng: np.random.Generator) -> None:
  """Write a GGUF file with an odd value in one field, or an odd tensor more."""
  fields = GGUF_FIELDS | (BPE_FIELDS if rng.random() < 0.5 else SENTENCEPIECE_FIELDS)
  name, odd = list(fields)[int(rng.integers(len(fields)))], GGUF_ODD[int(rng.integers(len(GGUF_ODD)))]
  kind, extra = 0, []
  if rng.random() < 0.2:
    extra = [('rope_freqs.weight', ((2,), (0,), (3,), (2**40,), (1, 2), (1, 1, 1, 1, 1))[int(rng.integers(6))])]
  elif rng.random() < 0.1:
    kind = int(rng.choice([1, 2, 8, 30, 99, 2**31]))
  elif isinstance(fields[name], list) and isinstance(odd, type(fields[name][0])) and rng.random() < 0.8:
    fields[name] = [*fields[name][:-1], odd]
  else:
    fields[name] = odd
  file.write_bytes(gguf_bytes(fields, extra, kind))


def read_all(path: pathlib.Path) -> None:
  """Read what any stage would read of a checkpoint, without putting it on devices."""
  opened = open_pretrained(path)
  if opened.has_tokenizer:
    tokenizer = opened.tokenizer()
    tokenizer.decode(tokenizer.encode('ab <s> \u00e9', add_bos=True))
    stop_ids(opened.assets, tokenizer)
  if opened.source is not None:
    for name in importer.check(opened.source, opened.stored()):
      opened.source.read(name)
  if opened.kind == 'peft':
    opened.params(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))


def outcomes(path: pathlib.Path, rounds: int, harm: Callable[[pathlib.Path, np.random.Generator], None], files: list[str]) -> Iterator[str]:
  """Damage one file after the other; yield '' if the checkpoint is read and the message if it is refused."""
  folder = path if path.is_dir() else path.parent
  whole = {name: (folder / name).read_bytes() for name in files}
  read_all(path)
  for seed in range(rounds):
    rng = np.random.default_rng(seed)
    name = files[seed % len(files)]
    harm(folder / name, rng)
    try:
      read_all(path)
      yield ''
    except UserError as error:
      assert 0 < len(str(error)) <= 500 and '\n' not in str(error), f'seed {seed}: {error}'
      yield str(error)
    except BaseException as error:
      error.add_note(f'seed {seed}, file {name}')
      raise
    finally:
      (folder / name).write_bytes(whole[name])


FORMATS = {
  'hugging_face': (hugging_face, damage, ROUNDS * 4),
  'sentencepiece': (with_sentencepiece, damage, ROUNDS),
  'torch': (with_torch, damage, ROUNDS),
  'peft': (adapters, damage, ROUNDS),
  'llama2c': (llama2c, damage, ROUNDS),
  'gguf': (gguf, damage, ROUNDS * 3),
  'gguf_fields': (gguf, damage_fields, ROUNDS * 3),
}


@pytest.mark.long
@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.needs('torch')) if n == 'torch' else n for n in FORMATS])
@pytest.mark.filterwarnings('ignore')
def test_damaged_checkpoints_are_read_or_refused_in_one_line(tmp_path, name):
  make, harm, rounds = FORMATS[name]
  path = make(tmp_path / 'model')
  folder = path if path.is_dir() else path.parent
  files = sorted(file.name for file in folder.iterdir())
  if name == 'sentencepiece':
    files = ['tokenizer.model']
  if name == 'torch':
    files = ['pytorch_model.bin']
  found = list(outcomes(path, rounds, harm, files))
  assert sum(map(bool, found)) > len(found) / 8  # the damage is damage
  assert name == 'gguf_fields' or all(str(tmp_path) in message or 'GGUF file' in message for message in found if message)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('num_hidden_layers', 10**30),
    ('num_hidden_layers', 10**400),
    ('layer_types', 1),
    ('rope_theta', 10**400),
    ('rms_norm_eps', 1e-300),
    ('hidden_size', 2**62),
    ('reward_token_id', 263),
    ('model_type', ['llama'] * 900),
  ],
)
def test_absurd_settings_are_named_at_once(tmp_path, key, value):
  folder = hugging_face(tmp_path / 'model')
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {key: value}))
  with pytest.raises(UserError, match=rf'config.json: {key} is .*; supported: ') as error:
    open_pretrained(folder).params(None)
  assert len(str(error.value)) <= 500


def test_counts_of_gguf_are_checked_before_they_are_used(tmp_path):
  file = gguf(tmp_path / 'model')
  whole = file.read_bytes()
  for at, what in ((8, 'tensors'), (16, 'metadata pairs')):
    file.write_bytes(whole[:at] + struct.pack('<Q', 2**40) + whole[at + 8 :])
    with pytest.raises(UserError, match=f'm.gguf: is damaged.* has {2**40} {what}, more than the file can hold'):
      open_pretrained(file)
  file.write_bytes(gguf_bytes(GGUF_FIELDS | BPE_FIELDS | {'llama.block_count': 2**31 - 1}))
  with pytest.raises(UserError, match=r'llama.block_count is 2147483647, but there are only \d+ tensors'):
    open_pretrained(file)
  file.write_bytes(gguf_bytes(GGUF_FIELDS | BPE_FIELDS | {'tokenizer.ggml.bos_token_id': 'x'}))
  with pytest.raises(UserError, match=r'tokenizer.ggml.bos_token_id is x, expected an integer; set tokenizer.path'):
    open_pretrained(file).tokenizer()
  file.write_bytes(gguf_bytes(GGUF_FIELDS | BPE_FIELDS, [('rope_freqs.weight', (0,))]))
  with pytest.raises(UserError, match=r"tensor 'rope_freqs.weight': has shape \(0,\)"):
    open_pretrained(file)


def test_sizes_of_llama2c_are_checked_before_they_are_used(tmp_path):
  file = llama2c(tmp_path / 'model')
  file.write_bytes(struct.pack('<7i', 8, 12, 2**31 - 1, 2, 1, 263, 16) + file.read_bytes()[28:])
  with pytest.raises(UserError, match=r'm.bin: has \d+ bytes, but its header implies \d+; .* download it again'):
    open_pretrained(file)


@pytest.mark.filterwarnings('ignore')
def test_damaged_runs_are_read_or_refused_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpointer, '_PAUSES', ())
  settings = {'objective': 'next_token', 'tokenizer': 'byte', 'model.vocab_size': 263, 'model.num_layers': 2}
  run = tmp_path / 'run'
  checkpointer.save_params(run, {'decoder': {'norm': np.ones(8, np.float32)}}, settings)
  files = sorted(file.relative_to(run).as_posix() for file in run.rglob('*') if file.is_file() and 'state' not in file.parts)
  found = list(outcomes(run, max(ROUNDS // 4, len(files)), damage, files))
  assert sum(map(bool, found)) > len(found) / 8
  shutil.rmtree(run / 'checkpoints/0/config')
  with pytest.raises(UserError, match=r'checkpoints/0: this checkpoint cannot be read \(.*\); restore it from a backup'):
    open_pretrained(run)
