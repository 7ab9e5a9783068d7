"""Rows on disk: a TensorFlow Datasets builder over ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from polar_jax import types
from polar_jax.data.template import join_messages

VERSION = '1.0.0'
_TEXTS = ('prompt', 'reference', 'chosen', 'rejected')
_LABELS = ('wrapper', 'category')
_IDS = tuple(f'{name}_ids' for name in _TEXTS)  # optional in a row: empty on disk where absent


class _TripletBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """Writes rows in the order given; rows are shuffled when read, by the pipeline's own rule."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, splits: Mapping[str, Iterable[types.Triplet]], description: str, metadata: Mapping[str, Any], **kwargs: Any):
    self._splits, self._text, self._values = splits, description, metadata
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    ids = tfds.features.Tensor(shape=(None,), dtype=np.int32)
    features = {name: tfds.features.Text() for name in (*_TEXTS, *_LABELS, 'metadata')} | dict.fromkeys(_IDS, ids)
    return tfds.core.DatasetInfo(
      builder=self,
      description=self._text,
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(self._values),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    return {name: self._generate_examples(name, rows) for name, rows in self._splits.items()}

  def _generate_examples(self, split: str, rows: Iterable[types.Triplet]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, row in enumerate(rows):
      yield i, _to_example(row, f'{split} row {i}')


class TripletSequence(Sequence[types.Triplet]):
  """Random access to the rows of one split."""

  def __init__(self, source: Any):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):  # a row; slices are not needed
    if not -len(self) <= index < len(self):
      raise IndexError(f'row {index} of a split of {len(self)} rows')
    return _from_example(self._source[int(index) % len(self)])

  def __getitems__(self, indices: Sequence[int]) -> list[types.Triplet]:
    return [_from_example(example) for example in self._source.__getitems__([int(index) for index in indices])]


def write_triplets(
  folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[types.Triplet]], description: str, metadata: Mapping[str, Any]
) -> pathlib.Path:
  """Writes a data set to `folder`/`name`/VERSION and returns that path.

  Args:
    folder: the TFDS data directory; nothing is written elsewhere.
    name: of the data set, in snake_case.
    splits: rows by split name.
    description: one paragraph for the data set's info.
    metadata: JSON values kept beside the rows (pool parameters, seeds).

  Raises:
    ValueError: a row is not plain text, or the folder already holds the data set.
  """
  target = pathlib.Path(folder) / name / VERSION
  if target.exists():
    raise ValueError(f'{target} already holds a data set; remove it or write elsewhere')
  tfds.disable_progress_bar()
  builder_class = type(''.join(w.title() for w in name.split('_')), (_TripletBuilder,), {'name': name}, skip_registration=True)
  builder = builder_class(splits, description, metadata, data_dir=str(folder), file_format='array_record')
  config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
  downloads = target.parent / 'downloads'  # TFDS wants such a folder though nothing is downloaded, and announces its work on stdout
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_dir=str(downloads), download_config=config)
  shutil.rmtree(downloads, ignore_errors=True)
  return target


def write_prompts(
  folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[types.Prompt]], description: str, metadata: Mapping[str, Any]
) -> pathlib.Path:
  """As `write_triplets`, of prompts: triplets with empty candidates, which `sources.open_prompts` reads.

  Messages are stored joined, as the reward model reads them, and whole in the row's metadata, where the policy's prompt stands.

  Raises:
    As `write_triplets`.
  """
  return write_triplets(folder, name, {split: map(_triplet_of, rows) for split, rows in splits.items()}, description, metadata)


def _triplet_of(row: types.Prompt) -> types.Triplet:
  prompt, reference = join_messages(row.prompt, 'prompt'), join_messages(row.reference, 'reference')
  more: dict[str, Any] = {'answer': row.answer} if row.answer else {}
  if not isinstance(row.prompt, str):
    more['policy_prompt'] = row.prompt
  return types.Triplet(prompt, reference, '', '', category=row.category, metadata=more | dict(row.metadata))


def open_triplets(folder: pathlib.Path) -> dict[str, TripletSequence]:
  """Every split of the one data set in `folder`, which may be a TFDS data directory or the versioned folder itself.

  Raises:
    FileNotFoundError: no data set, or more than one, is there.
  """
  folder = pathlib.Path(folder)
  found = sorted(p.parent for pattern in ('', '*/', '*/*/') for p in folder.glob(f'{pattern}dataset_info.json'))
  if len(found) != 1:
    listed = ', '.join(map(str, found)) or 'none'
    raise FileNotFoundError(f'{folder} must hold one TFDS data set (a dataset_info.json), found: {listed}')
  builder = tfds.builder_from_directory(str(found[0]))
  return {split: TripletSequence(builder.as_data_source(split)) for split in builder.info.splits}


def fingerprint(rows: Iterable[types.Triplet]) -> str:
  """SHA-256 (hex) over the rows in order, of what a reader gets back: texts, labels, ids and metadata."""
  digest = hashlib.sha256()
  for i, row in enumerate(rows):
    example = _to_example(row, f'row {i}')
    for name in (*_TEXTS, *_LABELS, 'metadata'):
      value = example[name].encode()
      digest.update(len(value).to_bytes(8, 'little') + value)
    for name in _IDS:
      digest.update(len(example[name]).to_bytes(8, 'little') + example[name].tobytes())
  return digest.hexdigest()


def _to_example(row: types.Triplet, where: str) -> dict[str, Any]:
  example: dict[str, Any] = {}
  for name in (*_TEXTS, *_LABELS):
    value = getattr(row, name)
    if not isinstance(value, str):
      raise ValueError(f'{where}: field {name} must be text in a triplet data set, not {type(value).__name__}; join messages first')
    example[name] = value
  example['metadata'] = json.dumps({k: v for k, v in row.metadata.items() if k not in _IDS}, sort_keys=True)
  for name in _IDS:
    example[name] = np.asarray(row.metadata.get(name, ()), np.int32)
  return example


def _from_example(example: Mapping[str, Any]) -> types.Triplet:
  texts = {name: example[name].decode() for name in (*_TEXTS, *_LABELS)}
  ids = {name: np.asarray(example[name], np.int32) for name in _IDS if len(example[name])}
  return types.Triplet(**texts, metadata={**json.loads(example['metadata']), **ids})
