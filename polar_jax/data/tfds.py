"""Triplets on disk as a TensorFlow Datasets data set of ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from polar_jax import types
from polar_jax.data.template import join_messages
from polar_jax.runtime import json_files

VERSION = '1.0.0'
_TEXTS = ('prompt', 'reference', 'chosen', 'rejected')
_LABELS = ('wrapper', 'category')
_IDS = tuple(f'{name}_ids' for name in _TEXTS)  # optional: empty on disk where absent


class _TripletBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """A builder that writes examples in the given order; the pipeline shuffles them when it reads."""

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
    return {name: self._generate_examples(name, triplets) for name, triplets in self._splits.items()}

  def _generate_examples(self, split: str, triplets: Iterable[types.Triplet]) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, triplet in enumerate(triplets):
      yield i, _to_example(triplet, f'{split} example {i}')


class TripletSequence(Sequence[types.Triplet]):
  """Random access to the triplets of one split.

  Attributes:
    shards: the files of the split, in order.
  """

  def __init__(self, source: Any, shards: Sequence[pathlib.Path] = ()):
    self._source, self.shards = source, tuple(shards)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index):  # an index; slices are not supported
    if not -len(self) <= index < len(self):
      raise IndexError(f'example {index} of a split of {len(self)} examples')
    return self._read(lambda: [self._source[int(index) % len(self)]], f'example {index}')[0]

  def __getitems__(self, indices: Sequence[int]) -> list[types.Triplet]:
    numbers = [int(index) for index in indices]
    return self._read(lambda: self._source.__getitems__(numbers), f'one of the examples {numbers[:3]} ...')

  def _read(self, read: Callable[[], Iterable[Mapping[str, Any]]], which: str) -> list[types.Triplet]:
    """Return the triplets of the stored examples that `read` returns; `which` names them."""
    try:
      return [_from_example(example) for example in read()]
    except Exception as error:  # array_record, protobuf and TFDS each raise their own
      where = f'{self.shards[0].parent}: ' if self.shards else ''
      raise types.UserError(f'{where}{which} cannot be read ({json_files.shorten(error)}); copy or write the data set again') from error


def write_triplets(
  folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[types.Triplet]], description: str, metadata: Mapping[str, Any]
) -> pathlib.Path:
  """Write a data set to `folder`/`name`/VERSION and return that path.

  Args:
    folder: the TFDS data directory; nothing is written elsewhere.
    name: name of the data set, in snake_case.
    splits: triplets by split name.
    description: one paragraph for the data set's info.
    metadata: JSON values stored with the data set (pool parameters, seeds).

  Raises:
    ValueError: a triplet is not plain text, or the folder already contains the data set.
  """
  target = pathlib.Path(folder) / name / VERSION
  if target.exists():
    raise ValueError(f'{target} already contains a data set; remove it, or write to another folder')
  tfds.disable_progress_bar()
  builder_class = type(''.join(w.title() for w in name.split('_')), (_TripletBuilder,), {'name': name}, skip_registration=True)
  builder = builder_class(splits, description, metadata, data_dir=str(folder), file_format='array_record')
  config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
  downloads = target.parent / 'downloads'  # TFDS requires this folder although nothing is downloaded, and prints its progress to stdout
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_dir=str(downloads), download_config=config)
  shutil.rmtree(downloads, ignore_errors=True)
  return target


def write_prompts(
  folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[types.Prompt]], description: str, metadata: Mapping[str, Any]
) -> pathlib.Path:
  """Write a data set of prompts, as triplets with empty candidates, which `polar_jax.data.examples.open_prompts` reads.

  Messages are stored joined, as the reward model reads them, and in full as the `policy_prompt` in the metadata of the example.

  Args:
    folder: the TFDS data directory; nothing is written elsewhere.
    name: name of the data set, in snake_case.
    splits: prompts by split name.
    description: one paragraph for the data set's info.
    metadata: JSON values stored with the data set.

  Raises:
    ValueError: as in `write_triplets`.
  """
  return write_triplets(folder, name, {split: map(_triplet_of, prompts) for split, prompts in splits.items()}, description, metadata)


def _triplet_of(example: types.Prompt) -> types.Triplet:
  prompt, reference = join_messages(example.prompt, 'prompt'), join_messages(example.reference, 'reference')
  more: dict[str, Any] = {'answer': example.answer} if example.answer else {}
  if not isinstance(example.prompt, str):
    more['policy_prompt'] = example.prompt
  return types.Triplet(prompt, reference, '', '', category=example.category, metadata=more | dict(example.metadata))


def open_triplets(folder: pathlib.Path) -> dict[str, TripletSequence]:
  """Open every split of the one data set in `folder`, which may be a TFDS data directory or the versioned folder itself.

  Raises:
    UserError: the folder contains no data set, or more than one, or a damaged one.
  """
  folder = pathlib.Path(folder)
  found = sorted(p.parent for pattern in ('', '*/', '*/*/') for p in folder.glob(f'{pattern}dataset_info.json'))
  if len(found) != 1:
    listed = ', '.join(map(str, found)) or 'none'
    raise types.UserError(
      f'{folder} must contain one TFDS data set (a dataset_info.json), found: {listed}; name the folder of one data set'
    )
  try:
    return _open(found[0])
  except Exception as error:
    reason = f'{type(error).__name__}: {json_files.shorten(error)}'
    raise types.UserError(f'{found[0]}: not a readable TFDS data set ({reason}); copy or write it again') from error


def _open(folder: pathlib.Path) -> dict[str, TripletSequence]:
  builder = tfds.builder_from_directory(str(folder))
  return {
    split: TripletSequence(builder.as_data_source(split), [pathlib.Path(file) for file in info.filepaths])
    for split, info in builder.info.splits.items()
  }


def fingerprint(triplets: Iterable[types.Triplet]) -> str:
  """Return the SHA-256 (hex) of the triplets in order, as a reader gets them: texts, labels, ids and metadata."""
  digest = hashlib.sha256()
  for i, triplet in enumerate(triplets):
    example = _to_example(triplet, f'example {i}')
    for name in (*_TEXTS, *_LABELS, 'metadata'):
      value = example[name].encode()
      digest.update(len(value).to_bytes(8, 'little') + value)
    for name in _IDS:
      digest.update(len(example[name]).to_bytes(8, 'little') + example[name].tobytes())
  return digest.hexdigest()


def _to_example(triplet: types.Triplet, where: str) -> dict[str, Any]:
  example: dict[str, Any] = {}
  for name in (*_TEXTS, *_LABELS):
    value = getattr(triplet, name)
    if not isinstance(value, str):
      raise ValueError(f'{where}: field {name} must be text in a TFDS data set, not {type(value).__name__}; join messages first')
    example[name] = value
  example['metadata'] = json.dumps({k: v for k, v in triplet.metadata.items() if k not in _IDS}, sort_keys=True)
  for name in _IDS:
    example[name] = np.asarray(triplet.metadata.get(name, ()), np.int32)
  return example


def _from_example(example: Mapping[str, Any]) -> types.Triplet:
  texts = {name: example[name].decode() for name in (*_TEXTS, *_LABELS)}
  ids = {name: np.asarray(example[name], np.int32) for name in _IDS if len(example[name])}
  return types.Triplet(**texts, metadata={**json.loads(example['metadata']), **ids})
