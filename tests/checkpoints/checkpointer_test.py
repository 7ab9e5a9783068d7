from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import re
import shutil
import warnings
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer as checkpointer_lib
from polar_jax.checkpoints.checkpointer import FOLDER, Checkpointer, load_params, load_settings
from polar_jax.config import CheckpointingConfig, ConfigError, MeshConfig, ModelConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import RANKING
from polar_jax.train.optimizer import make_optimizer

MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=4)
FINGERPRINT = {'objective': 'ranking', 'seed': 0, 'learning_rate': 1e-3}
# Sizes of data, fsdp, tensor, context.
MESHES = [(4, 2, 1, 1), (2, 4, 1, 1), (1, 2, 2, 1), (1, 1, 1, 1)]


def abstract_state(sizes):
  mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  return step_lib.build(RANKING, MODEL, make_optimizer(TrainConfig(), 10), mesh).abstract


def random_state(abstract, seed=0):
  """Return a state whose elements all differ, so that swapped arrays are noticed."""
  rng = np.random.default_rng(seed)
  draw = lambda a: rng.integers(0, 2**30, a.shape) if a.dtype == jnp.int32 else rng.normal(size=a.shape)
  return jax.tree.map(lambda a: jax.device_put(draw(a).astype(a.dtype), a.sharding), abstract)


def assert_bit_equal(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x).view(np.int32), np.asarray(y).view(np.int32)), a, b)


class Saved(NamedTuple):
  params: dict[str, jax.Array]
  step: int


def saved_steps(folder):
  return sorted(int(path.name) for path in (folder / FOLDER).iterdir())


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
  monkeypatch.setattr(checkpointer_lib, '_PAUSES', (0.0, 0.0))


@pytest.fixture
def open_checkpoints(tmp_path):
  opened = []

  def make(best_metric='validation_accuracy', best_is_lower=False, **settings):
    opened.append(Checkpointer(tmp_path, CheckpointingConfig(**settings), best_metric, best_is_lower))
    return opened[-1]

  yield make
  for checkpointer in opened:
    checkpointer.close()


@pytest.mark.long
def test_restore_bit_identical_on_every_mesh(open_checkpoints):
  state = random_state(abstract_state(MESHES[0]))
  kept = jax.device_get(state)
  for step, sizes in enumerate(MESHES[1:] + MESHES[:1], start=1):  # from each mesh to the next, and back to the first
    checkpointer = open_checkpoints()
    checkpointer.save(step, state, {'step': step}, FINGERPRINT, {})
    checkpointer.wait()
    checkpointer.close()
    abstract = abstract_state(sizes)
    state, data = open_checkpoints().restore(abstract, FINGERPRINT)
    assert data == {'step': step}
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert_bit_equal(state, kept)
    jax.tree.map(
      lambda x, a: (x.dtype, x.sharding) == (a.dtype, a.sharding) or pytest.fail(f'{x.sharding}, not {a.sharding}'), state, abstract
    )


def test_save_asynchronous_keeps_the_given_state(open_checkpoints):
  abstract = abstract_state(MESHES[0])
  state = random_state(abstract)
  kept = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state))
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
  checkpointer = open_checkpoints(asynchronous=True)
  checkpointer.save(1, state, {}, FINGERPRINT, {})
  for _ in range(5):
    state = overwrite(state)  # donates the buffers that are being saved
  jax.block_until_ready(state)
  checkpointer.wait()
  assert_bit_equal(checkpointer.restore(abstract, FINGERPRINT)[0], kept)


@pytest.mark.long
def test_save_concurrently_in_threads(tmp_path):
  """Sweeps and the seeds of the study train in threads of one process, and much of Orbax's state is per process."""
  state = {'x': jnp.arange(4.0)}
  saves, runs = 40, 3

  def run(number):
    checkpointer = Checkpointer(tmp_path / str(number), CheckpointingConfig(keep=1, keep_best=0), 'validation_accuracy', False)
    for step in range(1, saves + 1):
      checkpointer.save(step, Saved(jax.tree.map(lambda x: x + number, state), step), {'run': number}, FINGERPRINT, {'loss': float(number)})
      checkpointer.wait()
    return checkpointer

  with concurrent.futures.ThreadPoolExecutor(runs) as threads:
    for number, checkpointer in enumerate(threads.map(run, range(runs))):
      abstract = Saved(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state), 0)
      restored, data = checkpointer.restore(abstract, FINGERPRINT)
      np.testing.assert_array_equal(restored.params['x'], state['x'] + number)
      assert restored.step == saves and data == {'run': number}
      checkpointer.close()


def test_restore_iterator_continues(open_checkpoints):
  def iterator():
    return pipeline.iterate(grain.MapDataset.range(100).map(lambda i: i * i), threads=2, prefetch=4)

  abstract = abstract_state((1, 1, 1, 1))
  before = iterator()
  read = [next(before) for _ in range(3)]
  checkpointer = open_checkpoints()
  checkpointer.save(3, random_state(abstract), {'iterator': before.get_state(), 'tokens': 7}, FINGERPRINT, {})
  checkpointer.wait()
  _, data = checkpointer.restore(abstract, FINGERPRINT)
  after = iterator()
  after.set_state(data['iterator'])
  assert data['tokens'] == 7
  assert [*read, *(next(after) for _ in range(3))] == [i * i for i in range(6)]


def truncate(step):
  largest = max((path for path in (step / 'state').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:10])


def empty_settings(step):
  next(path for path in (step / 'config').rglob('*') if path.is_file() and path.read_bytes()).write_bytes(b'')


@pytest.mark.long
@pytest.mark.parametrize(
  'tear', [truncate, empty_settings, lambda step: shutil.rmtree(step / 'state'), lambda step: shutil.rmtree(step / 'data')]
)
def test_restore_falls_back_from_torn_checkpoint(open_checkpoints, tmp_path, tear):
  abstract = abstract_state((1, 2, 1, 1))
  states = {step: random_state(abstract, seed=step) for step in (3, 5, 7)}
  checkpointer = open_checkpoints(keep=3)
  for step, state in states.items():
    checkpointer.save(step, state, {'step': step}, FINGERPRINT, {})
  checkpointer.close()
  for step in (5, 7):
    tear(tmp_path / FOLDER / str(step))
  checkpointer = open_checkpoints(keep=3)
  with pytest.warns(UserWarning, match='step 7 is torn .*resuming from step 3') as warned:
    state, data = checkpointer.restore(abstract, FINGERPRINT)
  assert len(warned) == 2 and data == {'step': 3} and checkpointer.latest == 3
  assert_bit_equal(state, states[3])
  assert len(list(tmp_path.glob('torn_[57]_*'))) == 2  # nothing is deleted
  checkpointer.save(5, states[5], {'step': 5}, FINGERPRINT, {})  # the run can save these steps again
  checkpointer.wait()
  assert_bit_equal(checkpointer.restore(abstract, FINGERPRINT)[0], states[5])


def test_restore_moves_nothing_if_every_checkpoint_is_torn(open_checkpoints, tmp_path):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  for step in (1, 2):
    checkpointer.save(step, random_state(abstract), {}, FINGERPRINT, {})
    checkpointer.wait()
    truncate(tmp_path / FOLDER / str(step))
  with pytest.raises(ConfigError, match=r'no checkpoint in .*step 2: .*step 1: .*another --workdir'):
    checkpointer.restore(abstract, FINGERPRINT)
  assert saved_steps(tmp_path) == [1, 2]


def flip_bit(file, position, bit=0):
  content = bytearray(file.read_bytes())
  content[position] ^= 1 << bit
  file.write_bytes(content)


def data_files(step):
  """The largest files of numbers of a step. Small arrays lie in files that Orbax itself checks."""
  return sorted((path for path in (step / 'state').rglob('d/*')), key=lambda path: path.stat().st_size)[-4:]


@pytest.mark.long
def test_restore_names_an_array_with_a_flipped_bit_and_takes_the_step_before(open_checkpoints, tmp_path):
  abstract = abstract_state((1, 1, 1, 1))
  states = {step: random_state(abstract, seed=step) for step in (3, 5)}
  checkpointer = open_checkpoints(keep=3)
  for step, state in states.items():
    checkpointer.save(step, state, {'step': step}, FINGERPRINT, {})
  checkpointer.close()
  shutil.copytree(tmp_path / FOLDER / '5', tmp_path / 'whole')
  rng, reasons = np.random.default_rng(0), []
  for name in [file.relative_to(tmp_path) for file in data_files(tmp_path / FOLDER / '5')] * 3:
    flip_bit(tmp_path / name, int(rng.integers((tmp_path / name).stat().st_size)), int(rng.integers(8)))
    checkpointer = open_checkpoints(keep=3)
    with warnings.catch_warnings(record=True) as warned:
      warnings.simplefilter('always')
      state, data = checkpointer.restore(abstract, FINGERPRINT)
    checkpointer.close()
    torn = [str(warning.message) for warning in warned if 'is torn' in str(warning.message)]
    assert data == {'step': 3 if torn else 5}
    assert_bit_equal(state, states[data['step']])  # whatever the bit meant
    reasons += torn
    shutil.rmtree(tmp_path / FOLDER / '5', ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', tmp_path / FOLDER / '5')
  named = [re.search(r'step 5 is torn \(the array ((params|opt_state)\.[\w.]+) differs from its checksum\)', text) for text in reasons]
  assert sum(match is not None for match in named) >= 2, reasons


@pytest.mark.parametrize('part', ['data', 'config'])
def test_restore_notices_changed_settings_and_iterator_state(open_checkpoints, tmp_path, part):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  for step in (1, 2):
    checkpointer.save(step, random_state(abstract, step), {'position': 40 + step}, FINGERPRINT, {})
  checkpointer.close()
  file = next(path for path in (tmp_path / FOLDER / '2' / part).rglob('*') if path.is_file() and path.stat().st_size > 20)
  content, (old, new) = file.read_text(), {'data': ('"position": 42', '"position": 43'), 'config': ('0.001', '0.003')}[part]
  assert content.count(old) == 1
  file.write_text(content.replace(old, new))
  checkpointer = open_checkpoints()
  with pytest.warns(UserWarning, match='step 2 is torn .*differ from their checksum.*resuming from step 1'):
    assert checkpointer.restore(abstract, FINGERPRINT)[1] == {'position': 41}


@pytest.mark.long
def test_load_params_refuses_a_flipped_bit_and_its_advice_helps(open_checkpoints, tmp_path):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints(keep=3)
  for step in (3, 5):
    checkpointer.save(step, random_state(abstract, step), {}, FINGERPRINT, {})
  checkpointer.close()
  as_half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding), abstract.params)
  cast = load_params(tmp_path, as_half)
  assert_bit_equal(
    jax.tree.map(lambda x: x.astype(jnp.float32), cast),
    jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), random_state(abstract, 5).params),
  )
  newest = tmp_path / FOLDER / '5'
  found = []
  for file, eighth in itertools.product(data_files(newest), range(1, 8)):  # some bits belong to the optimizer, or to nothing
    content = file.read_bytes()
    flip_bit(file, len(content) * eighth // 8)
    with contextlib.suppress(ConfigError):
      load_params(tmp_path, as_half)
      file.write_bytes(content)
      continue
    with pytest.raises(ConfigError) as error:
      load_params(tmp_path, as_half)
    if 'the array' in str(error.value):
      found.append(error)
      break
    file.write_bytes(content)
  assert found
  message = (
    rf'^{newest}: this checkpoint cannot be read \(the array params\.\S+ differs from its checksum\); .*remove this folder to use step 3$'
  )
  with pytest.raises(ConfigError, match=message):
    load_params(tmp_path, as_half)
  shutil.rmtree(newest)
  assert_bit_equal(load_params(tmp_path, abstract.params), random_state(abstract, 3).params)


def test_checkpoints_without_checksums_are_read(open_checkpoints, tmp_path, monkeypatch):
  abstract = abstract_state((1, 1, 1, 1))
  state, checkpointer = random_state(abstract), open_checkpoints()
  with monkeypatch.context() as patch:
    patch.setattr(checkpointer_lib, '_with_checksums', lambda values, *_: values)
    checkpointer.save(1, state, {'step': 1}, FINGERPRINT, {})
    checkpointer.wait()
  restored, data = checkpointer.restore(abstract, FINGERPRINT)
  assert data == {'step': 1}
  assert_bit_equal(restored, state)
  assert_bit_equal(load_params(tmp_path, abstract.params), state.params)


def test_an_error_that_passes_does_not_tear_a_checkpoint(open_checkpoints, tmp_path, monkeypatch):
  abstract = abstract_state((1, 1, 1, 1))
  state, checkpointer = random_state(abstract), open_checkpoints()
  checkpointer.save(1, random_state(abstract, 1), {'step': 1}, FINGERPRINT, {})
  checkpointer.save(2, state, {'step': 2}, FINGERPRINT, {})
  checkpointer.wait()
  failures = []

  def restore(self, *args, **kwargs):
    if len(failures) % 3 < 2:
      failures.append(None)
      raise OSError(5, 'Input/output error')
    return original(self, *args, **kwargs)

  original = ocp.CheckpointManager.restore
  monkeypatch.setattr(ocp.CheckpointManager, 'restore', restore)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    restored, data = checkpointer.restore(abstract, FINGERPRINT)
  assert data == {'step': 2} and len(failures) == 2
  assert_bit_equal(restored, state)
  failures.clear()
  assert_bit_equal(load_params(tmp_path, abstract.params), state.params)
  assert len(failures) == 2


def test_running_out_of_memory_does_not_tear_a_checkpoint(open_checkpoints, tmp_path, monkeypatch):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  checkpointer.save(1, random_state(abstract), {}, FINGERPRINT, {})
  checkpointer.wait()
  monkeypatch.setattr(ocp.CheckpointManager, 'restore', lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
  with pytest.raises(MemoryError):
    checkpointer.restore(abstract, FINGERPRINT)
  assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize('name', ['7.orbax-checkpoint-tmp', '7.orbax-checkpoint-tmp-1700000000'])
def test_killed_save_is_ignored_and_removed(open_checkpoints, tmp_path, name):
  abstract = abstract_state((1, 1, 1, 1))
  state = random_state(abstract)
  checkpointer = open_checkpoints()
  checkpointer.save(5, state, {}, FINGERPRINT, {})
  checkpointer.wait()
  checkpointer.close()
  shutil.copytree(tmp_path / FOLDER / '5', tmp_path / FOLDER / name)
  shutil.rmtree(tmp_path / FOLDER / name / 'data')
  checkpointer = open_checkpoints()
  assert checkpointer.latest == 5
  assert_bit_equal(checkpointer.restore(abstract, FINGERPRINT)[0], state)
  assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ['5']
  checkpointer.save(7, state, {'step': 7}, FINGERPRINT, {})
  checkpointer.wait()
  assert checkpointer.latest == 7 and checkpointer.restore(abstract, FINGERPRINT)[1] == {'step': 7}


@pytest.mark.parametrize(('lower', 'left'), [(False, [2, 5, 6]), (True, [3, 5, 6])])
@pytest.mark.parametrize('restarts', [False, True])
def test_save_keeps_newest_and_best(open_checkpoints, tmp_path, lower, left, restarts):
  state = random_state(abstract_state((1, 1, 1, 1)))
  metrics = {1: {}, 2: {'m': 0.9}, 3: {'m': 0.1}, 4: {'m': 0.5}, 5: {}, 6: {'m': 0.6}}
  settings = {'best_metric': 'm', 'best_is_lower': lower, 'keep': 2, 'keep_best': 1}
  checkpointer = open_checkpoints(**settings)
  for step, values in metrics.items():
    checkpointer.save(step, state, {}, FINGERPRINT, values)
    checkpointer.wait()
    if restarts:
      checkpointer.close()
      checkpointer = open_checkpoints(**settings)
  assert saved_steps(tmp_path) == left


def test_save_keeps_no_best_with_keep_best_0(open_checkpoints, tmp_path):
  state = random_state(abstract_state((1, 1, 1, 1)))
  checkpointer = open_checkpoints(best_metric='m', keep=1, keep_best=0)
  for step in (1, 2, 3):
    checkpointer.save(step, state, {}, FINGERPRINT, {'m': -step})
    checkpointer.wait()
  assert saved_steps(tmp_path) == [3]


def test_save_skips_a_step_already_saved(open_checkpoints):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  checkpointer.save(1, random_state(abstract), {'which': 'first'}, FINGERPRINT, {})
  checkpointer.save(1, random_state(abstract, 1), {'which': 'second'}, FINGERPRINT, {})
  checkpointer.wait()
  assert checkpointer.restore(abstract, FINGERPRINT)[1] == {'which': 'first'}


def test_restore_names_changed_settings(open_checkpoints):
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  checkpointer.save(4, random_state(abstract), {}, FINGERPRINT, {})
  checkpointer.wait()
  with pytest.raises(ConfigError, match=r'step 4 .*learning_rate was 0.001, is 0.002; new was None, is 1.*--workdir') as error:
    checkpointer.restore(abstract, FINGERPRINT | {'learning_rate': 2e-3, 'new': 1})
  assert 'seed' not in str(error.value) and '\n' not in str(error.value)


def test_load_params_whole_and_decoder(open_checkpoints, tmp_path):
  mesh = sharding.make_mesh(MeshConfig(2, 4, 1, 1))
  saved = random_state(abstract_state((1, 1, 1, 1)))
  checkpointer = open_checkpoints()
  checkpointer.save(4, saved, {}, FINGERPRINT, {})
  checkpointer.wait()
  wanted = step_lib.build(RANKING, MODEL, optax.identity(), mesh).abstract.params
  whole = load_params(tmp_path, wanted)
  assert_bit_equal(whole, saved.params)
  jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(f'{x.sharding}, not {a.sharding}'), whole, wanted)
  decoder = load_params(tmp_path, {'decoder': wanted['decoder']})
  assert list(decoder) == ['decoder']
  assert_bit_equal(decoder['decoder'], saved.params['decoder'])


def test_load_params_names_mismatched_parameters(open_checkpoints, tmp_path):
  checkpointer = open_checkpoints()
  with pytest.raises(ConfigError, match='no checkpoint to start from'):
    load_params(tmp_path / 'nowhere', {})
  with pytest.raises(ConfigError, match='no checkpoint to start from'):  # an empty folder
    load_params(tmp_path, {})
  saved = random_state(abstract_state((1, 1, 1, 1)))
  checkpointer.save(4, saved, {}, FINGERPRINT, {})
  checkpointer.wait()
  wider = saved.params | {'v_head': jnp.zeros(17)}
  with pytest.raises(ConfigError, match=r'v_head is \(16,\) in the checkpoint and \(17,\) in this model'):
    load_params(tmp_path, wider)
  with pytest.raises(ConfigError, match=r'extra is missing in the checkpoint'):
    load_params(tmp_path, saved.params | {'extra': jnp.zeros(1)})


def test_restore_checkpoint_of_earlier_version(open_checkpoints, tmp_path):
  """Settings stored under their earlier names are compared, and read, under the current ones."""
  abstract = abstract_state((1, 1, 1, 1))
  checkpointer = open_checkpoints()
  earlier = FINGERPRINT | {'accumulation': 2, 'start_from': 'lm', 'use_reference': False, 'template.use_reference': True}
  checkpointer.save(4, random_state(abstract), {'step': 4}, earlier, {})
  checkpointer.wait()
  current = FINGERPRINT | {'gradient_accumulation_steps': 2, 'start_from': 'pretrain_lm', 'template.use_reference': False}
  assert checkpointer.restore(abstract, current)[1] == {'step': 4}
  assert load_settings(tmp_path) == current | {'checkpoint_layout': 2}
  with pytest.raises(ConfigError, match=r'gradient_accumulation_steps was 2, is 3; template.use_reference was False, is True'):
    checkpointer.restore(abstract, current | {'gradient_accumulation_steps': 3, 'template.use_reference': True})
