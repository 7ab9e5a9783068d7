"""Large files of examples, read from disk when an example is needed: the same as those that are held in memory."""

from __future__ import annotations

import concurrent.futures
import json
import pickle

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_jax import api_training, sharding
from polar_jax.config import CheckpointingConfig, ConfigError, MeshConfig, ModelConfig, TrainConfig
from polar_jax.data import identity, line_index
from polar_jax.data.examples import BadExampleError, ExampleFile, max_candidates, read_triplets
from polar_jax.data.line_index import LineIndex
from polar_jax.data.readers import DataError


def row(i, text='\u00e9'):
  ranked = {'ranked': [f'best {i}', text, 'worst']} if i % 3 == 2 else {'chosen': f'c{i}', 'rejected': text}
  return json.dumps({'prompt': f'p{i}', 'reference': 'r', **ranked, 'n': i}, ensure_ascii=i % 2 == 0)


@pytest.fixture
def read_both(monkeypatch):
  """Return a function that reads a file in both ways, the one from disk first."""

  def read(path, mode='raise'):
    out = []
    for large in (0, 1 << 40):
      monkeypatch.setattr(line_index, 'LARGE', large)
      out.append(read_triplets(path, mode))
    assert [type(e._examples) for e in out] == [LineIndex, list]
    return out

  return read


BAD = ['{', '[]', '{"prompt": "p"}', '{"prompt": 1, "reference": "r", "chosen": "c", "rejected": "d"}', '\u00e9', '{"ranked": []}']
LINES = st.lists(st.one_of(st.integers(0, 99).map(row), st.sampled_from(['', '  ', '\t', *BAD])), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(lines=LINES, newline=st.sampled_from(['\n', '\r\n']), last=st.booleans(), mark=st.booleans())
def test_all_examples_numbers_and_skipped_lines_are_the_same(tmp_path_factory, lines, newline, last, mark):
  path = tmp_path_factory.mktemp('lines') / 'a.jsonl'
  text = newline.join([*lines, row(1), '' if last else row(2)])
  path.write_bytes((b'\xef\xbb\xbf' if mark else b'') + text.encode())
  with pytest.MonkeyPatch.context() as patch:
    out = []
    for large in (0, 1 << 40):
      patch.setattr(line_index, 'LARGE', large)
      out.append(read_triplets(path, 'skip'))
  disk, memory = out
  assert isinstance(disk._examples, LineIndex) and not isinstance(memory._examples, LineIndex)
  assert list(disk) == list(memory) and disk[-2:] == memory[-2:]
  assert (list(disk.numbers), disk.skipped, max_candidates(disk)) == (list(memory.numbers), memory.skipped, max_candidates(memory))


def test_a_bad_line_is_named(tmp_path, read_both):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{row(1)}\n\n{{"prompt": "p"}}\n')
  for large in (0, 1 << 40):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BadExampleError, match=r"a\.jsonl, example 3: field 'reference' is missing"):
      patch.setattr(line_index, 'LARGE', large)
      read_triplets(path)
  assert list(read_both(path, 'skip')[0]) == list(read_both(path, 'skip')[1])


def test_threads_and_other_processes_read_at_the_same_time(tmp_path, read_both):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(row(i, 'x' * (i % 50)) + '\n' for i in range(300)))
  disk, memory = read_both(path)
  order = np.random.default_rng(0).integers(0, 300, 3_000).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(disk.__getitem__, order)) == [memory[i] for i in order]
  again = pickle.loads(pickle.dumps(disk))
  assert isinstance(again, ExampleFile) and list(again) == list(memory)


def test_a_file_that_is_changed_meanwhile_is_named(tmp_path, read_both):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(row(i) + '\n' for i in range(9)))
  disk, _ = read_both(path)
  path.write_text('')
  with pytest.raises(DataError, match=r'a\.jsonl: byte \d+: the file was changed while it was read; run again'):
    disk[4]


def test_the_digest_is_that_of_the_bytes(tmp_path, read_both):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(row(i) + '\n' for i in range(9)))
  disk, memory = (identity.triplets_digest(examples) for examples in read_both(path))
  assert disk.rpartition(':')[0] == memory.rpartition(':')[0] and disk != memory
  path.write_text(path.read_text().replace('p7', 'p8'))
  assert identity.triplets_digest(read_both(path)[0]) != disk


def run(path, folder, large, steps=4):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(line_index, 'LARGE', large)
    return api_training.train_reward_model(
      path,
      init='scratch',
      output_dir=folder,
      args=TrainConfig(steps=steps, batch_size=4, learning_rate=2e-2, warmup_ratio=0.0, final_lr_ratio=1.0),
      model=ModelConfig(num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=8),
      tokenizer='byte',
      mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
      settings=api_training.RunSettings(log=lambda line: None, checkpointing=CheckpointingConfig(every_steps=2)),
    )


@pytest.mark.long
def test_training_from_disk_is_training_from_memory_and_a_changed_file_is_refused(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(row(i) + '\n' for i in range(40)))
  disk, memory = (run(path, tmp_path / name, large) for name, large in (('disk', 0), ('memory', 1 << 40)))
  jax.tree.map(np.testing.assert_array_equal, disk.model.params, memory.model.params)
  path.write_text(path.read_text().replace('"p20"', '"q20"'))
  with pytest.raises(ConfigError, match='data'):
    run(path, tmp_path / 'disk', 0)
