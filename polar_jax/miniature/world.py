"""The synthesize stage: corpora, tokenizer, policy pool, pre-training triplets and preferences, all under workdir/data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_jax import config as config_lib
from polar_jax.data import text as text_lib
from polar_jax.data import tfds as triplet_dataset
from polar_jax.miniature import corpora as corpora_lib
from polar_jax.miniature import documents, ngram, preferences, triplets, vocabulary
from polar_jax.miniature import pool as pool_lib

if TYPE_CHECKING:
  from polar_jax.stages.context import Context

_FORMAT = 1  # raised whenever the same settings give other rows
# Options that were renamed after the format was fixed: the digest keeps their old names, so that existing data is still recognized.
_DIGEST_NAMES = {
  'train_examples': 'train_rows',
  'evaluation_examples': 'evaluation_rows',
  'preference_examples': 'preference_rows',
  'preference_evaluation_examples': 'preference_evaluation_rows',
  'min_window': 'smallest_window',
  'max_number': 'largest',
}
_DOCUMENTS = 'documents'  # the stream beside those of the corpora
_MARKER = 'synthesis.json'  # written last: its presence means that the folder is complete


@dataclasses.dataclass(frozen=True)
class SynthesisResult:
  """Where the data lies and what it is."""

  folder: str  # workdir/data; all other paths are relative to it
  tokenizer: str
  text: str
  pool: str
  triplets: str
  preferences: str
  config_fingerprint: str
  fingerprints: dict[str, str]  # '<data set>/<split>': SHA-256 of the decoded rows
  rows: dict[str, int]  # likewise: number of rows
  rows_per_minute: float  # triplets sampled, cleaned and decoded; writing is not counted
  seconds: dict[str, float]  # by phase
  reused: bool = False


def config_fingerprint(config: config_lib.SynthesizeConfig, seed: int, corpora: list[corpora_lib.Corpus]) -> str:
  """SHA-256 over all that decides the rows: settings (not the number of workers), seed, and the text of this Python."""
  settings = {_DIGEST_NAMES.get(k, k): v for k, v in dataclasses.asdict(config).items() if k != 'workers'}
  digest = hashlib.sha256(json.dumps([_FORMAT, settings, seed], sort_keys=True).encode())
  for corpus in corpora:
    for document in corpus.documents:
      digest.update(hashlib.sha256(document.encode()).digest())
  return digest.hexdigest()


def synthesize(config: config_lib.SynthesizeConfig, seed: int, workdir: pathlib.Path, log: Callable[[str], None]) -> SynthesisResult:
  """Makes the tiny world's data, or reuses a complete one of the same settings.

  Writes to workdir/data: tokenizer.json, text.npz (int32 streams `train_<corpus>` and `validation_<corpus>`, and `train_documents` and
  `validation_documents` if policies write any), pool.json, and the TFDS folders triplets/ and preferences/ with splits train, validation,
  unseen_prompts and unseen_policies.

  Raises:
    corpora.CorpusError: this Python lacks the text.
    ValueError: the settings leave too little text or too few policies.
  """
  folder = pathlib.Path(workdir) / 'data'
  seconds: dict[str, float] = {}
  clock = _Clock(seconds)
  corpora = corpora_lib.load_corpora()
  clock.lap('corpora')
  wanted = config_fingerprint(config, seed, corpora)
  previous = read_result(workdir)
  if previous is not None and previous.config_fingerprint == wanted:
    log(f'synthesize: reusing the complete data in {folder} (same settings, {sum(previous.rows.values()):,} rows)')
    return dataclasses.replace(previous, reused=True)
  if folder.exists():
    log(f'synthesize: {folder} is {"incomplete" if previous is None else "of other settings"}; rebuilding it')
    _remove(folder)
  folder.mkdir(parents=True, exist_ok=True)

  world = _build_world(config, seed, corpora, folder)
  clock.lap('pool')
  pretrain = {s: triplets.make_triplets(world, s, _rows(s, config.train_examples, config.evaluation_examples)) for s in triplets.SPLITS}
  sampling = clock.lap('triplets')
  kl = pool_lib.kl_matrix(
    world.pool, world.prefixes['train'].draw(triplets.row_uniforms(seed, 'kl', 'train', 64, 3)), seed, config.max_tokens, config.workers
  )
  clock.lap('kl')
  finetune = {
    s: preferences.make_preferences(world, kl, s, _rows(s, config.preference_examples, config.preference_evaluation_examples))
    for s in triplets.SPLITS
  }
  clock.lap('preferences')

  metadata = {'seed': seed, 'config_fingerprint': wanted, 'pool': [p.params.to_json() for p in world.pool]}
  descriptions = {
    'triplets': 'Triplets of n-gram policies: reference and chosen are two samples of one policy, rejected is one of another.',
    'preferences': 'Triplets of n-gram policies: chosen comes from a policy near to that of the reference, rejected from a far one.',
  }
  fingerprints, rows = {}, {}
  for name, splits in (('triplets', pretrain), ('preferences', finetune)):
    triplet_dataset.write_triplets(folder / name, name, splits, descriptions[name], metadata)
    for split, values in splits.items():
      fingerprints[f'{name}/{split}'] = triplet_dataset.fingerprint(values)
      rows[f'{name}/{split}'] = len(values)
  clock.lap('write')
  result = SynthesisResult(
    folder=str(folder),
    tokenizer='tokenizer.json',
    text='text.npz',
    pool='pool.json',
    triplets='triplets',
    preferences='preferences',
    config_fingerprint=wanted,
    fingerprints=fingerprints,
    rows=rows,
    rows_per_minute=60 * sum(map(len, pretrain.values())) / sampling,
    seconds=seconds,
  )
  _write_json(folder / _MARKER, dataclasses.asdict(result))
  spent = ', '.join(f'{phase} {value:.1f} s' for phase, value in seconds.items())
  log(f'synthesize: {sum(rows.values()):,} rows in {folder}, {result.rows_per_minute:,.0f} triplets/minute ({spent})')
  return result


def read_result(workdir: pathlib.Path) -> SynthesisResult | None:
  """What a finished `synthesize` left in `workdir`; None if there is none or it is not complete."""
  folder = pathlib.Path(workdir) / 'data'
  try:
    values = json.loads((folder / _MARKER).read_text())
    result = SynthesisResult(**{**values, 'folder': str(folder)})
  except (FileNotFoundError, json.JSONDecodeError, TypeError):
    return None
  parts = (result.tokenizer, result.text, result.pool, result.triplets, result.preferences)
  return result if all((folder / part).exists() for part in parts) else None


def load_pool(workdir: pathlib.Path) -> list[ngram.NgramPolicy]:
  """The policies of a finished `synthesize`, fitted again from pool.json and text.npz: the same laws to the last bit.

  Raises:
    FileNotFoundError: the workdir holds no complete synthesis.
  """
  result = read_result(workdir)
  if result is None:
    raise FileNotFoundError(f'{pathlib.Path(workdir) / "data"} holds no complete synthesis; run the stage synthesize with this workdir')
  folder = pathlib.Path(result.folder)
  pool = json.loads((folder / result.pool).read_text())
  streams = text_lib.load_streams(folder / result.text)['train']
  return pool_lib.build_pool([ngram.NgramParams.from_json(p) for p in pool['policies']], streams, pool['vocab_size'])


def run(context: Context) -> dict[str, Any]:
  """Run the synthesize stage in the miniature. Returns the section `synthesize` of the report."""
  result = dataclasses.asdict(synthesize(context.config.synthesize, context.config.seed, context.workdir, context.log))
  return {'synthesize': {name: result[name] for name in ('rows', 'rows_per_minute', 'fingerprints', 'seconds')}}


def _build_world(config: config_lib.SynthesizeConfig, seed: int, corpora: list[corpora_lib.Corpus], folder: pathlib.Path) -> triplets.World:
  """Tokenizer, streams and pool, written to `folder` as they are made."""
  tokenizer = vocabulary.train_tokenizer((d for c in corpora for d in c.part('train')), config.vocab_size)
  tokenizer.save(str(folder / 'tokenizer.json'))
  vocab = vocabulary.Vocabulary(folder / 'tokenizer.json')
  streams = {part: vocabulary.part_streams(vocab, corpora, part) for part in corpora_lib.PARTS}
  text = {f'train_{name}': s for name, s in streams['train'].items()}
  text |= {f'validation_{name}': s for name, s in streams['prompts'].items()}
  names = [c.name for c in corpora]
  params = pool_lib.draw_pool_params(seed, config.policies, config.unseen_policies, config.max_order, config.min_window, names)
  _write_json(folder / 'pool.json', {'seed': seed, 'vocab_size': vocab.size, 'policies': [p.to_json() for p in params]})
  pool = pool_lib.build_pool(params, streams['train'], vocab.size)
  sources = triplets.prefix_sources(streams['prompts'], streams['unseen'], config)
  world = triplets.World(pool, sources, vocab.pieces, config, seed)
  if config.documents:
    text |= {f'{split}_{_DOCUMENTS}': s for split, s in documents.make_streams(world).items()}
  np.savez(folder / 'text.npz', **text)  # type: ignore[arg-type]  # numpy's stub knows no ** of arrays
  return world


def _rows(split: str, train: int, evaluation: int) -> int:
  return train if split == 'train' else evaluation


def _remove(folder: pathlib.Path) -> None:
  """Removes what this module writes, the marker first so that a kill in between leaves an incomplete folder; nothing else."""
  for name in (_MARKER, 'tokenizer.json', 'text.npz', 'pool.json'):
    (folder / name).unlink(missing_ok=True)
  for name in ('triplets', 'preferences'):
    shutil.rmtree(folder / name, ignore_errors=True)


def _write_json(path: pathlib.Path, value: object) -> None:
  """Atomically, so that a reader sees all of it or nothing."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(json.dumps(value, indent=1, sort_keys=True))
  os.replace(partial, path)


class _Clock:
  """Notes the wall seconds of each phase."""

  def __init__(self, seconds: dict[str, float]):
    self._seconds, self._last = seconds, time.perf_counter()

  def lap(self, phase: str) -> float:
    """Seconds since the last lap, noted under `phase`."""
    now = time.perf_counter()
    self._seconds[phase], self._last = now - self._last, now
    return self._seconds[phase]
