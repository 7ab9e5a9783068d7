"""Tests of reading tensors into sharded parameters: all bit patterns and dtypes, and nothing read unnecessarily."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.checkpoints import exporter, families, importer
from polar_jax.checkpoints.formats.storage import CheckpointFileError, TensorInfo
from polar_jax.config import MeshConfig, ModelConfig
from polar_jax.model.heads import abstract_model

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# No mesh axis divides the vocabulary, the heads or the layers.
MODEL = ModelConfig(family='llama', vocab_size=21, num_layers=3, d_model=20, d_ff=28, num_heads=6, num_kv_heads=3, head_dim=10)
STORED = families.stored_tensors(MODEL, 'reward')


class InMemory:
  """A TensorSource that records what is read."""

  def __init__(self, tensors):
    self.path, self.held, self.reads = pathlib.Path('folder'), tensors, []

  def tensors(self):
    return {name: TensorInfo(a.shape, a.dtype, self.path / 'a.safetensors') for name, a in self.held.items()}

  def read(self, name):
    self.reads.append(name)
    return self.held[name].copy()


def random_bits(dtype, seed=0):
  """Return finite numbers of every exponent, including zeros of both signs, subnormal numbers, and the largest."""
  rng = np.random.default_rng(seed)

  def draw(shape):
    bits = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8).reshape(-1).view(dtype)
    with np.errstate(invalid='ignore'):
      return np.where(np.isfinite(bits), bits, dtype.type(-0.0)).astype(dtype).reshape(shape)

  return {s.name: draw(s.shape) for s in STORED}


def mesh_of(*sizes):
  return sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def abstract_on(mesh, model=MODEL, head='reward'):
  return sharding.abstract_params(abstract_model(model, head), mesh)


@pytest.mark.long
@pytest.mark.parametrize(
  ('sizes', 'stored', 'wanted'),
  [
    ((1, 1, 1, 1), F16, None),
    ((1, 1, 1, 1), BF16, None),
    ((1, 1, 1, 1), F16, F32),
    ((1, 1, 1, 1), F32, BF16),
    ((1, 2, 4, 1), F32, None),
    ((1, 2, 4, 1), BF16, F32),
    ((1, 2, 4, 1), F16, BF16),
  ],
  ids=str,
)
def test_load_is_exact(sizes, stored, wanted):
  held, mesh = random_bits(stored), mesh_of(*sizes)
  for name, array in held.items():
    held[name] = np.where(np.abs(array.astype(F32)) > 3e38, stored.type(1), array).astype(stored)  # representable in bfloat16
  assert (np.abs(held['model.embed_tokens.weight'].astype(F32)) < (1e-5 if stored == F16 else 1e-37)).any()
  params = importer.load(InMemory(held), STORED, abstract_on(mesh), wanted and wanted.name)
  jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(f'{x.sharding}, not {a.sharding}'), params, abstract_on(mesh))
  for name, array in exporter.stored_arrays(params, STORED):
    assert array.dtype == (wanted or stored)
    assert array.tobytes() == held[name].astype(array.dtype).tobytes(), name


def test_load_reads_only_the_requested_parameters():
  source, seen, abstract = InMemory(random_bits(F32)), {}, abstract_on(mesh_of(1, 1, 1, 1))
  params = importer.load(
    source, STORED, {'decoder': abstract['decoder']}, on_tensor=lambda name, a: seen.update({name: importer.checksum(a)})
  )
  assert list(params) == ['decoder']
  assert source.reads == list(seen) == [s.name for s in STORED if s.name != 'score.weight']  # each once
  assert seen == {name: hashlib.sha256(source.held[name].tobytes()).hexdigest() for name in seen}
  assert source.held['score.weight'].size == 20


def test_load_ignores_buffers_of_older_checkpoints():
  tensors = random_bits(F32)
  source = InMemory(tensors | {'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(5, F32)})
  assert importer.check(source, STORED).keys() == tensors.keys()
  with pytest.raises(CheckpointFileError, match=r"a.safetensors: tensor 'model.inv_freq' does not belong to the model"):
    importer.check(InMemory(tensors | {'model.inv_freq': np.ones(5, F32)}), STORED)


def test_check_tied_head_only_in_language_models():
  tied = dataclasses.replace(MODEL, tie_embeddings=True)
  tensors = random_bits(F32)
  twice = tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}
  with pytest.raises(CheckpointFileError, match=r"'lm_head.weight' does not belong to the model"):
    importer.check(InMemory(twice), families.stored_tensors(tied, 'reward'))
  del twice['score.weight']
  as_lm = families.stored_tensors(tied, 'lm')
  assert 'lm_head.weight' not in importer.check(InMemory(twice), as_lm)
  twice['lm_head.weight'][20, 19] += 1
  with pytest.raises(CheckpointFileError, match=r"a.safetensors: tensor 'lm_head.weight' differs from the embedding"):
    importer.check(InMemory(twice), as_lm)


@pytest.mark.parametrize(
  ('name', 'value'), [('model.layers.2.mlp.gate_proj.weight', np.nan), ('model.norm.weight', np.inf), ('score.weight', -np.inf)]
)
def test_load_refuses_nan_and_infinity_on_any_device(name, value):
  tensors = random_bits(BF16)
  tensors[name].reshape(-1)[-1] = value
  with pytest.raises(CheckpointFileError, match=rf"^folder/a.safetensors: tensor '{name}' contains NaN or infinity"):
    importer.load(InMemory(tensors), STORED, abstract_on(mesh_of(2, 4, 1, 1)))
