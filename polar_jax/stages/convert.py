"""The convert stage: imports checkpoints of other formats, and exports checkpoints of this project as Hugging Face folders."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import exporter, importer, peft, run_folder, tokenizer_files
from polar_jax.checkpoints.adapted import Adapted
from polar_jax.checkpoints.certificate import Certificate, TextIds, fixed_rows_scores, fixed_texts
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import ConfigError, TemplateConfig
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.data.vocabulary import VocabularyError
from polar_jax.model.heads import HEADS
from polar_jax.runtime import malloc, paths
from polar_jax.stages.context import Context
from polar_jax.types import UserError

_GIB = 2**30


def convert(context: Context) -> dict[str, Any]:
  """Convert `config.checkpoint` into the folder `config.output`, which must not exist, and print a certificate.

  The folder is written under a temporary name and renamed once the certificate holds, so that a failure leaves no partial output.

  Returns:
    The section `convert` of the report, from the certificate.

  Raises:
    UserError: the checkpoint cannot be read, or the written one does not read back unchanged.
  """
  config = context.config
  if config.checkpoint is None or config.output is None:
    raise ConfigError('convert needs --config.checkpoint (the checkpoint to read) and --config.output (the folder to write)')
  output = pathlib.Path(config.output)
  if output.exists():
    raise ConfigError(f'output {output} exists; remove it or name another folder')
  opened = open_pretrained(config.checkpoint)
  if config.convert.adapter and not isinstance(opened, Adapted):
    raise ConfigError(f'convert.adapter is set, but {opened.path} holds no adapters; set it to False')
  context.log(f'{opened.path}: {opened.kind}, {opened.head} model of family {opened.model.family}')
  partial = output.with_name(output.name + '.partial')
  _remove(partial)  # left by a run that was killed
  try:
    write = _import if opened.source else _export_adapter if config.convert.adapter else _export
    certificate = write(context, opened, partial)
    for line in certificate.lines():
      context.log(line)
    certificate.check()
    if _is_first():
      certificate.write(partial)
      os.replace(partial, output)
  finally:
    _remove(partial)
  context.log(f'convert: wrote {output}')
  facts = {'parameters': certificate.parameters, 'max_difference': certificate.max_difference, 'exact': certificate.exact}
  return {'convert': {'source': certificate.source, 'output': str(output), 'tensors': len(certificate.tensors), **facts}}


def _is_first() -> bool:
  """Return whether this process writes the files that are written once."""
  return jax.process_index() == 0


def _wait_for_all(step: str) -> None:
  """Return once every process has reached `step`, when all can read the files of process 0."""
  multihost_utils.sync_global_devices(f'convert: {step}')


def _remove(folder: pathlib.Path) -> None:
  """Delete a folder if it exists."""
  if _is_first():
    shutil.rmtree(folder, ignore_errors=True)


def _import(context: Context, opened: Pretrained, folder: pathlib.Path) -> Certificate:
  """Convert from Hugging Face, GGUF or llama2.c to a checkpoint of this project."""
  dtype, mesh = context.config.convert.dtype, context.mesh
  assert opened.source is not None
  before: dict[str, str] = {}
  held = importer.held_dtypes(opened.source, opened.stored(), dtype)

  def note(name: str, array: np.ndarray) -> None:
    with np.errstate(over='ignore'):  # the importer rejects the overflow and names the tensor
      before[name] = importer.checksum(array.astype(held[name], copy=False))

  _tokenizer(context, opened)
  stored_dtypes = {str(info.dtype) for info in opened.source.tensors().values()}
  exact = dtype is None or stored_dtypes == {dtype}
  texts, skipped = _texts(context, opened)
  scores = [] if exact else fixed_rows_scores(opened.params(mesh), opened.model, opened.head, mesh, texts)
  params = opened.params(mesh, dtype, on_tensor=note)
  scores = scores or fixed_rows_scores(params, opened.model, opened.head, mesh, texts)
  checkpoint.save_params(folder, params, _settings(opened))
  parameters = _count(params)
  del params
  malloc.give_back()
  if _is_first():
    with contextlib.suppress(UserError):  # reported by `_tokenizer`
      tokenizer_files.copy_small_files(opened.assets, folder / run_folder.ASSETS)
  _wait_for_all('written')
  written = open_pretrained(folder)
  back = written.params(mesh)
  after = {name: importer.checksum(array) for name, array in exporter.stored_arrays(back, opened.stored()) if name in before}
  return _certificate(context, opened, written, back, parameters, exact, before, after, scores, texts, skipped)


def _export(context: Context, opened: Pretrained, folder: pathlib.Path) -> Certificate:
  """Convert from a checkpoint of this project to a Hugging Face folder."""
  dtype, mesh = context.config.convert.dtype, context.mesh
  tokenizer = _tokenizer(context, opened)
  params, stored = opened.params(mesh), opened.stored()
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
  texts, skipped = _texts(context, opened)
  scores = fixed_rows_scores(params, opened.model, opened.head, mesh, texts)
  exporter.write_folder(
    folder,
    params,
    opened.model,
    opened.head,
    architecture=opened.architecture,
    template=opened.template(context.config.template),
    tokenizer=tokenizer,
    assets=opened.assets,
    dtype=dtype,
    shard_bytes=int(context.config.convert.shard_gib * _GIB),
    log=context.log,
  )
  before = {name: importer.checksum(array) for name, array in exporter.stored_arrays(params, stored, dtype)}
  parameters = _count(params)
  del params
  malloc.give_back()
  _wait_for_all('written')
  after: dict[str, str] = {}
  written = open_pretrained(folder)
  back = written.params(mesh, on_tensor=lambda name, array: after.update({name: importer.checksum(array)}))
  exact = dtype is None or dtypes == {dtype}
  return _certificate(context, opened, written, back, parameters, exact, before, after, scores, texts, skipped)


def _export_adapter(context: Context, opened: Pretrained, folder: pathlib.Path) -> Certificate:
  """Write the adapters of a checkpoint as a folder of PEFT."""
  assert isinstance(opened, Adapted)
  dtype, mesh, base = context.config.convert.dtype, context.mesh, opened.base
  texts, skipped = _texts(context, opened)
  params = opened.params(mesh)
  scores, parameters = fixed_rows_scores(params, opened.model, opened.head, mesh, texts), _count(params)
  del params
  arrays = peft.tensors(exporter.on_host(opened.trained(mesh)), opened.model, opened.head, opened.lora, dtype)
  if _is_first():
    token = opened.template(context.config.template).reward_token_id if opened.head == 'reward' else None
    base_path = str(paths.absolute(base.path))
    peft.write(
      folder, arrays, opened.model, opened.head, opened.lora, base=base_path, base_digest=opened.base_digest, reward_token_id=token
    )
  if base.kind != 'hugging_face':
    context.log(
      f'convert: PEFT reads a base in the form of Hugging Face: convert {base.path}, and name the new folder in {peft.CONFIG} '
      '(base_model_name_or_path)'
    )
  _wait_for_all('written')
  written = open_pretrained(folder)
  assert isinstance(written, Adapted) and written.tensors is not None
  before = {name: importer.checksum(array) for name, array in arrays.items()}
  # Weights that are fused in one layer have their products summed in another order.
  exact = dtype is None and opened.model.family != 'internlm2'
  back = written.params(mesh)
  return _certificate(context, opened, written, back, parameters, exact, before, written.tensors.checksums(), scores, texts, skipped)


def _texts(context: Context, opened: Pretrained, original: Pretrained | None = None) -> tuple[TextIds, str]:
  """Return the token ids of the certificate's texts, through a checkpoint's own tokenizer and template; or none, and why.

  With `original`, the template is that of the original but for the reward token: a Hugging Face folder stores no other setting of it.
  """
  given = context.config.template
  try:
    if original is not None:
      given = dataclasses.replace(original.template(given), reward_token_id=given.reward_token_id)
    return fixed_texts(opened.tokenizer(), opened.template(given), opened.head, opened.model), ''
  except UserError as error:
    return [], str(error)


def _certificate(
  context: Context,
  opened: Pretrained,
  written: Pretrained,
  back: dict[str, Any],
  parameters: int,
  exact: bool,
  before: dict[str, str],
  after: dict[str, str],
  scores: list[float],
  texts: TextIds,
  skipped: str,
) -> Certificate:
  """Compare the written checkpoint with the original.

  Args:
    context: config and devices.
    opened: the original.
    written: the written checkpoint. Its parameters are scored with its own settings, so that an error in those is noticed too.
    back: the parameters of `written`.
    parameters: their number in the original.
    exact: whether the conversion keeps every bit.
    before: checksums of the original's tensors by name.
    after: checksums of the written tensors.
    scores: the original's scores of fixed rows, and of `texts` after them.
    texts: the token ids of the certificate's texts in the original.
    skipped: why there are none.

  Raises:
    UserError: the two differ in their number of parameters or in the names of their tensors.
  """
  if _count(back) != parameters or before.keys() != after.keys():
    raise UserError(f'{context.config.output}: holds {_count(back)} parameters, {opened.path} has {parameters}; output discarded')
  if not skipped:
    texts_after, skipped = _texts(context, written, opened)
    if skipped:
      raise UserError(f'{context.config.output}: its texts cannot be tokenized as those of {opened.path}: {skipped}; output discarded')
  else:
    texts_after = []
  scores_after = fixed_rows_scores(back, written.compute_like(opened.model), opened.head, context.mesh, texts)  # equal if all is well
  rows = len(scores) - sum(ids is not None for ids in texts)
  return Certificate(
    source=str(opened.path),
    output=str(context.config.output),
    family=opened.model.family,
    head=opened.head,
    parameters=parameters,
    dtypes=tuple(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(back)})),
    exact=exact,
    tensors={name: (before[name], after[name]) for name in before},
    scores=(scores[:rows], scores_after[:rows]),
    text_ids=(texts, texts_after),
    text_scores=(scores[rows:], scores_after[rows:]),
    texts_skipped=skipped,
  )


def _count(params: dict[str, Any]) -> int:
  """Return the number of parameters."""
  return int(np.sum([leaf.size for leaf in jax.tree.leaves(params)], dtype=np.int64))


def _settings(opened: Pretrained) -> dict[str, Any]:
  """Return the settings to store with the converted checkpoint, in the form of a run's fingerprint."""
  model = {f'model.{name}': value for name, value in dataclasses.asdict(opened.model).items()}
  reward: dict[str, Any] = {} if opened.reward_token_id is None else {'template.reward_token_id': opened.reward_token_id}
  if opened.head == 'reward' and opened.template(TemplateConfig()).chat == 'always':  # the checkpoint alone would not say so
    reward |= {'template.chat': 'always', 'template.use_reference': False}
  return {'objective': HEADS[opened.head].objective, 'converted_from': opened.kind, **model, **reward}


def _tokenizer(context: Context, opened: Pretrained) -> Tokenizer | None:
  """Return the tokenizer of the checkpoint; None, with a log line, if it has none that can be read.

  Raises:
    VocabularyError: it has ids beyond the embedding.
  """
  try:
    return opened.tokenizer()
  except VocabularyError:
    raise
  except UserError as error:
    context.log(f'no tokenizer: {error}')
    return None
