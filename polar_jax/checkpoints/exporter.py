"""Export of parameters to a folder that transformers, vLLM and SGLang load."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from polar_jax.checkpoints import config_json, families, tokenizer_files
from polar_jax.checkpoints.families import Stored
from polar_jax.checkpoints.formats.storage import SafetensorsWriter
from polar_jax.config import ModelConfig, TemplateConfig
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import UserError

SHARD_BYTES = 4 * 2**30  # of a safetensors file
_REMOTE_CODE = pathlib.Path(__file__).parent / 'remote_code'


def stored_arrays(params: dict[str, Any], stored: list[Stored], dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
  """Yield (name, array) of the tensors of a Hugging Face checkpoint, one at a time.

  Args:
    params: parameters, possibly sharded.
    stored: the tensors to produce.
    dtype: dtype of the arrays; None: that of the parameters, which makes the export exact.

  Raises:
    UserError: a number is too large for `dtype`; the message names the tensor.
  """
  for s in stored:
    pieces = [_fetch(_look_up(params, part.path), part.layer) for part in s.parts]
    joined = np.asarray(s.join(*pieces))
    with np.errstate(over='ignore'):  # reported below
      array = np.ascontiguousarray(joined.astype(_dtype(params, s, dtype)))
    if dtype is not None and not np.isfinite(array).all() and np.isfinite(joined).all():
      raise UserError(f'tensor {s.name!r} reaches {np.abs(joined).max():.3g}, which {dtype} cannot hold; export in another dtype')
    yield s.name, array.reshape(s.shape)


def _look_up(params: dict[str, Any], path: tuple[str, ...]) -> Any:
  for key in path:
    params = params[key]
  return params


def _fetch(array: Any, layer: int | None) -> np.ndarray:
  """Return one layer of a parameter on the host. With several processes, all of them must call this."""
  piece = array if layer is None else array[layer]
  if isinstance(piece, jax.Array) and not piece.is_fully_addressable:
    return multihost_utils.process_allgather(piece, tiled=True)
  return np.asarray(piece)


def on_host(params: dict[str, Any]) -> dict[str, Any]:
  """Return parameters as numpy arrays. With several processes, all of them must call this."""
  return jax.tree.map(lambda array: _fetch(array, None), params)


def _dtype(params: dict[str, Any], s: Stored, dtype: str | None) -> np.dtype:
  """Return the dtype of a stored tensor. A constant of the architecture, which has no parameter, takes that of its head."""
  parameter = _look_up(params, s.parts[0].path if s.parts else ('v_head',))
  return np.dtype(jnp.dtype(dtype or parameter.dtype))


def write_folder(
  folder: pathlib.Path,
  params: dict[str, Any],
  model: ModelConfig,
  head: str,
  *,
  architecture: str | None = None,
  template: TemplateConfig = TemplateConfig(),
  tokenizer: Tokenizer | None = None,
  assets: pathlib.Path | None = None,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  log: Callable[[str], None] = print,
) -> None:
  """Write a model as a Hugging Face folder: weights, config.json, tokenizer.

  Args:
    folder: created if it does not exist.
    params: the model's parameters.
    model: its shape.
    head: 'reward', 'lm' or 'value'.
    architecture: name of the transformers class; None: the family's usual one.
    template: its reward token is stored by id in config.json.
    tokenizer: written in the form that transformers reads; None: not written.
    assets: folder of small files that came with an imported model, copied unchanged.
    dtype: dtype of the tensors; None: that of the parameters, which makes the export exact.
    shard_bytes: size limit of a safetensors file.
    log: called with a message if the tokenizer cannot be written.
  """
  stored = families.stored_tensors(model, head, architecture)
  write_weights(params, stored, folder, dtype, shard_bytes)
  if jax.process_index() == 0:
    main_dtype = str(params['decoder']['layers']['wq'].dtype)
    _write_small_files(folder, model, head, template, tokenizer, assets, dtype or main_dtype, log)


def _write_small_files(
  folder: pathlib.Path,
  model: ModelConfig,
  head: str,
  template: TemplateConfig,
  tokenizer: Tokenizer | None,
  assets: pathlib.Path | None,
  dtype: str,
  log: Callable[[str], None],
) -> None:
  """Write tokenizer files and config.json."""
  special_ids: dict[str, int | None] = {}
  reward_token_id = template.reward_token_id
  if assets is not None and assets.is_dir():
    tokenizer_files.copy_small_files(assets, folder)
  if tokenizer is not None:
    try:
      special_ids = {f'{name}_token_id': getattr(tokenizer, f'{name}_id') for name in ('bos', 'eos', 'pad')}
      if special_ids['pad_token_id'] is None:  # transformers scores no batch without one; any id will do
        special_ids['pad_token_id'] = tokenizer.eos_id
      if reward_token_id is None and template.chat != 'always':
        reward_token_id = tokenizer.special_id(template.reward_token)
      added = {} if template.separator_id is None else {template.separator: template.separator_id}
      tokenizer_files.write_for_transformers(tokenizer, folder, model.family, added)
    except UserError as error:
      log(f'the tokenizer is not written for transformers: {error}')
  if head != 'reward':
    reward_token_id = None
  write_config(folder, model, head, dtype=dtype, reward_token_id=reward_token_id, special_ids=special_ids)


def write_weights(params: dict[str, Any], stored: list[Stored], folder: pathlib.Path, dtype: str | None, max_bytes: int) -> None:
  """Write safetensors files, with an index if there are several.

  Args:
    params: parameters, possibly sharded.
    stored: the tensors to write.
    folder: where process 0 writes; it must not contain weights.
    dtype: see `stored_arrays`.
    max_bytes: size limit of a file.
  """
  sizes = {s.name: math.prod(s.shape) * _dtype(params, s, dtype).itemsize for s in stored}
  writer = SafetensorsWriter(folder, sizes, max_bytes) if jax.process_index() == 0 else None
  for name, array in stored_arrays(params, stored, dtype):
    if writer is not None:
      writer.add(name, array)
  if writer is not None:
    writer.close()


def write_config(
  folder: pathlib.Path,
  model: ModelConfig,
  head: str,
  *,
  dtype: str,
  reward_token_id: int | None,
  special_ids: Mapping[str, int | None],
) -> None:
  """Write config.json, and for InternLM2, which transformers does not include, the code of the model.

  A config.json that came with the weights is kept, with all keys unknown to us, as long as it still describes the model; only
  `problem_type` is set, so that servers return the scores as they are. Code that came with the weights is kept as well.

  Args:
    folder: the folder of the checkpoint.
    model: shape of the model.
    head: 'reward', 'lm' or 'value'.
    dtype: dtype of the stored tensors.
    reward_token_id: id of the reward token, if known.
    special_ids: 'pad_token_id', 'bos_token_id' and 'eos_token_id'.
  """
  config = _kept_config(folder / 'config.json', model, head)
  if config is None:
    config = config_json.to_json(model, head, dtype=dtype, special_ids=special_ids)
  config.pop('dtype', None)  # transformers 5's name of torch_dtype, unknown to older readers
  config['torch_dtype'] = dtype
  config |= config_json.problem_type(head)
  if reward_token_id is not None:
    config['reward_token_id'] = reward_token_id
  if not _has_code(folder, config):
    config.pop('auto_map', None)
    if model.family == 'internlm2':
      config['auto_map'] = config_json.to_json(model, head, dtype=dtype)['auto_map']
      for file in sorted(_REMOTE_CODE.glob('*.py')):
        shutil.copyfile(file, folder / file.name)
  (folder / 'config.json').write_text(json.dumps(config, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def _kept_config(file: pathlib.Path, model: ModelConfig, head: str) -> dict[str, Any] | None:
  """Return the existing config.json if it describes the model, else None."""
  if not file.is_file():
    return None
  config = json.loads(file.read_text('utf-8'))
  existing = config_json.from_json(config, str(file))
  shape = config_json.from_json(config_json.to_json(model, head, dtype='float32'), 'the model')
  return config if (existing.model, existing.head) == (shape.model, shape.head) else None


def _has_code(folder: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Return whether the model code that a config.json names is in the folder."""
  named = {reference.split('.')[0] for key, reference in (config.get('auto_map') or {}).items() if key in ('AutoConfig', 'AutoModel')}
  return bool(named) and all((folder / f'{module}.py').is_file() for module in named)
