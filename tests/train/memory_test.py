"""The memory of a compiled step against that of its devices, and what a message says to change."""

from __future__ import annotations

import dataclasses
import functools
import re
import types

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import ConfigError, MeshConfig, ModelConfig, TrainConfig
from polar_jax.data import pipeline
from polar_jax.runtime import malloc
from polar_jax.runtime.compiled import Executables, Memory
from polar_jax.runtime.units import in_units
from polar_jax.train import memory
from polar_jax.train import step as step_lib
from polar_jax.train.objectives import NEXT_TOKEN
from polar_jax.train.optimizer import make_optimizer

ROWS, LENGTH = 16, 64
MODEL = ModelConfig(num_layers=4, d_model=16, d_ff=64, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=64)


def mesh(devices: int = 1):
  return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])


@functools.cache
def memory_of(train: TrainConfig, model: ModelConfig) -> Memory:
  windows = pipeline.TextWindows(np.arange(3_000, dtype=np.int32) % 64, LENGTH, 0)
  plan = pipeline.BatchPlan(train.batch_size, train.gradient_accumulation_steps)
  batch = pipeline.text_batches(windows, plan, steps=1, seed=0)[0]
  with jax.set_mesh(mesh()):
    functions = step_lib.build(NEXT_TOKEN, model, make_optimizer(train, 1), mesh(), train.gradient_accumulation_steps)
    return Executables(functions.train).prepare(functions.abstract, sharding.put_local(batch, mesh()))


def checked(train: TrainConfig, model: ModelConfig, log) -> None:
  remedies = functools.partial(memory.remedies, model, train, train.batch_size)
  memory.check('run: a step', memory_of(train, model), mesh(), log, remedies)


@pytest.mark.long
def test_every_remedy_of_the_message_makes_the_step_fit(monkeypatch):
  train, lines = TrainConfig(batch_size=ROWS), []
  needed = memory.fit_of(memory_of(train, MODEL), mesh()).needed
  monkeypatch.setattr(memory.memory_lib, 'available', lambda _: int(0.7 * needed))
  with pytest.raises(ConfigError) as error:
    checked(train, MODEL, lines.append)
  message = str(error.value)
  found = re.fullmatch(
    r'run: a step needs \S+ [KM]iB of memory besides parameters and moments, and the host has \S+ [KM]iB free: '
    r"set gradient_accumulation_steps to (\d+) or more \(now 1\); or model\.remat to 'full' \(now 'none'\); "
    r'or a smaller batch_size \(now 16\) or model, or free memory',
    message,
  )
  assert found, message
  assert lines == [] and len(message) <= 500
  checked(dataclasses.replace(train, gradient_accumulation_steps=int(found[1])), MODEL, lines.append)
  checked(train, dataclasses.replace(MODEL, remat='full'), lines.append)
  checked(dataclasses.replace(train, batch_size=ROWS // 2), MODEL, lines.append)
  assert len(lines) == 3 and all('free' in line for line in lines)


def test_devices_of_one_host_share_its_memory(monkeypatch):
  monkeypatch.setattr(memory.memory_lib, 'available', lambda _: 100)
  one = Memory(argument=1_000, output=50, alias=40, temporary=7, code=3)  # arguments are allocated already
  assert memory.fit_of(one, mesh()) == memory.Fit(20, 100, 'host') and memory.fit_of(one, mesh()).fits
  assert memory.fit_of(one, mesh(8)) == memory.Fit(160, 100, 'host') and not memory.fit_of(one, mesh(8)).fits
  assert memory.fit_of(one, mesh(), extra=81).needed == 101
  assert memory.fit_of(Memory(refused=5_000), mesh()).needed == 5_000


@pytest.mark.parametrize(('free', 'maps'), [(39, True), (40, False), (None, False)])
def test_the_allocator_gives_blocks_back_when_memory_is_short(monkeypatch, free, maps):
  calls = []
  monkeypatch.setattr(malloc, 'map_large_blocks', lambda: calls.append(1))
  monkeypatch.setattr(memory.memory_lib, 'available', lambda _: free)
  memory.check('run: a step', Memory(temporary=10), mesh(), lambda _: None, lambda _: [])
  assert bool(calls) is maps


@pytest.mark.parametrize(
  ('rows', 'accumulation', 'needed', 'free', 'wanted'),
  [
    (16, 1, 100, 50, 3),  # 1.1 times the need, over what is free
    (16, 2, 100, 50, 6),
    (16, 4, 1_000, 50, 16),  # no more parts than rows
    (5, 2, 1_000, 50, 6),
    (16, 16, 100, 50, None),  # one row at once already
    (3, 1, 10, None, 3),
    (16, 1, 5, None, 6),  # as if one byte were free
    (16, 1, 5, 0, 6),
  ],
)
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_accumulation_is_advised_in_proportion_to_what_is_missing(rows, accumulation, needed, free, wanted, remat):
  train = TrainConfig(batch_size=32, gradient_accumulation_steps=accumulation)
  lines = memory.remedies(dataclasses.replace(MODEL, remat=remat), train, rows, memory.Fit(needed, free, 'device'))
  expected = [] if wanted is None else [f'set gradient_accumulation_steps to {wanted} or more (now {accumulation})']
  expected += ["model.remat to 'full' (now 'none')"] if remat == 'none' else []
  assert lines == [*expected, 'a smaller batch_size (now 32) or model, or free memory']


def test_a_device_with_memory_of_its_own_has_the_least_of_its_neighbors(monkeypatch):
  device = lambda process, free: types.SimpleNamespace(platform='gpu', process_index=process, free=free)
  monkeypatch.setattr(memory.memory_lib, 'available', lambda device: device.free)
  one = Memory(output=50, alias=40, temporary=7, code=3)
  fit = lambda *devices: memory.fit_of(one, types.SimpleNamespace(devices=np.array(devices, object)), extra=1)
  assert fit(device(0, 90), device(0, 30), device(1, 5), device(0, None)) == memory.Fit(21, 30, 'device')
  unknown = fit(device(0, None))
  assert unknown == memory.Fit(21, None, 'device') and unknown.fits
  assert memory.Fit(30, 30, 'device').fits and not memory.Fit(31, 30, 'device').fits


STATE = {'w': np.zeros((4, 100), np.float32), 'step': np.zeros((), np.int32)}  # 1,604 bytes


@pytest.mark.parametrize(
  ('asynchronous', 'free', 'expected'),
  [
    # Twice the state and the larger step of the host, 40 bytes.
    (True, 3_248, None),
    (True, 3_247, 'set checkpointing.asynchronous=False (1.57 KiB); or a smaller model, or free memory'),
    (True, 1_604, 'set checkpointing.asynchronous=False (1.57 KiB); or a smaller model, or free memory'),
    (True, 1_603, 'a smaller model, or free memory'),
    (False, 1_604, None),
    (False, 1_603, 'a smaller model, or free memory'),
    (True, None, None),
  ],
)
def test_a_save_must_fit_the_host(monkeypatch, asynchronous, free, expected):
  monkeypatch.setattr(memory.memory_lib, 'available_on_host', lambda: free)
  calls, lines = [memory.Fit(7, None, 'host'), memory.Fit(40, None, 'host'), memory.Fit(9_000, None, 'device')], []
  check = lambda asynchronous: memory.check_save('run', STATE, asynchronous, calls, lines.append)
  if expected is None:
    check(asynchronous)
    kind = 'an asynchronous save next to a step needs 3.17 KiB' if asynchronous else 'a save needs 1.57 KiB'
    amount = 'an unknown amount' if free is None else in_units(free)
    assert lines == [f'run: {kind} of memory besides parameters and moments, and the host has {amount} free']
    return
  with pytest.raises(ConfigError) as error:
    check(asynchronous)
  assert str(error.value).endswith(f'free: {expected}') and lines == []
  if 'asynchronous=False' in expected:  # the remedy
    check(False)


def test_a_save_holds_each_part_of_an_array_once(monkeypatch):
  monkeypatch.setattr(memory.memory_lib, 'available_on_host', lambda: None)
  devices = sharding.make_mesh(MeshConfig(data=2, fsdp=4), jax.devices()[:8])
  place = lambda *axes: jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*axes))
  shape = lambda *axes: jax.ShapeDtypeStruct((8, 1_024), np.float32, sharding=place(*axes))
  for axes in ((), ('fsdp',), ('data',), (('data', 'fsdp'),)):
    lines = []
    memory.check_save('run', [shape(*axes)], False, [], lines.append)
    assert f'a save needs {in_units(32 << 10)} of' in lines[0], axes


def test_a_save_writes_no_more_at_once_than_orbax_does(monkeypatch):
  monkeypatch.setattr(memory.memory_lib, 'available_on_host', lambda: None)
  lines, large = [], [jax.ShapeDtypeStruct((50, 10**9), np.float32)]  # 200 GB
  for asynchronous in (True, False):
    memory.check_save('run', large, asynchronous, [], lines.append)
  assert f'needs {in_units(296 * 10**9)} of' in lines[0] and f'needs {in_units(96 * 10**9)} of' in lines[1]
