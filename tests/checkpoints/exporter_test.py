"""Tests of exported tensors, and of keeping a config.json that still describes the model."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from optional import torch, transformers

from polar_jax import sharding
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import config_json, exporter, families
from polar_jax.config import Config, MeshConfig, ModelConfig
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.heads import HEADS
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.stages import convert
from polar_jax.stages.context import Context
from polar_jax.types import UserError

pytestmark = [pytest.mark.needs('torch', 'transformers'), pytest.mark.usefixtures('torch_on_one_thread')]

MODEL = ModelConfig(vocab_size=19, num_layers=2, d_model=24, d_ff=28, num_heads=6, num_kv_heads=2, head_dim=4, tie_embeddings=True)
QWEN = dataclasses.replace(MODEL, family='qwen2', qkv_bias=True)
# Fields that a family leaves to its models.
FREE = {
  'mistral': {'sliding_window': 9},
  'gemma3_text': {'sliding_window': 9, 'global_every': 2, 'rope_local_theta': 50.0, 'query_pre_attn_scalar': 7.0},
  'smollm3': {'nope_every': 2},
}
BYTES = dataclasses.replace(MODEL, vocab_size=263, rope_theta=500.0, norm_eps=0.01)  # large enough for the byte tokenizer


@pytest.mark.parametrize(('model', 'head', 'kind'), [(QWEN, 'lm', LanguageModel), (MODEL, 'value', ValueModel)])
def test_stored_arrays_against_independent_mapping(random_params, as_stored, tmp_path, model, head, kind):
  params = random_params(kind, model)
  expected, stored = as_stored(model, params), families.stored_tensors(model, head)
  on_device = jax.tree.map(jnp.asarray, params)
  assert [name for name, _ in exporter.stored_arrays(on_device, stored)] == [s.name for s in stored]
  exporter.write_weights(on_device, stored, tmp_path, None, max_bytes=10**9)
  found = safetensors.numpy.load_file(tmp_path / 'model.safetensors')
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array)


def test_stored_arrays_constant_has_the_dtype_of_its_head(random_params, tmp_path):
  """As in every linear layer of torch, where weight and bias have the same dtype."""
  llama = dataclasses.replace(MODEL, family='llama')
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), random_params(ValueModel, llama))
  params['v_head'] = params['v_head'].astype(jnp.float32)
  found = dict(exporter.stored_arrays(params, families.stored_tensors(llama, 'value')))
  assert {name for name, a in found.items() if a.dtype == np.float32} == {'score.weight', 'score.bias'}
  assert sum(a.dtype == jnp.bfloat16 for a in found.values()) == len(found) - 2
  assert {a.dtype.name for _, a in exporter.stored_arrays(params, families.stored_tensors(llama, 'value'), 'float16')} == {'float16'}


def test_stored_arrays_overflow_and_nan(random_params):
  stored, params = families.stored_tensors(MODEL, 'value'), random_params(ValueModel, MODEL)
  params['decoder']['layers']['w_up'][1, 3, 4] = -70_000
  with pytest.raises(UserError, match=r"^tensor 'model.layers.1.feed_forward.w3.weight' reaches 7e\+04, which float16 cannot hold"):
    dict(exporter.stored_arrays(params, stored, 'float16'))
  assert len(dict(exporter.stored_arrays(params, stored, 'bfloat16'))) == len(stored)


def write(folder, model=QWEN, head='lm', **settings):
  given = {'dtype': 'bfloat16', 'reward_token_id': None, 'special_ids': {'eos_token_id': 7}} | settings
  exporter.write_config(folder, model, head, **given)
  return json.loads((folder / 'config.json').read_text('utf-8'))


def kept(folder, **changes):
  """Return a config.json that came with QWEN's weights."""
  config = config_json.to_json(QWEN, 'lm', dtype='float32') | {'eos_token_id': [1, 2], 'unknown': 'é'} | changes
  (folder / 'config.json').write_text(json.dumps(config))
  return config


def test_write_config_creates_a_config(tmp_path):
  written = write(tmp_path)
  assert config_json.from_json(written, 'it').model == QWEN and written['torch_dtype'] == 'bfloat16'
  assert written['eos_token_id'] == 7 and written['pad_token_id'] is None and 'auto_map' not in written


def test_write_config_keeps_a_matching_config(tmp_path):
  config = kept(tmp_path, dtype='float32')
  written = write(tmp_path)
  del config['dtype']
  assert written == config | {'torch_dtype': 'bfloat16'}
  assert 'é' in (tmp_path / 'config.json').read_text('utf-8')


@pytest.mark.parametrize(
  ('model', 'head'), [(QWEN, 'reward'), (dataclasses.replace(QWEN, num_layers=3), 'lm'), (dataclasses.replace(QWEN, norm_eps=0.1), 'lm')]
)
def test_write_config_replaces_the_config_of_another_model(tmp_path, model, head):
  kept(tmp_path)
  written = write(tmp_path, model, head, reward_token_id=5 if head == 'reward' else None)
  read = config_json.from_json(written, 'it')
  assert (read.model, read.head, read.reward_token_id) == (model, head, 5 if head == 'reward' else None)
  assert 'unknown' not in written and written['eos_token_id'] == 7


@pytest.mark.parametrize('given', [{}, {'problem_type': None}, {'problem_type': 'single_label_classification'}])
def test_write_config_declares_rewards_a_regression(tmp_path, given):
  """Otherwise vLLM applies a sigmoid to them. The files of POLAR have no such key."""
  config = config_json.to_json(MODEL, 'reward', dtype='float32')
  del config['problem_type']
  (tmp_path / 'config.json').write_text(json.dumps(config | given))
  assert write(tmp_path, MODEL, 'reward')['problem_type'] == 'regression'
  assert 'problem_type' not in write(tmp_path, QWEN, 'lm')


OWN = {'AutoConfig': 'configuration_own.OwnConfig', 'AutoModel': 'modeling_own.Own'}


@pytest.mark.parametrize(
  ('auto_map', 'files', 'stays'),
  [
    (OWN, ['configuration_own.py', 'modeling_own.py'], True),
    (OWN | {'AutoTokenizer': ['absent.A', None]}, ['configuration_own.py', 'modeling_own.py'], True),
    (OWN, ['modeling_own.py'], False),
    ({key: f'someone/else--{value}' for key, value in OWN.items()}, ['configuration_own.py', 'modeling_own.py'], False),
    (None, [], False),
    ({}, [], False),
  ],
)
def test_write_config_keeps_or_adds_internlm2_code(tmp_path, auto_map, files, stays):
  config = config_json.to_json(MODEL, 'reward', dtype='float32') | {'auto_map': auto_map, 'unknown': 1}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  for name in files:
    (tmp_path / name).write_text('raise SystemExit')
  written = write(tmp_path, MODEL, 'reward')
  added = sorted(path.name for path in tmp_path.glob('*.py') if path.name not in files)
  assert written['unknown'] == 1
  assert added == ([] if stays else ['configuration_internlm2.py', 'modeling_internlm2.py'])
  ours = {'AutoConfig': 'configuration_internlm2.InternLM2Config', 'AutoModel': 'modeling_internlm2.InternLM2ForRewardModel'}
  assert written['auto_map'] == (auto_map if stays else ours)
  assert all((tmp_path / name).read_text() == 'raise SystemExit' for name in files)


def test_write_config_drops_reference_to_missing_code(tmp_path):
  for files in ([], ['configuration_own.py', 'modeling_own.py']):
    kept(tmp_path, auto_map=OWN)
    for name in files:
      (tmp_path / name).write_text('raise SystemExit')
    written = write(tmp_path)
    assert written.get('auto_map') == (OWN if files else None)


# ---- transformers ----


def exported_from(params, model: ModelConfig, head: str, root: pathlib.Path) -> pathlib.Path:
  """Export a run with these parameters and return the folder."""
  fields = {f'model.{name}': value for name, value in dataclasses.asdict(model).items()}
  checkpoint.save_params(root / 'run', params, {'objective': HEADS[head].objective, 'tokenizer': 'byte', **fields})
  config = Config(stage='convert', checkpoint=str(root / 'run'), output=str(root / 'exported'))
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  convert.convert(Context(config, root, mesh, lambda line: None))
  return root / 'exported'


def our_logits(kind: type, model: ModelConfig, params, ids: np.ndarray) -> np.ndarray:
  """Return our logits of one sequence."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(model, rngs=nnx.Rngs(0))))
  positions = np.arange(len(ids), dtype=np.int32)[None]
  inputs = (ids[None], positions, [(np.zeros_like(positions), positions + 1)])
  return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(*inputs))(params))[0]


@pytest.mark.long
@pytest.mark.parametrize(
  ('auto', 'family', 'head', 'tied'),
  [
    ('AutoModelForCausalLM', 'llama', 'lm', False),
    ('AutoModelForSequenceClassification', 'llama', 'reward', False),
    ('AutoModelForCausalLM', 'qwen2', 'lm', True),
    ('AutoModelForSequenceClassification', 'qwen2', 'reward', True),
    ('AutoModelForCausalLM', 'mistral', 'lm', False),
    ('AutoModelForCausalLM', 'gemma3_text', 'lm', True),
    ('AutoModelForSequenceClassification', 'gemma3_text', 'reward', False),
    ('AutoModelForSequenceClassification', 'smollm3', 'reward', True),
    ('AutoModelForCausalLM', 'qwen3', 'lm', True),
    ('AutoModelForSequenceClassification', 'qwen3', 'reward', False),
    ('AutoModel', 'internlm2', 'reward', False),
  ],
)
def test_convert_result_loads_in_transformers(random_params, tmp_path, auto, family, head, tied):
  """The run has a byte tokenizer, so that all files are created, none copied."""
  model = dataclasses.replace(BYTES, family=family, tie_embeddings=tied, **families.FAMILIES[family].fixed, **FREE.get(family, {}))
  kind = {'lm': LanguageModel, 'reward': RewardModel, 'value': ValueModel}[head]
  params = random_params(kind, model)
  folder = exported_from(params, model, head, tmp_path)
  torch_class = imported_class(folder, auto) if family == 'internlm2' else getattr(transformers, auto)
  loaded, info = torch_class.from_pretrained(folder, output_loading_info=True, dtype='auto')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
  assert next(loaded.parameters()).dtype == torch.float32
  ids = np.random.default_rng(1).integers(0, 255, 23).astype(np.int32)
  with torch.no_grad():
    theirs = loaded.eval()(torch.from_numpy(ids[None].astype(np.int64)), torch.ones(1, len(ids))).logits[0].numpy()
  ours = our_logits(ValueModel if head == 'reward' else kind, model, params, ids)
  np.testing.assert_allclose(theirs.squeeze(), ours[-1] if head == 'reward' else ours, atol=1e-4)
  if family != 'internlm2':
    texts = ['héllo <|reward|> wörld[UNUSED_TOKEN_130]', '']
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert [tokenizer(t)['input_ids'] for t in texts] == [ByteTokenizer().encode(t, add_bos=True) for t in texts]
  written = json.loads((folder / 'config.json').read_text())
  assert written.get('reward_token_id') == (260 if head == 'reward' else None)
  assert (written['pad_token_id'], written['bos_token_id'], written['eos_token_id']) == (256, 257, 258)


def imported_class(folder: pathlib.Path, auto: str) -> type:
  """Import the exported files as a package, as transformers does for `trust_remote_code`."""
  name = f'exported_{auto}'
  package = types.ModuleType(name)
  package.__path__ = [str(folder)]
  sys.modules[name] = package
  module, kind = json.loads((folder / 'config.json').read_text())['auto_map'][auto].split('.')
  return getattr(importlib.import_module(f'{name}.{module}'), kind)
