"""Hugging Face folders of random models for the tests of the convert stage, written without the package under test."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from optional import torch

from polar_jax import sharding
from polar_jax.config import Config, ConvertConfig, MeshConfig, ModelConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.stages import convert
from polar_jax.stages.context import Context
from polar_jax.types import UserError

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# Of these dimensions a mesh axis of 8 divides only d_ff, one of 4 also d_model; heads and the vocabulary stay whole.
MODEL = ModelConfig(
  vocab_size=263, num_layers=2, d_model=36, d_ff=40, num_heads=6, num_kv_heads=3, head_dim=6, rope_theta=500.0, norm_eps=0.01
)
HEADS = {
  'ForCausalLM': ('lm', LanguageModel),
  'ForRewardModel': ('reward', RewardModel),
  'ForSequenceClassification': ('reward', RewardModel),
  'ForTokenClassification': ('value', ValueModel),
}
MESHES = {'one': (1, 1, 1, 1), 'fsdp8': (1, 8, 1, 1), 'fsdp2_tensor4': (1, 2, 4, 1), 'data2_fsdp4': (2, 4, 1, 1)}
BOMB = 'import pathlib\npathlib.Path(__file__).with_name("ran").touch()\nraise SystemExit("run")\n'


class Case(NamedTuple):
  architecture: str
  layout: str = 'one'  # file(s)
  dtype: Any = F32
  head_dtype: Any = None  # of the head, and `norm_dtype` of norms: `dtype` where it is None
  norm_dtype: Any = None
  mesh: str = 'one'
  family: str = 'llama'
  tied: bool = False
  head_twice: bool = False  # a tied output projection that is stored once more


CASES = {
  'internlm2_reward': Case('InternLM2ForRewardModel', 'index', BF16, head_dtype=F32, family='internlm2'),
  'internlm2_lm': Case('InternLM2ForCausalLM', 'one', F16, mesh='fsdp8', family='internlm2'),
  'internlm3_lm': Case('LlamaForCausalLM', 'index', BF16, norm_dtype=F32, mesh='data2_fsdp4', family='internlm3'),
  'llama_reward': Case('LlamaForSequenceClassification', 'legacy_bin', F32, mesh='fsdp2_tensor4'),
  'llama_value': Case('LlamaForTokenClassification', 'one', BF16, head_dtype=F32),
  'qwen2_tied': Case('Qwen2ForCausalLM', 'bin_index', BF16, family='qwen2', tied=True, head_twice=True),
  'qwen2_reward': Case('Qwen2ForSequenceClassification', 'one', F32, family='qwen2'),
}


class Folder(NamedTuple):
  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, np.ndarray]  # as stored, without duplicates
  params: dict[str, Any]  # our parameters in float32, before rounding


def config_of(case: Case) -> tuple[ModelConfig, dict[str, Any]]:
  """Return our model config, and a config.json that also has unknown keys."""
  m = dataclasses.replace(MODEL, family=case.family, tie_embeddings=case.tied, qkv_bias=case.family == 'qwen2')
  config = {
    'architectures': [case.architecture],
    'model_type': case.family,
    'vocab_size': m.vocab_size,
    'hidden_size': m.d_model,
    'intermediate_size': m.d_ff,
    'num_hidden_layers': m.num_layers,
    'num_attention_heads': m.num_heads,
    'num_key_value_heads': m.num_kv_heads,
    'max_position_embeddings': m.max_position,
    'rms_norm_eps': m.norm_eps,
    'rope_theta': m.rope_theta,
    'tie_word_embeddings': m.tie_embeddings,
    'hidden_act': 'silu',
    'torch_dtype': case.dtype.name,
    'pad_token_id': 256,
    'bos_token_id': 257,
    'eos_token_id': 258,
    '_name_or_path': 'someone/something',
    'of_another_program': {'nested': [1, None, 'é']},
  }
  if 'Classification' in case.architecture:
    config |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  if case.architecture.endswith('RewardModel'):
    config['reward_token_id'] = 260
  return m, config


def write_torch(file: pathlib.Path, tensors: dict[str, np.ndarray], legacy: bool = False) -> None:
  as_torch = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == BF16 else torch.from_numpy(a)
  torch.save({name: as_torch(a) for name, a in tensors.items()}, file, _use_new_zipfile_serialization=not legacy)


def write_weights(folder: pathlib.Path, layout: str, tensors: dict[str, np.ndarray]) -> None:
  if 'bin' in layout:
    stem, suffix, write = 'pytorch_model', 'bin', lambda file, some: write_torch(file, some, 'legacy' in layout)
  else:
    stem, suffix = 'model', 'safetensors'
    write = lambda file, some: safetensors.numpy.save_file(some, file, metadata={'format': 'pt'})
  if 'index' not in layout:
    write(folder / f'{stem}.{suffix}', tensors)
    return
  files: dict[str, dict[str, np.ndarray]] = {f'{stem}-{i + 1:05}-of-00003.{suffix}': {} for i in range(3)}
  for i, (name, array) in enumerate(tensors.items()):
    files[list(files)[i % 3]][name] = array
  for file, some in files.items():
    write(folder / file, some)
  index = {'weight_map': {name: file for file, some in files.items() for name in some}}
  (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps(index))


def context_of(checkpoint_path, output, mesh: str = 'one', log: list[str] | None = None, **settings) -> Context:
  config = Config(stage='convert', checkpoint=str(checkpoint_path), output=str(output), convert=ConvertConfig(**settings))
  sizes = MESHES[mesh]
  made = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  return Context(config, pathlib.Path('unused'), made, (lambda line: None) if log is None else log.append)


def stored_in(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Return the tensors of a folder's safetensors files, as the library reads them."""
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    found |= safetensors.numpy.load_file(file)
  return found


def certificate_of(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / 'certificate.json').read_text())


def refused(context: Context, message: str, kind: type[Exception] = UserError) -> None:
  """Check that the stage raises an error of one line and leaves no files."""
  output = pathlib.Path(context.config.output)
  before = sorted(output.parent.iterdir())
  with pytest.raises(kind, match=message) as error:
    convert.convert(context)
  assert '\n' not in str(error.value)
  assert sorted(output.parent.iterdir()) == before


def edit_config(**changes):
  def edit(source: Folder) -> None:
    (source.path / 'config.json').write_text(json.dumps(source.config | changes))

  return edit


def edit_tensors(change):
  """Return an edit that applies `change` to the tensors and writes them again."""

  def edit(source: Folder) -> None:
    tensors = {name: a.copy() for name, a in source.tensors.items()}
    change(tensors)
    (source.path / 'pytorch_model.bin').unlink(missing_ok=True)
    write_weights(source.path, 'one', tensors)

  return edit


def cut_short(source: Folder) -> None:
  edit_tensors(lambda tensors: None)(source)
  file = source.path / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def only(name: str, array: np.ndarray):
  return edit_tensors(lambda tensors: tensors.update({name: array}))


def with_value(name: str, value: float, row: int = -1):
  def change(tensors):
    tensors[name].reshape(-1)[row] = value

  return edit_tensors(change)
