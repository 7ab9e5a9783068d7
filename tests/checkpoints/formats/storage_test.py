"""Tests of Hugging Face folders: reading tensor by tensor, errors of damaged folders, and writing files that other libraries read."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from optional import torch

from polar_jax.checkpoints.formats.storage import CheckpointFileError, SafetensorsWriter, halves_from_pairs, open_folder
from polar_jax.types import UserError

RNG = np.random.default_rng(0)
TENSORS = {
  'half': RNG.normal(size=(3, 4)).astype(np.float16),
  'brain': RNG.normal(size=(5,)).astype(ml_dtypes.bfloat16),
  'single': RNG.normal(size=(2, 3, 2)).astype(np.float32),
  'scalar': np.array(1.5, np.float32),
  'none': np.zeros((0, 3), np.float32),
}


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
  assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
  assert actual.tobytes() == expected.tobytes()


def raw_file(header: object, data: bytes = b'') -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(text)) + text + data


def write_shards(folder: pathlib.Path, shards: dict[str, dict], index: dict | None = None) -> None:
  for name, tensors in shards.items():
    safetensors.numpy.save_file(tensors, folder / name)
  weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map | (index or {})}))


# ---- reading ----


def test_open_folder_written_by_safetensors(tmp_path):
  safetensors.numpy.save_file(TENSORS, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
  source = open_folder(str(tmp_path))
  assert source.path == tmp_path
  assert {name: (i.shape, i.dtype) for name, i in source.tensors().items()} == {n: (a.shape, a.dtype) for n, a in TENSORS.items()}
  assert {i.file for i in source.tensors().values()} == {tmp_path / 'model.safetensors'}
  for name, array in TENSORS.items():
    assert_same(source.read(name), array)


@pytest.mark.needs('torch')
def test_open_folder_written_by_torch_in_bfloat16(tmp_path):
  import safetensors.torch

  tensor = torch.randn(7, 5).to(torch.bfloat16)
  safetensors.torch.save_file({'w': tensor}, tmp_path / 'model.safetensors')
  assert_same(open_folder(tmp_path).read('w'), tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))


def test_open_folder_shards_with_and_without_index_and_links(tmp_path):
  stored, linked = tmp_path / 'blobs', tmp_path / 'snapshot'
  stored.mkdir()
  linked.mkdir()
  a, b = {'half': TENSORS['half']}, {'brain': TENSORS['brain'], 'single': TENSORS['single']}
  write_shards(stored, {'model-00001-of-00002.safetensors': a, 'model-00002-of-00002.safetensors': b})
  safetensors.numpy.save_file({'other': TENSORS['half']}, stored / 'consolidated.safetensors')  # not in the index
  for file in stored.iterdir():
    (linked / file.name).symlink_to(file)
  for _ in range(2):
    source = open_folder(linked)
    wanted = {name: array for name, array in (a | b).items() if name in source.tensors()}
    assert wanted.keys() == (a | b).keys()
    for name, array in wanted.items():
      assert_same(source.read(name), array)
    assert source.tensors()['half'].file == linked / 'model-00001-of-00002.safetensors'
    (linked / 'model.safetensors.index.json').unlink(missing_ok=True)
    (linked / 'consolidated.safetensors').unlink(missing_ok=True)


def test_read_array_owns_its_memory(tmp_path):
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(TENSORS, file)
  array = open_folder(tmp_path).read('single')
  assert array.flags.owndata
  assert array.flags.writeable
  file.write_bytes(b'\xff' * file.stat().st_size)
  assert_same(array, TENSORS['single'])


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'model.safetensors: is empty'),
    (raw_file({'w': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}, bytes(16))[:30], 'model.safetensors: is damaged, truncated'),
    (raw_file({'w': {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]}}, bytes(15)), 'model.safetensors: is damaged, truncated'),
    (b'abc', 'model.safetensors: is damaged, truncated'),
    (raw_file(b'no json at all!!'), 'invalid JSON in header'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n', 'model.safetensors: is a Git LFS pointer.*git lfs pull'),
    (
      raw_file({'w8': {'dtype': 'F8_E4M3', 'shape': [4], 'data_offsets': [0, 4]}}, bytes(4)),
      "model.safetensors: tensor 'w8' is stored as F8",
    ),
    (raw_file({'w8': {'dtype': 'I8', 'shape': [4], 'data_offsets': [0, 4]}}, bytes(4)), "model.safetensors: tensor 'w8' is stored as I8"),
  ],
)
def test_open_folder_bad_safetensors(tmp_path, content, message):
  (tmp_path / 'model.safetensors').write_bytes(content)
  with pytest.raises(CheckpointFileError, match=message) as error:
    open_folder(tmp_path)
  assert '\n' not in str(error.value)


def test_read_file_truncated_after_opening(tmp_path):
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file({'w': np.ones(100, np.float32)}, file)
  source = open_folder(tmp_path)
  file.write_bytes(file.read_bytes()[:-4])
  with pytest.raises(CheckpointFileError, match=r'expected 400 bytes at \d+, got 396'):
    source.read('w')
  file.unlink()
  with pytest.raises(CheckpointFileError, match=r'model.safetensors: cannot be read'):
    source.read('w')
  with pytest.raises(CheckpointFileError, match=r"has no tensor 'v'"):
    source.read('v')


def test_open_folder_without_weights(tmp_path):
  (tmp_path / 'link').mkdir()
  (tmp_path / 'link/model.safetensors').symlink_to('nowhere')
  with pytest.raises(CheckpointFileError, match=r'link/model.safetensors: cannot be read \(No such file'):
    open_folder(tmp_path / 'link')
  shutil.rmtree(tmp_path / 'link')
  with pytest.raises(CheckpointFileError, match=r'does not exist'):
    open_folder(tmp_path / 'nowhere')
  with pytest.raises(CheckpointFileError, match=r'only: nothing'):
    open_folder(tmp_path)
  for name in ('config.json', 'training_args.bin'):
    (tmp_path / name).write_text('{}')
  with pytest.raises(CheckpointFileError, match=r'contains no weights .* only: config.json, training_args.bin$'):
    open_folder(tmp_path)
  with pytest.raises(CheckpointFileError, match=r'config.json: is a file; name the folder'):
    open_folder(tmp_path / 'config.json')
  for i in range(20):
    (tmp_path / f'x{i:02}').touch()
  with pytest.raises(CheckpointFileError, match=r'x07 and 12 more$'):
    open_folder(tmp_path)


def test_open_folder_bins_without_torch_name_the_extra(tmp_path, monkeypatch):
  (tmp_path / 'pytorch_model.bin').touch()
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=re.escape("pip install 'polar_jax[torch]'")):
    open_folder(tmp_path)


A = {'a': np.ones(2, np.float32)}
B = {'b': np.ones(2, np.float32)}


@pytest.mark.parametrize(
  ('shards', 'index', 'message'),
  [
    ({'x.safetensors': A}, {'b': 'y.safetensors'}, r'index.json: names missing files: y.safetensors'),
    ({'x.safetensors': A}, {'b': 'x.safetensors'}, r"x.safetensors: has no tensor 'b', but model.safetensors.index.json lists it there"),
    ({'x.safetensors': A, 'model.safetensors': B}, {'b': 'x.safetensors'}, r'contains both model.safetensors and model.safetensors.index'),
    ({'x.safetensors': A}, {'b': '../x.safetensors'}, r'index.json: `weight_map` must map .* file in this folder'),
    ({'x.safetensors': A}, {'b': 3}, r'index.json: `weight_map` must map .* file in this folder'),
  ],
)
def test_open_folder_bad_indices(tmp_path, shards, index, message):
  write_shards(tmp_path, shards, index)
  with pytest.raises(CheckpointFileError, match=message):
    open_folder(tmp_path)


def test_the_index_says_which_file_holds_a_tensor(tmp_path):
  old = {'a': np.zeros(3, np.float32), 'c': np.zeros(1, np.float32)}
  write_shards(tmp_path, {'x.safetensors': old, 'y.safetensors': A | B}, {'a': 'y.safetensors', 'b': 'y.safetensors', 'c': 'x.safetensors'})
  source = open_folder(tmp_path)
  assert {name: (info.shape, info.file.name) for name, info in source.tensors().items()} == {
    'a': ((2,), 'y.safetensors'),
    'b': ((2,), 'y.safetensors'),
    'c': ((1,), 'x.safetensors'),
  }
  assert source.read('a').tolist() == [1, 1]
  (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {"b": "y.safetensors", "c": "x.safetensors"}}')
  with pytest.raises(CheckpointFileError, match=r"y.safetensors: contains tensor 'a', and so does x.safetensors; remove one of them"):
    open_folder(tmp_path)


@pytest.mark.parametrize('text', ['', '[]', '{"weight_map": []}', '{"metadata": {}}'])
def test_open_folder_invalid_index(tmp_path, text):
  safetensors.numpy.save_file(A, tmp_path / 'x.safetensors')
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(CheckpointFileError, match=r'index.json: '):
    open_folder(tmp_path)


def test_open_folder_without_index_requires_complete_disjoint_files(tmp_path):
  safetensors.numpy.save_file(A, tmp_path / 'model-00001-of-00002.safetensors')
  with pytest.raises(CheckpointFileError, match=r'00001-of-00002.safetensors: is one of 2 files, and some'):
    open_folder(tmp_path)
  safetensors.numpy.save_file(A, tmp_path / 'model-00002-of-00002.safetensors')
  with pytest.raises(CheckpointFileError, match=r"00002-of-00002.safetensors: contains tensor 'a'"):
    open_folder(tmp_path)


MEASURE = """
import sys
from polar_jax.checkpoints.formats.storage import open_folder
def peak():
  return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 1024
source = open_folder(sys.argv[1])
before = peak()
for name in source.tensors():
  array = source.read(name)
  del array
print(peak() - before)
"""


def test_read_peak_memory_is_one_tensor(tmp_path):
  """VmHWM is the peak of all resident memory, including mapped pages."""
  zeros = {f'w{i}': np.zeros((8, 2**20), ml_dtypes.bfloat16) for i in range(6)}  # 16 MiB each
  safetensors.numpy.save_file(zeros, tmp_path / 'model.safetensors')
  out = subprocess.run([sys.executable, '-c', MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
  assert float(out.stdout) < 16 * 1.25


# ---- writing ----


def write(folder: pathlib.Path, tensors: dict[str, np.ndarray], max_bytes: int, order: list[str] | None = None) -> None:
  writer = SafetensorsWriter(folder, {name: array.nbytes for name, array in tensors.items()}, max_bytes)
  for name in order or tensors:
    writer.add(name, tensors[name])
  writer.close()


def test_writer_one_file_if_everything_fits(tmp_path):
  write(tmp_path / 'new', TENSORS, 10**6)
  assert [p.name for p in (tmp_path / 'new').iterdir()] == ['model.safetensors']
  with safetensors.safe_open(tmp_path / 'new/model.safetensors', 'numpy') as f:
    assert f.metadata() == {'format': 'pt'}
    assert set(f.keys()) == set(TENSORS)
    for name, array in TENSORS.items():
      assert_same(np.asarray(f.get_tensor(name)), array)


def test_writer_fills_shards_in_order_and_indexes_them(tmp_path):
  tensors = {name: np.full(n, i, np.float32) for i, (name, n) in enumerate([('z', 20), ('a', 4), ('b', 4), ('c', 3), ('d', 40), ('e', 1)])}
  write(tmp_path, tensors, 32)
  index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
  files = [f'model-{i}-of-00005.safetensors' for i in ('00001', '00002', '00003', '00004', '00005')]
  assert index == {'metadata': {'total_size': 72 * 4}, 'weight_map': dict(zip('zabcde', [*files[:2], *files[1:]], strict=True))}
  for name, file in index['weight_map'].items():
    assert_same(safetensors.numpy.load_file(tmp_path / file)[name], tensors[name])


@pytest.mark.needs('torch')
def test_writer_alignment_for_torch(tmp_path):
  import safetensors.torch

  tensors = {'odd': np.ones(3, ml_dtypes.bfloat16), 'v': np.arange(4, dtype=np.float32)}
  write(tmp_path, tensors, 10**6)
  text = (tmp_path / 'model.safetensors').read_bytes()
  length = int.from_bytes(text[:8], 'little')
  assert length % 8 == 0
  assert json.loads(text[8 : 8 + length])['v']['data_offsets'][0] % 4 == 0
  loaded = safetensors.torch.load_file(tmp_path / 'model.safetensors')
  assert loaded['v'].tolist() == [0, 1, 2, 3]
  assert loaded['odd'].tolist() == [1, 1, 1]


def test_writer_unfinished_file_is_rejected(tmp_path):
  writer = SafetensorsWriter(tmp_path, {'a': 8, 'b': 8}, 100)
  writer.add('a', A['a'])
  with pytest.raises(CheckpointFileError, match=r'model.safetensors: is damaged'):
    open_folder(tmp_path)
  with pytest.raises(ValueError, match=r"1 planned tensors were not written: 'b'"):
    writer.close()


def test_writer_refuses_unplanned_tensors(tmp_path):
  writer = SafetensorsWriter(tmp_path, {'a': 8, 'b': 8}, 100)
  with pytest.raises(ValueError, match=r"'c' was not planned"):
    writer.add('c', A['a'])
  for wrong in (np.ones(3, np.float32), np.ones(1, np.float64), np.ones(2, '>f4')):
    with pytest.raises(ValueError, match=r"tensor 'a' was written already, is not"):
      writer.add('a', wrong)
  writer.add('a', A['a'])
  with pytest.raises(ValueError, match=r"tensor 'a' was written already"):
    writer.add('a', A['a'])
  with pytest.raises(CheckpointFileError, match=r'model.safetensors: exists already'):
    SafetensorsWriter(tmp_path, {'a': 8}, 100)


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ARRAYS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4), st.booleans())


@pytest.mark.long
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  plan=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != '__metadata__'), ARRAYS, max_size=8),
  max_bytes=st.integers(1, 600),
  data=st.data(),
)
def test_writer_round_trip(plan, max_bytes, data):
  rng = np.random.default_rng(len(plan))
  tensors = {}
  for name, (dtype, shape, transposed) in plan.items():
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)  # including NaN
    tensors[name] = array.T if transposed else array
  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), tensors, max_bytes, data.draw(st.permutations(list(tensors))))
    source = open_folder(folder)
    assert set(source.tensors()) == set(tensors)
    by_library = {}
    for file in pathlib.Path(folder).glob('*.safetensors'):
      by_library |= safetensors.numpy.load_file(file)
      in_file = [array.nbytes for name, array in tensors.items() if source.tensors()[name].file == file]
      assert sum(in_file) <= max_bytes or sum(size > 0 for size in in_file) == 1
    for name, array in tensors.items():
      assert_same(source.read(name), array)
      assert_same(np.asarray(by_library[name]), array)


# ---- order of rotary dimensions ----


def rotate(vector: list[float], position: int, pairs: list[tuple[int, int]]) -> list[float]:
  out = list(vector)
  for i, (a, b) in enumerate(pairs):
    angle = position * 10_000.0 ** (-i / len(pairs))
    out[a] = vector[a] * np.cos(angle) - vector[b] * np.sin(angle)
    out[b] = vector[a] * np.sin(angle) + vector[b] * np.cos(angle)
  return out


def test_halves_from_pairs_keeps_attention_scores():
  heads, dim, width = 3, 8, 5
  interleaved = [(2 * i, 2 * i + 1) for i in range(dim // 2)]
  halves = [(i, i + dim // 2) for i in range(dim // 2)]
  wq, wk = RNG.normal(size=(2, heads * dim, width))
  x_q, x_k = RNG.normal(size=(2, width))

  def score(wq, wk, pairs, head, at_q, at_k):
    rows = slice(head * dim, (head + 1) * dim)
    return np.dot(rotate(wq[rows] @ x_q, at_q, pairs), rotate(wk[rows] @ x_k, at_k, pairs))

  moved = halves_from_pairs(wq, heads), halves_from_pairs(wk, heads)
  for head in range(heads):
    for at_q, at_k in ((0, 0), (3, 1), (11, 4)):
      wanted = score(wq, wk, interleaved, head, at_q, at_k)
      assert np.isclose(score(*moved, halves, head, at_q, at_k), wanted, rtol=1e-12)
      if at_q != at_k:
        assert not np.isclose(score(wq, wk, halves, head, at_q, at_k), wanted, rtol=1e-3)
