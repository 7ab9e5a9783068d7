"""Tests of reading llama2.c's files: weight by weight, and by the text that a real model generates."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from optional import torch, transformers

from polar_jax.checkpoints.formats.llama2c import open_llama2c
from polar_jax.checkpoints.formats.storage import CheckpointFileError
from polar_jax.config import ModelConfig

WIDTH, D_FF, LAYERS, HEADS, KV_HEADS, VOCAB, LENGTH = 24, 10, 3, 4, 2, 7, 5
HEAD_DIM = WIDTH // HEADS


def pairs_from_halves(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reorder Hugging Face's matrix rows as llama2.c's export does, one at a time."""
  half = weight.shape[0] // heads // 2
  rows = []
  for head in range(heads):
    for i in range(half):
      rows += [weight[2 * half * head + i], weight[2 * half * head + half + i]]
  return np.stack(rows)


def make(path, tied: bool) -> dict[str, np.ndarray]:
  """Write a random model and return its tensors in Hugging Face's order of rotary dimensions."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  kv = KV_HEADS * HEAD_DIM
  t = {'model.embed_tokens.weight': draw(VOCAB, WIDTH), 'model.norm.weight': draw(WIDTH), 'lm_head.weight': draw(VOCAB, WIDTH)}
  shapes = {
    'input_layernorm': (WIDTH,),
    'self_attn.q_proj': (WIDTH, WIDTH),
    'self_attn.k_proj': (kv, WIDTH),
    'self_attn.v_proj': (kv, WIDTH),
    'self_attn.o_proj': (WIDTH, WIDTH),
    'post_attention_layernorm': (WIDTH,),
    'mlp.gate_proj': (D_FF, WIDTH),  # w1
    'mlp.down_proj': (WIDTH, D_FF),  # w2
    'mlp.up_proj': (D_FF, WIDTH),  # w3
  }
  flat = [t['model.embed_tokens.weight']]
  for part, shape in shapes.items():
    for layer in range(LAYERS):
      weight = t[f'model.layers.{layer}.{part}.weight'] = draw(*shape)
      flat.append(pairs_from_halves(weight, HEADS if part[-6] == 'q' else KV_HEADS) if part[-6:] in ('q_proj', 'k_proj') else weight)
  flat += [t['model.norm.weight'], draw(LENGTH, HEAD_DIM // 2), draw(LENGTH, HEAD_DIM // 2)]
  if tied:
    del t['lm_head.weight']
  else:
    flat.append(t['lm_head.weight'])
  header = struct.pack('<7i', WIDTH, D_FF, LAYERS, HEADS, KV_HEADS, VOCAB if tied else -VOCAB, LENGTH)
  path.write_bytes(header + b''.join(a.tobytes() for a in flat))
  return t


@pytest.mark.parametrize('tied', [True, False])
def test_open_llama2c_tensors_and_model(tmp_path, tied):
  wanted = make(tmp_path / 'm.bin', tied)
  source = open_llama2c(str(tmp_path / 'm.bin'))
  assert {n: i.shape for n, i in source.tensors().items()} == {n: a.shape for n, a in wanted.items()}
  assert {(i.dtype, i.file) for i in source.tensors().values()} == {(np.dtype(np.float32), tmp_path / 'm.bin')}
  for name, array in wanted.items():
    assert np.array_equal(source.read(name), array), name
  assert source.model == ModelConfig(
    family='llama',
    vocab_size=VOCAB,
    num_layers=LAYERS,
    d_model=WIDTH,
    d_ff=D_FF,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_position=LENGTH,
    tie_embeddings=tied,
  )


def test_open_llama2c_wrong_size(tmp_path):
  file = tmp_path / 'm.bin'
  make(file, True)
  content = file.read_bytes()
  for wrong in (content[:-4], content + b'abc', content[:28]):
    file.write_bytes(wrong)
    with pytest.raises(CheckpointFileError, match=f'm.bin: has {len(wrong)} bytes, but its header implies {len(content)}; '):
      open_llama2c(file)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'has 0 bytes, fewer than the 28'),
    (struct.pack('<2i', 24, 10), 'has 8 bytes, fewer than the 28'),
    (struct.pack('<Ii', 0x616B3432, 1) + bytes(248), 'version 1 or later; export it with .*--version 0'),
    (struct.pack('<7i', 24, 10, 0, 4, 2, 7, 5), r'its header .* reads \(24, 10, 0, 4, 2, 7, 5\)'),
    (struct.pack('<7i', 20, 10, 3, 4, 2, 7, 5), 'is not a llama2.c file'),  # an odd head dimension
    (struct.pack('<7i', 24, 10, 3, 4, 3, 7, 5), 'is not a llama2.c file'),  # heads that are not a multiple of key/value heads
    (b'PK\x03\x04' + bytes(100), 'is not a llama2.c file'),
  ],
)
def test_open_llama2c_bad_header(tmp_path, content, message):
  (tmp_path / 'm.bin').write_bytes(content)
  with pytest.raises(CheckpointFileError, match=rf'm.bin: .*{message}'):
    open_llama2c(tmp_path / 'm.bin')


def test_open_llama2c_missing_file(tmp_path):
  with pytest.raises(CheckpointFileError, match=r'm.bin: cannot be read'):
    open_llama2c(tmp_path / 'm.bin')


def read_pieces(path) -> list[bytes]:
  """Read llama2.c's tokenizer file: the longest length, then score, length and bytes of each piece."""
  raw, at, pieces = path.read_bytes(), 4, []
  while at < len(raw):
    (length,) = struct.unpack_from('<i', raw, at + 4)
    pieces.append(raw[at + 8 : at + 8 + length])
    at += 8 + length
  return pieces


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.data
def test_real_model_generates_its_story(data_folder):
  """transformers rotates halves, as we do; with rows in another order the model generates nonsense."""
  folder = data_folder / 'models/stories260k'
  source = open_llama2c(folder / 'stories260K.bin')
  m = source.model
  assert (m.d_model, m.num_layers, m.num_heads, m.num_kv_heads, m.max_position, m.vocab_size, m.tie_embeddings) == (
    (64, 5, 8, 4, 512, 512, True)
  )
  config = transformers.LlamaConfig(
    vocab_size=m.vocab_size,
    hidden_size=m.d_model,
    intermediate_size=m.d_ff,
    num_hidden_layers=m.num_layers,
    num_attention_heads=m.num_heads,
    num_key_value_heads=m.num_kv_heads,
    rms_norm_eps=m.norm_eps,
    tie_word_embeddings=True,
  )
  model = transformers.LlamaForCausalLM(config)
  missing, unexpected = model.load_state_dict({name: torch.from_numpy(source.read(name)) for name in source.tensors()}, strict=False)
  assert (missing, unexpected) == (['lm_head.weight'], [])
  tokens = [1]
  with torch.no_grad():
    for _ in range(40):
      tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
  pieces = read_pieces(folder / 'tok512.bin')
  assert b''.join(pieces[t] for t in tokens[1:]).strip().startswith(b'Once upon a time, there was a little girl named Lily.')
