"""Fills the file of samples with what a run starts from: its prompts, recorded answers, and the policies that they belong to."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import ConfigError, PoolConfig
from polar_jax.data import readers
from polar_jax.runtime import paths
from polar_jax.synthesis import local
from polar_jax.synthesis import prompts as prompts_lib
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import INSTRUCTION
from polar_jax.synthesis.store import Store
from polar_jax.types import UserError

RECORDED = 'recorded'
MEMBERS = 'members'  # setting of a recorded policy: its names in the files
_LISTED = 5  # names in a message


def settings_of(config: PoolConfig, seed: int) -> dict[str, Any]:
  """Return the settings that decide which prompts there are and who is asked for what, as JSON values.

  Raises:
    UserError: a file of prompts does not exist, or the settings contradict each other.
  """
  weights = prompt_weights(config)
  files = [] if config.prompts is None else prompts_lib.open_files(config.prompts, config.prefix_max_words, seed)
  if weights is not None and (len(weights) != len(files) or config.max_prompts is None):
    raise ConfigError(
      f'synthesize.prompt_weights has {len(weights)} numbers for {len(files)} files of prompts, and max_prompts={config.max_prompts}; '
      'name one number for each file, and set synthesize.max_prompts'
    )
  return {
    'seed': seed,
    'prompts': [[file.path.name, digest_of(file.path)] for file in files],
    **{name: getattr(config, name) for name in ('prompt_weights', 'max_prompts', 'prefix_max_words', 'validation_share', 'unseen_share')},
    **{name: getattr(config, name) for name in ('unit_prompts', 'samples_per_prompt', 'policies_per_prompt', 'near_duplicates')},
  }


def prompt_weights(config: PoolConfig) -> list[float] | None:
  """Return the option `prompt_weights` as numbers.

  Raises:
    ConfigError: it is not a list of positive numbers.
  """
  if config.prompt_weights is None:
    return None
  try:
    weights = [float(part) for part in config.prompt_weights.split(',')]
  except ValueError:
    weights = []
  if not weights or not all(0 < weight < float('inf') for weight in weights):
    raise ConfigError(f'synthesize.prompt_weights is {config.prompt_weights!r}; it must be positive numbers separated by commas')
  return weights


def add_prompts(config: PoolConfig, seed: int, store: Store, log: Callable[[str], None]) -> None:
  """Add the prompts of the files that `synthesize.prompts` names, if they are not there yet.

  Raises:
    UserError: a row cannot be used, or there is no prompt.
  """
  if config.prompts is None or store.fact('prompts_are_there'):
    return
  files = prompts_lib.open_files(config.prompts, config.prefix_max_words, seed)
  rows = prompts_lib.read_prompts(files, prompt_weights(config), config.max_prompts)
  split = prompts_lib.split_of(config.validation_share, config.unseen_share)
  with store.transaction():
    counts = store.add_prompts(rows, split)
    store.set_fact('prompts_are_there', True)
    store.set_fact('prompt_counts', {**counts, 'too_short': sum(file.skipped for file in files)})
  if not counts['added']:
    raise UserError(f'synthesize.prompts={config.prompts}: has no prompt; a document needs at least two words')
  repeated, short = counts['read'] - counts['added'], sum(file.skipped for file in files)
  log(f'synthesize: {counts["added"]:,} prompts ({repeated:,} repetitions and {short:,} documents of fewer than two words left out)')


def add_recorded(config: PoolConfig, specs: Sequence[PolicySpec], store: Store, log: Callable[[str], None]) -> list[PolicySpec]:
  """Add recorded answers, if they are not there yet, and return the pool with a policy for each that was recorded.

  An entry takes the policies of its files that its setting `policy` names or matches, or else the one of its own name, or else all that
  no other entry of the same files takes. With `merge` they are one policy, recorded under several names.

  Raises:
    UserError: a file cannot be used or has changed, or an entry takes no policy.
  """
  split = prompts_lib.split_of(config.validation_share, config.unseen_share)
  found: dict[tuple[str, ...], dict[str, int]] = {}
  for spec in specs:
    if spec.kind == RECORDED:
      files = tuple(spec.settings['path'])
      found[files] = _import(files, spec.name, store, split, log)
  named = {spec.name: _named(spec, found[tuple(spec.settings['path'])]) for spec in specs if spec.kind == RECORDED}
  out = []
  for spec in specs:
    if spec.kind != RECORDED:
      out.append(spec)
      continue
    files = tuple(spec.settings['path'])
    taken = {name for other, names in named.items() if other != spec.name for name in names or ()}
    names = named[spec.name] if named[spec.name] is not None else [name for name in found[files] if name not in taken]
    if not names:
      known = ', '.join(list(found[files])[:_LISTED])
      raise UserError(
        f'policy {spec.name!r}: {", ".join(files)} has no answer of {", ".join(spec.settings.get("policy", [spec.name]))[:80]} (it has: '
        f'{known or "no rows"}{" ..." if len(found[files]) > _LISTED else ""}); correct the setting policy'
      )
    groups = {spec.name: names} if spec.settings.get('merge') else {name: [name] for name in names}
    out += [dataclasses.replace(spec, name=name, settings={**spec.settings, MEMBERS: members}) for name, members in groups.items()]
  return out


def _named(spec: PolicySpec, names: dict[str, int]) -> list[str] | None:
  """Return the policies of its files that an entry names; None if it names none and takes what is left."""
  patterns = spec.settings.get('policy')
  if patterns is None:
    return [spec.name] if spec.name in names else None
  return [name for name in names if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _import(files: tuple[str, ...], name: str, store: Store, split: Any, log: Callable[[str], None]) -> dict[str, int]:
  """Add the answers of some files, if they are not there yet. Returns the number of answers by policy."""
  counts: dict[str, int] = {}
  for path in map(pathlib.Path, files):
    digest = digest_of(path)
    seen = store.fact(f'recorded file {path}')  # its digest
    if seen not in (None, digest):
      raise UserError(f'{path}: has changed since its answers were read into {store.path}; name another workdir, or remove that file')
    known = store.fact(f'recorded {digest}')  # also of a file that was moved
    if known is None:
      rows: Iterator[Any] = prompts_lib.read_recorded(path, name)
      with store.transaction():
        known = store.add_recorded(rows, INSTRUCTION, split)
        store.set_fact(f'recorded {digest}', known)
        store.set_fact(f'recorded file {path}', digest)
      log(f'synthesize: {path.name}: {sum(known.values()):,} answers of {len(known):,} policies')
    for policy, count in known.items():
      counts[policy] = counts.get(policy, 0) + count
  return counts


def check(specs: Sequence[PolicySpec], store: Store) -> None:
  """Check that a pool can give triplets, before anything is sampled.

  Raises:
    UserError: there are too few policies, a policy has no prompts, or no prompt has two samples of one policy.
  """
  for held_out, what in ((False, 'policies that are not held out'), (True, 'policies that are held out')):
    group = [spec for spec in specs if spec.held_out == held_out]
    if len(group) < 2 and (group or not held_out):
      raise ConfigError(f'the pool has {len(group)} {what}; a triplet needs two')
  for spec in specs:
    _check_kind(spec)
  kinds = list(store.count_prompts('kind'))
  recorded = store.sample_counts()
  for spec in specs:
    if spec.kind == RECORDED:
      if not any(recorded.get(member) for member in spec.settings[MEMBERS]):
        raise UserError(f'policy {spec.name!r} has no recorded answer to any prompt that is kept; remove it, or add prompts')
    elif not kinds:
      raise ConfigError(f'policy {spec.name!r} has no prompts: set synthesize.prompts')
    elif not any(spec.accepts(kind, kinds) for kind in kinds):
      raise ConfigError(
        f'policy {spec.name!r} has no prompts: it answers prompts of kind {spec.prompts}, and all of synthesize.prompts are of kind '
        f'{", ".join(kinds)}'
      )
  if all(spec.kind == RECORDED for spec in specs) and not store.has_pairs([spec.settings[MEMBERS] for spec in specs]):
    raise UserError(
      'no prompt of the pool has two samples of one policy, which a triplet needs; add answers of another run, or merge names of a policy'
    )


def _check_kind(spec: PolicySpec) -> None:
  """Check, without loading it, that a policy of this machine can be opened."""
  settings = spec.settings
  if spec.kind == 'ngram':
    local.check_temperature(spec)
    for file in settings['path']:
      if not pathlib.Path(file).is_file():
        raise ConfigError(f'policy {spec.name!r}: no file at {file}')
  if spec.kind == 'checkpoint':
    try:
      opened = open_pretrained(paths.path_of(settings['path']))
    except UserError as error:
      raise ConfigError(f'policy {spec.name!r}: {error}') from error
    if opened.head != 'lm':
      raise ConfigError(f'policy {spec.name!r}: {settings["path"]} has a {opened.head} head; only a language model can be a policy')
    local.check_layers(spec, opened.model.num_layers)


def digest_of(path: pathlib.Path) -> str:
  """Return SHA-256 (hex) of the bytes of a file, or of the files of a folder with their names."""
  files = sorted(file for file in path.rglob('*') if file.is_file()) if path.is_dir() else [path]
  if not path.exists():
    raise readers.DataError(f'{path}: no such file')
  digest = hashlib.sha256()
  for file in files:
    digest.update(str(file.relative_to(path)).encode() + b'\0' if path.is_dir() else b'')
    try:
      with file.open('rb') as stream:
        digest.update(hashlib.file_digest(stream, 'sha256').digest())
    except OSError as error:
      raise readers.DataError(f'{file}: cannot be read ({error.strerror})') from error
  return digest.hexdigest()
