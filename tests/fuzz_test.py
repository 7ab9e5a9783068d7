"""Damaged files of users and of our own: every reader returns something, or says in one line what is wrong.

The mutations are seeded. `POLAR_FUZZ=2000 python -m pytest tests/fuzz_test.py` tries that many for each kind of file.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import changed_value

from polar_jax.config import SynthesizeConfig
from polar_jax.data import examples, text, token_store
from polar_jax.data.pipeline import TripletSegments
from polar_jax.miniature import world
from polar_jax.report import plots, report, rft
from polar_jax.runtime import heartbeat, json_files, text_files
from polar_jax.scaling import results
from polar_jax.scoring import files
from polar_jax.synthesis import arithmetic
from polar_jax.train.metrics import FILE, SAMPLES, read_metrics
from polar_jax.types import Triplet, UserError

ROUNDS = int(os.environ.get('POLAR_FUZZ', '60'))
VALUES = (None, True, -1, 0, 10**30, 1e308, float('nan'), '', 'x', '\ud800', [], {}, [[]], {'a': None}, [1, 'x'], 'y' * 2_000)
RAW = (b'\0', b'\xff\xfe', b'"', b'{', b'}', b'[', b',', b'\n', b'1e999', b'null', b'\xef\xbb\xbf', b'9' * 5_000, b'[' * 3_000)


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """Return bytes with one to three random changes."""
  for _ in range(int(rng.integers(1, 4))):
    at, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    short = min(end, at + 8)
    piece = RAW[int(rng.integers(len(RAW)))]
    changed = bytearray(data)
    if at < len(data):
      changed[at] ^= 1 << int(rng.integers(8))
    data = (bytes(changed), data[:at], data[:at] + data[short:], data[:end] + data[at:], data[:at] + piece + data[at:],
            data[:at] + piece + data[short:])[int(rng.integers(6))]  # fmt: skip
  return data


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
  """Damage a file: half of the time, if it is JSON or lines of it, a value in it, else its bytes."""
  if rng.random() < 0.5:
    return damaged(data, rng)
  try:
    return json.dumps(changed_value(json.loads(data), VALUES, rng)).encode()
  except ValueError:
    pass
  try:
    lines = [json.loads(line) for line in data.splitlines()]
  except ValueError:
    return damaged(data, rng)
  i = int(rng.integers(len(lines)))
  lines[i] = changed_value(lines[i], VALUES, rng)
  return ''.join(json.dumps(line) + '\n' for line in lines).encode()


def check(path: pathlib.Path, read: Callable[[], Any], rounds: int = ROUNDS) -> None:
  """Read a file damaged in `rounds` ways."""
  read()
  original = path.read_bytes()
  for seed in range(rounds):
    rng = np.random.default_rng([seed, zlib.crc32(path.name.encode())])
    if path.suffix == '.gz' and rng.random() < 0.5:
      path.write_bytes(gzip.compress(mutate(gzip.decompress(original), rng)))
    else:
      path.write_bytes(mutate(original, rng))
    try:
      read()
    except UserError as error:
      message = str(error)
      assert message and '\n' not in message and len(message) <= 500, (seed, message)
    except Exception as error:
      pytest.fail(f'{path.name}, seed {seed}: {type(error).__name__}: {error}')
  path.write_bytes(original)


MESSAGES = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'é'}]
ROWS = [
  {'prompt': MESSAGES, 'reference': 'r', 'chosen': 'c', 'rejected': 'd', 'output': 'o', 'wrapper': 'sft', 'category': 'x', 'n': 1.5, 'i': i}
  for i in range(5)
]
OFFICIAL = [{'data_source': 's', 'prompt': MESSAGES, 'ability': 'qa', 'reward_model': {'style': 'polar', 'ground_truth': 'r'},
             'extra_info': {'split': 'train', 'index': i, 'prompt': MESSAGES}} for i in range(3)]  # fmt: skip


def write_lines(path, rows):
  data = ''.join(json.dumps(row) + '\n' for row in rows).encode()
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


def read_all(path, mode):
  examples.read_triplets(path, mode)
  examples.open_prompts(path, 'train', mode)
  for example in files.read_examples(path, mode, []):
    files.json_text(example.content)


@pytest.mark.parametrize('mode', ['raise', 'skip'])
@pytest.mark.parametrize('name', ['a.jsonl', 'a.jsonl.gz', 'a.parquet'])
def test_examples(tmp_path, name, mode):
  path = tmp_path / name
  if name.endswith('.parquet'):
    pq.write_table(pa.Table.from_pylist(ROWS), path)
  else:
    write_lines(path, ROWS)
  check(path, lambda: read_all(path, mode))


def test_official_prompts(tmp_path):
  path = write_lines(tmp_path / 'a.jsonl', OFFICIAL)
  check(path, lambda: examples.open_prompts(path, 'train'))


@pytest.mark.parametrize('name', ['state.json', 'dataset_info.json', 'data.arrow'])
def test_saved_data_sets(tmp_path, name):
  table = pa.Table.from_pylist(ROWS)
  with pa.OSFile(str(tmp_path / 'data.arrow'), 'wb') as file, pa.ipc.new_stream(file, table.schema) as writer:
    writer.write_table(table)
  (tmp_path / 'dataset_info.json').write_text('{"features": {"prompt": {"dtype": "string"}}}')
  (tmp_path / 'state.json').write_text('{"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x", "_split": null}')
  check(tmp_path / name, lambda: list(examples.open_triplets(tmp_path, 'train')))


def test_text(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('Some text, café.\n' * 20)
  check(path, lambda: text_files.read_text(path))
  np.savez(tmp_path / 'text.npz', train_a=np.arange(9), validation_a=np.arange(5))
  check(tmp_path / 'text.npz', lambda: text.load_streams(tmp_path / 'text.npz'))


def test_results_of_a_sweep(tmp_path):
  path = tmp_path / results.TABLE
  path.write_text('run,parameters,tokens,flops,loss,note\n' + ''.join(f'r{i},{i + 1}e6,1e7,6e14,0.{i + 1},"a, b"\n' for i in range(6)))
  check(path, lambda: results.read(path))
  check(path, lambda: results.read_table(path))
  results.write_result(tmp_path, {'run': 'a', 'loss': 0.5, 'parameters': 10, 'tokens': 3.5, 'flops': 1e9, 'steps': 3})
  check(tmp_path / results.RESULT, lambda: results.read_result(tmp_path))


RECORDS = [{'stage': 'pretrain', 'step': i, 'loss': 0.5, 'accuracy': 0.75, 'reward_histogram': {'low': 0.0}} for i in range(1, 6)]
SAMPLE = {'step': 3, 'pick': 'best', 'prompt': 'p', 'reference': 'r', 'output': 'o', 'score': 0.5, 'shuffled': 0.25, 'length': 4}
INTERVAL = {'accuracy': 0.75, 'low': 0.5, 'high': 0.875, 'n': 40, 'clusters': 30, 'clustered_by': 'policy'}
MARGIN = {'baseline': 'length', 'difference': 0.125, 'low': -0.0625, 'high': 0.25, 'clusters': 30, 'clustered_by': 'policy'}
SURVEY = {'examples': 9, 'same_text': 2, 'numbers': {'same_text': [1, 2]}}
RUN = {'steps': 5, 'loss': 0.5, 'accuracy': 0.75, 'mfu_rule': 'rule', 'examples': {'training': SURVEY}}
TUNED = {'steps': 3, 'reward': 0.5, 'evaluation_before': {'raw': 0.25}, 'evaluation_after': {'raw': 0.5}, 'alarms': ['a']}
REPORT = {
  'pretrain': RUN,
  'evaluate': {'by_split': {'test': INTERVAL}, 'baselines': {'length': {'test': INTERVAL}}, 'margin_over_best_baseline': {'test': MARGIN}},
  'finetune': {'arms': {'pretrained_finetuned': INTERVAL}, 'by_category': {'x': INTERVAL}, 'runs': {'finetune': RUN}},
  'rft': {'runs': {'rft': TUNED}},
  'score': {'rows': 3, 'mean': 0.5},
  'timing': {'pretrain': 1.5, 'total': 1.5},
  'environment': {'jax': '0.8', 'cpu_count': 2},
}  # fmt: skip


def test_logs_of_steps(tmp_path):
  path = write_lines(tmp_path / FILE, RECORDS)
  check(path, lambda: [plots.series(read_metrics(tmp_path), key) for key in ('loss', 'accuracy', 'learning_rate')])
  folder = tmp_path / rft.FOLDER
  folder.mkdir()
  path = write_lines(folder / SAMPLES, [SAMPLE] * 4)
  check(path, lambda: rft.section({}, {}, rft.read_samples(tmp_path)))


def test_the_report(tmp_path, monkeypatch):
  monkeypatch.setattr(plots, 'save_all', lambda figures, workdir: {})  # drawing takes far longer than reading
  for name in ('accuracy_bars', 'arm_bars'):
    monkeypatch.setattr(plots, name, lambda *results: None)
  path = tmp_path / report.JSON_NAME
  path.write_text(json.dumps(REPORT))

  def read():
    report.update_results(tmp_path, 'timing', {'evaluate': 2.0})
    report.write_report(tmp_path, report.load_results(tmp_path))

  check(path, read)


@pytest.mark.long
def test_markers_of_complete_data(tmp_path):
  config = SynthesizeConfig(
    world='arithmetic', train_examples=4, evaluation_examples=2, preference_examples=2, preference_evaluation_examples=2
  )
  arithmetic.synthesize(config, 0, tmp_path, lambda line: None)
  marker = tmp_path / 'data/arithmetic.json'
  check(marker, lambda: report.update_results(tmp_path, 'synthesize', arithmetic.synthesize(config, 0, tmp_path, lambda line: None)))
  fields = {
    'config_fingerprint': 'a',
    'fingerprints': {'t/train': 'b'},
    'rows': {'t/train': 3},
    'rows_per_minute': 1.5,
    'seconds': {'all': 2},
  }
  marker.write_text(json.dumps(fields))
  check(marker, lambda: world.read_result(tmp_path))


def test_the_partial_output_of_the_score_stage(tmp_path):
  source = write_lines(tmp_path / 'in.jsonl', ROWS)
  target = tmp_path / 'out.jsonl'
  whole = tmp_path / 'whole.jsonl'
  rewards = np.arange(5, dtype=np.float32)

  def write(path, rows):
    file = files.RewardFile(path, {'a': 1}, files.read_examples(source, 'raise', []))
    file.write([*files.read_examples(source, 'raise', [])][file.kept : rows], rewards[file.kept : rows])
    return file

  write(whole, 5).finish()
  write(target, 3).close()
  partial, header = files.partial_files(target)
  kept = partial.read_bytes()

  def read():
    header.write_text('{"a": 1}')
    file = write(target, 5)
    file.finish()
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [{name: value for name, value in line.items() if name != 'reward'} for line in lines] == ROWS
    partial.write_bytes(kept)

  check(partial, read)
  header.write_text('{"a": 1}')

  def reopen():
    files.RewardFile(target, {'a': 1}).close()
    partial.write_bytes(kept)

  check(header, reopen)


def test_the_store_of_tokens(tmp_path):
  (tmp_path / 'info.json').write_text('{"key": "k"}')
  np.savez(tmp_path / 'lengths.npz', indices=np.arange(3, dtype=np.int32), chosen=np.full(3, 2), total=np.full(3, 4))
  np.save(tmp_path / 'tokens.npy', np.zeros(12, np.int32))
  triplets = [Triplet('p', 'r', 'c', 'd')] * 3

  def read():
    token_store.is_stored(tmp_path, 'k', np.arange(3))
    assert isinstance(token_store.open_store(triplets, None, tmp_path, 'k'), TripletSegments)

  for name in ('info.json', 'lengths.npz', 'tokens.npy'):
    check(tmp_path / name, read)


def test_heartbeats(tmp_path):
  beat = {'host': 'h', 'pid': 3, 'phase': 'pretrain', 'step': 4, 'since': 1.5, 'time': 2.5}
  for process in range(2):
    (tmp_path / f'{process}.json').write_text(json.dumps(beat))
  check(tmp_path / '1.json', lambda: heartbeat.report(tmp_path, 2, 200))


def test_json_of_any_kind(tmp_path):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps(REPORT))
  check(path, lambda: json_files.dumps(json_files.read(path, 'write it again')))
