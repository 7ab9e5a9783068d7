"""Tests of pytorch_model.bin files: exact tensors, no code execution, and one clear line for what cannot be read."""

from __future__ import annotations

import gc
import json
import os
import pickle
import weakref

import ml_dtypes
import numpy as np
import pytest
from optional import torch

from polar_jax.checkpoints.formats import torch_files
from polar_jax.checkpoints.formats.storage import CheckpointFileError, open_folder

pytestmark = pytest.mark.needs('torch')

SHARED = torch.arange(12.0)
STATE = {
  'brain': torch.randn(6, 4).to(torch.bfloat16),
  'half': torch.randn(5).half(),
  'single': torch.nn.Parameter(torch.randn(2, 3)),
  'turned': torch.randn(3, 4).T,
  'part': SHARED[3:7],
  'scalar': torch.tensor(2.5).to(torch.bfloat16),
}


def assert_state(source, state) -> None:
  for name, tensor in state.items():
    wanted = tensor.detach()
    dtype = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}[tensor.dtype]
    found = source.read(name)
    info = source.tensors()[name]
    assert info.dtype == found.dtype == dtype
    assert info.shape == found.shape == tuple(tensor.shape)
    assert np.array_equal(found.astype(np.float32), wanted.float().numpy())


@pytest.mark.parametrize('zipped', [True, False])
def test_entries_of_one_file(tmp_path, zipped):
  torch.save(STATE, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=zipped)
  assert_state(open_folder(tmp_path), STATE)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('indexed', [True, False])
def test_entries_of_shards(tmp_path, zipped, indexed):
  names = list(STATE)
  shards = {f'pytorch_model-0000{i + 1}-of-00002.bin': {n: STATE[n] for n in names[i::2]} for i in range(2)}
  for file, tensors in shards.items():
    torch.save(tensors, tmp_path / file, _use_new_zipfile_serialization=zipped)
  torch.save({'lr': 1}, tmp_path / 'training_args.bin')  # contains no weights and is never opened
  if indexed:
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': weight_map}))
  assert_state(open_folder(tmp_path), STATE)


def test_open_folder_prefers_safetensors(tmp_path):
  from safetensors.torch import save_file

  torch.save({'a': torch.zeros(2)}, tmp_path / 'pytorch_model.bin')
  save_file({'b': torch.ones(2)}, tmp_path / 'model.safetensors')
  assert list(open_folder(tmp_path).tensors()) == ['b']


def test_read_array_owns_its_memory(tmp_path):
  file = tmp_path / 'pytorch_model.bin'
  torch.save(STATE, file)
  array = open_folder(tmp_path).read('part')
  with file.open('r+b') as f:  # in place, so that a mapping would change
    f.write(b'\xff' * file.stat().st_size)
  assert array.tolist() == [3, 4, 5, 6]


def test_read_file_deleted_after_opening(tmp_path):
  torch.save(STATE, tmp_path / 'pytorch_model.bin')
  source = open_folder(tmp_path)
  torch.save({'half': STATE['half']}, tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointFileError, match=r"pytorch_model.bin: tensor 'part' disappeared"):
    source.read('part')
  (tmp_path / 'pytorch_model.bin').unlink()
  with pytest.raises(CheckpointFileError, match=r'pytorch_model.bin: cannot be read'):
    source.read('half')


@pytest.mark.long
def test_legacy_file_is_loaded_once_and_only_the_last_is_kept(tmp_path, monkeypatch):
  for i in (1, 2):
    torch.save({f'a{i}': torch.ones(2), f'b{i}': torch.ones(2)}, tmp_path / f'pytorch_model-{i}.bin', _use_new_zipfile_serialization=False)
  loads, loaded, load = [], [], torch.load

  def watch(file, **settings):
    gc.collect()
    assert all(tensor() is None for tensor in loaded)  # the previous file has been released
    state = load(file, **settings)
    loads.append(file.name)
    loaded.extend(weakref.ref(tensor) for tensor in state.values())
    return state

  monkeypatch.setattr(torch, 'load', watch)
  files = torch_files.TorchFiles()
  entries = files.entries(tmp_path / 'pytorch_model-1.bin') | files.entries(tmp_path / 'pytorch_model-2.bin')
  for name in ('a2', 'b2', 'a1', 'b1'):
    entries[name].read()
  assert loads == ['pytorch_model-1.bin', 'pytorch_model-2.bin', 'pytorch_model-1.bin']


class Malicious:
  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize('how', ['zipped', 'legacy', 'pickle'])
def test_entries_never_run_a_pickle(tmp_path, how):
  marker, file = tmp_path / 'marker', tmp_path / 'pytorch_model.bin'
  content = {'a': torch.zeros(2), 'b': Malicious(marker)}
  if how == 'pickle':
    file.write_bytes(pickle.dumps(content['b'], protocol=2))
  else:
    torch.save(content, file, _use_new_zipfile_serialization=how == 'zipped')
  message = r'pytorch_model.bin: contains more than weights.*posix\.mkdir.*safetensors' if how != 'pickle' else 'pytorch_model.bin: '
  with pytest.raises(CheckpointFileError, match=message) as error:
    open_folder(tmp_path)
  assert '\n' not in str(error.value)
  assert not marker.exists()
  pickle.loads(pickle.dumps(content['b']))
  assert marker.exists()  # an unrestricted load does run it


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('keep', [0.0, 0.001, 0.3, 0.9, -1])
def test_entries_of_truncated_file(tmp_path, zipped, keep):
  file = tmp_path / 'pytorch_model.bin'
  torch.save({'w': torch.zeros(4_000)}, file, _use_new_zipfile_serialization=zipped)
  content = file.read_bytes()
  file.write_bytes(content[: int(len(content) * keep) if keep >= 0 else -1])
  with pytest.raises(CheckpointFileError, match=r'pytorch_model.bin: is (empty|damaged, truncated)') as error:
    open_folder(tmp_path)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([torch.zeros(2)], 'contains a list, not tensors by name'),
    ({'model': {'w': torch.zeros(2)}}, "'model' is not a dense .*tensor \\(dict\\)"),
    ({'w': torch.zeros(2, dtype=torch.int8)}, "'w' is not a dense .*tensor \\(torch.int8\\)"),
    ({'w': torch.eye(3).to_sparse()}, "'w' is not a dense float32"),
    ({'w': torch.zeros(2), 'epoch': 3}, "'epoch' is not a dense .*tensor \\(int\\)"),
  ],
)
def test_entries_refuse_other_content(tmp_path, content, message):
  torch.save(content, tmp_path / 'pytorch_model.bin')
  with pytest.raises(CheckpointFileError, match=f'pytorch_model.bin: {message}'):
    open_folder(tmp_path)
