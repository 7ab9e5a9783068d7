"""Conversions that fail, are killed, or do not write what they read."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import jax
import numpy as np
import pytest
from convert_folders import context_of, refused, stored_in

from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import config_json, exporter, tokenizer_files
from polar_jax.checkpoints.formats import storage
from polar_jax.stages import convert

pytestmark = pytest.mark.usefixtures('torch_on_one_thread', 'compile_once')


@pytest.mark.needs('torch')
def test_a_failed_conversion_leaves_nothing(small, tmp_path, monkeypatch):
  written = []

  def stop(self, name, array):
    written.append(name)
    if len(written) == 5:
      assert any((tmp_path / 'hf.partial').glob('*.safetensors'))
      raise OSError('no space left on device')
    return add(self, name, array)

  add = storage.SafetensorsWriter.add
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  with monkeypatch.context() as patch:
    patch.setattr(storage.SafetensorsWriter, 'add', stop)
    refused(context_of(tmp_path / 'ours', tmp_path / 'hf'), 'no space left', OSError)
  assert len(written) == 5
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_files, 'copy_small_files', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    refused(context_of(small.path, tmp_path / 'ours2'), '^$', KeyboardInterrupt)


@pytest.mark.needs('torch')
def test_leftovers_of_a_killed_conversion_are_removed(small, tmp_path):
  for output in ('ours', 'hf'):
    stale = tmp_path / f'{output}.partial'
    (stale / 'checkpoints' / '0').mkdir(parents=True)
    (stale / 'model-00001-of-00009.safetensors').write_text('half')
    (stale / 'config.json').write_text('{')
    convert.convert(context_of(small.path if output == 'ours' else tmp_path / 'ours', tmp_path / output))
    assert not stale.exists()
  assert stored_in(tmp_path / 'hf').keys() == small.tensors.keys()
  assert not (tmp_path / 'ours/config.json').exists() and (tmp_path / 'ours/assets/config.json').exists()


def flip(params: dict[str, Any], *path: str) -> dict[str, Any]:
  """Return a copy in which the last bit of one number of a parameter is flipped."""
  copied = jax.tree.map(lambda x: x, params)
  *outer, last = path
  at = copied
  for key in outer:
    at = at[key]
  array = np.array(at[last])
  array.reshape(-1).view(np.uint8)[-4] ^= 1
  at[last] = jax.device_put(array, at[last].sharding)
  return copied


@pytest.mark.needs('torch')
@pytest.mark.parametrize('path', [('decoder', 'layers', 'w_up'), ('decoder', 'embedding'), ('v_head',)])
def test_a_bit_changed_by_an_import_is_detected(small, tmp_path, monkeypatch, path):
  save = checkpoint.save_params
  monkeypatch.setattr(checkpoint, 'save_params', lambda folder, params, settings: save(folder, flip(params, *path), settings))
  refused(
    context_of(small.path, tmp_path / 'out'), r"out: tensor '(model|score)\..*' reads back differently from .*source \(1 tensors differ\)"
  )


@pytest.mark.needs('torch')
def test_a_bit_changed_by_an_export_is_detected(small, tmp_path, monkeypatch):
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  write = exporter.write_weights

  def write_wrongly(params, stored, folder, dtype, max_bytes):
    write(params, stored, folder, dtype, max_bytes)
    file = folder / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[8 + struct.unpack('<Q', data[:8])[0]] ^= 1
    file.write_bytes(data)

  monkeypatch.setattr(exporter, 'write_weights', write_wrongly)
  refused(
    context_of(tmp_path / 'ours', tmp_path / 'out'),
    r"out: tensor 'model.embed_tokens.weight' reads back differently from .*ours \(1 tensors differ\)",
  )


@pytest.mark.long
@pytest.mark.needs('torch')
@pytest.mark.parametrize('setting', [{'rope_theta': 501.0}, {'norm_eps': 0.02}])
def test_a_lost_setting_is_detected(small, tmp_path, monkeypatch, setting):
  """Weights alone do not determine a model."""
  to_json, saved = config_json.to_json, checkpoint.save_params
  with monkeypatch.context() as patch:
    changed = {f'model.{name}': value for name, value in setting.items()}
    patch.setattr(checkpoint, 'save_params', lambda folder, params, settings: saved(folder, params, settings | changed))
    refused(context_of(small.path, tmp_path / 'out'), r'out: scores differ by .* from those of .*source; output discarded')
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  (tmp_path / 'ours/assets/config.json').unlink()  # otherwise it would be kept
  monkeypatch.setattr(config_json, 'to_json', lambda model, *args, **more: to_json(dataclasses.replace(model, **setting), *args, **more))
  refused(context_of(tmp_path / 'ours', tmp_path / 'out'), r'out: scores differ by .* from those of .*ours; output discarded')
