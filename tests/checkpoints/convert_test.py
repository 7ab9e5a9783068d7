"""Hugging Face folders are imported and exported again: every byte of every tensor, the small files, and the certificate."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from convert_folders import (
  BF16,
  CASES,
  F16,
  F32,
  HEADS,
  Case,
  Folder,
  certificate_of,
  config_of,
  context_of,
  refused,
  stored_in,
  write_weights,
)
from flax import nnx
from optional import torch

from polar_jax import runner, sharding
from polar_jax.checkpoints import pretrained
from polar_jax.model import heads
from polar_jax.model.reward_model import RewardModel
from polar_jax.stages import convert

pytestmark = pytest.mark.usefixtures('torch_on_one_thread', 'compile_once')


class Converted(NamedTuple):
  case: Case
  source: Folder
  ours: pathlib.Path
  exported: pathlib.Path
  log: list[str]
  results: dict[str, Any]


def case_param(name: str):
  return pytest.param(name, marks=pytest.mark.needs('torch')) if 'bin' in CASES[name].layout else name


@pytest.fixture(scope='module', params=[case_param(name) for name in CASES])
def converted(request, make_folder, tmp_path_factory) -> Converted:
  """A folder that was imported and exported again."""
  case, root, log = CASES[request.param], tmp_path_factory.mktemp('converted'), []
  source = make_folder(case)
  convert.convert(context_of(source.path, root / 'ours', case.mesh, log))
  results = convert.convert(context_of(root / 'ours', root / 'exported', case.mesh, log, shard_gib=20_000 / 2**30))
  return Converted(case, source, root / 'ours', root / 'exported', log, results)


def test_tensors_round_trip_to_the_byte(converted):
  found = stored_in(converted.exported)
  assert found.keys() == converted.source.tensors.keys()
  for name, array in converted.source.tensors.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert found[name].tobytes() == array.tobytes(), name
  index = json.loads((converted.exported / 'model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == found.keys() and len(set(index['weight_map'].values())) > 1


def test_parameters_are_sharded_over_the_mesh(converted):
  case, opened = converted.case, pretrained.open_pretrained(converted.source.path)
  mesh = context_of('', '', case.mesh).mesh
  abstract = sharding.abstract_params(heads.abstract_model(opened.model, opened.head), mesh)
  read, again = opened.params(mesh), pretrained.open_pretrained(converted.ours).params(mesh)
  dtypes = set()
  for a, x, y in zip(*map(jax.tree.leaves, (abstract, read, again)), strict=True):
    assert x.sharding == y.sharding == a.sharding and x.shape == a.shape and x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    dtypes.add(x.dtype)
  assert dtypes == {d for d in (case.dtype, case.head_dtype, case.norm_dtype) if d is not None}
  if case.mesh == 'data2_fsdp4':
    assert any(len({str(s.index) for s in leaf.addressable_shards}) == 4 for leaf in jax.tree.leaves(read))


def test_small_files_round_trip(converted):
  source, exported = converted.source.path, converted.exported
  for name in ('modeling_own.py', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja'):
    assert (exported / name).read_bytes() == (source / name).read_bytes(), name
  assert not list(source.parent.rglob('ran')) + list(exported.parent.rglob('ran'))
  config = json.loads((exported / 'config.json').read_text('utf-8'))
  if converted.case.family == 'internlm2':  # the folder does not contain its code
    assert (exported / f'{config.pop("auto_map")["AutoConfig"].split(".")[0]}.py').is_file()
  if not converted.case.architecture.endswith('ForCausalLM'):  # without it, servers apply a sigmoid
    assert config.pop('problem_type') == 'regression'
  # The classifier has a chat template and no reward token, although its tokenizer has one: it must not become a model of our kind.
  assert config == converted.source.config


def independent_scores(c: Converted, params: dict[str, Any]) -> np.ndarray:
  """Score the certificate's rows by the models themselves, one at a time and without the tokens after their end."""
  head, kind = next(HEADS[suffix] for suffix in HEADS if c.case.architecture.endswith(suffix))
  model, _ = config_of(c.case)
  rng = np.random.default_rng(0)
  tokens_BT, last_B = rng.integers(0, 263, (8, 32), np.int32), rng.integers(1, 32, 8, np.int32)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(model, rngs=nnx.Rngs(0))))
  positions = np.arange(32, dtype=np.int32)[None]
  intervals = [(np.zeros_like(positions), positions + 1)]

  @jax.jit
  def apply(params, tokens_1T, last):
    merged = nnx.merge(graphdef, params)
    index = last[None, None] if kind is RewardModel else None
    return merged(tokens_1T, positions, intervals, index)

  scores = []
  for tokens_T, last in zip(tokens_BT, last_B, strict=True):
    tokens_T = np.where(np.arange(32) <= last, tokens_T, 0)
    out = np.asarray(apply(params, tokens_T[None], last), np.float64)
    if head == 'reward':
      scores.append(out[0, 0])
    elif head == 'value':
      scores.append(out[0, last])
    else:
      logp = out[0] - np.log(np.exp(out[0]).sum(-1, keepdims=True))
      scores.append(np.mean([logp[t, tokens_T[t + 1]] for t in range(last)]))
  return np.array(scores)


def test_certificate_agrees_with_independent_counts(converted):
  tensors = converted.source.tensors
  imported, exported = certificate_of(converted.ours), certificate_of(converted.exported)
  for stated, folder, origin in ((imported, converted.ours, converted.source.path), (exported, converted.exported, converted.ours)):
    assert stated['source'] == str(origin) and stated['output'] == str(folder)
    assert stated['parameters'] == sum(a.size for name, a in tensors.items() if name != 'score.bias')
    assert stated['tensors'] == {name: [hashlib.sha256(a.tobytes()).hexdigest()] * 2 for name, a in tensors.items()}
    assert stated['dtypes'] == sorted({a.dtype.name for a in tensors.values()})
    assert stated['family'] == converted.case.family and stated['exact'] is True and stated['max_difference'] == 0
  assert converted.results['convert']['parameters'] == exported['parameters']
  if converted.case.family == 'qwen2':
    return  # the other cases cover every head and mesh
  rounded = pretrained.open_pretrained(converted.source.path).params(context_of('', '').mesh, 'float32')
  expected = independent_scores(converted, rounded)
  assert np.ptp(expected) > 0.3
  for scores in (*imported['scores'], *exported['scores']):
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_certificate_is_printed(converted):
  text = '\n'.join(converted.log)
  for name, array in converted.source.tensors.items():
    assert len(re.findall(rf'^  {re.escape(name)} +{hashlib.sha256(array.tobytes()).hexdigest()[:16]}$', text, re.MULTILINE)) == 2
  assert text.count(f'{len(converted.source.tensors)} of {len(converted.source.tensors)} tensors read back bit-identical') == 2
  assert text.count('8 fixed rows scored before and after: max |difference| 0') == 2


# ---- another dtype ----


def as_torch_rounds(array: np.ndarray) -> np.ndarray:
  return torch.from_numpy(np.array(array, np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(BF16)


@pytest.mark.long
@pytest.mark.needs('torch')
def test_bfloat16_rounds_like_torch_in_imports_and_exports(make_folder, tmp_path):
  case, mesh = CASES['llama_reward'], 'fsdp2_tensor4'
  source = make_folder(case, tmp_path / 'source')
  ties = np.arange(2**16, dtype=np.uint32)[: 263 * 36] * np.uint32(0x10000) + np.uint32(0x8000)  # ties, of which every second one rounds up
  source.tensors['model.embed_tokens.weight'].reshape(-1)[:] = ties.view(np.float32)
  (source.path / 'pytorch_model.bin').unlink()
  write_weights(source.path, 'one', source.tensors)
  convert.convert(context_of(source.path, tmp_path / 'cast', mesh, dtype='bfloat16'))
  convert.convert(context_of(tmp_path / 'cast', tmp_path / 'cast_out', mesh))
  convert.convert(context_of(source.path, tmp_path / 'kept', mesh))
  convert.convert(context_of(tmp_path / 'kept', tmp_path / 'kept_out', mesh, dtype='bfloat16'))
  for out in (tmp_path / 'cast_out', tmp_path / 'kept_out'):
    found = stored_in(out)
    for name, array in source.tensors.items():
      assert found[name].tobytes() == as_torch_rounds(array).tobytes(), (out, name)
    assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  assert [certificate_of(tmp_path / name)['exact'] for name in ('cast', 'cast_out', 'kept', 'kept_out')] == [False, True, True, False]
  for stated in (certificate_of(tmp_path / 'cast'), certificate_of(tmp_path / 'kept_out')):
    assert 0 < stated['max_difference'] < 0.2 and stated['dtypes'] == ['bfloat16']


@pytest.mark.long
@pytest.mark.needs('torch')
@pytest.mark.parametrize(('dtype', 'large'), [('float16', 7e4), ('bfloat16', 3.4e38)])
def test_overflow_of_a_dtype_is_refused(make_folder, tmp_path, dtype, large, recwarn):
  source = make_folder(CASES['llama_reward'], tmp_path / 'source')
  for name in ('model.layers.1.mlp.down_proj.weight', 'model.embed_tokens.weight'):
    tensors = {n: a.copy() for n, a in source.tensors.items()}
    tensors[name][3, 5] = -large
    (source.path / 'pytorch_model.bin').unlink(missing_ok=True)
    write_weights(source.path, 'one', tensors)
    message = rf'tensor {name!r} reaches {re.escape(f"{large:.2g}")}, which {dtype} cannot hold'
    refused(context_of(source.path, tmp_path / 'out', dtype=dtype), rf'model\.safetensors: {message}')
    convert.convert(context_of(source.path, tmp_path / name))
    refused(context_of(tmp_path / name, tmp_path / 'out', dtype=dtype), message)
  assert not [w for w in recwarn if 'overflow' in str(w.message)]


@pytest.mark.needs('torch')
def test_a_folder_without_tokenizer_is_converted_with_a_message(small, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (small.path / name).unlink()
  log: list[str] = []
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  convert.convert(context_of(tmp_path / 'ours', tmp_path / 'hf', log=log))
  assert any(re.search('no tokenizer: .* contains neither a tokenizer.json nor', line) for line in log)
  assert stored_in(tmp_path / 'hf').keys() == small.tensors.keys()


@pytest.mark.long
@pytest.mark.needs('torch')
def test_the_stage_writes_to_the_report(small, tmp_path, capsys):
  config = context_of(small.path, tmp_path / 'ours').config
  assert runner.run(config, tmp_path / 'workdir') == 0
  assert f'convert: wrote {tmp_path / "ours"}' in capsys.readouterr().out
  results = json.loads((tmp_path / 'workdir/report.json').read_text())['convert']
  assert (results['tensors'], results['exact'], results['max_difference']) == (len(small.tensors), True, 0)


def test_layers_of_several_dtypes_are_held_in_one_that_rounds_nothing(make_folder, tmp_path):
  source = make_folder(CASES['llama_reward']._replace(layout='one', dtype=BF16), tmp_path / 'source')
  mixed = {name: a.astype(F16 if 'layers.0' in name else F32 if 'layers.1' in name else BF16) for name, a in source.tensors.items()}
  mixed['model.layers.1.mlp.up_proj.weight'] = source.tensors['model.layers.1.mlp.up_proj.weight']
  write_weights(source.path, 'one', mixed)
  convert.convert(context_of(source.path, tmp_path / 'ours'))
  convert.convert(context_of(tmp_path / 'ours', tmp_path / 'exported'))
  assert certificate_of(tmp_path / 'ours')['exact']
  found = stored_in(tmp_path / 'exported')
  for name, array in mixed.items():
    assert found[name].dtype == (F32 if 'layers' in name else BF16)  # float16 and bfloat16 have only float32 in common
    np.testing.assert_array_equal(found[name].astype(F32), array.astype(F32), name)
  convert.convert(context_of(source.path, tmp_path / 'cast', dtype='float32'))
  assert certificate_of(tmp_path / 'cast')['dtypes'] == ['float32']
