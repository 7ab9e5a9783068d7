"""Synthesis of the miniature's data: corpora, tokenizer, policy pool, pre-training triplets and preferences, all under workdir/data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from polar_jax import config as config_lib
from polar_jax.data import text as text_lib
from polar_jax.data import tfds as triplet_dataset
from polar_jax.miniature import corpora as corpora_lib
from polar_jax.miniature import documents, ngram, preferences, triplets, vocabulary
from polar_jax.miniature import pool as pool_lib
from polar_jax.runtime import json_files, paths
from polar_jax.runtime.clock import Clock
from polar_jax.types import UserError

if TYPE_CHECKING:
  from polar_jax.stages.context import Context

# Files and folders in workdir/data.
TOKENIZER, TEXT, POOL, TRIPLETS, PREFERENCES = 'tokenizer.json', text_lib.STREAMS, 'pool.json', 'triplets', 'preferences'
_MARKER = 'synthesis.json'  # written last: its presence means that the folder is complete

_FORMAT = 1  # bumped whenever the same settings give other examples
_DOCUMENTS = 'documents'  # name of the policies' stream among those of the corpora
# Names that the settings had when the fingerprint was introduced, so that complete data of earlier versions are reused.
_FIRST_NAMES = {
  new.removeprefix('synthesize.'): old.removeprefix('synthesize.')
  for old, new in config_lib.RENAMED.items()
  if new.startswith('synthesize.') and old.startswith('synthesize.')
}


@dataclasses.dataclass(frozen=True)
class SynthesisResult:
  """Result of a synthesis: the examples that it wrote, and timings."""

  config_fingerprint: str
  fingerprints: dict[str, str]  # '<data set>/<split>': SHA-256 of the decoded examples
  rows: dict[str, int]  # '<data set>/<split>': number of examples
  rows_per_minute: float  # triplets sampled, cleaned and decoded; time spent writing is not counted
  seconds: dict[str, float]  # by phase


def config_fingerprint(config: config_lib.SynthesizeConfig, seed: int, corpora: list[corpora_lib.Corpus]) -> str:
  """Return SHA-256 over everything the examples depend on: the miniature's settings but `workers`, seed, and the text of this Python."""
  unread = {'workers', *config_lib.OF_FILES, *(f.name for f in dataclasses.fields(config_lib.PoolConfig))}
  settings = {_FIRST_NAMES.get(k, k): v for k, v in dataclasses.asdict(config).items() if k not in unread}
  settings |= {} if config.negatives == 1 else {'negatives': config.negatives}  # what earlier versions did not have
  digest = hashlib.sha256(json.dumps([_FORMAT, settings, seed], sort_keys=True).encode())
  for corpus in corpora:
    for document in corpus.documents:
      digest.update(hashlib.sha256(document.encode()).digest())
  return digest.hexdigest()


def synthesize(config: config_lib.SynthesizeConfig, seed: int, workdir: pathlib.Path, log: Callable[[str], None]) -> SynthesisResult:
  """Synthesize the miniature's data, or reuse complete data made with the same settings.

  Writes to workdir/data: tokenizer.json, text.npz (int32 streams `train_<corpus>` and `validation_<corpus>`, and `train_documents` and
  `validation_documents` if policies write any), pool.json, and the TFDS folders triplets/ and preferences/ with splits train, validation,
  unseen_prompts and unseen_policies.

  Args:
    config: sizes and sampling settings.
    seed: seed of every random stream.
    workdir: its subfolder `data` is rebuilt if it is incomplete or was made with other settings.
    log: called with progress messages.

  Raises:
    corpora.CorpusError: this Python lacks the text.
    UserError: the settings leave too little text or too few policies.
  """
  folder = pathlib.Path(workdir) / 'data'
  clock = Clock()
  corpora = corpora_lib.load_corpora()
  clock.lap('corpora')
  wanted = config_fingerprint(config, seed, corpora)
  previous = read_result(workdir)
  if previous is not None and previous.config_fingerprint == wanted:
    log(f'synthesize: reusing the complete data in {folder} (same settings, {sum(previous.rows.values()):,} examples)')
    return previous
  if folder.exists():
    log(f'synthesize: {folder} is {"incomplete" if previous is None else "made with other settings"}; rebuilding it')
    _remove(folder)
  folder.mkdir(parents=True, exist_ok=True)

  world = _build_world(config, seed, corpora, folder)
  clock.lap('pool')
  pretrain = {s: triplets.make_triplets(world, s, _size(s, config.train_examples, config.evaluation_examples)) for s in triplets.SPLITS}
  sampling = clock.lap('triplets')
  kl = pool_lib.kl_matrix(
    world.pool, world.prefixes['train'].draw(triplets.example_uniforms(seed, 'kl', 'train', 64, 3)), seed, config.max_tokens, config.workers
  )
  clock.lap('kl')
  finetune = {
    s: preferences.make_preferences(world, kl, s, _size(s, config.preference_examples, config.preference_evaluation_examples))
    for s in triplets.SPLITS
  }
  clock.lap('preferences')

  metadata = {'seed': seed, 'config_fingerprint': wanted, 'pool': [p.params.to_json() for p in world.pool]}
  descriptions = {
    TRIPLETS: 'Triplets of n-gram policies: reference and chosen are two samples of one policy, rejected is one of another.',
    PREFERENCES: 'Triplets of n-gram policies: chosen comes from a policy near to that of the reference, rejected from a far one.',
  }
  fingerprints, sizes = {}, {}
  for name, splits in ((TRIPLETS, pretrain), (PREFERENCES, finetune)):
    triplet_dataset.write_triplets(folder / name, name, splits, descriptions[name], metadata)
    for split, examples in splits.items():
      fingerprints[f'{name}/{split}'] = triplet_dataset.fingerprint(examples)
      sizes[f'{name}/{split}'] = len(examples)
  clock.lap('write')
  result = SynthesisResult(
    config_fingerprint=wanted,
    fingerprints=fingerprints,
    rows=sizes,
    rows_per_minute=60 * sum(map(len, pretrain.values())) / sampling,
    seconds=clock.seconds,
  )
  _write_json(folder / _MARKER, dataclasses.asdict(result))
  spent = ', '.join(f'{phase} {value:.1f} s' for phase, value in clock.seconds.items())
  log(f'synthesize: {sum(sizes.values()):,} examples in {folder}, {result.rows_per_minute:,.0f} triplets/minute ({spent})')
  return result


def read_result(workdir: pathlib.Path) -> SynthesisResult | None:
  """Return the result of a complete synthesis in `workdir`; None if there is none or it is incomplete."""
  folder = pathlib.Path(workdir) / 'data'
  try:
    values = json_files.read(folder / _MARKER, '')
    result = SynthesisResult(**{f.name: values[f.name] for f in dataclasses.fields(SynthesisResult)})
  except (json_files.JsonError, KeyError):  # a damaged marker proves nothing
    return None
  parts = ((result.fingerprints, str), (result.rows, int), (result.seconds, (int, float)))
  if not all(isinstance(part, dict) and all(isinstance(value, kind) for value in part.values()) for part, kind in parts):
    return None
  if not isinstance(result.config_fingerprint, str) or not isinstance(result.rows_per_minute, (int, float)):
    return None
  return result if all((folder / part).exists() for part in (TOKENIZER, TEXT, POOL, TRIPLETS, PREFERENCES)) else None


def load_pool(workdir: pathlib.Path) -> list[ngram.NgramPolicy]:
  """Return the policies of a complete synthesis, fitted again from pool.json and text.npz: bit-identical distributions.

  Raises:
    UserError: the workdir has no complete synthesis, or a file of it is damaged.
  """
  folder = pathlib.Path(workdir) / 'data'
  if read_result(workdir) is None:
    raise UserError(f'{folder}: no complete data of the miniature; run its synthesize stage in this workdir')
  remedy = f'delete {folder / _MARKER} and run the synthesize stage again'
  pool = json_files.read(folder / POOL, remedy)
  streams = text_lib.load_streams(folder / TEXT)['train']
  try:
    return pool_lib.build_pool([ngram.NgramParams.from_json(p) for p in pool['policies']], streams, pool['vocab_size'])
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise UserError(f'{folder / POOL}: damaged ({type(error).__name__}: {json_files.shorten(error)}); {remedy}') from error


def run(context: Context) -> dict[str, Any]:
  """Run the synthesize stage in the miniature. Returns the section `synthesize` of the report."""
  result = dataclasses.asdict(synthesize(context.config.synthesize, context.config.seed, context.workdir, context.log))
  return {'synthesize': {name: result[name] for name in ('rows', 'rows_per_minute', 'fingerprints', 'seconds')}}


def _build_world(config: config_lib.SynthesizeConfig, seed: int, corpora: list[corpora_lib.Corpus], folder: pathlib.Path) -> triplets.World:
  """Build tokenizer, streams and pool, and write each to `folder`."""
  tokenizer = vocabulary.train_tokenizer((d for c in corpora for d in c.part('train')), config.vocab_size)
  tokenizer.save(str(folder / TOKENIZER))
  vocab = vocabulary.Vocabulary(folder / TOKENIZER)
  streams = {part: vocabulary.part_streams(vocab, corpora, part) for part in corpora_lib.PARTS}
  text = {f'train_{name}': s for name, s in streams['train'].items()}
  text |= {f'validation_{name}': s for name, s in streams['prompts'].items()}
  names = [c.name for c in corpora]
  params = pool_lib.draw_pool_params(seed, config.policies, config.unseen_policies, config.max_order, config.min_window, names)
  _write_json(folder / POOL, {'seed': seed, 'vocab_size': vocab.size, 'policies': [p.to_json() for p in params]})
  pool = pool_lib.build_pool(params, streams['train'], vocab.size)
  sources = triplets.prefix_sources(streams['prompts'], streams['unseen'], config)
  world = triplets.World(pool, sources, vocab.pieces, config, seed)
  if config.documents:
    text |= {f'{split}_{_DOCUMENTS}': s for split, s in documents.make_streams(world).items()}
  np.savez(folder / TEXT, **text)  # type: ignore[arg-type]  # numpy's stub does not know **kwargs of arrays
  return world


def _size(split: str, train: int, evaluation: int) -> int:
  return train if split == 'train' else evaluation


def _remove(folder: pathlib.Path) -> None:
  """Remove what this module writes, and nothing else; the marker first, so that an interrupted removal leaves an incomplete folder."""
  for name in (_MARKER, TOKENIZER, TEXT, POOL):
    (folder / name).unlink(missing_ok=True)
  for name in (TRIPLETS, PREFERENCES):
    shutil.rmtree(folder / name, ignore_errors=True)


def _write_json(path: pathlib.Path, value: object) -> None:
  paths.write_atomically(path, json.dumps(value, indent=1, sort_keys=True))
