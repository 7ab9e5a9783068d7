"""Data, checkpoints and logs in a bucket: the command line, gcsfs, Orbax and TensorStore against a stand-in for the service."""

from __future__ import annotations

import gzip
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import bucket_stand_in
import fast_compilation
import numpy as np
import pyarrow
import pytest
import small_run
from pyarrow import parquet

from polar_jax.miniature import vocabulary

pytestmark = [pytest.mark.needs('gcsfs'), pytest.mark.long]

STEPS, SPLITS = 30, ('train', 'validation')


class World:
  """A folder with a config, examples on disk and in a bucket, and machines that come and go, each a folder of its own."""

  def __init__(self, folder: pathlib.Path, bucket: bucket_stand_in.Bucket):
    self.folder, self.bucket, rng = folder, bucket, np.random.default_rng(0)
    settings = {'tokenizer.kind': 'file', 'tokenizer.path': 'tokenizer.json', 'checkpointing.every_steps': 5}
    small_run.write_config(folder / 'small.py', settings, steps=STEPS, batch_size=4, evaluate_examples=8)
    vocabulary.train_tokenizer(['abc xyz'], 300).save(str(folder / 'tokenizer.json'))
    (folder / 'data').mkdir()
    for split in SPLITS:
      text = small_run.triplets(rng, 40).encode()
      (folder / 'data' / f'{split}.jsonl').write_bytes(text)
      bucket.put(f'our/data/{split}.jsonl.gz', gzip.compress(text))
    cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    self.environment = fast_compilation.environment(**cache, **bucket_stand_in.environment(bucket))

  def start(self, machine: str, *settings: str) -> subprocess.Popen:
    line = [sys.executable, '-m', 'polar_jax.main', '--config=small.py', f'--workdir={machine}', *(f'--config.{s}' for s in settings)]
    return subprocess.Popen(line, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  def finish(self, machine: str, *settings: str, status: int = 0) -> str:
    process = self.start(machine, *settings)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output

  def metrics(self, machine: str) -> list[dict]:
    lines = (self.folder / machine / 'pretrain/metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in small_run.TIMED} for line in lines]

  def saved(self, run: str) -> list[int]:
    """Return the steps whose checkpoint is complete."""
    names = self.bucket.names('our')
    whole = [name.split('/') for name in names if name.startswith(f'{run}/pretrain/checkpoints/') and name.endswith('/commit_success.txt')]
    return sorted(int(parts[3]) for parts in whole if len(parts) == 5)


IN_BUCKET = ('data.triplets=gs://our/data',)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  with bucket_stand_in.serving() as bucket:
    made = World(tmp_path_factory.mktemp('buckets'), bucket)
    made.finish('local', 'data.triplets=data')
    made.finish('whole', *IN_BUCKET, 'checkpointing.folder=gs://our/whole')
    yield made


def test_a_run_in_a_bucket_equals_one_on_disk(world):
  assert world.metrics('whole') == world.metrics('local')
  assert world.saved('whole')[-1] == STEPS and not (world.folder / 'whole/pretrain/checkpoints').exists()
  kept = world.bucket.objects['our/whole/pretrain/metrics.jsonl'][0]
  assert kept == (world.folder / 'whole/pretrain/metrics.jsonl').read_bytes()


@pytest.mark.long
def test_another_machine_continues_where_a_lost_one_stopped(world):
  process = world.start('lost', *IN_BUCKET, 'checkpointing.folder=gs://our/moved')
  deadline = time.monotonic() + 300
  while not world.saved('moved'):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.001)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0 and 'saved' in output, output
  stopped = world.saved('moved')[-1]
  assert stopped < STEPS
  output = world.finish('new', *IN_BUCKET, 'checkpointing.folder=gs://our/moved')
  assert f'pretrain: resumed from step {stopped} of {STEPS}' in output
  assert world.metrics('new') == world.metrics('local')  # the log of the lost machine was restored with the checkpoint


@pytest.mark.slow  # two processes more; distributed_test.py trains in several
def test_hosts_without_a_shared_disk_train_together_and_one_continues_alone(world):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  settings = (*IN_BUCKET, 'checkpointing.folder=gs://our/hosts')
  cluster = (f'distributed.coordinator={address}', 'distributed.processes=2', 'mesh.data=2')
  running = [world.start(f'host{p}', *settings, *cluster, f'distributed.process={p}') for p in range(2)]
  output = [process.communicate(timeout=300)[0] for process in running]
  assert [process.returncode for process in running] == [0, 0], '\n'.join(output)
  losses = lambda machine: [record['loss'] for record in world.metrics(machine) if 'loss' in record]
  np.testing.assert_allclose(losses('host0'), losses('local'), rtol=0, atol=2e-5)
  assert not (world.folder / 'host1/pretrain/metrics.jsonl').exists() and world.saved('hosts')[-1] == STEPS
  for name in [n for n in world.bucket.objects if n.startswith(f'our/hosts/pretrain/checkpoints/{STEPS}/')]:
    del world.bucket.objects[name]
  assert f'resumed from step {STEPS - 5} of {STEPS}' in world.finish('alone', *settings)
  np.testing.assert_allclose(losses('alone'), losses('local'), rtol=0, atol=2e-5)


@pytest.mark.slow  # on disk: checkpoints/checkpointer_test.py
def test_torn_checkpoint_is_set_aside(world):
  for name, (content, _) in [*world.bucket.objects.items()]:
    if name.startswith('our/whole/'):
      world.bucket.put(name.replace('our/whole/', 'our/torn/'), content)
  for name in [n for n in world.bucket.objects if f'our/torn/pretrain/checkpoints/{STEPS}/state/' in n and '/d/' in n]:
    del world.bucket.objects[name]
  output = world.finish('torn', *IN_BUCKET, 'checkpointing.folder=gs://our/torn')
  assert f'the checkpoint of step {STEPS} is torn' in output and f'gs://our/torn/pretrain/torn_{STEPS}_' in output
  assert 'resumed from step 25' in output and world.metrics('torn') == world.metrics('local')


@pytest.mark.slow  # a checkpoint in the bucket is read above
def test_scores_with_a_checkpoint_in_the_bucket(world):
  examples = ''.join(json.dumps({'prompt': 'p', 'reference': 'r', 'output': text}) + '\n' for text in ('a', 'bc'))
  world.bucket.put('our/examples.jsonl', examples.encode())
  scored = []
  for name, checkpoint in (('there', 'gs://our/whole/pretrain'), ('here', 'local/pretrain')):
    settings = (
      'stage=score',
      'tokenizer.kind=checkpoint',
      f'checkpoint={checkpoint}',
      'input=gs://our/examples.jsonl',
      f'output={name}.jsonl',
    )
    world.finish(name, *settings)
    scored.append((world.folder / f'{name}.jsonl').read_text())
  assert scored[0] == scored[1] and len(scored[0].splitlines()) == 2


@pytest.mark.slow  # reading from a bucket is tested above, reading these formats in data/
def test_parquet_and_text_in_the_bucket(world, tmp_path):
  examples = [json.loads(line) for line in (world.folder / 'data/validation.jsonl').read_text().splitlines()]
  parquet.write_table(pyarrow.Table.from_pylist(examples), tmp_path / 'examples.parquet')
  world.bucket.put('our/examples.parquet', (tmp_path / 'examples.parquet').read_bytes())
  world.finish('parquet', 'data.triplets=gs://our/data/train.jsonl.gz', 'data.validation=gs://our/examples.parquet')
  assert world.metrics('parquet') == world.metrics('local')
  text = 'abc xyz ' * 300
  world.bucket.put('our/text/below/a.txt', text.encode())
  world.bucket.put('our/text/notes.md', b'not text')
  (world.folder / 'a.txt').write_text(text)
  losses = []
  for name, given in (('text_there', 'gs://our/text'), ('text_here', 'a.txt')):
    world.finish(
      name, 'stage=pretrain_lm', f'data.text={given}', 'pretrain_lm.steps=3', 'pretrain_lm.batch_size=2', 'pretrain_lm.sequence_length=8'
    )
    losses.append((world.folder / name / 'pretrain_lm/summary.json').read_text().split('"seconds"')[0])
  assert losses[0] == losses[1]


def test_incomplete_checkpoint_is_ignored(world):
  for name, (content, _) in [*world.bucket.objects.items()]:
    if name.startswith('our/whole/') and not name.endswith('commit_success.txt'):
      world.bucket.put(name.replace('our/whole/', 'our/half/'), content)
  code = 'from polar_jax.runtime import paths; from polar_jax.checkpoints import checkpointer as checkpoint; '
  code += "print([checkpoint.exists(paths.path_of(f'gs://our/{name}/pretrain')) for name in ('whole', 'half', 'nothing')])"
  result = subprocess.run([sys.executable, '-c', code], env=world.environment, capture_output=True, text=True, check=True)
  assert result.stdout.strip() == '[True, False, False]'


@pytest.mark.slow  # a checkpoint in the bucket is read above
def test_starts_from_a_run_in_the_bucket(world):
  losses = []
  for name, start in (('from_there', 'gs://our/whole/pretrain'), ('from_here', 'local/pretrain')):
    output = world.finish(name, 'data.triplets=data', f'pretrain.start_from={start}')
    assert f'starts from the parameters in {start}' in output
    losses.append([record.get('loss') for record in world.metrics(name)])
  assert losses[0] == losses[1] != [record.get('loss') for record in world.metrics('local')]


# Settings -> part of the message that refuses them.
UNSUPPORTED = (
  ({'data.triplets': 'gs://our/nothing'}, 'data.triplets: nothing at gs://our/nothing'),
  ({'data.triplets': 'gs://our/tfds'}, 'gs://our/tfds: TFDS reads only from file systems'),
  ({'data.triplets': 'data', 'pretrain.start_from': 'gs://our/nothing'}, 'no checkpoint to start from in gs://our/nothing'),
  ({'data.triplets': 'data', 'pretrain.start_from': 'gs://our/data'}, 'gs://our/data: not a run of polar_jax'),
  ({'data.triplets': 'ftp://our/data'}, 'ftp:// is not supported'),
  ({'stage': 'score', 'checkpoint': 'local/pretrain', 'input': 'data/train.jsonl', 'output': 'gs://our/out.jsonl'}, 'name a local file'),
)
RUN_EACH = """
import json, pathlib, runpy, sys
from polar_jax import runner
from polar_jax.config import parse
for settings in json.loads(sys.argv[1]):
  config = runpy.run_path('small.py')['get_config']()
  with config.unlocked():
    config.update_from_flattened_dict(settings)
  print(runner.run(parse(config), pathlib.Path('other')), file=sys.stderr, flush=True)
"""


@pytest.mark.long
def test_unsupported_uses_of_a_bucket_are_refused(world):
  world.bucket.put('our/tfds/dataset_info.json', b'{}')
  line = [sys.executable, '-c', RUN_EACH, json.dumps([settings for settings, _ in UNSUPPORTED])]
  result = subprocess.run(line, cwd=world.folder, env=world.environment, capture_output=True, text=True, check=True)
  lines = [line for line in result.stderr.splitlines() if line.startswith('polar_jax: ') or line.isdigit()]
  assert lines[1::2] == ['1'] * len(UNSUPPORTED), result.stderr
  for found, (_, message) in zip(lines[::2], UNSUPPORTED, strict=True):
    assert message in found


def test_workdir_is_local(world):
  process = subprocess.run(
    [sys.executable, '-m', 'polar_jax.main', '--config=small.py', '--workdir=gs://our/run'],
    cwd=world.folder, env=world.environment, capture_output=True, text=True,
  )  # fmt: skip
  assert process.returncode == 2 and 'checkpointing.folder' in process.stderr
