"""Triplets on disk as a TensorFlow Datasets data set of ArrayRecord files, written and read without TensorFlow."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from polar_jax import types
from polar_jax.data import records
from polar_jax.data.template import join_messages
from polar_jax.runtime import json_files, paths

VERSION = '1.0.0'
CHECKSUMS = 'checksums.json'  # in the folder of a data set: size and SHA-256 of each of its files of records
_FILE_FORMAT = 'array_record'
_SHARD_BYTES = 256 << 20  # of records before they are compressed
_INCOMPLETE = 'incomplete.'  # start of the name of a folder that is being written
_LISTS = 'ranked_lists'  # in the metadata of a data set: most candidates of an example of each split that has ranked lists
_SPLIT = re.compile(r'[\w-]+')
_REMEDY = 'copy or write the data set again'
# Each record is a group of its own, which is read without its neighbors: training reads in random order, and array_record logs an error
# when it opens larger groups. Of a group that small zstd costs three times as much to write as snappy, and saves a quarter of the bytes.
_OPTIONS = 'group_size:1,snappy'

Row = types.Triplet | records.Fields


class TripletSequence(Sequence[types.Triplet]):
  """Random access to the triplets of one split.

  Attributes:
    shards: the files of the split, in order.
    max_candidates: most candidates of an example: more than two if some are ranked lists.
  """

  def __init__(self, source: Any, shards: Sequence[pathlib.Path] = (), max_candidates: int = 2):
    self._source, self.shards, self.max_candidates = source, tuple(shards), max_candidates

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
      return [_from_example(example, self.max_candidates > 2) for example in read()]
    except Exception as error:  # array_record, protobuf and TFDS each raise their own
      where = f'{self.shards[0].parent}: ' if self.shards else ''
      raise types.UserError(f'{where}{which} cannot be read ({json_files.shorten(error)}); copy or write the data set again') from error


class Written(NamedTuple):
  """What was written of a data set."""

  folder: pathlib.Path
  rows: dict[str, int]  # by split
  fingerprints: dict[str, str]  # by split: what `fingerprint` returns for its triplets
  checksums: dict[str, str]  # by file: SHA-256 of its bytes

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the whole data set: of the fingerprints of its splits, in any order."""
    return hashlib.sha256(json.dumps(self.fingerprints, sort_keys=True).encode()).hexdigest()


def write_triplets(
  folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[types.Triplet]], description: str, metadata: Mapping[str, Any]
) -> pathlib.Path:
  """Write a data set to `folder`/`name`/VERSION and return that path. See `write`."""
  return write(folder, name, splits, description, metadata).folder


def write(folder: pathlib.Path, name: str, splits: Mapping[str, Iterable[Row]], description: str, metadata: Mapping[str, Any]) -> Written:
  """Write a data set to `folder`/`name`/VERSION, with the checksums of its files.

  Splits are read once, one after another, and no more than one triplet of them is held at a time. The same triplets give the same bytes.
  The folder appears when it is complete; what an interrupted call has left is not taken for a data set, and the next call removes it.

  Args:
    folder: the TFDS data directory; nothing is written elsewhere.
    name: name of the data set, in snake_case.
    splits: triplets by split name, or what is stored of them.
    description: one paragraph for the data set's info.
    metadata: JSON values stored with the data set (pool parameters, seeds).

  Raises:
    ValueError: a triplet is not plain text, a split has no triplet or a name that TFDS cannot read, or the folder already contains the
      data set.
  """
  target = pathlib.Path(folder) / name / VERSION
  if target.exists():
    raise ValueError(f'{target} already contains a data set; remove it, or write to another folder')
  for split in splits:
    if not _SPLIT.fullmatch(split) or split == 'all':
      raise ValueError(f'split {split!r}: TFDS cannot read a split of this name; use letters, digits, _ and -, and not "all"')
  incomplete = target.with_name(f'{_INCOMPLETE}{VERSION}')
  shutil.rmtree(incomplete, ignore_errors=True)
  incomplete.mkdir(parents=True)
  try:
    template = tfds.core.ShardedFileTemplate(data_dir=incomplete, dataset_name=name, filetype_suffix=_FILE_FORMAT)
    written = {split: _write_split(template.replace(split=split), split, triplets) for split, triplets in splits.items()}
    lists = {split: count for split, part in written.items() if (count := part.fingerprint.max_candidates) > 2}
    infos = {split: part.info for split, part in written.items()}
    _write_info(template, infos, description, {**metadata, _LISTS: lists} if lists else metadata)
    files = {file: values for part in written.values() for file, values in part.files.items()}
    paths.write_atomically(incomplete / CHECKSUMS, json.dumps({'files': files}, indent=1, sort_keys=True) + '\n')
    os.rename(incomplete, target)
  except BaseException:
    shutil.rmtree(incomplete, ignore_errors=True)
    raise
  return Written(
    target,
    {split: part.fingerprint.rows for split, part in written.items()},
    {split: part.fingerprint.hexdigest() for split, part in written.items()},
    {file: values['sha256'] for file, values in sorted(files.items())},
  )


class _WrittenSplit(NamedTuple):
  info: tfds.core.SplitInfo
  fingerprint: records.Fingerprint
  files: dict[str, dict[str, Any]]  # name -> size and SHA-256


def _write_split(template: tfds.core.ShardedFileTemplate, split: str, triplets: Iterable[Row]) -> _WrittenSplit:
  """Write a split file by file. Names of TFDS hold the number of files, which is known in the end."""
  fingerprint = records.Fingerprint()
  sizes: list[int] = []
  lengths: list[int] = []
  shards: list[pathlib.Path] = []
  rest = enumerate(triplets)
  for first in rest:  # of a file
    shards.append(pathlib.Path(template.data_dir) / f'{split}.{len(shards)}')
    before = fingerprint.rows
    sizes.append(_write_shard(shards[-1], itertools.chain([first], rest), split, fingerprint))
    lengths.append(fingerprint.rows - before)
  if not shards:
    raise ValueError(f'split {split!r} has no examples, which TFDS cannot store; leave the split out')
  files = {}
  for i, shard in enumerate(shards):
    path = pathlib.Path(template.sharded_filepath(shard_index=i, num_shards=len(shards)))
    os.rename(shard, path)
    files[path.name] = {'bytes': path.stat().st_size, 'sha256': _sha256(path)}
  info = tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(sizes), filename_template=template)
  return _WrittenSplit(info, fingerprint, files)


def _write_shard(path: pathlib.Path, triplets: Iterator[tuple[int, Row]], split: str, fingerprint: records.Fingerprint) -> int:
  """Write triplets to one file until it is full or there are no more. Returns the bytes of its records."""
  size = 0
  with contextlib.closing(array_record_module.ArrayRecordWriter(str(path), _OPTIONS)) as writer:
    for i, triplet in triplets:
      try:
        fields = records.fields_of(triplet) if isinstance(triplet, types.Triplet) else triplet
      except ValueError as error:
        raise ValueError(f'{split} example {i}: {error}') from error
      record = records.record_of(fields)
      writer.write(record)
      fingerprint.add(fields)
      size += len(record)
      if size >= _SHARD_BYTES:
        break
  return size


def _write_info(
  template: tfds.core.ShardedFileTemplate, splits: Mapping[str, tfds.core.SplitInfo], description: str, metadata: Mapping[str, Any]
) -> None:
  """Write what TFDS reads to find splits and features."""
  identity = tfds.core.DatasetIdentity(
    name=template.dataset_name, version=tfds.core.Version(VERSION), data_dir=str(template.data_dir), module_name=__name__
  )
  ids = tfds.features.Tensor(shape=(None,), dtype=np.int32)
  texts = {name: tfds.features.Text() for name in (*records.TEXTS, *records.LABELS, 'metadata')}
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=description,
    features=tfds.features.FeaturesDict(texts | dict.fromkeys(records.IDS, ids)),
    metadata=tfds.core.MetadataDict(metadata),
    disable_shuffling=True,  # examples are in the given order; the pipeline shuffles them when it reads
  )
  info.set_file_format(_FILE_FORMAT)
  info.set_splits(tfds.core.SplitDict(list(splits.values())))
  info.write_to_directory(template.data_dir)


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


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

  Sizes of files are compared with those that were written; `verify` compares all their bytes.

  Raises:
    UserError: the folder contains no data set, or more than one, or a damaged one.
  """
  found = _find(folder)
  if (found / CHECKSUMS).exists():  # earlier versions did not write it
    _check_sizes(found)
  try:
    return _open(found)
  except Exception as error:
    reason = f'{type(error).__name__}: {json_files.shorten(error)}'
    raise types.UserError(f'{found}: not a readable TFDS data set ({reason}); copy or write it again') from error


def verify(folder: pathlib.Path) -> dict[str, str]:
  """Compare every byte of the one data set in `folder` (see `open_triplets`) with the checksums that were written with it.

  Returns:
    the SHA-256 of each file of records, by its name.

  Raises:
    UserError: a file is damaged, or the folder contains no data set with checksums.
  """
  found = _find(folder)
  files = _check_sizes(found)
  damaged = [name for name, (_, digest) in files.items() if _sha256(found / name) != digest]
  if damaged:
    raise types.UserError(f'{found}: the bytes of {", ".join(damaged)} are not those that were written; {_REMEDY}')
  return {name: digest for name, (_, digest) in files.items()}


def _find(folder: pathlib.Path) -> pathlib.Path:
  folder = pathlib.Path(folder)
  found = sorted(
    p.parent
    for pattern in ('', '*/', '*/*/')
    for p in folder.glob(f'{pattern}dataset_info.json')
    if not p.parent.name.startswith(_INCOMPLETE)
  )
  if len(found) != 1:
    listed = ', '.join(map(str, found)) or 'none'
    raise types.UserError(
      f'{folder} must contain one TFDS data set (a dataset_info.json), found: {listed}; name the folder of one data set'
    )
  return found[0]


def _check_sizes(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
  """Return size and SHA-256 of each file of records as they were written, after a look at the sizes that the files have now."""
  stored = json_files.read(folder / CHECKSUMS, _REMEDY).get('files')
  try:
    files = {name: (int(values['bytes']), str(values['sha256'])) for name, values in stored.items()}
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise types.UserError(f'{folder / CHECKSUMS}: damaged ({type(error).__name__}: {json_files.shorten(error)}); {_REMEDY}') from error
  present = {path.name: path.stat().st_size for path in folder.glob(f'*.{_FILE_FORMAT}-*')}
  for name in sorted(files.keys() | present.keys()):
    if name not in files:
      raise types.UserError(f'{folder}: {name} is not among the files in {CHECKSUMS}; {_REMEDY}')
    if name not in present:
      raise types.UserError(f'{folder}: {name} is missing; {_REMEDY}')
    if present[name] != files[name][0]:
      raise types.UserError(f'{folder}: {name} has {present[name]:,} bytes, and {files[name][0]:,} were written; {_REMEDY}')
  return files


def _open(folder: pathlib.Path) -> dict[str, TripletSequence]:
  builder = tfds.builder_from_directory(str(folder))
  lists = (builder.info.metadata or {}).get(_LISTS, {})
  return {
    split: TripletSequence(builder.as_data_source(split), [pathlib.Path(file) for file in info.filepaths], lists.get(split, 2))
    for split, info in builder.info.splits.items()
  }


def fingerprint(triplets: Iterable[types.Triplet]) -> str:
  """Return the SHA-256 (hex) of the triplets in order, as a reader gets them: texts, labels, ids and metadata."""
  digest = records.Fingerprint()
  for triplet in triplets:
    digest.update(triplet)
  return digest.hexdigest()


def _from_example(example: Mapping[str, Any], may_be_ranked: bool) -> types.Triplet:
  texts = {name: example[name].decode() for name in (*records.TEXTS, *records.LABELS)}
  ids = {name: np.asarray(example[name], np.int32) for name in records.IDS if len(example[name])}
  metadata = json.loads(example['metadata'])
  if not may_be_ranked or (ranked := metadata.pop(records.RANKED, None)) is None:
    return types.Triplet(**texts, metadata={**metadata, **ids})
  candidates = (texts['chosen'], *ranked['others'], texts['rejected'])
  return types.RankedList(**texts, metadata={**metadata, **ids}, candidates=candidates, ranks=tuple(ranked['ranks']))
