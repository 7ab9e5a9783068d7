"""The folders in which PEFT keeps adapters: adapter_config.json and adapter_model.safetensors.

PEFT has two matrices for each linear layer of transformers, lora_A (R, in) and lora_B (out, R), and whole copies of the modules that are
trained along with them (`modules_to_save`). Where a family fuses several of our weights in one linear layer, their adapters become one of
the sum of their ranks: the A side by side, the B in blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from polar_jax.checkpoints import families, importer
from polar_jax.checkpoints.families import Stored
from polar_jax.checkpoints.formats import storage
from polar_jax.checkpoints.formats.storage import CheckpointFileError
from polar_jax.config import DTYPES, PROJECTIONS, QUANTIZED, LoraConfig, ModelConfig
from polar_jax.data.special_tokens import read_json
from polar_jax.model import lora

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'
_TASKS = {'lm': 'CAUSAL_LM', 'reward': 'SEQ_CLS', 'value': 'TOKEN_CLS'}
# Keys of the file's metadata, which PEFT does not read.
_DIGEST, _REWARD_TOKEN, _BASE_DTYPE = 'base_digest', 'reward_token_id', 'base_dtype'
# Options of PEFT that change what is computed, and the values at which they do not.
_UNUSED = {
  'bias': 'none',
  'use_dora': False,
  'fan_in_fan_out': False,
  'lora_bias': False,
  'use_qalora': False,
  'trainable_token_indices': None,
}


class PeftConfig(NamedTuple):
  """The content of an adapter_config.json that matters here.

  Attributes:
    base: `base_model_name_or_path`.
    task: `task_type`.
    alpha: of modules that no entry of `alphas` matches.
    alphas: regular expression of module names -> alpha. The ranks of modules are those of their tensors.
    rank_stabilized: `use_rslora`.
    dropout: `lora_dropout`.
  """

  base: str
  task: str | None
  alpha: float
  alphas: Mapping[str, float]
  rank_stabilized: bool
  dropout: float

  def alpha_of(self, module: str) -> float:
    """Return the alpha of a module."""
    return next((float(value) for key, value in self.alphas.items() if re.fullmatch(rf'(.*\.)?({key})', module)), self.alpha)

  def scale(self, module: str, rank: int) -> float:
    """Return the factor of the product of the two matrices of a module."""
    return lora.scale(LoraConfig(rank=rank, alpha=self.alpha_of(module), rank_stabilized=self.rank_stabilized))


def read_config(folder: pathlib.Path) -> PeftConfig:
  """Return the content of `folder / CONFIG`.

  Raises:
    CheckpointFileError: it does not describe adapters that this project can compute; the message names the key.
  """
  file = folder / CONFIG
  data = read_json(file)
  if not isinstance(data, dict) or data.get('peft_type') != 'LORA':
    kind = data.get('peft_type') if isinstance(data, dict) else None
    raise CheckpointFileError(f'{file}: peft_type is {kind!r}; only LORA can be read')
  for key, value in _UNUSED.items():
    if data.get(key, value) not in (value, None):
      raise CheckpointFileError(f'{file}: {key} is {data[key]!r}, which is not supported; merge the adapter with PEFT (merge_and_unload)')
  alpha, base = data.get('lora_alpha'), data.get('base_model_name_or_path')
  if not isinstance(alpha, (int, float)) or not alpha > 0:
    raise CheckpointFileError(f'{file}: lora_alpha is {alpha!r}; it must be a positive number')
  if not isinstance(base, str) or not base:
    raise CheckpointFileError(f'{file}: base_model_name_or_path is {base!r}; set it to the folder of the base')
  patterns = data.get('alpha_pattern') or {}
  if not isinstance(patterns, dict) or not all(isinstance(v, (int, float)) and v > 0 and _is_regex(k) for k, v in patterns.items()):
    raise CheckpointFileError(f'{file}: alpha_pattern must map names of modules to positive numbers')
  dropout = data.get('lora_dropout', 0.0)
  return PeftConfig(
    base=base,
    task=data.get('task_type'),
    alpha=float(alpha),
    alphas=patterns,
    rank_stabilized=bool(data.get('use_rslora', False)),
    dropout=float(dropout) if isinstance(dropout, (int, float)) else 0.0,
  )


def _is_regex(text: str) -> bool:
  try:
    re.compile(text)
  except re.error:
    return False
  return True


class Tensors:
  """The adapters in a folder of PEFT, described by the header of its file.

  Attributes:
    head: 'reward', 'lm' or 'value'.
    lora: rank and targets: the largest rank, and all weights that have an adapter in some layer.
    base_digest: what identifies the base, if this project wrote the folder.
    reward_token_id: likewise.
  """

  def __init__(self, folder: pathlib.Path, config: PeftConfig, model: ModelConfig, base_head: str):
    """Read the header and check it against the model.

    Raises:
      CheckpointFileError: there is no such file, or a tensor does not belong to adapters of the model.
    """
    self._file, self._config, self._model = folder / WEIGHTS, config, model
    if not self._file.is_file():
      raise CheckpointFileError(f'{folder}: has no {WEIGHTS}; save the adapter with PEFT 0.6 or later')
    self._source = storage.LazyTensors(self._file, storage.safetensors_entries(self._file))
    metadata = _metadata(self._file)
    self.base_digest, token = metadata.get(_DIGEST), metadata.get(_REWARD_TOKEN, '')
    self.reward_token_id = int(token) if token.isdecimal() else None
    present = self._source.tensors()
    self._head_name = next((name for name in map(_head_tensor, [self._model] * 2, ('reward', 'value')) if name in present), None)
    heads = {task: head for head, task in _TASKS.items()}
    self.head = heads.get(config.task or '', 'reward' if self._head_name and base_head == 'lm' else base_head)
    self.lora = self._described(metadata.get(_BASE_DTYPE, ''))

  def _described(self, base_dtype: str) -> LoraConfig:
    """Return rank, scale and targets, once every tensor is checked. `base_dtype`: in which the base was trained on, if that is known."""
    present, ranks = dict(self._source.tensors()), dict[str, int]()
    targets = set[str]()
    for s in linear_layers(self._model, self.head):
      a, b = (present.pop(f'{_PREFIX}{_module(s)}.lora_{f}.weight', None) for f in 'AB')
      if a is None and b is None:
        continue
      rank = a.shape[0] if a and a.shape else 0
      if not (a and b and rank) or (a.shape, b.shape) != ((rank, s.shape[1]), (s.shape[0], rank)):
        shapes = ' and '.join('missing' if x is None else str(x.shape) for x in (a, b))
        raise CheckpointFileError(
          f'{self._file}: lora_A and lora_B of {_module(s)!r} are {shapes}; its base implies (r, {s.shape[1]}) and ({s.shape[0]}, r)'
        )
      ranks[_module(s)] = rank
      targets |= {part.path[-1] for part in s.parts}
    if self._head_name:
      info = present.pop(self._head_name)
      if info.shape not in ((1, self._model.d_model), (self._model.d_model,)):
        raise CheckpointFileError(
          f'{self._file}: tensor {self._head_name!r} has shape {info.shape}, but its base implies (1, {self._model.d_model})'
        )
    if present or not ranks:
      wrong = repr(next(iter(present))[:100]) if present else 'none of its tensors'
      known = ', '.join(sorted({_module(s).rpartition('.')[2] for s in linear_layers(self._model, self.head)}))
      raise CheckpointFileError(f'{self._file}: {wrong} does not belong to adapters of the base; its layers have: {known}')
    rank = max(ranks.values())
    alpha = self._config.alpha_of(next(module for module, own in ranks.items() if own == rank))
    in_order = tuple(target for target in PROJECTIONS if target in targets)
    return LoraConfig(
      rank=rank,
      alpha=alpha,
      rank_stabilized=self._config.rank_stabilized,
      dropout=self._config.dropout,
      targets=in_order,
      base_dtype=base_dtype if base_dtype in (*DTYPES, *QUANTIZED) else 'float32',
    )

  def params(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapters, and the scalar head if the folder has it, on the host, float32.

    Ranks below the largest are filled up with zeros; a module with a scale of its own has it in B.

    Args:
      shapes: the arrays `a` and `b` of each target.
    """
    rank, main = self.lora.rank, lora.scale(self.lora)
    assert rank is not None
    read = lambda name: self._source.read(name).astype(np.float32)
    names = self._source.tensors()
    adapters = {target: {f: np.zeros(shape.shape, np.float32) for f, shape in own.items()} for target, own in shapes.items()}
    for s in linear_layers(self._model, self.head):
      name_a, name_b = (f'{_PREFIX}{_module(s)}.lora_{f}.weight' for f in 'AB')
      if name_a not in names:
        continue
      a_RI, b_OR = read(name_a), read(name_b)
      scale = self._config.scale(_module(s), len(a_RI))
      b_OR = b_OR if scale == main else b_OR * np.float32(scale / main)
      missing = rank - len(a_RI)
      a_RI, b_OR = np.pad(a_RI, ((0, missing), (0, 0))), np.pad(b_OR, ((0, 0), (0, missing)))
      of_parts = _narrow(self._model, self.head, rank)[s.name].split(b_OR) if len(s.parts) > 1 else (b_OR.T,)
      for part, b in zip(s.parts, of_parts, strict=True):
        own = adapters[part.path[-1]]
        own['a'][part.layer], own['b'][part.layer] = a_RI.T.reshape(own['a'].shape[1:]), b.reshape(own['b'].shape[1:])
    out: dict[str, Any] = {'decoder': {'layers': {'lora': adapters}}}
    return out | ({'v_head': read(self._head_name).reshape(self._model.d_model)} if self._head_name else {})

  def checksums(self) -> dict[str, str]:
    """Return the checksum of every tensor, by name."""
    return {name: importer.checksum(self._source.read(name)) for name in self._source.tensors()}


def linear_layers(model: ModelConfig, head: str) -> list[Stored]:
  """Return the stored tensors of the family that hold weights which can have an adapter."""
  return [s for s in families.stored_tensors(model, head) if s.parts and all(part.path[-1] in PROJECTIONS for part in s.parts)]


def _module(s: Stored) -> str:
  return s.name.removesuffix('.weight')


def _head_tensor(model: ModelConfig, head: str) -> str:
  """Return the name of the scalar head in a folder of PEFT."""
  stored = families.stored_tensors(model, head)
  return _PREFIX + next(s.name for s in stored if s.parts and s.parts[0].path == ('v_head',))


@functools.lru_cache(maxsize=4)
def _narrow(model: ModelConfig, head: str, rank: int) -> dict[str, Stored]:
  """Return the stored tensors of a model whose width is the rank: they arrange B as the weights themselves are arranged."""
  return {s.name: s for s in families.stored_tensors(dataclasses.replace(model, d_model=rank), head)}


def _metadata(file: pathlib.Path) -> dict[str, str]:
  with safetensors.safe_open(file, 'numpy') as f:
    return f.metadata() or {}


def tensors(trained: Mapping[str, Any], model: ModelConfig, head: str, config: LoraConfig, dtype: str | None) -> dict[str, np.ndarray]:
  """Return the tensors of a folder of PEFT.

  Args:
    trained: adapters, and the scalar head if the model has one, on the host.
    model: its shape.
    head: 'reward', 'lm' or 'value'.
    config: of the adapters.
    dtype: of the tensors; None: float32.
  """
  adapters, out = trained['decoder']['layers']['lora'], {}
  for s in linear_layers(model, head):
    own = [part.path[-1] for part in s.parts if part.path[-1] in adapters]
    if not own:
      continue
    layer, rank = s.parts[0].layer, config.rank or 0
    total = rank * len(own)
    a_IR = np.concatenate([adapters[name]['a'][layer].reshape(-1, rank) for name in own], axis=1)
    b_RO = adapters[own[0]]['b'][layer].reshape(rank, -1)
    if len(s.parts) > 1:
      narrow, blocks = _narrow(model, head, total)[s.name], []
      for part, shape in zip(s.parts, (w.shape for w in narrow.split(np.zeros(narrow.shape, np.float32))), strict=True):
        block, name = np.zeros(shape, np.float32), part.path[-1]
        if name in own:
          low = rank * own.index(name)
          block[low : low + rank] = adapters[name]['b'][layer]
        blocks.append(block)
      b_RO = narrow.join(*blocks).T
    out[f'{_PREFIX}{_module(s)}.lora_A.weight'], out[f'{_PREFIX}{_module(s)}.lora_B.weight'] = a_IR.T, b_RO.T
  if 'v_head' in trained:
    out[_head_tensor(model, head)] = trained['v_head'][None]
  return {name: np.ascontiguousarray(x, jnp.dtype(dtype or 'float32')) for name, x in out.items()}


def write(
  folder: pathlib.Path,
  arrays: Mapping[str, np.ndarray],
  model: ModelConfig,
  head: str,
  config: LoraConfig,
  *,
  base: str,
  base_digest: str | None,
  reward_token_id: int | None,
) -> None:
  """Write a folder of PEFT.

  Args:
    folder: created; it must not contain weights.
    arrays: the result of `tensors`.
    model: its shape.
    head: 'reward', 'lm' or 'value'.
    config: of the adapters.
    base: folder of the base, which PEFT reads if it is one of Hugging Face.
    base_digest: what identifies the base; None: not known.
    reward_token_id: of a reward model, if known.
  """
  metadata = {_DIGEST: base_digest or '', _BASE_DTYPE: config.base_dtype}
  metadata |= {} if reward_token_id is None else {_REWARD_TOKEN: str(reward_token_id)}
  sizes = {name: array.nbytes for name, array in arrays.items()}
  writer = storage.SafetensorsWriter(folder, sizes, sum(sizes.values()) + 1, WEIGHTS, {k: v for k, v in metadata.items() if v})
  for name, array in arrays.items():
    writer.add(name, array)
  writer.close()
  modules, factors = list[str](), dict[str, int]()
  for s in linear_layers(model, head):
    count, name = sum(part.path[-1] in config.targets for part in s.parts), _module(s).rpartition('.')[2]
    if count and name not in modules:
      modules.append(name)
      factors |= {name: count} if count > 1 else {}
  growth = math.sqrt if config.rank_stabilized else float  # of alpha, so that the scale of a sum of ranks is that of each
  assert config.rank is not None
  data = {
    'peft_type': 'LORA',
    'task_type': None if head == 'reward' and model.family == 'internlm2' else _TASKS[head],
    'base_model_name_or_path': base,
    'r': config.rank,
    'lora_alpha': config.alpha,
    'use_rslora': config.rank_stabilized,
    'lora_dropout': config.dropout,
    'target_modules': modules,
    'rank_pattern': {name: config.rank * count for name, count in factors.items()},
    'alpha_pattern': {name: config.alpha * growth(count) for name, count in factors.items()},
    'modules_to_save': None if head == 'lm' else [_head_tensor(model, head).split('.')[-2]],
    'bias': 'none',
    'fan_in_fan_out': False,
    'init_lora_weights': True,
    'inference_mode': True,
  }
  (folder / CONFIG).write_text(json.dumps(data, indent=2) + '\n', encoding='utf-8')
